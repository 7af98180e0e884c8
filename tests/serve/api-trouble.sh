#!/usr/bin/env bash
# A full and a read-only disk, a driver that hangs, a clock that jumps.
cd "$(dirname "$0")/../.." && . tests/serve/lib.sh
work=$(mktemp -d "${TMPDIR:-/tmp}"/bulkhead-test.XXXXXX)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
suite() {
  local log=$work/log
  python3 tests/serve/trouble.py "$@" 2>&1 | tee "$log"
  local closing; closing=$(grep -aE "^[0-9]+ passed, [0-9]+ failed$" "$log" | tail -1)
  read -r p _ f _ <<<"${closing:-0 passed, 1 failed}"
  passed=$((passed + p)) failed=$((failed + f))
}
suite disk
suite driver
if gcc -shared -fPIC -O1 -o "$work/clock.so" tests/serve/clock.c -ldl; then suite clock "$work/clock.so"; else failed=$((failed + 1)); echo "not ok - the clock shim builds"; fi
printf "%s passed, %s failed\n" "$passed" "$failed"
[ "$failed" = 0 ]
