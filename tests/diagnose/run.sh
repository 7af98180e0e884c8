#!/usr/bin/env bash
# Precision and recall of diagnose on a corpus of real, published and hostile lines; noise; a bundle.
set -uo pipefail
cd "$(dirname "$0")/../.."
room=$(mktemp -d "${TMPDIR:-/tmp}/diagnose.XXXXXX")
trap 'rm -rf "$room"' EXIT
# The second mostly waits: both beside each other.
python3 tests/diagnose/live.py >"$room/live.log" 2>&1 &
live=$!
python3 tests/diagnose/corpus.py "${BIN:-$PWD/build/bin}/bulkhead" tests/corpus/logs "$room" >"$room/corpus.log" 2>&1
corpus=$?
wait "$live"
live=$?
# One closing line for both.
cat "$room"/{corpus,live}.log | awk '/^[0-9]+ passed, [0-9]+ failed$/ { passed += $1; failed += $3; next }
  { print } END { printf "%d passed, %d failed\n", passed, failed }'
[ "$corpus" = 0 ] && [ "$live" = 0 ]
