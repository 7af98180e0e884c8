#!/usr/bin/env bash
# kill -9 anywhere: every point with BULKHEAD_QUICK=0, some of each kind otherwise. Needs root for strace and mounts.
cd "$(dirname "$0")/../.." && . tests/lib.sh
smi=$DEPS/usr/lib/nvidia/current/nvidia-smi
if [ "$(id -u)" != 0 ]; then
  echo "# crash: needs root (strace, a mount namespace for systemctl): not run"
  printf '0 passed, 0 failed\n'
  exit 0
fi
how=()
[ "$BULKHEAD_QUICK" = 1 ] && how=(--quick)
python3 tests/crash/crash.py "$BIN/bulkhead" "$smi" "$work" "${how[@]}"
status=$?
exit $status
