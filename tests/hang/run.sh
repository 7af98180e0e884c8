#!/usr/bin/env bash
# A driver that hangs while somebody only looks: each verb ends by itself and says which call hangs.
cd "$(dirname "$0")/../.." && . tests/lib.sh
twin=$work/twin
bulkhead=$BIN/bulkhead
check "the twin comes up" "$bulkhead" twin up dgx-h100 --dir "$twin"
export BULKHEAD_ROOT=$twin/root BULKHEAD_NVML=$twin/lib/libnvidia-ml.so.1 BULKHEAD_DRIVER_TIMEOUT=1
printf 'apiVersion: bulkhead/v1\nkind: Node\ngpus:\n  - select: {index: "0"}\n    mode: share\n    power_limit_w: 500\n' >"$work/node.yaml"
hangs() { "$bulkhead" twin break hang-call --function "$@" --dir "$twin" >/dev/null; }
mended() { "$bulkhead" twin mend --dir "$twin" >/dev/null; }

hangs nvmlDeviceGetPersistenceMode --gpu 3
for verb in "inventory" "inventory --json" "doctor" "plan -f $work/node.yaml" "verify -f $work/node.yaml" "apply -f $work/node.yaml --yes"; do
  exits "${verb%% -*} with a hung call exits 2" 2 timeout 20 "$bulkhead" $verb
  says "names the call, how long and the GPU" 'driver call nvmlDeviceGetPersistenceMode has not answered for 1 s \(gpu 3\)' "$out"
  says "and says what to type next" 'dmesg .*xid' "$out"
done
mended
exits "a call that is only slow is waited for" 0 bash -c "'$bulkhead' twin break hang-call --function nvmlDeviceGetPersistenceMode --gpu 3 --delay-ms 400 --times 1 --dir '$twin' >/dev/null && '$bulkhead' inventory"
mended
hangs nvmlInit_v2
began=$(date +%s)
exits "a driver that hangs as it starts is given up as well" 2 timeout 20 "$bulkhead" inventory
says "after three times the time: it may be initialising GPUs" 'nvmlInit_v2 has not answered for 3 s;' "$out"
check "and not later" test $(($(date +%s) - began)) -le 6
mended
exits "once it answers again, so does inventory" 0 "$bulkhead" inventory
done_testing
