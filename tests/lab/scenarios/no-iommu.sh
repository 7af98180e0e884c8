#: what Groups without an IOMMU look like groups and isolate nothing: never given away.
#: kernel own
#: iommu none
#: parts nvme
. /lab/lib.sh
pf=$(nvme)
until_true 5 test -e $pci/$pf/driver
echo 1 >/sys/module/vfio/parameters/enable_unsafe_noiommu_mode
hand_to_vfio $pf
same "the kernel binds and makes a group" "vfio-pci vfio-noiommu" "$(driver_of $pf) $(cat /sys/kernel/iommu_groups/*/name)"
exits "it is refused" 1 lab_passthrough give $pf
says "because it was made without an IOMMU" 'made without an IOMMU' "$out"
doctor_looks --for passthrough
same "the doctor does not take it for an IOMMU" fail "$(verdict iommu.noiommu)"
node=$(ls /dev/vfio | grep noiommu)
chmod 666 /dev/vfio/$node
same "a user without CAP_SYS_RAWIO may not even open it: EPERM" "EPERM" "$(lab_answers -u 1000 group $node $pf | sed -n 's/^open the group: //p')"
