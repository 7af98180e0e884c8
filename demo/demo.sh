#!/usr/bin/env bash
# The main job as a story: an eight-GPU machine is checked, cut, broken, healed and put back. Every "=>" line is a claim
# that this script tests; the first that is false ends the demo with exit 1. Nothing of this machine is changed: the
# simulated one lives in a temporary directory.
set -uo pipefail
: "${BIN:=$PWD/build/bin}" "${DEPS:=$PWD/build/deps}"
bulkhead=$BIN/bulkhead
smi=$DEPS/usr/lib/nvidia/current/nvidia-smi
examples=$(cd "$(dirname "$0")/../examples" && pwd)
dir=$(mktemp -d "${TMPDIR:-/tmp}"/bulkhead-demo.XXXXXX)
twin=$dir/twin
unset BULKHEAD_ROOT BULKHEAD_NVML BULKHEAD_STATE BULKHEAD_TWIN

bold= dim= green= red= reset=
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then bold=$'\e[1m' dim=$'\e[2m' green=$'\e[32m' red=$'\e[31m' reset=$'\e[0m'; fi
claims=0
chapter() { printf '\n%s%s%s\n' "$bold" "$*" "$reset"; }
tell() { printf '%s\n' "$*"; }
claim() { claims=$((claims + 1)); printf '%s=> %s%s\n' "$green" "$*" "$reset"; }
broken() {
  printf '%s=> NOT TRUE: %s%s\n' "$red" "$*" "$reset"
  [ -z "${out:-}" ] || printf '%s\n' "$out" | tail -40 | sed 's/^/   | /'
  exit 1
}
daemon=
finish() {
  [ -z "$daemon" ] || kill -KILL "$daemon" 2>/dev/null
  [ -e "$twin/state.bin" ] && "$bulkhead" twin down --dir "$twin" >/dev/null 2>&1
  rm -rf "$dir"
}
trap finish EXIT

# shown COMMAND...: prints the command as a reader would type it, then what it prints; keeps it in $out, its exit code in $code.
shown() {
  printf '%s$ %s%s\n' "$dim" "$(printf '%s ' "$@" | sed -E -e "s#^env (BULKHEAD[A-Z_]*=[^ ]* |LD_LIBRARY_PATH=[^ ]* )+##" -e "s#$BIN/##g" -e "s#$smi#nvidia-smi#g" -e "s#$dir/##g" -e "s#$examples/#examples/#g")" "$reset"
  code=0
  out=$("$@" 2>&1) || code=$?
  printf '%s\n' "$out" | sed -e "s#$dir/##g" -e "s#$examples/#examples/#g" | head -"${lines:-60}"
}
quiet() { code=0; out=$("$@" 2>&1) || code=$?; }
wants() { [ "$code" = "$1" ] || broken "${*:2} (exit $code, expected $1)"; claim "${*:2}"; }
seen() { grep -qE -- "$1" <<<"$out" || broken "${*:2} (no /$1/ in the output)"; claim "${*:2}"; }

