#!/usr/bin/env bash
# Software slices on a twin: memory caps, time slices, ceilings, and what dies.
cd "$(dirname "$0")/../.." && . tests/lib.sh
if [ "$(id -u)" != 0 ]; then
  echo "# share: needs root (a seccomp listener without no_new_privs, other users): not run"
  printf '0 passed, 0 failed\n'
  exit 0
fi
chmod 755 "$work"  # another user is a tenant too
"$BIN/bulkhead" twin up dgx-h100 --dir "$work/twin" >/dev/null || { not_ok "the twin comes up"; done_testing; }
"$BIN/bulkhead" twin run --dir "$work/twin" -- python3 tests/share/share.py "$BIN/bulkhead" "$work/twin"
status=$?
exit $status
