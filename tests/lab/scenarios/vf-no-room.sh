#: what 127 virtual functions find no room behind their bridge.
#: parts nvme-large
#: append intel_iommu=on pci=realloc=off
. /lab/lib.sh
load nvme
pf=$(nvme)
until_true 5 test -e $pci/$pf/driver
same "the kernel has no address space for one" ENOMEM "$(lab_write $pci/$pf/sriov_numvfs 4)"
same "and makes none" 0 "$(cat $pci/$pf/sriov_numvfs)"

# ---- in our words
exits "ours fail" 2 lab_passthrough vfs $pf 4
says "with the cause" 'ENOMEM: .+' "$out"
says "and a mend" '^hint: .+' "$out"
same "the device stays with its driver" nvme "$(driver_of $pf)"
