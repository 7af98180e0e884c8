#: what bulkhead gives a GPU with its companions and two virtual functions away, proves it, and takes them back.
#: set fast
#: kernel 6.1 6.12
#: parts gpu nvme bridge
. /lab/lib.sh
load snd-hda-intel xhci-pci nvme e1000
gpu=$(gpu) pf=$(nvme)
until_true 5 test -e $pci/${gpu%.0}.2/driver
until_true 5 test -e $pci/$pf/driver
before="$(driver_of $gpu) $(driver_of ${gpu%.0}.1) $(driver_of ${gpu%.0}.2)"
say "before: $before"
node() { printf 'apiVersion: bulkhead/v1\nkind: Node\ndevices:\n'; printf '  - %s\n' "$@"; }

# ---- what stands in the way
node "{pci: \"$(edu)\", mode: passthrough}" >/tmp/stranger.yaml
exits "a device whose group has a stranger is refused" 1 bulkhead apply -f /tmp/stranger.yaml --dry-run
says "by the stranger's name" "shares IOMMU group [0-9]+ with $(find_device 8086:100e)" "$(echo "$out" | tr '\n' ' ' | tr -s ' ')"

# ---- the whole group
node "{pci: \"$gpu\", mode: passthrough}" "{pci: \"$pf\", mode: passthrough, sriov: {vfs: 2}}" >/tmp/node.yaml

say "$out"
exits "apply exits 0" 0 bulkhead apply -f /tmp/node.yaml --yes
say "$out"
same "three functions are with vfio-pci" "vfio-pci vfio-pci vfio-pci" "$(driver_of $gpu) $(driver_of ${gpu%.0}.1) $(driver_of ${gpu%.0}.2)"
same "the kernel calls the group viable" viable "$(lab_vfio status $(group_of $gpu))"
says "and it opens" '^open msix=[1-9]' "$(lab_vfio open $(group_of $gpu) $gpu)"
same "two virtual functions" 2 "$(cat $pci/$pf/sriov_numvfs)"
vf0=$(basename "$(readlink $pci/$pf/virtfn0)") vf1=$(basename "$(readlink $pci/$pf/virtfn1)")
same "with vfio-pci, and the physical function still the host's" "vfio-pci vfio-pci nvme" "$(driver_of $vf0) $(driver_of $vf1) $(driver_of $pf)"
says "the first opens" '^open msix=' "$(lab_vfio open $(group_of $vf0) $vf0)"
exits "a second apply exits 0" 0 bulkhead apply -f /tmp/node.yaml --yes
says "and has nothing to do" 'nothing to do|Nothing to do' "$out"

# ---- while a guest has it
lab_vfio hold $(group_of $gpu) $gpu 60 >/tmp/held &
holder=$!
until_true 5 grep -q open /tmp/held
exits "what a guest has open is not taken back" 1 bulkhead reclaim $gpu --yes
says "and the guest is named" "pid $holder .lab_vfio" "$out"
exits "with --evict it is" 0 bulkhead reclaim $gpu --yes --evict
same "each has the driver it had" "$before" "$(driver_of $gpu) $(driver_of ${gpu%.0}.1) $(driver_of ${gpu%.0}.2)"
same "and nothing holds it to another" "(null)" "$(override_of $gpu)"
exits "the virtual functions go back" 0 bulkhead reclaim $pf --yes
same "there are none" 0 "$(cat $pci/$pf/sriov_numvfs)"
same "no udev rule is left" gone "$(test -e /etc/udev/rules.d/10-bulkhead-vfio.rules || echo gone)"
exits "a second time there is nothing to do" 0 bulkhead reclaim $gpu $pf --yes

# ---- and rollback
exits "given away once more" 0 bulkhead apply -f /tmp/node.yaml --yes
exits "rollback takes it back" 0 bulkhead rollback --yes
same "as it was" "$before 0" "$(driver_of $gpu) $(driver_of ${gpu%.0}.1) $(driver_of ${gpu%.0}.2) $(cat $pci/$pf/sriov_numvfs)"
