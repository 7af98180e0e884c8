#: what The life of virtual functions: made, bound, held, given back, removed.
#: set fast
#: kernel 6.1 6.12
#: parts nvme
. /lab/lib.sh
load vfio-pci vfio_iommu_type1 nvme
pf=$(nvme)
until_true 5 test -e $pci/$pf/driver
functions() { for v in $pci/$pf/virtfn*; do [ -e $v ] && basename "$(readlink $v)"; done; }

# ---- how many
same "no number" EINVAL "$(lab_write $pci/$pf/sriov_numvfs abc)"
same "more than there are" ERANGE "$(lab_write $pci/$pf/sriov_numvfs 5)"
put 0 $pci/$pf/sriov_drivers_autoprobe
same "four" ok "$(lab_write $pci/$pf/sriov_numvfs 4)"
same "are there" 4 "$(functions | wc -l)"
same "another number is refused while there are some" EBUSY "$(lab_write $pci/$pf/sriov_numvfs 2)"
same "the same number is not" ok "$(lab_write $pci/$pf/sriov_numvfs 4)"
same "each has a group of its own" 4 "$(for f in $(functions); do group_of $f; done | sort -u | wc -l)"
same "and no driver" "none" "$(for f in $(functions); do driver_of $f; done | sort -u)"

# ---- two guests' worth of them
set -- $(functions)
for f in "$1" "$2"; do hand_to_vfio $f; done
says "the first opens" '^open msix=' "$(lab_vfio open $(group_of $1) $1)"
says "the second opens" '^open msix=' "$(lab_vfio open $(group_of $2) $2)"
same "the nodes are root's alone" "600 600" "$(stat -c %a /dev/vfio/$(group_of $1) /dev/vfio/$(group_of $2) | xargs)"

# ---- a guest that holds one
lab_vfio hold $(group_of $1) $1 3 >/tmp/held &
until_true 5 grep -q open /tmp/held
taken=$(lab_write -t $pci/$1/driver/unbind $1)
wait
says "unbinding waits until the guest lets go" '^ok ([1-9][0-9]{3})$' "$taken"
hand_to_vfio $1
lab_vfio hold $(group_of $1) $1 3 >/tmp/held &
until_true 5 grep -q open /tmp/held
says "and so does taking all functions away" '^ok ([1-9][0-9]{3})$' "$(lab_write -t $pci/$pf/sriov_numvfs 0)"
wait
same "none is left" 0 "$(functions | wc -l)"

# ---- the physical function given away
hand_to_vfio $pf
same "a physical function under vfio-pci makes none" ENOENT "$(lab_write $pci/$pf/sriov_numvfs 2)"
