#: what Interrupts are not remapped: binding works, and the first use of the device is refused.
#: set fast
#: kernel 6.1 6.12
#: parts gpu nvme
#: iommu no-remapping
#: modules fakeid
. /lab/lib.sh
insmod /lab/fakeid.ko map=1af4:1042=10de:2330:030200
load vfio-pci vfio_iommu_type1 nvme
doctor_looks --for passthrough
same "the IOMMU is in force" ok "$(verdict iommu.kernel)"
same "interrupts are not remapped" fail "$(verdict iommu.interrupt-remapping)"
nvme=$(nvme)
hand_to_vfio $nvme
same "the kernel binds all the same" vfio-pci "$(driver_of $nvme)"
same "says that the group is viable" viable "$(lab_vfio status $(group_of $nvme))"
same "and refuses where the device is used" "set iommu: EPERM" "$(lab_vfio open $(group_of $nvme) $nvme)"

# ---- in our words
lab_passthrough reclaim $nvme >/dev/null
exits "our proof fails where a guest's start would" 2 lab_passthrough give $nvme
says "with the cause" 'EPERM: .*interrupt' "$out"
says "and a mend" '^hint: .+' "$out"
