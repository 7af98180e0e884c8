#!/usr/bin/env bash
# Programs that use CUDA on a twin: what they get, what NVML says of them, and whom their time and memory are taken from.
cd "$(dirname "$0")/../.." && . tests/lib.sh
twin=$work/twin
bulkhead=$BIN/bulkhead
smi=$DEPS/usr/lib/nvidia/current/nvidia-smi
pynvml=$DEPS/usr/lib/python3/dist-packages
in_twin() { timeout -k 5 120 "$bulkhead" twin run --dir "$twin" -- "$@"; }
field() { sed -n "s/.*\"$2\": \"\{0,1\}\([^,\"}]*\).*/\1/p" <<<"$1" | head -1; }
waits_for() { local i; for i in $(seq 100); do grep -q "$1" "$2" 2>/dev/null && return 0; sleep 0.05; done; return 1; }

same 'it exports what libcuda 580.159.04 exports, and nothing else' \
  "$(sed -n 's/^ROW(\(.*\))/\1/p' twin/cuda/symbols.inc | LC_ALL=C sort)" \
  "$(nm -D --defined-only "$BIN/libcuda.so.1" | awk '{print $3}' | grep -v '^cudbg' | LC_ALL=C sort)"
check 'its SONAME is libcuda.so.1 and it needs no C++ library' bash -c \
  "readelf -d '$BIN/libcuda.so.1' | grep -q 'SONAME.*libcuda.so.1' && ! readelf -d '$BIN/libcuda.so.1' | grep -q 'NEEDED.*stdc'"
exits 'without a twin there is no device' 1 env LD_LIBRARY_PATH="$BIN" "$BIN/cuda_alloc"
says 'and the program is told so' '"CUDA_ERROR_NO_DEVICE"' "$out"

check 'the twin comes up' "$bulkhead" twin up dgx-h100 --dir "$twin"

scenario() { if out=$(in_twin "$BIN/cuda_check" "$2" 2>&1); then ok "$1"; else not_ok "$1" "$2 -> exit $?" "$out"; fi; }
scenario 'entry points are found by version and by default stream' lookup
scenario 'what was written to device memory is read back' contents
scenario 'streams, events and host functions keep their order; a full channel waits' streams
scenario 'graphs are captured, joined and launched; their memory is theirs until trimmed' graphs
scenario 'past the end of memory every way to allocate is refused, and what was goes on' refused
scenario 'contexts: current, stacked, destroyed with all they had; 518 MiB each' contexts
scenario 'after a fork the child is not initialised, and the parent goes on' forked
scenario 'a fork before the first call is a process like any other' forked-first
scenario 'an illegal address ends its context until that is reset' faulted
scenario 'eight threads at once lose nothing' threads
scenario 'physical memory is mapped, retained and released' vmm

# ---- devices
scenario 'devices have names, ids and sizes' devices
same 'the devices are those of nvidia-smi, in its order' "$(in_twin "$smi" --query-gpu=uuid --format=csv,noheader 2>/dev/null)" \
  "$(sed -n 's/.* \(GPU-.*\)/\1/p' <<<"$out")"
seen() { CUDA_VISIBLE_DEVICES=$1 in_twin "$BIN/cuda_check" devices 2>&1 | sed -n 's/.* \(GPU-.*\)/\1/p' | tr '\n' ' '; }
uuids=($(sed -n 's/.* \(GPU-.*\)/\1/p' <<<"$out"))
same 'CUDA_VISIBLE_DEVICES takes indices, in its order' "${uuids[3]} ${uuids[1]} " "$(seen 3,1)"
same 'and uuids, whole or their beginning' "${uuids[5]} ${uuids[0]} " "$(seen "${uuids[5]},${uuids[0]:0:12}")"
same 'and ends at what is neither' "${uuids[2]} " "$(seen 2,-1,3)"

# ---- the check before a GPU's next tenant: its kernels run here too, and one bit is enough
checked() { in_twin env BULKHEAD_TWIN="$twin" "$bulkhead" check-gpu --device "$1" --cuda libcuda.so.1 2>&1; }
exits 'a GPU that computes right passes the check' 0 checked "${uuids[4]}"
says 'on all of its multiprocessors' 'double precision: [0-9]+ rounds on 132 of 132 multiprocessors, every result right' "$out"
says 'and its tensor cores' 'tensor cores: [0-9]+ rounds on 132 of 132 multiprocessors, every result right' "$out"
"$bulkhead" twin break computes-wrong --gpu 4 --count 17 --dir "$twin" >/dev/null
exits 'one with a multiprocessor that gives wrong bits does not' 1 checked "${uuids[4]}"
says 'which one is said' 'results wrong, on multiprocessor 17 ' "$out"
exits 'its neighbour does' 0 checked "${uuids[5]}"
"$bulkhead" twin mend computes-wrong --dir "$twin" >/dev/null