on_host() { env BULKHEAD_ROOT="$twin/root" BULKHEAD_NVML="$twin/lib/libnvidia-ml.so.1" "$@"; }
host() { shown env BULKHEAD_ROOT="$twin/root" BULKHEAD_NVML="$twin/lib/libnvidia-ml.so.1" "$@"; }
# on_twin COMMAND...: any program, with the twin's driver library first.
on_twin() { env BULKHEAD_TWIN="$twin" LD_LIBRARY_PATH="$twin/lib" "$@"; }
smi() { shown env BULKHEAD_TWIN="$twin" LD_LIBRARY_PATH="$twin/lib" "$smi" "$@"; }
# facts INVENTORY: what bulkhead may change on a GPU, one line a GPU.
facts() { python3 -c 'import json, sys
for g in json.load(sys.stdin)["gpus"]: print(g["uuid"], g["mig"]["enabled"], g["mig"]["pending"], len(g["mig"]["instances"]), g["power"]["limit_mw"], g["persistence"])' <<<"$1"; }
mig_uuids() { on_twin "$smi" -L | awk -v gpu="GPU $1:" '/^GPU /{ mine = index($0, gpu) == 1 } mine && /MIG-/ { gsub(/[()]/, ""); print $2, $NF }'; }

chapter "1. A machine with eight H100s"
tell "The twin brings up a simulated DGX H100: its own libnvidia-ml.so.1 and a host tree, its numbers read on real GPUs."
quiet "$bulkhead" twin up dgx-h100 --dir "$twin"
wants 0 "the twin is up; everything below is the production code, pointed at it"
lines=24 host "$bulkhead" inventory
wants 0 "the inventory is read"
[ "$(on_twin "$smi" -L | grep -c '^GPU ')" = 8 ] || broken "NVIDIA's own nvidia-smi counts eight GPUs"
claim "NVIDIA's own nvidia-smi counts the same eight GPUs"
original=$(on_host "$bulkhead" inventory --json)

chapter "2. Is it fit for tenants? Two faults are planted"
tell "Fabric Manager is lost, and the CPU governor was left on powersave."
quiet "$bulkhead" twin break fabric-lost --dir "$twin"
wants 0 "Fabric Manager is gone"
for policy in "$twin"/root/sys/devices/system/cpu/cpufreq/policy*/scaling_governor; do echo powersave >"$policy"; done
lines=70 host "$bulkhead" doctor --for mig
wants 1 "the doctor says no"
seen 'fabric\.unit' "it found Fabric Manager, from what systemd says, and names the mend"
seen 'read: .*powersave' "it found the governor, and shows the file and the word it read there"
quiet "$bulkhead" twin mend fabric-lost --dir "$twin"
wants 0 "the operator mends Fabric Manager; the node file will mend the governor"

chapter "3. What do we want, and what would it cost?"
sed 's/^/   /' "$examples/dgx-h100.yaml"
lines=24 host "$bulkhead" plan -f "$examples/dgx-h100.yaml"
wants 0 "the plan is decided whole, before the first driver call that changes anything"
steps=$(sed -nE 's/^([0-9]+) steps? for.*/\1/p' <<<"$out")
claim "$steps steps, each with its reason and its undo (the first few are shown)"
quiet on_host "$bulkhead" inventory --json
[ "$(facts "$out")" = "$(facts "$original")" ] || broken "plan touched something"
claim "and nothing was touched"

chapter "4. Make it so"
lines=40 host "$bulkhead" apply -f "$examples/dgx-h100.yaml" --yes
wants 0 "applied: every step was written down, done, read back"
host "$bulkhead" apply -f "$examples/dgx-h100.yaml" --yes
wants 0 "a second apply does nothing"
seen 'nothing to do' "and says so"
host "$bulkhead" doctor --for mig
wants 0 "the doctor is content: the governor was mended on the way"
smi mig -lgi
[ "$(on_twin "$smi" -L | grep -c MIG-)" = 16 ] || broken "nvidia-smi sees 16 MIG devices"
claim "NVIDIA's own nvidia-smi sees the 16 slices, four on each of GPU 0 to 3"

chapter "5. A tenant moves in, and the layout changes around it"
quiet "$bulkhead" twin attach 0:2 --name trainer --memory 20GiB --busy 0.9 --dir "$twin"
wants 0 "a tenant's process 'trainer' runs in the 3g.40gb of GPU 0"
before=$(mig_uuids 0)
lines=30 host "$bulkhead" plan -f "$examples/dgx-h100-recut.yaml"
wants 0 "the recut destroys one idle 2g.20gb on each GPU and nothing else"
seen 'nobody loses anything' "nobody loses anything, it says"
[ "$(grep -cE '^ *[0-9]+ .*destroy ' <<<"$out")" = 4 ] || broken "exactly four instances are destroyed"
claim "exactly four of the sixteen instances are destroyed; mig-parted would wipe all four GPUs"
quiet on_host "$bulkhead" apply -f "$examples/dgx-h100-recut.yaml" --yes
wants 0 "applied"
after=$(mig_uuids 0)
[ "$(grep 3g.40gb <<<"$before")" = "$(grep 3g.40gb <<<"$after")" ] || broken "the tenant's MIG device is the same one"
claim "the tenant's MIG device is the same as before: $(grep 3g.40gb <<<"$after" | head -1)"
on_twin "$smi" --query-compute-apps=pid,process_name --format=csv,noheader | grep -q trainer || broken "trainer still runs"
claim "and trainer never noticed"

chapter "6. kill -9 in the middle"
tell "Going back to the first layout, with a driver that takes three seconds to destroy an instance. Then: kill -9."
quiet "$bulkhead" twin break slow-destroy --delay-ms 3000 --times 1 --dir "$twin"
on_host setsid "$bulkhead" apply -f "$examples/dgx-h100.yaml" --yes >"$dir/killed.log" 2>&1 &
sleep 1
# The whole group: the command and the worker that is inside the driver at this moment.
pkill -KILL -f "apply -f $examples/dgx-h100.yaml" || broken "there was nothing to kill"
wait 2>/dev/null
grep -v Killed "$dir/killed.log" | cut -d']' -f1- | sed -e 's/ env BULKHEAD.*//' -e 's/ [^ ]*demo.sh: line.*//' -e 's/^/   /' | head -5
host "$bulkhead" history
seen 'cut off' "the journal knows that a run was cut off"
lines=14 host "$bulkhead" apply -f "$examples/dgx-h100.yaml" --yes
wants 0 "the next apply settles the step in flight by reading the hardware, and finishes the job"
host "$bulkhead" verify -f "$examples/dgx-h100.yaml"
wants 0 "the host is exactly as the node file says"
[ "$(grep 3g.40gb <<<"$before")" = "$(mig_uuids 0 | grep 3g.40gb)" ] || broken "the tenant's MIG device survived"
claim "the tenant's MIG device was not touched by any of it"

chapter "7. A layout that cannot be had"
host "$bulkhead" plan -f "$examples/refused.yaml"
wants 1 "refused, before the first driver call"
seen '9 memory slices' "with the arithmetic"
cat >"$dir/evict.yaml" <<'YAML'
apiVersion: bulkhead/v1
kind: Node
gpus:
  - select: {index: "0"}
    mode: mig
    layout: [7g.80gb]
YAML
host "$bulkhead" plan -f "$dir/evict.yaml"
wants 1 "a layout that fits only without the tenant is refused as well"
seen 'trainer' "and names who is in the way, by pid and cgroup"

chapter "8. Put it back"
quiet "$bulkhead" twin detach --all --dir "$twin"
for attempt in 1 2 3 4 5; do
  quiet on_host "$bulkhead" rollback --yes
  [ "$code" = 0 ] || broken "rollback $attempt"
  grep -q 'Nothing to take back' <<<"$out" && break
  printf '%s$ bulkhead rollback --yes %s\n   %s\n' "$dim" "$reset" "$(tail -1 <<<"$out")"
done
seen 'Nothing to take back' "run after run was taken back, its steps undone in reverse order"
quiet on_host "$bulkhead" inventory --json
[ "$(on_twin "$smi" -L | grep -c MIG-)" = 0 ] || broken "no slice is left"
[ "$(facts "$out")" = "$(facts "$original")" ] || broken "the GPUs are as they were found"
claim "no slice is left; MIG modes, power limits and persistence are what the first inventory said"

chapter "9. Two programs share one GPU, and know nothing of it"
if [ "$(id -u)" != 0 ]; then
  tell "Skipped: holding a program from outside needs root."
else
  tell "GPU 7 without MIG. Two CUDA programs as tenants, 30 and 70 parts of the time, 2 GiB each; nothing is preloaded into them."
  in_twin() { "$bulkhead" twin run --dir "$twin" -- "$@"; }
  tenant() { in_twin "$bulkhead" share run --untested --gpu 7 --memory 2GiB --name "$1" --weight "$2" -- "$BIN/cuda_spin" --us 1000 --seconds 9 >"$dir/$1.out" 2>"$dir/$1.err" & }
  tenant train-a 30
  tenant train-b 70
  for attempt in $(seq 100); do
    quiet in_twin "$bulkhead" share list --json
    [ "$(grep -c '"inForceMicroseconds": [1-9]' <<<"$out")" = 2 ] && break
    sleep 0.05
  done
  quiet in_twin "$bulkhead" share list
  printf '%s$ bulkhead share list%s\n%s\n' "$dim" "$reset" "$out"
  seen 'train-a .* 30 %' "each has its slice of the GPU's own scheduler, in force milliseconds after it began"
  quiet in_twin "$bulkhead" share run --untested --gpu 7 --memory 1GiB -- "$bulkhead" share spin "$dir/board" $((2 << 30))
  wants 3 "a third that wants 2 GiB under a cap of 1 GiB gets CUDA's own out-of-memory"
  arbiter=$(in_twin "$bulkhead" share list --json | sed -nE 's/.*"arbiter": ([0-9]+).*/\1/p' | head -1)
  kill -KILL "$arbiter" || broken "there is an arbiter to kill"
  wait
  busy() { sed -nE 's/.*"busy": ([0-9.]+).*/\1/p' "$dir/$1.out"; }
  out=$(cat "$dir"/train-?.out "$dir"/train-?.err)
  part=$(awk -v a="$(busy train-a)" -v b="$(busy train-b)" 'BEGIN { if (a + b > 0) printf "%.0f", 100 * a / (a + b) }')
  [ "${part:-0}" -ge 26 ] && [ "$part" -le 34 ] || broken "train-a got its 30 % (it got ${part:-nothing} %)"
  claim "train-a received $part % of what both got, although an arbiter was killed with -9 in the middle"
fi

chapter "10. Would more fit? And what would a policy get out of a fleet?"
quiet on_twin "$smi" -i 0 -mig 1 # by hand, as somebody else might
quiet on_twin "$smi" mig -i 0 -cgi 19,19,19 -C
host "$bulkhead" plan --what-if '7 x 1g.10gb' --adopt
seen '4 of 7 would' "GPU 0 holds three small slices: of seven more, four would fit"
wants 1 "what does not fit is an answer with its way out, not an error"
quiet on_twin "$smi" mig -i 0 -dci
quiet on_twin "$smi" mig -i 0 -dgi
shown "$bulkhead" simulate --trace "$examples/traces/openb/openb_pod_list_default.csv" --nodes-file "$examples/traces/openb/openb_node_list_gpu_node.csv" --policy ours,fgd,best-fit --seeds 42..44 --quiet
use() { awk -v name="$1" '$1 == name { print $3 }' <<<"$out"; }
awk -v a="$(use bulkhead)" -v b="$(use 06-FGD)" -v c="$(use 05-BestFit)" 'BEGIN { exit !(a > b && b > c && c > 0) }' || broken "bulkhead's rule is ahead of FGD and best-fit"
claim "8,152 pods of a real cluster on its 6,212 GPUs: $(use bulkhead) % of them in use, $(use 06-FGD) by FGD, $(use 05-BestFit) by best-fit"

chapter "11. Three tenants, one daemon"
tell "Leases instead of layouts: GPU 0 to 3 are cut as tenants ask; a daemon owns who has what, and writes it down before it answers."
if [ "$(id -u)" != 0 ]; then
  tell "Skipped: without root, who is who on the daemon's socket has to be configured first (docs/operator.md)."
else
  sed 's/^/   /' "$examples/dgx-h100-pools.yaml"
  quiet on_host "$bulkhead" apply -f "$examples/dgx-h100-pools.yaml" --yes
  wants 0 "the pools of the node file are applied"
  # The shell itself becomes the daemon: what is killed is it, and not its parent.
  # A healed GPU is checked by computing on it; the preloaded library is the twin's /dev/nvidia*.
  { cat "$examples/dgx-h100-pools.yaml" && printf 'heal: {mode: act}\n'; } >"$dir/pools.yaml"
  serve() { (exec env BULKHEAD_TWIN="$twin" LD_PRELOAD="$twin/lib/libbulkhead-twin-device.so" BULKHEAD_ROOT="$twin/root" BULKHEAD_NVML="$twin/lib/libnvidia-ml.so.1" "$bulkhead" serve --listen none --socket "$dir/api.sock" -f "$dir/pools.yaml" >>"$dir/serve.log" 2>&1) & daemon=$!; disown; }
  await() { for attempt in $(seq 200); do [ -S "$dir/api.sock" ] && "$@" >/dev/null 2>&1 && return; sleep 0.05; done; }
  export BULKHEAD_URL=unix:$dir/api.sock
  serve
  await on_host "$bulkhead" gpus
  for tenant in vision speech batch; do
    quiet on_host "$bulkhead" tenant put "$tenant" leases=4 slices=2
    wants 0 "tenant $tenant may hold 4 leases, 2 slices"
    quiet on_host "$bulkhead" token create --user "ada@$tenant" --role tenant --tenant "$tenant" --ttl 1h --quiet
    wants 0 "and has a token, kept as a hash alone"
    printf '%s' "$out" >"$dir/$tenant.token"
  done
  id_of() { python3 -c 'import json, sys; print(json.load(sys.stdin)["id"])' <<<"$out"; }
  # asked COMMAND...: what it says on standard output; its progress is on the other.
  asked() { code=0; out=$("$@" 2>>"$dir/progress") || code=$?; }
  as() { env BULKHEAD_TOKEN="$(cat "$dir/$1.token")" "${@:2}"; }
  tell
  tell "vision asks for half a GPU, speech for a small slice; the instances are cut while they wait."
  asked as vision "$bulkhead" lease create --class mig --profile 3g.40gb --ttl 1h --wait --json
  wants 0 "vision has its 3g.40gb"
  lease=$(id_of)
  shown as vision "$bulkhead" lease show "$lease"
  seen 'not isolated' "it says what the slice isolates, and what not"
  device=$(grep -oE 'MIG-[0-9a-f-]+' <<<"$out" | head -1)
  on_twin "$smi" -L | grep -q "$device" || broken "nvidia-smi sees vision's slice"
  claim "NVIDIA's own nvidia-smi sees the slice"
  shown as vision "$bulkhead" lease run "$lease" -- sh -c 'echo "a program in the lease sees $CUDA_VISIBLE_DEVICES"'
  seen "$device" "a program in the lease gets that device and no other"
  asked as speech "$bulkhead" lease create --class mig --profile 1g.10gb --ttl 10s --wait --json
  wants 0 "speech has a small one, for ten seconds"
  short=$(id_of)
  shown as batch "$bulkhead" lease create --class mig --profile 1g.10gb --count 3 --ttl 1h
  wants 1 "batch asks for three slices: refused, with both numbers and what would help"
  seen '2' "the quota is 2"
  quiet as batch "$bulkhead" lease show "$lease"
  wants 2 "batch cannot even learn that vision's lease exists"
  tell
  tell "Now: kill -9 of the daemon."
  kill -KILL "$daemon" || broken "there was a daemon to kill"
  for attempt in $(seq 100); do kill -0 "$daemon" 2>/dev/null || break; sleep 0.05; done
  serve
  await on_host "$bulkhead" gpus
  quiet as vision "$bulkhead" lease show "$lease" --json
  [ "$(grep -c "$device" <<<"$out")" -ge 1 ] || broken "vision's lease is the same one"
  claim "it is back; vision's lease is the same, on the same device"
  for attempt in $(seq 300); do
    quiet as speech "$bulkhead" lease show "$short" --json
    grep -q '"state": "ended"' <<<"$out" && break
    sleep 0.1
  done
  seen '"state": "ended"' "speech's ten seconds are over: ended, and its slice scrubbed"
  shown on_host "$bulkhead" lease list --all
  seen vision "the operator sees all of it"
  shown on_host "$bulkhead" audit verify
  wants 0 "every decision is in a log whose lines prove one another, the ones before the kill as well"

  chapter "12. Who used what, what is wrong, what a log line means, and what heals itself"
  tell "The same daemon asks every GPU ten times a second, counts for the tenants, and watches over the machine."
  slice=$("$bulkhead" twin status --json --dir "$twin" | python3 -c '
import json, sys
for gpu in json.load(sys.stdin)["gpus"]:
    for gi in gpu["instances"]:
        for ci in gi["compute"]:
            if ci["uuid"] == sys.argv[1]: print("%d:%d:%d" % (gpu["index"], gi["id"], ci["id"]))' "$device")
  quiet "$bulkhead" twin attach "$slice" --name train --memory 20GiB --busy 0.9 --dir "$twin"
  wants 0 "vision's training begins"
  sleep 6
  shown on_host "$bulkhead" top --once
  seen vision "one screen has GPUs, slices and whose they are"
  tell
  tell "The rack's supply sags and brakes GPU 6."
  quiet "$bulkhead" twin break power-brake --gpu 6 --dir "$twin"
  for attempt in $(seq 300); do
    quiet on_host "$bulkhead" alarms
    grep -q 'brake' <<<"$out" && break
    sleep 0.1
  done
  shown on_host "$bulkhead" alarms
  wants 1 "an alarm: what is wrong, since when, and what would be done about it"
  quiet "$bulkhead" twin mend power-brake --dir "$twin"
  tell
  quiet on_host "$bulkhead" usage --json
  python3 -c '
import json, sys
said = json.load(sys.stdin)
assert said["addsUp"] and any(item.get("tenant") == "vision" for item in said["items"])' <<<"$out" || broken "the accounts add up to the GPUs' time and energy"
  shown on_host "$bulkhead" usage
  claim "every slice-second and every joule is somebody's: tenants' and the operator's lines add up to the GPUs' time and energy counters"
  quiet as speech "$bulkhead" usage
  grep -q vision <<<"$out" && broken "a tenant sees its own account alone"
  claim "speech asks as well, and sees its own account alone"
  tell
  tell "A line from some machine's kernel log:"
  line='NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, name=python, GPU has fallen off the bus.'
  shown "$bulkhead" explain "$line"
  seen 'bus' "it says what the line means, whom to blame, and what to do"
  printf '[Mon Nov 23 09:00:00 2026] %s\n' "$line" 'usb 1-1: new high-speed USB device number 4' >"$dir/dmesg.txt"
  shown "$bulkhead" diagnose --from "$dir/dmesg.txt"
  wants 1 "a log of a machine that is not this one becomes an incident, with evidence and remedy"

  tell
  tell "GPU 6 has a double bit error. The daemon's node file says heal: {mode: act}."
  quiet "$bulkhead" twin break ecc --gpu 6 --count 2 --dir "$twin"
  quiet "$bulkhead" twin xid 6 48 --dir "$twin"
  for attempt in $(seq 300); do
    quiet on_host "$bulkhead" heal
    grep -qE 'helped|failed' <<<"$out" && break
    sleep 0.1
  done
  shown on_host "$bulkhead" heal
  seen 'helped' "nobody new got the GPU, it was reset, computed on, and serves again"
  shown on_host "$bulkhead" incidents --all
  out=$(tr -s ' \n' ' ' <<<"$out")  # the table's column is narrower than the sentence
  seen 'closed: .*reset-gpu' "the incident is closed, with what mended it"
  quiet on_host "$bulkhead" lease list --all --json
  grep -q "$device" <<<"$out" || broken "vision's slice was not touched"
  claim "vision's slice was not touched"

  quiet as vision "$bulkhead" lease release "$lease"
  wants 0 "vision gives its slice back"
  kill -TERM "$daemon"
  for attempt in $(seq 200); do kill -0 "$daemon" 2>/dev/null || break; sleep 0.05; done
  [ ! -S "$dir/api.sock" ] || broken "SIGTERM ends the daemon in good order: its socket is gone"
  claim "SIGTERM ends the daemon in good order: its socket is gone"
  daemon=
  unset BULKHEAD_URL
fi

printf '\n%sEvery one of %s claims above was checked as it was made.%s\n' "$bold" "$claims" "$reset"
