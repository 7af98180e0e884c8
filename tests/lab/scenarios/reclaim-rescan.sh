#: what reclaim --rescan: off the bus and on again with the driver and the override it had; killed in between, the next run rescans.
#: kernel 6.1 6.12
#: parts gpu nvme
#: modules moody
#: files tests/lab/guest/devices.sh
#: limit 300
. /lab/lib.sh
. /lab/devices.sh
devices_ready
sound=${gpu%.0}.1
insmod /lab/moody.ko
put $sound $pci/$sound/driver/unbind
put moody $pci/$sound/driver_override
put $sound /sys/bus/pci/drivers_probe
remember_host
says "the GPU's sound has an override of its own" "moody/moody" "$at_host"
born() { stat -c %i $pci/$1/config; }

# ---- the road
exits "apply exits 0" 0 $give
same "guest" guest "$(state)"
before="$(born $gpu) $(born $sound)"
rescan="bulkhead reclaim $gpu $pf --rescan --yes"
exits "reclaim --rescan exits 0" 0 $rescan
same "each has the driver and the override it had" host "$(state)"
[ "$(born $gpu) $(born $sound)" != "$before" ] && ok "and was off the bus" || not_ok "and was off the bus" "$before"
exits "a second time there is nothing to do" 0 $rescan
says "in words" 'nothing to do|Nothing to do' "$out"
exits "rollback gives it to the guest again" 0 bulkhead rollback --yes
same "guest" guest "$(state)"

# ---- an override lost after a rescan by somebody else: seen, and put back
put 1 $pci/$gpu/remove
put 1 /sys/bus/pci/rescan
until_true 5 test -e $pci/$gpu/driver
same "somebody's rescan gave the GPU to the host, and its group is in pieces" "${at_host%% *} vfio-pci/vfio-pci" "$(drivers_of $gpu $sound)"
exits "verify says so" 1 bulkhead verify -f $node
says "by name" "$gpu" "$out"
exits "apply puts it back" 0 $give
same "whole" guest "$(state)"

# ---- killed between removal and scan, and at the writes about it
trouble= told=0
cases=0
cut_at() { # CALL:PART WHAT: reclaim --rescan killed there, then $next, which ends with $wanted
  lab_cut end $1 1 $rescan --json >/tmp/killed 2>&1
  [ $? = 137 ] || { trouble="$trouble | $2: it was not killed there: $(cat /tmp/killed)"; return; }
  cases=$((cases + 1))
  say "$2: $(for f in $functions; do test -e $pci/$f && echo "$f $(driver_of $f)" || echo "$f gone"; done | xargs)"
  ask_journal
  finish "killed $2" "$next" "$wanted"
}
next=$rescan wanted=host
cut_at write:/remove "before the removal"
$give >/dev/null 2>&1
cut_at write:pci/rescan "between removal and scan"
$give >/dev/null 2>&1
cut_at write:drivers_probe "before the probe"
$give >/dev/null 2>&1
next="bulkhead rollback --yes" wanted=guest
cut_at write:pci/rescan "between removal and scan, then rolled back"
next="bulkhead reclaim $gpu $pf --yes" wanted=host
cut_at write:pci/rescan "between removal and scan, then a plain reclaim"
same "after each of $cases kills the next run scanned and ended whole" "" "$trouble"
same "five kills" 5 $cases
