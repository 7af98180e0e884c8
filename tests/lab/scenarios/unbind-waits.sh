#: what An unbind that blocks in the kernel: the deadline passes, the holder is named, bulkhead goes on, and later all is as it should be.
#: kernel 6.1 6.12
#: parts nvme
#: files tests/lab/guest/devices.sh
#: limit 180
. /lab/lib.sh
. /lab/devices.sh
load nvme
pf=$(nvme)
until_true 5 test -e $pci/$pf/driver
printf 'apiVersion: bulkhead/v1\nkind: Node\ndevices:\n  - {pci: "%s", mode: passthrough}\n' $pf >$node
exits "apply exits 0" 0 $give

# ---- held before: refused, and not begun
lab_vfio hold $(group_of $pf) $pf 600 >/tmp/held &
holder=$!
until_true 5 grep -q open /tmp/held
exits "reclaim of what a guest has open is refused" 1 bulkhead reclaim $pf --yes
says "with the guest's name" "pid $holder .lab_vfio" "$out"
same "nothing was written" "vfio-pci/vfio-pci" "$(drivers_of $pf)"
kill -9 $holder
wait

# ---- held since: reclaim has looked and stands before its unbind when a guest opens the device
lab_cut hold write:vfio-pci/unbind 1 bulkhead reclaim $pf --yes --step-timeout 20 >/tmp/said 2>&1 &
tracer=$!
until_true 30 grep -q '^cut$' /tmp/said
rm /tmp/held
lab_vfio hold $(group_of $pf) $pf 600 >/tmp/held &
holder=$!
until_true 5 grep -q open /tmp/held
kill -USR1 $tracer
wait $tracer
same "reclaim ends when its deadline passes, not when the guest ends" 2 $?
said=$(tr '\n' ' ' </tmp/said)
says "says that the write hangs and cannot be killed" 'worker [0-9]+ hangs in the kernel and cannot be killed' "$said"
says "names the guest that it waits for" "pid $holder .lab_vfio. has the device open" "$said"
worker=$(echo "$said" | sed -n 's/.*worker \([0-9]*\) hangs.*/\1/p' | head -1)
says "which is so" 'D' "$(cut -d' ' -f3 /proc/$worker/stat)"
kill -0 $holder 2>/dev/null && ok "the guest goes on" || not_ok "the guest goes on"

# ---- the kernel's own answer to those who only look, and ours
for file in driver_override sriov_numvfs; do
  (cat $pci/$pf/$file >/tmp/looked; echo "answers: $(cat /tmp/looked)" >/tmp/looked-$file) &
  sleep 1
  say "cat $file meanwhile $(cat /tmp/looked-$file 2>/dev/null || echo hangs)"
done
says "who only looks at the number of virtual functions hangs with it" '^$' "$(cat /tmp/looked-sriov_numvfs 2>/dev/null)"
exits "inventory goes on" 0 timeout 60 bulkhead inventory
exits "so does the history" 0 timeout 60 bulkhead history
exits "another reclaim is refused, and does not hang" 2 timeout 60 bulkhead reclaim $pf --yes
says "because that worker has the lock" "$worker" "$out"
exits "a plan is refused, and does not hang" 1 timeout 60 bulkhead reclaim $pf --dry-run
says "because the write hangs (6.1: the override cannot be read; 6.12: the guest has the file open)" "hangs in the kernel|held by pid $holder" "$out"

# ---- the guest ends
kill -9 $holder
wait $holder
until_true 20 test ! -e /proc/$worker
exits "the next reclaim ends the matter" 0 bulkhead reclaim $pf --yes
says "and says what it found" 'was cut off in' "$out"
until_true 5 test -e $pci/$pf/driver
same "the device is the host's" "nvme/(null)" "$(drivers_of $pf)"
same "with nothing in flight" no "$(in_flight && echo yes || echo no)"
