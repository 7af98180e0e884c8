#: what In a virtual machine firmware is a question for the host above, and the doctor says so.
#: parts gpu nvme
#: iommu none
#: metal no
#: modules fakeid
. /lab/lib.sh
insmod /lab/fakeid.ko map=1af4:1042=10de:2330:030200
load vfio-pci nvme
doctor_looks --for passthrough
same "there is none" 0 "$(ls /sys/class/iommu | wc -l)"
same "firmware: not known here" unknown "$(verdict iommu.firmware)"
says "and who knows" "ask the host that runs it" "$(words iommu.firmware)"
same "kernel: not taken for on" no "$(test "$(verdict iommu.kernel)" = ok && echo yes || echo no)"
