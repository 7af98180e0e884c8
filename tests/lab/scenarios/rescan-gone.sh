#: what A device that does not come back from reclaim --rescan: the machine takes it out while it is off the bus.
#: kernel 6.1 6.12
#: parts nvme
#: host unplug device_del id=nv0
#: limit 180
. /lab/lib.sh
load nvme
pf=$(nvme)
until_true 5 test -e $pci/$pf/driver
printf 'apiVersion: bulkhead/v1\nkind: Node\ndevices:\n  - {pci: "%s", mode: passthrough}\n' $pf >/tmp/node.yaml
printf 'apiVersion: bulkhead/v1\nkind: Node\nhost:\n  modprobe: [{name: bulkhead-vfio.conf, lines: ["options vfio-pci ids=10de:2330"]}]\n' >/tmp/other.yaml
mkdir -p /etc/modprobe.d
exits "apply exits 0" 0 bulkhead apply -f /tmp/node.yaml --yes
lab_cut hold write:pci/rescan 1 bulkhead reclaim $pf --rescan --yes >/tmp/said 2>&1 &
tracer=$!
until_true 30 grep -q '^cut$' /tmp/said
same "the device is off the bus" gone "$(test -e $pci/$pf || echo gone)"
echo "LAB mark unplug"
sleep 10
kill -USR1 $tracer
wait $tracer
same "reclaim fails" 2 $?
said=$(tr '\n' ' ' </tmp/said)
says "by the device's name" "$pf: rescan: the device did not come back" "$said"
says "says what to do" 'power-cycle' "$said"
exits "another reclaim says that it is not there" 1 timeout 60 bulkhead reclaim $pf --yes
says "after what it settled" 'was cut off in.*the device is gone' "$out"
says "by name" "$pf: is not on the PCI bus" "$out"
same "nothing is in flight" no "$(bulkhead history --json | jq -e '[.[].steps[] | select(.state == "intended")] != []' >/dev/null && echo yes || echo no)"
exits "and nothing stands in the way of other things" 0 timeout 60 bulkhead apply -f /tmp/other.yaml --yes
