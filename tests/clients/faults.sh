#!/usr/bin/env bash
# Each surface fails alone, and a killed client leaves a driver that works.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
smi=$DEPS/usr/lib/nvidia/current/nvidia-smi
fault() { "$BIN/bulkhead" twin break "$@" --dir "$twin" >/dev/null; }
mend() { "$BIN/bulkhead" twin mend --dir "$twin" >/dev/null; }
twin_up dgx-h100

fault fail-call --function nvmlDeviceGetName --code 15 --times 1
run "$smi" -L
says "a planted failure is answered once" 'GPU is lost'
run "$smi" -L
exits "and only once" 0

fault lost-from-nvml --gpu 3
run "$smi" -L
is "a GPU lost from NVML is not enumerated" 7 "$(grep -c '^GPU ' <<<"$output")"
if [ -d "$twin/root/sys/bus/pci/devices/0000:61:00.0" ]; then ok "but still on PCI"; else not_ok "but still on PCI" "$(ls "$twin/root/sys/bus/pci/devices" | head -50)"; fi
mend

"$smi" -i 0 -mig 1 >/dev/null
for when in kill-before kill-after; do
  fault $when --function nvmlDeviceCreateGpuInstance --times 1
  run "$smi" mig -i 0 -cgi 19
  exits "$when: the client dies of SIGKILL in the call" 137
  run "$smi" mig -i 0 -lgi
  if [ $when == kill-before ]; then exits "$when: no instance was made" 6; else says "$when: the instance stands" 'MIG 1g\.10gb'; fi
done
run "$smi" mig -i 0 -dgi
exits "and the driver still works" 0

fault half-made-gi --times 1
run "$smi" mig -i 0 -cgi 9
if [ "$code" -ne 0 ]; then ok "a half-made instance is an error"; else not_ok "a half-made instance is an error" "$output"; fi
run "$smi" mig -i 0 -lgi
says "which leaves a remnant" 'MIG 3g\.40gb'
run "$smi" mig -i 0 -cci
if [ "$code" -ne 0 ]; then ok "that takes no compute instance"; else not_ok "that takes no compute instance" "$output"; fi
run "$smi" mig -i 0 -dgi
exits "but can be destroyed" 0

fault hang-call --function nvmlDeviceGetName
run timeout 2 "$smi" -L
exits "a hung call hangs" 124
mend
"$smi" mig -i 0 -cgi 9 >/dev/null
fault slow-destroy --delay-ms 800 --times 1
start=$(date +%s%N)
run "$smi" mig -i 0 -dgi
exits "a slow destroy succeeds" 0
if [ $((($(date +%s%N) - start) / 1000000)) -ge 800 ]; then ok "and is slow"; else not_ok "and is slow" "too quick"; fi
