#: what Side by side with driverctl when the power goes right after the answer: what is left of it in the next boot.
#: parts gpu nvme
#: disk yes
#: boots 2
#: limit 180
. /lab/lib.sh
load vfio-pci vfio_iommu_type1 nvme snd-hda-intel xhci-pci
nvme=$(nvme) gpu=$(gpu)
case $BOOT in
  1)
    until_true 5 test -e $pci/$nvme/driver
    until_true 5 test -e $pci/${gpu%.0}.2/driver
    printf 'apiVersion: bulkhead/v1\nkind: Node\nhost:\n  vfio: {owner: "1000", mode: "0660"}\ndevices:\n  - {pci: "%s", mode: passthrough}\n' $gpu >/disk/notes/node.yaml
    sync
    exits "bulkhead says that it is done" 0 bulkhead apply -f /disk/notes/node.yaml --yes
    exits "so does driverctl" 0 driverctl set-override $nvme vfio-pci
    lose_power
    ;;
  2)
    same "bulkhead's rule for this boot is on the disk, whole" 1 "$(grep -c "$gpu.*driver_override" /etc/udev/rules.d/10-bulkhead-vfio.rules)"
    exits "its journal too" 0 bulkhead history
    says "says what was done" 'apply' "$out"
    # It writes without a sync: the file is there or not, as the disk had it.
    say "driverctl's file: $(if [ ! -e /etc/driverctl.d/pci-$nvme ]; then echo 'gone'; elif [ ! -s /etc/driverctl.d/pci-$nvme ]; then echo 'empty'; else echo 'whole'; fi)"
    same "driverctl's is not: it writes without a sync" no "$(test -s /etc/driverctl.d/pci-$nvme && echo yes || echo no)"
    ;;
esac
