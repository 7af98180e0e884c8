#!/usr/bin/env bash
# The distribution's python3-pynvml against the twin.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
packages=$DEPS/usr/lib/python3/dist-packages
[ -f "$packages/pynvml.py" ] || { echo "# no pynvml in $packages"; exit 1; }
twin_up dgx-h100
"$BIN/bulkhead" inventory --json >"$scratch/host.json"
cat >"$scratch/client.py" <<'PY'
import json, sys, threading
from pynvml import *

host = json.load(open(sys.argv[1]))
def check(sentence, holds):
    print(("ok - " if holds else "not ok - ") + sentence)

def code_of(function, *arguments):
    try:
        function(*arguments)
        return 0
    except NVMLError as error:
        return error.value

check("before nvmlInit every call is uninitialised (1)", code_of(nvmlDeviceGetCount) == 1)
nvmlInit()
check("the driver's version is the profile's", nvmlSystemGetDriverVersion() == "580.159.04")
boards = [nvmlDeviceGetHandleByIndex(i) for i in range(nvmlDeviceGetCount())]
check("as many boards as in bulkhead's inventory, with its UUIDs", [nvmlDeviceGetUUID(b) for b in boards] == [g["uuid"] for g in host["gpus"]])
check("memory is that of a real H100", nvmlDeviceGetMemoryInfo(boards[0]).total == 85520809984)
check("power limits are those of a real H100", nvmlDeviceGetPowerManagementLimitConstraints(boards[0]) == [200000, 700000])
check("an index too many is an invalid argument (2)", code_of(nvmlDeviceGetHandleByIndex, 8) == 2)
check("a UUID of nobody is not found (6)", code_of(nvmlDeviceGetHandleByUUID, b"GPU-0") == 6)

gpu = boards[5]
check("MIG goes on at once", nvmlDeviceSetMigMode(gpu, 1) == 0 and nvmlDeviceGetMigMode(gpu) == [1, 1])
gi = nvmlDeviceCreateGpuInstance(gpu, 9)
info = nvmlGpuInstanceGetInfo(gi)
check("the first 3g lies at 0:4 as GPU instance 1", (info.id, info.placement.start, info.placement.size) == (1, 0, 4))
ci = nvmlGpuInstanceCreateComputeInstance(gi, 2)
slice = nvmlDeviceGetMigDeviceHandleByIndex(gpu, 0)
uuid = nvmlDeviceGetUUID(slice)
check("the slice is found by its UUID", nvmlDeviceGetName(nvmlDeviceGetHandleByUUID(uuid.encode())).endswith("MIG 3g.40gb"))
check("a slice has 40448 MiB", nvmlDeviceGetMemoryInfo(slice).total == 40448 << 20)
check("the GPU instance cannot go while the compute instance stands (19)", code_of(nvmlGpuInstanceDestroy, gi) == 19)
nvmlComputeInstanceDestroy(ci)
check("its old handle is stale (2)", code_of(nvmlDeviceGetUUID, slice) == 2)
check("so is the compute instance's (2)", code_of(nvmlComputeInstanceDestroy, ci) == 2)
ci = nvmlGpuInstanceCreateComputeInstance(gi, 2)
check("the slice that comes back has the same UUID", nvmlDeviceGetUUID(nvmlDeviceGetMigDeviceHandleByIndex(gpu, 0)) == uuid)
nvmlComputeInstanceDestroy(ci)
nvmlGpuInstanceDestroy(gi)
nvmlDeviceSetMigMode(gpu, 0)

events = nvmlEventSetCreate()
nvmlDeviceRegisterEvents(boards[2], nvmlEventTypeXidCriticalError, events)
check("waiting for an event that does not come times out (10)", code_of(nvmlEventSetWait_v2, events, 20) == 10)
import subprocess
subprocess.run([sys.argv[2], "twin", "xid", *sys.argv[4:], "--dir", sys.argv[3]], check=True, stdout=subprocess.DEVNULL)
event = nvmlEventSetWait_v2(events, 2000)
check("an XID reaches the event set", (event.eventType, event.eventData) == (nvmlEventTypeXidCriticalError, 79))

errors = []
def hammer():
    try:
        for _ in range(300):
            nvmlDeviceGetPowerUsage(boards[1])
    except NVMLError as error:
        errors.append(error)
threads = [threading.Thread(target=hammer) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
check("four threads at once get answers", not errors)
nvmlShutdown()
check("after nvmlShutdown calls are uninitialised again (1)", code_of(nvmlDeviceGetCount) == 1)
PY
xid_arguments=(2 79)
run env PYTHONPATH="$packages" python3 "$scratch/client.py" "$scratch/host.json" "$BIN/bulkhead" "$twin" "${xid_arguments[@]}"
while IFS= read -r line; do
  case $line in
    "ok - "*) ok "${line#ok - }" ;;
    "not ok - "*) not_ok "${line#not ok - }" "see the script" ;;
  esac
done <<<"$output"
if [ "$code" -ne 0 ]; then not_ok "the client runs to its end" "$output"; fi
