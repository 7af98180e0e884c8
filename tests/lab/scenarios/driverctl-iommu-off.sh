#: what Side by side with driverctl where the kernel leaves the IOMMU off: who is left with a device that has no driver.
#: parts nvme
#: append intel_iommu=off
. /lab/lib.sh
load vfio-pci vfio_iommu_type1 nvme
nvme=$(nvme)
until_true 5 test -e $pci/$nvme/driver
printf 'apiVersion: bulkhead/v1\nkind: Node\ndevices:\n  - {pci: "%s", mode: passthrough}\n' $nvme >/tmp/node.yaml
exits "driverctl fails" 1 driverctl --nosave set-override $nvme vfio-pci
says "without the reason" 'failed to bind device' "$out"
same "and leaves the device to nobody" "none vfio-pci" "$(driver_of $nvme) $(override_of $nvme)"
driverctl --nosave unset-override $nvme
until_true 5 test -e $pci/$nvme/driver
exits "bulkhead refuses" 1 bulkhead apply -f /tmp/node.yaml --yes
says "with the reason, and what to change" 'intel_iommu=off' "$out"
same "and leaves the device to the host" "nvme (null)" "$(driver_of $nvme) $(override_of $nvme)"
