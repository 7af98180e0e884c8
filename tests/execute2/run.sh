#!/usr/bin/env bash
# apply on other machines and over other roads: adoption, half-made instances, Ampere, chips without MIG, a mixed host, host files,
# units, the governor, and reboots between one apply and the next.
cd "$(dirname "$0")/../.." && . tests/lib.sh
bulkhead=$BIN/bulkhead
smi() { LD_LIBRARY_PATH=$twin/lib "$DEPS/usr/lib/nvidia/current/nvidia-smi" "$@"; }
up() {  # up PROFILE NAME
  twin=$work/twin-$2
  check "$1 comes up" "$bulkhead" twin up "$1" --dir "$twin"
  export BULKHEAD_ROOT=$twin/root BULKHEAD_NVML=$twin/lib/libnvidia-ml.so.1
}
down() { "$bulkhead" twin down --dir "$twin" >/dev/null 2>&1; }
look() { "$bulkhead" twin status --dir "$twin" --json | python3 -c '
import json, sys
s = json.load(sys.stdin)
for g in s["gpus"]:
    print(g["index"], g["mig"], g["power_limit_watts"], g["persistence"], g["clock_lock_mhz"], sorted((i["start"], i["profile"], len(i["compute"]), i["half_made"]) for i in g["instances"]))
for u in s["units"]: print(u)'
  grep -h . "$twin"/root/sys/devices/system/cpu/cpufreq/policy*/scaling_governor 2>/dev/null | sort | uniq -c
  (cd "$twin/root" && find etc boot -type f ! -name '*.new' -print0 | sort -z | xargs -0 sha256sum); }
node() { { printf 'apiVersion: bulkhead/v1\nkind: Node\n'; cat; } >"$work/$1.yaml"; }
owned() { sqlite3 "$twin/root/var/lib/bulkhead/journal.db" "SELECT count(*) FROM owned_instances o WHERE boot_id='$(cat "$twin/root/proc/sys/kernel/random/boot_id")'"; }

# ---- adoption: exactly the GPUs that a rule in MIG mode selects, whichever key selects them
up mixed mixed
for gpu in 0 1 2; do smi -i $gpu -mig 1; smi mig -i $gpu -cgi 19 -C; done >/dev/null
foreign=$(look)
for select in 'model: "*H100*"' 'pci_id: "10de:2330"' 'pci: "0000:ca:00.0"'; do
  node adopt <<<"gpus:
  - select: {$select}
    mode: mig
    layout: [1g.10gb]"
  # GPU 3 is an H100 as well and gets a slice of its own, but for the rule by address.
  exits "$select: without --adopt a foreign slice does not count" 0 "$bulkhead" plan -f "$work/adopt.yaml" --json
  says "$select: so another one would be made on gpu 2" 'gpu 2: create 1g.10gb' "$out"
  exits "$select: apply --adopt" 0 "$bulkhead" apply -f "$work/adopt.yaml" --yes --adopt
  says "$select: takes one instance over" '1 instance of somebody else is ours now' "$out"
  exits "$select: inventory" 0 "$bulkhead" inventory --json
  same "$select: ours is what the rule selects, the others' stay theirs" "$(grep -q 'pci: ' <<<"$select" && echo '[[0, false], [1, false], [2, true]]' || echo '[[0, false], [1, false], [2, true], [3, true]]')" "$(python3 -c '
import json, sys
print(json.dumps([[g["index"], i["ours"]] for g in json.load(sys.stdin)["gpus"] for i in g["mig"]["instances"]]))' <<<"$out")"
  exits "$select: a second apply has nothing to do" 0 "$bulkhead" apply -f "$work/adopt.yaml" --yes
  says "$select: and says so" 'nothing to do' "$out"
  exits "$select: rollback" 0 "$bulkhead" rollback --yes
  same "$select: leaves what was adopted" "$foreign" "$(look)"
  same "$select: as somebody else's" 0 "$(owned)"
done
for gpu in 0 1 2; do smi mig -i $gpu -dci; smi mig -i $gpu -dgi; smi -i $gpu -mig 0; done >/dev/null
foreign=$(look)
# A host of two generations and a chip of each under one file.
node mixed <<<'gpus:
  - select: {model: "*A100*"}
    mode: mig
    layout: [3g.40gb, 1g.10gb]
  - select: {model: "*H100*"}
    mode: mig
    layout: [4g.40gb, 1g.10gb+me]'
exits "mixed: two generations under one file" 0 "$bulkhead" apply -f "$work/mixed.yaml" --yes
exits "mixed: verify" 0 "$bulkhead" verify -f "$work/mixed.yaml"
exits "mixed: rollback" 0 "$bulkhead" rollback --yes
same "mixed: as before" "$foreign" "$(look)"
down

