#: what The firmware offers an IOMMU and the kernel leaves it off.
#: set fast
#: kernel 6.1 6.12
#: parts gpu nvme
#: append intel_iommu=off
#: modules fakeid
. /lab/lib.sh
insmod /lab/fakeid.ko map=1af4:1042=10de:2330:030200
load vfio-pci nvme vfio_iommu_type1
gpu=$(find_device 10de:2330)
doctor_looks --for passthrough
same "the kernel has no group" 0 "$(ls /sys/kernel/iommu_groups | wc -l)"
same "firmware: ok" ok "$(verdict iommu.firmware)"
same "kernel: not" fail "$(verdict iommu.kernel)"
says "because the command line says so" 'intel_iommu=off' "$(words iommu.kernel)"
says "with the argument to change" 'intel_iommu' "$(jq -r '.findings[] | select(.verdict == "fail") | .mends // .mend | tostring' /tmp/doctor.json)"
hand_to_vfio $gpu
same "the kernel itself refuses to bind it" none "$(driver_of $gpu)"
same "and says why where it is asked by name" EINVAL "$(lab_write /sys/bus/pci/drivers/vfio-pci/bind $gpu)"

# ---- in our words
nvme=$(nvme)
exits "giving a device away is refused before anything is written" 1 lab_passthrough give $nvme
says "because it is in no group" 'IOMMU' "$out"
same "the device stays with its driver" nvme "$(driver_of $nvme)"
