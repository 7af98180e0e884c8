#!/usr/bin/env bash
# The hold from outside, over the twin's driver: what a tenant may take, ways around it, and arbiters that are killed.
cd "$(dirname "$0")/../.." && . tests/lib.sh
objects=$work/objects
mkdir -p "$objects"
sources='engine/hold/hold engine/hold/record engine/hold/processes engine/hold/exported core/ledger/ledger edge/rm/rm edge/seccomp/seccomp
  edge/process/process base/base base/fd base/text twin/state/state twin/rm/rm twin/rm/objects twin/rm/scheduler
  twin/rm/store tests/hold/hold_test'
compile() { $(command -v ccache) "${CXX:-g++}" -std=c++20 -O2 -g1 -Wall -Wextra -I. -c "$1.cpp" -o "$objects/$(tr / _ <<<"$1").o"; }
export -f compile
export objects
if ! { xargs -n1 -P"$(nproc)" bash -c 'compile "$1"' - <<<"$sources" &&
  "${CXX:-g++}" "$objects"/*.o -o "$work/hold_test" -lfmt -lpthread; } >"$work/log" 2>&1; then
  not_ok "the test's own program compiles" "$(tail -20 "$work/log")"
  done_testing
fi
export TEST_PRELOAD=$BIN/libbulkhead-twin-device.so
scenario() {
  local sentence=$1 out
  shift
  if out=$(timeout -k 5 1800 "$work/hold_test" "$@" 2>&1); then ok "$sentence${out:+ ($out)}"; else not_ok "$sentence" "$* -> exit $?" "$out"; fi
}
if [ $# != 0 ]; then scenario "$*" "$@"; done_testing; fi

scenario 'every byte up to the cap is to be had, past it the driver is out of memory' cap
scenario 'what is charged is what the driver gave, rounding and chosen handles included' sizes
scenario 'what a process had is to be had again as soon as it was waited for' processes
scenario 'a driver file that was closed gives back what it had, although it was borrowed' closed
scenario 'a child that inherited a driver file keeps what is charged for it' inherited
scenario 'likewise when the parent ended while no arbiter was there' inherited-meanwhile
scenario '8 threads allocate and free: the books and the driver agree' threads
scenario 'signals neither lose nor repeat a call' signals
scenario 'a thread with descriptors of its own hides nothing' unshared
scenario 'channel groups are found, held, and not moved by the tenant itself' groups
scenario 'a program sees its share as the size of the GPU' sight
scenario 'managed memory is charged by length, and refunded when it is looked at again' managed
scenario 'duplicated and exported bytes stay charged' exports
scenario 'exported memory stays charged beyond its maker until the last descriptor of it is closed' orphans
scenario 'wherever that descriptor is' orphans-hidden
scenario 'whatever becomes of the arbiter meanwhile' orphans-meanwhile
scenario 'other letters, older forms, legacy calls and calls behind a pointer are no way around' ways-around
scenario 'with no arbiter left the kernel refuses' orphan
if [ "$BULKHEAD_QUICK" = 1 ]; then
  scenario 'an arbiter killed at any system call leaves nothing half done: every 23rd' kill-each 23
  scenario 'arbiters killed one after the other: nothing lost, nothing counted twice' kill-storm 20
else
  scenario 'an arbiter killed at any system call leaves nothing half done: every one' kill-each 1
  scenario 'arbiters killed one after the other: nothing lost, nothing counted twice' kill-storm 1000
fi
done_testing
