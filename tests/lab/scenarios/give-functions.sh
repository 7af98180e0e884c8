#: what Virtual functions for two guests, through our own hands: made, bound, proved, held, taken back.
#: kernel 6.1 6.12
#: parts nvme
. /lab/lib.sh
load nvme
pf=$(nvme)
until_true 5 test -e $pci/$pf/driver
exits "two virtual functions are made and given away" 0 lab_passthrough vfs $pf 2
first=$(basename "$(readlink $pci/$pf/virtfn0)") second=$(basename "$(readlink $pci/$pf/virtfn1)")
same "both are proved" 2 "$(echo "$out" | grep -c proved)"
same "the kernel has them with vfio-pci, and the physical function with the host" "vfio-pci vfio-pci nvme" \
  "$(driver_of $first) $(driver_of $second) $(driver_of $pf)"
exits "once more" 0 lab_passthrough vfs $pf 2
same "changes nothing" 0 "$(echo "$out" | grep 'deed:' | grep -vc proved)"
exits "more than the device has are refused" 1 lab_passthrough vfs $pf 9
says "with how many it has" '4 virtual functions at most, 9 are wanted' "$out"
exits "the physical function is not given away from under them" 1 lab_passthrough give $pf
says "in its own words" 'has 2 virtual functions, which would lose their device' "$out"

# ---- a guest holds one
lab_vfio hold $(group_of $first) $first 30 >/tmp/held &
holder=$!
until_true 5 grep -q open /tmp/held
lab_time /tmp/took lab_passthrough reclaim $first >/tmp/said
says "taking it back is an error, not a wait" 'unbind: a virtual machine has /dev/vfio/[0-9]+ open' "$(cat /tmp/said)"
says "with the command that names the holder" 'hint: .*fuser' "$(cat /tmp/said)"
same "at once" yes "$(awk '{ print $1 < 5000000 ? "yes" : $1 }' /tmp/took)"
same "nothing was written" "vfio-pci vfio-pci" "$(driver_of $first) $(override_of $first)"
says "its proof is content with the guest that has it" 'a virtual machine has it open' "$(lab_passthrough prove $first)"
kill -9 $holder
wait
exits "when the guest is gone all of them are taken back" 0 lab_passthrough keep $pf 0
same "none is left" 0 "$(cat $pci/$pf/sriov_numvfs)"
exits "and the whole device can go" 0 lab_passthrough give $pf
exits "and come back" 0 lab_passthrough reclaim $pf
until_true 5 test -e $pci/$pf/driver
same "to its driver" nvme "$(driver_of $pf)"
