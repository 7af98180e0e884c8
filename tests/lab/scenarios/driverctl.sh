#: what Side by side with driverctl: how long a bind and an unbind take, and what each makes of what stands in the way.
#: parts nvme gpu bridge
. /lab/lib.sh
load vfio-pci vfio_iommu_type1 nvme
nvme=$(nvme)
until_true 5 test "$(driver_of $nvme)" = nvme
for round in 1 2 3 4 5; do
  lab_time /tmp/driverctl-bind driverctl --nosave set-override $nvme vfio-pci
  same "driverctl binds (round $round)" vfio-pci "$(driver_of $nvme)"
  lab_time /tmp/driverctl-unbind driverctl --nosave unset-override $nvme
  same "and gives it back" nvme "$(driver_of $nvme)"
  lab_time /tmp/ours-bind lab_passthrough bind $nvme
  same "ours binds" vfio-pci "$(driver_of $nvme)"
  lab_time /tmp/ours-unbind lab_passthrough unbind $nvme
  same "and gives it back" nvme "$(driver_of $nvme)"
  lab_time /tmp/ours-give lab_passthrough give $nvme >/dev/null
  same "ours gives it away with its checks and the proof" vfio-pci "$(driver_of $nvme)"
  lab_passthrough reclaim $nvme >/dev/null
done
median() { sort -n $1 | sed -n 3p | awk '{ printf "%.1f", $1 / 1000 }'; }
say "ours, median of 5: bind $(median /tmp/ours-bind) ms, unbind $(median /tmp/ours-unbind) ms; with checks, proof and reset $(median /tmp/ours-give) ms"
say "driverctl, median of 5: bind $(median /tmp/driverctl-bind) ms, unbind $(median /tmp/driverctl-unbind) ms"

total() { sort -n $1 | sed -n 3p; }
same "ours is not slower to bind" yes "$([ $(total /tmp/ours-bind) -le $(total /tmp/driverctl-bind) ] && echo yes)"
same "nor to unbind" yes "$([ $(total /tmp/ours-unbind) -le $(total /tmp/driverctl-unbind) ] && echo yes)"

# ---- what each makes of what stands in the way; docs/design/passthrough.md has the table
gpu=$(gpu)
load snd-hda-intel xhci-pci e1000
until_true 5 test -e $pci/${gpu%.0}.2/driver
gpu_driver=$(driver_of $gpu)
one_node() { printf 'apiVersion: bulkhead/v1\nkind: Node\ndevices:\n  - {pci: "%s", mode: passthrough}\n' $1 >/tmp/node.yaml; }

say "a group of three functions"
exits "driverctl binds one and says nothing of the others" 0 driverctl --nosave set-override $gpu vfio-pci
same "so that the group cannot be used" "not viable" "$(lab_vfio status $(group_of $gpu))"
driverctl --nosave unset-override $gpu
one_node $gpu
exits "bulkhead binds all three" 0 bulkhead apply -f /tmp/node.yaml --yes
same "so that it can" viable "$(lab_vfio status $(group_of $gpu))"
exits "and gives them back" 0 bulkhead reclaim $gpu --yes
same "to their drivers" $gpu_driver "$(driver_of $gpu)"

say "a stranger in the group"
edu=$(edu)
exits "driverctl binds the device and says nothing of it" 0 driverctl --nosave set-override $edu vfio-pci
same "so that the group cannot be used" "not viable" "$(lab_vfio status $(group_of $edu))"
driverctl --nosave unset-override $edu 2>/dev/null
one_node $edu
exits "bulkhead refuses" 1 bulkhead apply -f /tmp/node.yaml --yes
says "by the stranger's name" "$(find_device 8086:100e)" "$out"

say "a guest that has the device open"
one_node $nvme
exits "given to a guest" 0 bulkhead apply -f /tmp/node.yaml --yes
lab_vfio hold $(group_of $nvme) $nvme 600 >/tmp/held &
holder=$!
until_true 5 grep -q open /tmp/held
exits "bulkhead refuses to take it" 1 bulkhead reclaim $nvme --yes
says "and names the guest" "pid $holder .lab_vfio" "$out"
driverctl --nosave unset-override $nvme >/tmp/theirs 2>&1 &
theirs=$!
sleep 3
kill -9 $theirs
sleep 1
same "driverctl hangs in the kernel, past kill -9, and says nothing" "D" "$(cut -d' ' -f3 /proc/$theirs/stat 2>/dev/null)$(cat /tmp/theirs)"
exits "bulkhead beside it does not hang" 0 timeout 60 bulkhead inventory
exits "and refuses the device" 1 timeout 60 bulkhead reclaim $nvme --yes
says "whose unbind hangs" "hangs in the kernel|held by pid $holder" "$out"
kill -9 $holder
wait $holder
until_true 20 test ! -e /proc/$theirs
same "when the guest is gone the device has no driver: nobody goes on" none "$(driver_of $nvme)"
exits "bulkhead reclaim gives it its driver" 0 bulkhead reclaim $nvme --yes
same "so that it is the host's" "nvme (null)" "$(driver_of $nvme) $(override_of $nvme)"

say "kill -9 after the unbind"
lab_cut kill write:driver_override 1 driverctl set-override $nvme vfio-pci
same "driverctl leaves the device with no driver" "none (null)" "$(driver_of $nvme) $(override_of $nvme)"
same "and remembers nothing: its list is empty" 0 "$(driverctl list-overrides 2>/dev/null | grep -c $nvme)"
exits "the same command again gets it there" 0 driverctl --nosave set-override $nvme vfio-pci
driverctl --nosave unset-override $nvme
lab_cut end write:drivers_probe 1 bulkhead apply -f /tmp/node.yaml --yes >/dev/null
same "bulkhead leaves it so too" none "$(driver_of $nvme)"
exits "and rollback knows what was under way" 0 bulkhead rollback --yes
says "says so" 'was cut off in' "$out"
same "and gives it back" "nvme (null)" "$(driver_of $nvme) $(override_of $nvme)"

say "a device that is gone"
put 1 $pci/$nvme/remove
exits "driverctl says no such device" 1 driverctl --nosave set-override $nvme vfio-pci
says "in those words" "no such device" "$out"
exits "bulkhead too" 1 bulkhead apply -f /tmp/node.yaml --yes
says "with the way to find it" 'rescan' "$out"
put 1 /sys/bus/pci/rescan
until_true 5 test -e $pci/$nvme/driver

say "a driver that does not exist"
exits "driverctl refuses" 1 driverctl --nosave set-override $nvme nosuchdriver
same "before anything is done" nvme "$(driver_of $nvme)"
