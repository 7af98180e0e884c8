#!/usr/bin/env bash
# plan, apply, verify, rollback, history, end to end on a twin: the road, and what goes wrong on it.
cd "$(dirname "$0")/../.." && . tests/lib.sh
twin=$work/twin
bulkhead=$BIN/bulkhead
smi() { LD_LIBRARY_PATH=$twin/lib "$DEPS/usr/lib/nvidia/current/nvidia-smi" "$@"; }
check "the twin comes up" "$bulkhead" twin up dgx-h100 --dir "$twin"
export BULKHEAD_ROOT=$twin/root BULKHEAD_NVML=$twin/lib/libnvidia-ml.so.1
journal=$twin/root/var/lib/bulkhead
state() { "$bulkhead" twin status --dir "$twin" --json | python3 -c '
import json, sys
s = json.load(sys.stdin)
for g in s["gpus"]:
    print(g["index"], g["mig"], g["power_limit_watts"], g["persistence"], g["clock_lock_mhz"], sorted((i["start"], i["profile"], len(i["compute"])) for i in g["instances"]))
for u in s["units"]: print(u)'; }

cat >"$work/node.yaml" <<'YAML'
apiVersion: bulkhead/v1
kind: Node
gpus:
  - select: {index: "0"}
    mode: mig
    layout: [3g.40gb, 2g.20gb, 1g.10gb, 1g.10gb]
  - select: {index: "4"}
    mode: share
    power_limit_w: 500
YAML
sed 's/3g.40gb, 2g.20gb/2g.20gb, 2g.20gb/' "$work/node.yaml" >"$work/other.yaml"
original=$(state)

# ---- the road
exits "plan says what it would do and exits 0" 0 "$bulkhead" plan -f "$work/node.yaml"
says "each step has its why and its undo" 'undo   gpu 0: destroy 3g.40gb' "$out"
same "plan changes nothing" "$original" "$(state)"
check "plan makes no journal" test ! -e "$journal"
exits "verify exits 1 with the differences" 1 "$bulkhead" verify -f "$work/node.yaml"
says "verify names them" '(create|MIG mode)' "$out"
exits "apply without a terminal and without --yes refuses to guess" 2 "$bulkhead" apply -f "$work/node.yaml" </dev/null
says "and says what to type" 'apply -f .* --yes' "$out"
exits "a dry run exits 0" 0 "$bulkhead" apply -f "$work/node.yaml" --dry-run
same "and changes nothing" "$original" "$(state)"
exits "apply --yes" 0 "$bulkhead" apply -f "$work/node.yaml" --yes
says "ends with an empty second plan" 'a second plan is empty' "$out"
applied=$(state)
exits "a second apply exits 0" 0 "$bulkhead" apply -f "$work/node.yaml" --yes
says "and has nothing to do" 'nothing to do' "$out"
exits "verify exits 0" 0 "$bulkhead" verify -f "$work/node.yaml"
says "nvidia-smi sees the instances" 'MIG 3g.40gb' "$(smi -L)"
exits "history lists one run" 0 "$bulkhead" history
says "as done" '^1 +apply +done' "$out"
exits "rollback --yes" 0 "$bulkhead" rollback --yes
same "brings the host back exactly" "$original" "$(state)"
exits "a second rollback has nothing to take back" 0 "$bulkhead" rollback --yes
says "and says so" 'Nothing to take back' "$out"

# ---- a driver that fails, lies, hangs
exits "broken: a create that fails" 0 "$bulkhead" twin break fail-call --function nvmlGpuInstanceCreateComputeInstance --code 999 --times 1 --dir "$twin"
exits "a failed step exits 2" 2 "$bulkhead" apply -f "$work/node.yaml" --yes
says "and says that the host is as before" 'The host is as before' "$out"
same "the undos put everything back, the half-made instance too" "$original" "$(state)"
"$bulkhead" twin mend --dir "$twin" >/dev/null 2>&1
exits "broken: a call that hangs" 0 "$bulkhead" twin break hang-call --function nvmlDeviceSetPowerManagementLimit --delay-ms 60000 --times 1 --dir "$twin"
exits "a hung call ends with its deadline" 2 "$bulkhead" apply -f "$work/node.yaml" --yes --step-timeout 2
says "and is named" 'set-power-limit: no answer after 2.0 s' "$out"
same "and all is put back" "$original" "$(state)"
"$bulkhead" twin mend --dir "$twin" >/dev/null 2>&1

# ---- two at once
exec 9>"$work/held"
"$bulkhead" twin break hang-call --function nvmlDeviceSetPowerManagementLimit --delay-ms 4000 --times 1 --dir "$twin" >/dev/null
"$bulkhead" apply -f "$work/node.yaml" --yes >"$work/first.txt" 2>&1 &
first=$!
for _ in $(seq 100); do grep -q 'power limit' "$work/first.txt" && break; sleep 0.05; done
exits "a second apply at the same time is refused" 2 "$bulkhead" apply -f "$work/other.yaml" --yes
says "and told who holds it" "pid $first \(bulkhead apply\)" "$out"
wait "$first"; same "the first one ends well" 0 "$?"
"$bulkhead" twin mend --dir "$twin" >/dev/null 2>&1
same "as if it had been alone" "$applied" "$(state)"

# ---- busy instances
sleep 300 & holder=$!
gi=$("$bulkhead" twin status --dir "$twin" --json | python3 -c 'import json,sys; print(next(i["id"] for i in json.load(sys.stdin)["gpus"][0]["instances"] if i["profile"] == 9))')
check "a process takes the 3g instance" "$bulkhead" twin attach "0:$gi:0" --pid "$holder" --dir "$twin"
exits "a re-cut that needs a busy instance is refused" 1 "$bulkhead" apply -f "$work/other.yaml" --yes
says "with its holder" "pid $holder \(sleep\)" "$out"
same "and nothing is changed" "$applied" "$(state)"
exits "rollback is refused for the same reason" 1 "$bulkhead" rollback --yes
says "with its holder too" "pid $holder \(sleep\)" "$out"
exits "--evict ends the holder and goes on" 0 "$bulkhead" apply -f "$work/other.yaml" --yes --evict --grace 1
check "the holder is gone" bash -c "! kill -0 $holder 2>/dev/null"
wait "$holder" 2>/dev/null
exits "rollback takes the newest run back" 0 "$bulkhead" rollback --yes
same "and only that" "$applied" "$(state)"
exits "the next rollback takes the one before" 0 "$bulkhead" rollback --yes
same "to the beginning" "$original" "$(state)"

# ---- somebody else's instances
smi -i 0 -mig 1 >/dev/null
smi mig -i 0 -cgi 9 -C >/dev/null
foreign=$(state)
exits "a layout that does not fit beside somebody else's instance is refused" 1 "$bulkhead" apply -f "$work/node.yaml" --yes
says "and the instance in the way is named" '3g.40gb \(gi 1\) at 0-3 stays' "$out"
sed 's/layout: .*/layout: [2g.20gb, 1g.10gb]/' "$work/node.yaml" >"$work/beside.yaml"
exits "one that fits is made beside it" 0 "$bulkhead" apply -f "$work/beside.yaml" --yes
says "left alone" 'MIG 3g.40gb' "$(smi -L)"
exits "rollback" 0 "$bulkhead" rollback --yes
same "leaves it alone too" "$foreign" "$(state)"
smi mig -i 0 -dci >/dev/null; smi mig -i 0 -dgi >/dev/null; smi -i 0 -mig 0 >/dev/null

# ---- the world changes while somebody thinks
cat >"$work/ask.py" <<'PY'
import os, pty, subprocess, sys
pid, fd = pty.fork()
if pid == 0: os.execv(sys.argv[1], [sys.argv[1], "apply", "-f", sys.argv[2]])
seen = b""
while b"[y/N]" not in seen: seen += os.read(fd, 4096)
if len(sys.argv) > 4: subprocess.run(sys.argv[4:], check=True, stdout=subprocess.DEVNULL)
os.write(fd, sys.argv[3].encode() + b"\n")
try:
    while True:
        more = os.read(fd, 4096)
        if not more: break
        seen += more
except OSError: pass
sys.stdout.write(seen.decode(errors="replace"))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
PY
before=$(state)
exits "no at the terminal exits 1" 1 python3 "$work/ask.py" "$bulkhead" "$work/node.yaml" n
same "and changes nothing" "$before" "$(state)"
exits "a host that changed while somebody thought is a conflict" 2 env LD_LIBRARY_PATH="$twin/lib" python3 "$work/ask.py" "$bulkhead" "$work/node.yaml" y \
  "$DEPS/usr/lib/nvidia/current/nvidia-smi" -i 4 -pl 600
says "and nothing is done" 'changed since the plan was shown; nothing was done' "$out"
smi -i 4 -pl 700 >/dev/null
same "nothing" "$before" "$(state)"

# ---- no room, no right, no sense
"$bulkhead" history --json >"$work/history.json"
if [ "$(id -u)" = 0 ] && mkdir -p "$work/small" && mount -t tmpfs -o size=256k none "$work/small" 2>/dev/null; then
  exits "a full disk is refused before anything is touched" 2 "$bulkhead" --state-dir "$work/small/state" apply -f "$work/node.yaml" --yes
  says "with the way out" 'make room|--state-dir' "$out"
  same "nothing was touched" "$before" "$(state)"
  mount -o remount,ro "$work/small"
  exits "a read-only state directory is refused" 2 "$bulkhead" --state-dir "$work/small/other" apply -f "$work/node.yaml" --yes
  says "with its name and why" 'small/other: Read-only file system' "$out"
  same "nothing was touched then" "$before" "$(state)"
  umount "$work/small"
fi
size=$(stat -c %s "$journal/journal.db")
cp -a "$journal" "$work/journal"
lengths="0 1 15 16 100 511 512 4095 4096 4097 $((size / 2)) $((size - 4096)) $((size - 1))"
[ "$BULKHEAD_QUICK" = 1 ] || lengths=$(seq 0 199 $((size - 1)))
bad=""
for length in $lengths; do
  rm -rf "$journal"; cp -a "$work/journal" "$journal"; truncate -s "$length" "$journal/journal.db"
  for verb in "plan -f $work/node.yaml" "apply -f $work/node.yaml --yes" "rollback --yes" history; do
    got=0; out=$("$bulkhead" $verb 2>&1) || got=$?
    [ "$got" = 2 ] && grep -q 'journal .* is \(damaged\|empty\)\|another program' <<<"$out" && grep -q 'mv .*aside' <<<"$out" || bad+="$verb at $length: exit $got: $out"$'\n'
    [ "$(stat -c %s "$journal/journal.db")" = "$length" ] || bad+="$verb at $length changed the file"$'\n'
  done
done
same "a journal cut off anywhere is refused by every verb, with the way out, and left as it is" "" "$bad"
same "and the host with it" "$before" "$(state)"
rm -rf "$journal"; cp -a "$work/journal" "$journal"
printf 'kind: Nonsense\n' >"$work/bad.yaml"
exits "a node file with mistakes is refused" 2 "$bulkhead" apply -f "$work/bad.yaml" --yes
head -c 10000000 /dev/zero | tr '\0' 'x' >"$work/huge.yaml"
exits "a huge one is refused unread" 2 "$bulkhead" plan -f "$work/huge.yaml"
exits "a missing one is named" 2 "$bulkhead" plan -f "$work/none.yaml"
same "history after all that is what it was" "$(cat "$work/history.json")" "$("$bulkhead" history --json)"
done_testing
