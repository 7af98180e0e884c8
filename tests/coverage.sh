#!/usr/bin/env bash
# Line coverage of core/ by the unit tests; fails below 90 %.
set -euo pipefail
cd "$(dirname "$0")/.."
cmake --preset coverage >/dev/null
quietly() { "$@" >build/coverage/last.log 2>&1 || { tail -20 build/coverage/last.log; printf 'not ok - %s\n0 passed, 1 failed\n' "$*"; exit 1; }; }
quietly ninja -C build/coverage bulkhead_tests
find build/coverage -name '*.gcda' -delete
quietly build/coverage/bin/bulkhead_tests --gtest_brief=1
gcovr --root . --object-directory build/coverage --filter 'core/' --exclude '.*_test\.cpp' --exclude-throw-branches \
  --print-summary --txt build/coverage/core.txt build/coverage | tee build/coverage/summary.txt
percent=$(sed -nE 's/^lines: ([0-9.]+)%.*/\1/p' build/coverage/summary.txt)
if awk "BEGIN { exit !($percent >= 90) }"; then
  printf 'ok - line coverage of core/ is %s %% (at least 90)\n1 passed, 0 failed\n' "$percent"
else
  cat build/coverage/core.txt
  printf 'not ok - line coverage of core/ is %s %%, wanted at least 90\n0 passed, 1 failed\n' "$percent"
  exit 1
fi
