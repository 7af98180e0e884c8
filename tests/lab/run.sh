#!/usr/bin/env bash
# The lab: bulkhead on real kernels, in machines that QEMU emulates. tests/lab/run.sh --list shows the scenarios.
#   tests/lab/run.sh [SCENARIO...]   BULKHEAD_QUICK=1 runs the fast set when none is named
cd "$(dirname "$0")/../.." || exit 2
export BIN=${BIN:-$PWD/build/bin} LC_ALL=C.UTF-8
for tool in qemu-system-x86_64 busybox depmod mke2fs xz python3; do
  command -v "$tool" >/dev/null && continue
  # Nothing is counted: a machine without QEMU says nothing about bulkhead.
  printf 'skipped: the lab needs %s, which is not here (./do installs it where apt can)\n0 passed, 0 failed\n' "$tool"
  exit 0
done
set=full
[ "${BULKHEAD_QUICK:-0}" = 1 ] && set=fast
exec nice -n 5 python3 -B tests/lab/lab/lab.py --set "$set" "$@"