# ---- memory, as NVML sees it
in_twin "$BIN/cuda_alloc" --hold 20 malloc >"$work/alloc" &
waits_for malloc "$work/alloc"
apps=$(in_twin "$smi" --query-compute-apps=pid,name,used_memory --format=csv,noheader 2>&1)
says 'nvidia-smi sees the program with its context and its 64 MiB' 'cuda_alloc, 582 MiB' "$apps"
pid=${apps%%,*}
check 'by its pid' test "$(cat "/proc/$pid/comm")" = cuda_alloc
if [ -f "$pynvml/pynvml.py" ]; then
  out=$(PYTHONPATH=$pynvml in_twin python3 -c 'from pynvml import *
nvmlInit()
for p in nvmlDeviceGetComputeRunningProcesses(nvmlDeviceGetHandleByIndex(0)): print(p.pid, p.usedGpuMemory >> 20)' 2>&1)
  same 'pynvml sees the same' "$pid 582" "$out"
fi
kill -9 "$pid"
wait
sleep 0.2 # NVML looks at what programs hold ten times a second
apps=$(in_twin "$smi" --query-compute-apps=pid,used_memory --format=csv,noheader 2>&1)
same 'killed, it is gone from NVML with all it had' '' "$apps"
out=$(in_twin "$BIN/cuda_alloc" 2>&1)
same 'every way to allocate answers' 'malloc small pitch managed host array mipmap async pool vmm export opened ipc graph context stack end' \
  "$(sed -n 's/.*"path": "\([a-z]*\)".*"code": 0,.*/\1/p' <<<"$out" | tail -n +2 | tr '\n' ' ' | sed 's/ $//')"
out=$(in_twin "$BIN/cuda_alloc" --bytes $((1 << 30)) --until-refused | tail -1)
says 'all of an H100 but its context is to be had' '"CUDA_ERROR_OUT_OF_MEMORY".*"bytes": 83751862272, "free": [0-9]{1,9},' "$out"
exits 'a static program meets no driver unless somebody performs its calls' 3 in_twin "$BIN/rm_static"
exits 'without a driver file it says so' 1 env BULKHEAD_ROOT="$work/nowhere" "$BIN/rm_static"

# ---- time
out=$(in_twin "$BIN/cuda_spin" --us 100 --fault 2>&1)
says 'an illegal address ends the program that made it' '"CUDA_ERROR_ILLEGAL_ADDRESS", "code": 700' "$out"
out=$(in_twin "$BIN/cuda_spin" --us 1000 --seconds 0.5)
check "alone it gets its time: $(field "$out" busy)" awk "BEGIN{exit !($(field "$out" busy) > 0.2)}"
began=$(date +%s%N)
in_twin "$BIN/cuda_spin" --us 1000 --seconds 1.5 >"$work/one" &
in_twin "$BIN/cuda_spin" --us 1000 --seconds 1.5 --graph 4 >"$work/two" &
wait
took_us=$((($(date +%s%N) - began) / 1000))
one=$(field "$(cat "$work/one")" gpu_us) two=$(field "$(cat "$work/two")" gpu_us)
check "two together get no more than one GPU: $one + $two us in $took_us" test $((one + two)) -lt "$took_us"
check 'and each gets something' test "$one" -gt 0 -a "$two" -gt 0
out=$(in_twin "$BIN/cuda_spin" --us 200 --rate 100 --seconds 0.5)
says 'requests have latencies' '"requests": 50, "p50_ms": [0-9.]+, "p90_ms"' "$out"
"$bulkhead" twin down --dir "$twin" >/dev/null

# ---- a clock that moves by steps
check 'a stepped twin comes up' "$bulkhead" twin up h100-vm --stepped --dir "$twin"
in_twin "$BIN/cuda_spin" --us 40000 --depth 2 --seconds 0.01 >"$work/stepped" &
sleep 0.5
same 'a kernel does not end while time stands still' '' "$(cat "$work/stepped")"
for _ in 1 2 3 4 5 6 7 8 9 10; do "$bulkhead" twin step 20ms --dir "$twin" >/dev/null; done
check 'and ends when enough of it has passed' waits_for kernels "$work/stepped"
wait
"$bulkhead" twin run --dir "$twin" -- sh -c 'trap "echo told >$0; exit 9" TERM; echo up >$0; while :; do sleep 0.1; done' "$work/told" &
runs=$!
waits_for up "$work/told"
kill -TERM $runs
wait $runs
same 'whoever ends `twin run` ends its program, whose exit code it has' '9 told' "$? $(cat "$work/told")"
done_testing
