#: what Functions of one slot in groups of their own: one is given away, the others are named, and a reset of the slot takes nobody along.
#: kernel 6.1 6.12
#: qemu 10
#: parts igb-two gpu
#: limit 240
. /lab/lib.sh
load igb snd-hda-intel xhci-pci
first=$(igb) second=${first%.0}.1 gpu=$(find_device 1af4:1042)
[ -n "$gpu" ] || gpu=$(gpu)
until_true 10 test -e $pci/$first/driver
until_true 10 test -e $pci/$second/driver
until_true 10 test -e $pci/${gpu%.0}.2/driver
same "two ports, one slot" "$first $second" "$(find_devices 8086:10c9 | xargs)"
[ "$(group_of $first)" != "$(group_of $second)" ] && ok "two groups" || not_ok "two groups" "$(group_of $first)"
node() { printf 'apiVersion: bulkhead/v1\nkind: Node\ndevices:\n'; printf '  - {pci: "%s", mode: passthrough}\n' "$@"; }
flat() { echo "$out" | tr '\n' ' ' | tr -s ' '; }

# ---- with a reset of its own
node $first >/tmp/one.yaml
exits "the plan is made" 0 bulkhead apply -f /tmp/one.yaml --dry-run
says "and names the port that is left behind, with its driver" "$second \(network card, driver igb\) of its slot is in another IOMMU group" "$(flat)"
exits "the first port is given away" 0 bulkhead apply -f /tmp/one.yaml --yes
same "and the second is the host's" "vfio-pci igb" "$(driver_of $first) $(driver_of $second)"
says "it resets itself" '; reset$' "$(lab_passthrough prove $first)"
exits "back" 0 bulkhead reclaim $first --yes

# ---- without one
lab_write $pci/$first/reset_method '\n' >/dev/null
lab_write $pci/$second/reset_method '\n' >/dev/null
was=$(stat -c %i $pci/$second/net/*/address)
exits "given away without a way to be reset" 0 bulkhead apply -f /tmp/one.yaml --yes
says "the proof says so, and whom a reset of the slot would have taken along" "note: not reset: it has no reset of its own; a reset of its slot would take $second .igb. along" "$(flat)"
same "so the host's port was not reset" "$was" "$(stat -c %i $pci/$second/net/*/address)"
node $first $second >/tmp/both.yaml
exits "both are given away" 0 bulkhead apply -f /tmp/both.yaml --yes
says "the slot is reset when nobody has one open" 'nobody has any of its functions open' "$(lab_passthrough prove $first)"
same "and none is named as left behind" "" "$(bulkhead apply -f /tmp/both.yaml --dry-run | grep 'left behind')"
exits "back" 0 bulkhead reclaim $first $second --yes
same "each with its driver" "igb igb" "$(driver_of $first) $(driver_of $second)"

# ---- functions of one group
for f in $gpu ${gpu%.0}.1 ${gpu%.0}.2; do lab_write $pci/$f/reset_method '\n' >/dev/null; done
node $gpu >/tmp/gpu.yaml
exits "a GPU without a reset of its own is given away with its audio and USB functions" 0 bulkhead apply -f /tmp/gpu.yaml --yes
says "and was reset with its slot" '; reset with its slot$' "$(lab_passthrough prove $gpu)"
same "of which there is nothing to note" "" "$(printf '%s\n' "$out" | grep note:)"
