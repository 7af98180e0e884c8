#!/usr/bin/env bash
# kill -9 at random under load: 20 times, 200 in ./do test-all.
cd "$(dirname "$0")/../.." && . tests/serve/lib.sh
rounds=20
[ "$BULKHEAD_QUICK" = 1 ] || rounds=200
exec python3 tests/serve/kill.py "$rounds"
