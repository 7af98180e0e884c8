#!/usr/bin/env bash
# The API fuzzed from its OpenAPI document: 30 s, an hour in ./do test-all.
cd "$(dirname "$0")/../.." && . tests/serve/lib.sh
seconds=30
[ "$BULKHEAD_QUICK" = 1 ] || seconds=${BULKHEAD_API_FUZZ_SECONDS:-3600}
exec python3 tests/serve/fuzz_run.py "$seconds"
