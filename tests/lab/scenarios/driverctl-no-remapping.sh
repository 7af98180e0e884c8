#: what Side by side with driverctl where interrupts are not remapped: who says that the device cannot be used.
#: parts nvme
#: iommu no-remapping
. /lab/lib.sh
load vfio-pci vfio_iommu_type1 nvme
nvme=$(nvme)
until_true 5 test -e $pci/$nvme/driver
printf 'apiVersion: bulkhead/v1\nkind: Node\ndevices:\n  - {pci: "%s", mode: passthrough}\n' $nvme >/tmp/node.yaml
exits "driverctl is content" 0 driverctl --nosave set-override $nvme vfio-pci
same "with a device that no guest can start with" "set iommu: EPERM" "$(lab_vfio open $(group_of $nvme) $nvme)"
driverctl --nosave unset-override $nvme
until_true 5 test -e $pci/$nvme/driver
exits "bulkhead tries it, and fails" 2 bulkhead apply -f /tmp/node.yaml --yes
says "with the reason" 'EPERM: interrupts are not remapped' "$out"
same "and gives it back to the host" "nvme (null)" "$(driver_of $nvme) $(override_of $nvme)"
