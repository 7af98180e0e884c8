#: what An IOMMU in force: the doctor's verdicts and groups are the kernel's.
#: kernel 6.1 6.12
#: parts gpu nvme bridge numa
#: modules fakeid
. /lab/lib.sh
# The 3D controller and its audio function are shown as an H100's.
insmod /lab/fakeid.ko map=1af4:1042=10de:2330:030200,8086:2668=10de:22ba:040300
load vfio-pci nvme
gpu=$(find_device 10de:2330)
doctor_looks --for passthrough
same "firmware offers an IOMMU: the kernel shows its table" "$(test -e /sys/firmware/acpi/tables/DMAR && echo ok)" "$(verdict iommu.firmware)"
same "it is in force: the kernel has registered one" "$(test -n "$(ls /sys/class/iommu)" && echo ok)" "$(verdict iommu.kernel)"
same "interrupts are remapped: the kernel counts them so" "$(grep -q 'IR-' /proc/interrupts && echo ok)" "$(verdict iommu.interrupt-remapping)"
same "the GPU is in a group" "$(test "$(group_of $gpu)" != none && echo ok)" "$(verdict iommu.gpu-groups)"
same "with its own functions only" "$gpu ${gpu%.0}.1 ${gpu%.0}.2" "$(members_of $gpu)"
same "so that is well" ok "$(verdict iommu.isolation)"
same "its windows have addresses" ok "$(verdict pci.bar-assigned)"
same "no group without an IOMMU" ok "$(verdict iommu.noiommu)"
says "and the type of the group is read where the kernel keeps it" "DMA" "$(words iommu.host-dma)$(cat /sys/kernel/iommu_groups/$(group_of $gpu)/type)"
# Behind a conventional bridge strangers share a group; then the kernel's word and ours have to be the same as well.
same "strangers behind a conventional bridge share a group" 3 "$(members_of "$(edu)" | wc -w)"
says "inventory names the GPU by its address" "$gpu" "$(bulkhead inventory)"
