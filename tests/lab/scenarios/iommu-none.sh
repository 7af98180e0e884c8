#: what No IOMMU at all; the kernel prints "IOMMU enabled" all the same, for the argument alone.
#: kernel 6.1 6.12
#: parts gpu nvme
#: iommu none
#: append intel_iommu=on
#: modules fakeid
. /lab/lib.sh
insmod /lab/fakeid.ko map=1af4:1042=10de:2330:030200
load vfio-pci nvme
doctor_looks --for passthrough
says "the kernel's log says it is enabled" 'DMAR: IOMMU enabled' "$(dmesg)"
same "there is none" 0 "$(ls /sys/class/iommu | wc -l)"
same "firmware offers none" fail "$(verdict iommu.firmware)"
same "kernel: not taken for on" no "$(test "$(verdict iommu.kernel)" = ok && echo yes || echo no)"
