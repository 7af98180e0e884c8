#: what A device that is dead, or dies while it is proved: named at once, nobody waits for it, and nothing else has to.
#: kernel 6.1 6.12
#: parts nvme gpu
#: files tests/lab/guest/devices.sh
#: limit 600
. /lab/lib.sh
. /lab/devices.sh
devices_ready
printf 'apiVersion: bulkhead/v1\nkind: Node\ndevices:\n  - {pci: "%s", mode: passthrough}\n' $pf >$node
printf 'apiVersion: bulkhead/v1\nkind: Node\nhost:\n  modprobe: [{name: bulkhead-vfio.conf, lines: ["options vfio-pci ids=10de:2330"]}]\n' >/tmp/other.yaml
mkdir -p /etc/modprobe.d
ones='its config space reads all ones'
# As after a power cycle: what the kernel knew of it is forgotten.
revive() {
  slot_power $pf on
  put 1 $pci/$pf/remove
  put 1 /sys/bus/pci/rescan
  until_true 10 test -e $pci/$pf/driver
}

# ---- before it is given away
slot_power $pf off
same "the device answers nothing" ffffffff "$(hexdump -n 4 -e '4/1 "%02x"' $pci/$pf/config)"
exits "it is not given away" 1 $give
says "because it is dead" "$pf.*$ones" "$(echo "$out" | tr '\n' ' ' | tr -s ' ')"
says "says what to do" 'power-cycle' "$out"
same "it is left with its driver" "nvme/(null)" "$(drivers_of $pf)"
revive
same "its driver has it again" "nvme/(null)" "$(drivers_of $pf)"

# ---- when it is with VFIO, and proved
exits "alive it is given away" 0 $give
slot_power $pf off
exits "verify says that something is wrong" 1 bulkhead verify -f $node
says "and what" "$ones" "$(echo "$out" | tr '\n' ' ' | tr -s ' ')"
exits "its own proof fails" 2 lab_passthrough prove $pf
says "for the same reason, and waits for no reset" "$ones" "$out"
exits "it may go back" 0 bulkhead reclaim $pf --yes
say "$out"
same "held to nothing" "(null)" "$(override_of $pf)"
same "nothing is in flight" no "$(in_flight && echo yes || echo no)"
revive

# ---- dying in its reset: the kernel waits a minute for it, and again when it is closed
exits "the host has it" 0 bulkhead reclaim $pf --yes
before=$(drivers_of $pf)
lab_cut hold ioctl:vfio-device 4 $give >/tmp/said 2>&1 &
tracer=$!
until_true 60 grep -q '^cut$' /tmp/said
slot_power $pf off
kill -USR1 $tracer
wait $tracer
same "the apply fails" 2 $?
said=$(tr '\n' ' ' </tmp/said | tr -s ' ')
says "because the device is dead" "$pf: $ones" "$said"
says "says what to do" 'power-cycle' "$said"
says "the kernel gave the reset up" 'giving up' "$(dmesg)"
say "$(cat /tmp/said)"
same "the device is held to nothing" "(null)" "$(override_of $pf)"
same "nothing is in flight" no "$(in_flight && echo yes || echo no)"
exits "and nothing stands in the way of other things" 0 bulkhead apply -f /tmp/other.yaml --yes
revive
exits "with power it can be given away" 0 $give
