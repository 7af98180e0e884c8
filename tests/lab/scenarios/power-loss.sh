#: what Power is lost during apply: the file is the old or the new one, and the next run ends the matter.
#: disk yes
#: boots 14
#: limit 300
. /lab/lib.sh
file=/etc/modprobe.d/bulkhead-vfio.conf
mkdir -p /etc/modprobe.d
node() {
  cat <<YAML
apiVersion: bulkhead/v1
kind: Node
host:
  modprobe: [{name: bulkhead-vfio.conf, lines: ["options vfio-pci ids=10de:$1"]}]
YAML
}
words_of() { tail -n +2 $file 2>/dev/null; }
old=$((1000 + BOOT - 1)) new=$((1000 + BOOT))
if [ $BOOT -gt 1 ]; then
  say "boot $BOOT: power was lost $(cat /disk/notes/cut) ms into an apply; the file says: $(words_of)"
  case $(words_of) in
    "options vfio-pci ids=10de:$((old - 1))" | "options vfio-pci ids=10de:$old") ok "boot $BOOT: the file is the old or the new one" ;;
    *) not_ok "boot $BOOT: the file is the old or the new one" "$(cat $file 2>&1)" ;;
  esac
  exits "boot $BOOT: the journal can be read" 0 bulkhead history
  node $old >/tmp/node.yaml
  exits "boot $BOOT: the same apply exits 0" 0 bulkhead apply -f /tmp/node.yaml --yes
  same "boot $BOOT: and the file is the new one" "options vfio-pci ids=10de:$old" "$(words_of)"
  exits "boot $BOOT: a second one exits 0" 0 bulkhead apply -f /tmp/node.yaml --yes
  says "boot $BOOT: and has nothing to do" 'nothing to do' "$out"
else
  node $old >/tmp/node.yaml
  exits "the first apply exits 0" 0 bulkhead apply -f /tmp/node.yaml --yes
fi
[ $BOOT = 14 ] && exit 0
cut=$(((BOOT - 1) * 70))
echo $cut >/disk/notes/cut
node $new >/disk/notes/node.yaml
sync
power_fails_in $cut
bulkhead apply -f /disk/notes/node.yaml --yes >/dev/null
lose_power
