#!/usr/bin/env bash
# The guard in programs of its own, over a small driver that knows for certain what is held.
cd "$(dirname "$0")/../.." && . tests/lib.sh
guard=$BIN/libbulkhead-guard.so
root=$work/root
mkdir -p "$root/dev" && touch "$root/dev/nvidiactl" "$root/dev/nvidia-uvm"
build() { "${CXX:-g++}" -std=c++20 -O1 -g1 -Wall -Wextra -I. "$@" || { not_ok "the test's own programs compile"; done_testing; }; }
build -fPIC -shared tests/guard/driver.cpp -o "$work/driver.so" &
build -fPIC -shared -fvisibility=hidden -Wl,-Bsymbolic tests/guard/cuda.cpp -Wl,-soname,libcuda.so.1 -o "$work/libcuda.so.580" &
build tests/guard/guard_test.cpp -pthread -o "$work/guard_test"
wait
export BULKHEAD_ROOT=$root TEST_PRELOAD=$guard:$work/driver.so BULKHEAD_GUARD_CUDA=$work/libcuda.so.580
scenario() { if out=$(timeout -k 5 1800 "$work/guard_test" "$2" 2>&1); then ok "$1${out:+ ($out)}"; else not_ok "$1" "$2 -> exit $?" "$out"; fi; }

if [ $# != 0 ]; then for name in "$@"; do scenario "$name" "$name"; done; done_testing; fi

check 'it needs libc and nothing else' bash -c '[ "$(readelf -d '"$guard"' | grep -c NEEDED)" = 1 ] && readelf -d '"$guard"' | grep -q "NEEDED.*libc.so.6"'
check 'its SONAME is libcuda.so.1' bash -c 'readelf -d '"$guard"' | grep -q "SONAME.*libcuda.so.1"'
same 'every entry point of the list is exported, and nothing else but the choke point' \
  "$( (grep "^cu" guard/preload/libcuda_symbols.txt; printf '%s\n' ioctl mmap mmap64 munmap bulkhead_guard_copy) | LC_ALL=C sort)" \
  "$(nm -D --defined-only "$guard" | awk '{print $3}' | LC_ALL=C sort)"

scenario 'past the cap the driver is out of memory, up to it every byte is to be had' cap
scenario 'what is charged is what the driver gave, rounding included' sizes
scenario 'a program sees its share as the size of the GPU' share
scenario 'freeing a parent, device or client gives back what hung below' cascade
scenario 'each GPU has its own cap' gpus
scenario 'memory with several handles is charged once, until the last is freed' duplicates
scenario 'exported memory stays charged, also past its exporter while somebody imports' exports
scenario 'memory lent by IPC stays charged while another process may have it' lent
scenario 'managed memory is charged by length, and refunded piece by piece' managed
scenario '16 threads allocate and free: never past the cap, nothing left over' threads
scenario 'of two or three that race for the last bytes exactly one gets them, 9000 times' last-bytes
scenario 'fork storms with exits, kills and leaks: never past the cap, nothing left over' fork-storm
scenario 'a child cannot allocate through its parent'"'"'s client' inherited
scenario 'vfork leaves the parent alone; exec uses its slot again' exec
scenario 'a full table charges on and never gives too much back' overflow
scenario '70000 pieces of memory fit the table' many
scenario 'a page of garbage, rewritten all the time, crashes nobody' hostile
scenario 'memory held from outside is not charged inside' outside
scenario 'a slice set by the tenant is counted; legacy allocations find no memory' counts
scenario 'without a free slot there is no memory; with one again there is' slots
scenario '256 processes take slots at once' at-once
scenario 'SIGKILL after any instruction of the guard leaves nothing behind and the neighbour in peace' killed
scenario 'libcuda.so.1 is the guard, and every call arrives as it was made' trampolines
scenario 'managed memory past the cap is out of memory to the program as well' managed-answer
scenario 'a closed gate holds launches, not captures, and not when its arbiter is silent' gate
scenario 'a driver library opened by another name is charged all the same' other-names
scenario 'a child that lost the descriptor finds the page by path' by-path
for bad in no-page unsealed small magic version words; do scenario "without a good page everything passes through ($bad)" $bad; done

plain() { (unset BULKHEAD_ROOT; exec "$@"); }
for program in "bash -c 'echo \$((6*7))'" "python3 -c 'import subprocess,threading,mmap; print(subprocess.check_output([\"echo\", \"42\"]).decode().strip())'" \
  "git --version" "ssh -V" "ls /" "sqlite3 :memory: 'select 42'"; do
  command -v "${program%% *}" >/dev/null || continue
  same "harmless in: ${program%% *}" "$(bash -c "$program" 2>&1; echo $?)" "$(LD_PRELOAD=$guard bash -c "$program" 2>&1; echo $?)"
done
done_testing
