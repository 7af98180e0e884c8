#: what kill -9 at every call by which apply changes anything: the next run ends the matter.
#: limit 600
. /lab/lib.sh
file=/etc/modprobe.d/bulkhead-vfio.conf
mkdir -p /etc/modprobe.d
cat >/tmp/node.yaml <<'YAML'
apiVersion: bulkhead/v1
kind: Node
host:
  modprobe: [{name: bulkhead-vfio.conf, lines: ["options vfio-pci ids=10de:2330"]}]
YAML
bad=0
settled() {
  local what=
  case $(cat $file 2>/dev/null) in "" | *"options vfio-pci ids=10de:2330") ;; *) what="neither old nor new: $(cat $file)" ;; esac
  bulkhead apply -f /tmp/node.yaml --yes >/tmp/said 2>&1 || what="$what apply: $(cat /tmp/said)"
  grep -q 2330 $file || what="$what not the new one: $(cat $file)"
  bulkhead apply -f /tmp/node.yaml --yes 2>&1 | grep -q 'nothing to do' || what="$what a second apply has something to do"
  bulkhead rollback --yes >/tmp/said 2>&1 || what="$what rollback: $(cat /tmp/said)"
  [ ! -e $file ] || what="$what not taken back: $(cat $file)"
  [ -z "$what" ] || { bad=$((bad + 1)); not_ok "$where" "$what"; rm -f $file; }
}
kill_everywhere "rename unlink fsync fdatasync write pwrite64" settled bulkhead apply -f /tmp/node.yaml --yes
say "$kills kills"
[ $kills -gt 20 ] && ok "killed at $kills points" || not_ok "killed at many points" "$kills"
same "after each of them" 0 "$bad"
