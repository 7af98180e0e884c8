#!/usr/bin/env bash
# What strangers and hostile tenants try.
cd "$(dirname "$0")/../.." && . tests/serve/lib.sh
exec python3 tests/serve/attacks.py
