#!/usr/bin/env bash
# The twin's library against the real one's symbol list and the vendor's header, and its cost.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
library=$BIN/libnvidia-ml.so.1
symbols() { nm -D --defined-only "$1" | awk '$2 == "T" { print $3 }' | sort; }

symbols "$library" >"$scratch/ours"
real=$(find "$DEPS/usr/lib" -name 'libnvidia-ml.so.5*' | head -1)
if [ -n "$real" ]; then
  symbols "$real" | grep '^nvml' >"$scratch/real"
  is "every function that the real 535 library exports is there ($(wc -l <"$scratch/real"))" "" "$(comm -23 "$scratch/real" "$scratch/ours" | xargs)"
else
  not_ok "the real library is unpacked" "nothing under $DEPS/usr/lib"
fi
grep -oE 'DECLDIR nvml[A-Za-z0-9_]+' "$DEPS/usr/include/nvml.h" | awk '{ print $2 }' | sort -u >"$scratch/header"
is "every function that nvml.h declares is there ($(wc -l <"$scratch/header"))" "" "$(comm -23 "$scratch/header" "$scratch/ours" | xargs)"
newer="nvmlDeviceGetMarginTemperature nvmlDeviceGetGpuInstanceProfileInfoByIdV nvmlDeviceGetCurrentClocksEventReasons nvmlDeviceGetGpuFabricInfoV nvmlDeviceGetPlatformInfo nvmlDeviceGetPdi nvmlDeviceGetRepairStatus nvmlGpmMigSampleGet nvmlDeviceGetTemperatureV nvmlDeviceGetCapabilities nvmlSystemGetDriverBranch"
is "what clients of the 12 and 13 drivers call is there" "" "$(comm -23 <(tr ' ' '\n' <<<"$newer" | sort) "$scratch/ours" | xargs)"
is "nothing but the vendor's names leaks out" "" "$(grep -v '^nvml' "$scratch/ours" | xargs)"
is "the library calls itself libnvidia-ml.so.1" "libnvidia-ml.so.1" "$(objdump -p "$library" | awk '$1 == "SONAME" { print $2 }')"
is "it needs glibc alone" "" "$(objdump -p "$library" | awk '$1 == "NEEDED" { print $2 }' | grep -vE '^(libc|libm|ld-linux-x86-64)\.so' | xargs)"

twin_up dgx-h100
cat >"$scratch/cost.py" <<'PY'
import ctypes, time, sys
# NULL handles and NULL outputs through every exported function: an answer, never a crash.
library = ctypes.CDLL(sys.argv[1])
start = time.perf_counter(); library.nvmlInit_v2(); first = time.perf_counter() - start
start = time.perf_counter()
for _ in range(50): library.nvmlShutdown(); library.nvmlInit_v2()
again = (time.perf_counter() - start) / 50
count = ctypes.c_uint()
start = time.perf_counter()
for _ in range(2000): library.nvmlDeviceGetCount_v2(ctypes.byref(count))
call = (time.perf_counter() - start) / 2000
print(f"{first*1e6:.0f} {again*1e6:.0f} {call*1e6:.1f}")
wrong = []
for name in open(sys.argv[2]).read().split():
    if name in ("nvmlInit", "nvmlInit_v2", "nvmlInitWithFlags", "nvmlShutdown", "nvmlErrorString"): continue
    code = getattr(library, name)(None, None, None, None, None, None)
    if code == 0 or code not in (2, 3, 4, 6): wrong.append(f"{name}={code}")
print(" ".join(wrong))
PY
run python3 "$scratch/cost.py" "$twin/lib/libnvidia-ml.so.1" "$scratch/ours"
exits "every exported function survives NULL for every argument" 0
is "and refuses it" "" "$(sed -n 2p <<<"$output")"
read -r first again call < <(sed -n 1p <<<"$output") || true
echo "# nvmlInit: $first us the first time, $again us again with nvmlShutdown; one call through Python: $call us"
if [ "${again:-99999}" -lt 1000 ]; then ok "nvmlInit takes less than a millisecond"; else not_ok "nvmlInit takes less than a millisecond" "$again us"; fi