# ---- an instance made half
up h100-vm half
original=$(look)
node half <<<'gpus:
  - select: {all: true}
    mode: mig
    layout: [3g.40gb, 2g.20gb]'
"$bulkhead" twin break half-made-gi --gpu 0 --times 1 --dir "$twin" >/dev/null
exits "half: apply over a half-made instance fails" 2 "$bulkhead" apply -f "$work/half.yaml" --yes
says "half: the host is as before" 'The host is as before' "$out"
same "half: nothing is left, the half-made one neither" "$original" "$(look)"
same "half: nothing is called ours" 0 "$(owned)"
"$bulkhead" twin mend --dir "$twin" >/dev/null
exits "half: with a sound driver it works" 0 "$bulkhead" apply -f "$work/half.yaml" --yes
exits "half: rollback" 0 "$bulkhead" rollback --yes
same "half: as before" "$original" "$(look)"

# ---- a reboot between two applies: on Hopper mode and instances are gone, and the journal's rows of that boot with them
exits "reboot: apply" 0 "$bulkhead" apply -f "$work/half.yaml" --yes
applied=$(look)
exits "reboot: the machine reboots" 0 "$bulkhead" twin reboot --dir "$twin"
same "reboot: Hopper forgot everything" "$original" "$(look)"
exits "reboot: verify says so" 1 "$bulkhead" verify -f "$work/half.yaml"
same "reboot: nothing is ours on this boot" 0 "$(owned)"
# Somebody else now makes an instance where ours was: the old row must not make it ours.
smi -i 0 -mig 1 >/dev/null; smi mig -i 0 -cgi 9 -C >/dev/null
same "reboot: the namesake of an old instance is somebody else's" false "$("$bulkhead" inventory --json | python3 -c 'import json,sys; print(str(json.load(sys.stdin)["gpus"][0]["mig"]["instances"][0]["ours"]).lower())')"
theirs=$(look)
exits "reboot: a rollback of the run before, which turned MIG on, is refused" 1 "$bulkhead" rollback --yes
says "reboot: because of it" '1 instance of somebody else is on it' "$out"
same "reboot: which stays as it is" "$theirs" "$(look)"
smi mig -i 0 -dci >/dev/null; smi mig -i 0 -dgi >/dev/null
exits "reboot: without it the rollback goes on" 0 "$bulkhead" rollback --yes
says "reboot: and finds our instances gone" 'gone already' "$("$bulkhead" history --json)"
same "reboot: and the mode off" "$original" "$(look)"
exits "reboot: apply again" 0 "$bulkhead" apply -f "$work/half.yaml" --yes
same "reboot: makes everything again" "$applied" "$(look)"
same "reboot: as ours" 2 "$(owned)"
exits "reboot: once more" 0 "$bulkhead" twin reboot --dir "$twin"
exits "reboot: apply with no rollback between" 0 "$bulkhead" apply -f "$work/half.yaml" --yes
same "reboot: makes everything again then as well" "$applied" "$(look)"
exits "reboot: rollback" 0 "$bulkhead" rollback --yes
same "reboot: takes back what this boot has" "$original" "$(look)"
# Killed, then rebooted: the step in flight is settled by what the new boot shows.
"$bulkhead" twin break hang-call --function nvmlDeviceCreateGpuInstanceWithPlacement --delay-ms 60000 --times 1 --dir "$twin" >/dev/null
"$bulkhead" apply -f "$work/half.yaml" --yes >"$work/killed.txt" 2>&1 & first=$!
for _ in $(seq 100); do grep -q 'create' "$work/killed.txt" && break; sleep 0.05; done
kill -9 $first; wait $first 2>/dev/null
"$bulkhead" twin mend --dir "$twin" >/dev/null; "$bulkhead" twin reboot --dir "$twin" >/dev/null
exits "reboot: after a kill and a reboot apply goes through" 0 "$bulkhead" apply -f "$work/half.yaml" --yes
says "reboot: and tells what became of the step in flight" 'cut off in' "$out"
same "reboot: with the same end" "$applied" "$(look)"
down

# ---- Ampere: the mode changes by a reset of an idle GPU, and stays over a reboot
up dgx-a100 a100
original=$(look)
node a100 <<<'gpus:
  - select: {index: "0"}
    mode: mig
    layout: [3g.40gb, 2g.20gb]'
