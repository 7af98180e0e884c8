#: what What the host itself lives on is not given away: a mounted disk, the default route, an open file, live virtual functions, the display.
#: kernel 6.1
#: parts nvme gpu bridge display
#: disk yes
. /lab/lib.sh
load nvme e1000 virtio_pci virtio_blk
gpu=$(gpu) pf=$(nvme) card=$(find_device 8086:100e) display=0000:00:02.0
for d in $pci/*; do [ "$(cat $d/class)" != 0x010601 ] || sata=$(basename $d); done
until_true 10 test -e $pci/$pf/driver
until_true 10 test -e $pci/$card/net
until_true 10 test -b /dev/vda
drivers() { for f in $gpu $pf $card $display $sata; do echo "$f $(driver_of $f)"; done; }
refused() { # "sentence" ADDRESS PATTERN...: refused, in these words
  printf 'apiVersion: bulkhead/v1\nkind: Node\ndevices:\n  - {pci: "%s", mode: passthrough}\n' $2 >/tmp/node.yaml
  exits "$1 is refused" 1 bulkhead apply -f /tmp/node.yaml --yes
  out=$(echo "$out" | tr '\n' ' ' | tr -s ' ')
  shift 2
  for pattern in "$@"; do says "in its own words" "$pattern" "$out"; done
}
put 2 $pci/$pf/sriov_numvfs
ip link set $(ls $pci/$card/net) up
ip addr add 10.9.9.2/24 dev $(ls $pci/$card/net)
ip route add default via 10.9.9.1
(exec 3</dev/vda; exec sleep 600) &
holder=$!
until_true 10 test -e /proc/$holder/fd/3
before=$(drivers)

refused "the controller of a mounted disk" $sata 'SATA controller is in use by the host: .*mounted on /disk' 'unmount it'
says "and what shares its group is named" 'shares IOMMU group [0-9]+ with .*\(ISA bridge, ' "$out"
refused "the card of the default route" $card 'network card is in use by the host: default route' 'move the default route'
refused "a device that a process has open" $gpu "held by pid $holder \(" 'stop them, or take it from them with --evict'
refused "a physical function with live virtual ones" $pf 'has 2 virtual functions, which would lose their device' "bulkhead reclaim $pf"
refused "the display the firmware started on" $display 'the display that the firmware started on' 'serial console'
same "nothing was touched" "$before" "$(drivers)"
same "and nothing is in the journal" '[]' "$(bulkhead history --json | jq -c .)"
kill $holder
