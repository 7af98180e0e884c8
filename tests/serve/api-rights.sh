#!/usr/bin/env bash
# Every route x role.
cd "$(dirname "$0")/../.." && . tests/serve/lib.sh
exec python3 tests/serve/rights.py
