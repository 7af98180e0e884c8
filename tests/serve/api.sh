#!/usr/bin/env bash
# The API as its users meet it, spoken by curl.
cd "$(dirname "$0")/../.." && . tests/serve/lib.sh
exec python3 tests/serve/basics.py