busy=$("$bulkhead" twin attach 0 --name train --memory 1GiB --dir "$twin")
exits "ampere: a busy GPU is refused" 1 "$bulkhead" apply -f "$work/a100.yaml" --yes
says "ampere: with its holder" "$busy" "$out"
same "ampere: untouched" "$original" "$(look)"
"$bulkhead" twin detach --all --dir "$twin" >/dev/null
exits "ampere: an idle one is planned" 0 "$bulkhead" plan -f "$work/a100.yaml"
says "ampere: the reset is said" 'resets the GPU' "$out"
exits "ampere: and applied" 0 "$bulkhead" apply -f "$work/a100.yaml" --yes
applied=$(look)
exits "ampere: reboot" 0 "$bulkhead" twin reboot --dir "$twin"
says "ampere: the mode stays" "^0 .*'current': True" "$(look)"
exits "ampere: apply makes the instances again" 0 "$bulkhead" apply -f "$work/a100.yaml" --yes
same "ampere: as they were" "$applied" "$(look)"
down

# ---- a chip without MIG
up l40s-4 l40s
original=$(look)
node l40s <<<'gpus:
  - select: {model: "*L40S*"}
    mode: mig
    layout: [1g.10gb]'
exits "l40s: MIG is refused" 1 "$bulkhead" apply -f "$work/l40s.yaml" --yes
says "l40s: with what there is instead" 'mode: share|exclusive' "$out"
same "l40s: untouched" "$original" "$(look)"
down

# ---- the host: kernel arguments, module options, units, the governor
up dgx-h100 host
"$bulkhead" twin break fabric-lost --dir "$twin" >/dev/null
original=$(look)
node host <<<'host:
  kernel_args: [pci=realloc=on, bulkhead.test=1]
  cpu_governor: performance
  units: [{name: nvidia-fabricmanager.service, enabled: true, active: true}]
  modprobe: [{name: bulkhead-test.conf, lines: ["options nvidia NVreg_EnableGpuFirmware=1"]}]'
exits "host: plan" 0 "$bulkhead" plan -f "$work/host.yaml"
says "host: says that a reboot is owed" '[Rr]eboot' "$out"
exits "host: apply" 0 "$bulkhead" apply -f "$work/host.yaml" --yes
says "host: ends with an empty second plan" 'second plan is empty' "$out"
says "host: and says that a reboot is owed" '[Rr]eboot' "$out"
exits "host: Fabric Manager runs" 0 "$bulkhead" twin status --dir "$twin" --json
same "host: started through systemd" "True" "$(python3 -c 'import json,sys; print([u["active"] for u in json.load(sys.stdin)["units"] if "fabric" in u["name"]][0])' <<<"$out")"
says "host: the boot menu has the arguments" 'pci=realloc=on bulkhead.test=1' "$(cat "$twin/root/boot/grub/grub.cfg")"
says "host: the initramfs has the options" 'NVreg_EnableGpuFirmware=1' "$(cat "$twin"/root/boot/initrd.img-*)"
same "host: every CPU has the governor" performance "$(grep -h . "$twin"/root/sys/devices/system/cpu/cpufreq/policy*/scaling_governor | sort -u)"
exits "host: a second plan is empty before the reboot" 0 "$bulkhead" apply -f "$work/host.yaml" --yes
says "host: nothing to do" 'nothing to do' "$out"
says "host: but the reboot is owed still" '[Rr]eboot' "$out"
exits "host: reboot" 0 "$bulkhead" twin reboot --dir "$twin"
says "host: the kernel has them" 'pci=realloc=on bulkhead.test=1' "$(cat "$twin/root/proc/cmdline")"
exits "host: verify finds the governor forgotten" 1 "$bulkhead" verify -f "$work/host.yaml"
says "host: that alone" 'governor' "$out"
exits "host: apply sets it again" 0 "$bulkhead" apply -f "$work/host.yaml" --yes
exits "host: verify" 0 "$bulkhead" verify -f "$work/host.yaml"
if grep -qi 'reboot' <<<"$out"; then not_ok "host: no reboot is owed any more" "$out"; else ok "host: no reboot is owed any more"; fi
exits "host: rollback of the governor" 0 "$bulkhead" rollback --yes
exits "host: rollback of the rest" 0 "$bulkhead" rollback --yes
exits "host: reboot without them" 0 "$bulkhead" twin reboot --dir "$twin"
if grep -q 'bulkhead.test' "$twin/root/proc/cmdline"; then not_ok "host: the arguments are gone" "$(cat "$twin/root/proc/cmdline")"; else ok "host: the arguments are gone"; fi
check "host: and the file of module options" test ! -e "$twin/root/etc/modprobe.d/bulkhead-test.conf"
if grep -q 'EnableGpuFirmware=1' "$twin"/root/boot/initrd.img-*; then not_ok "host: out of the initramfs too"; else ok "host: out of the initramfs too"; fi
down
done_testing
