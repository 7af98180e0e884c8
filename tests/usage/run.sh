#!/usr/bin/env bash
# Who used what: two tenants on a twin, a daemon that is killed, a driver that is loaded anew, and sums that must be
# the GPUs' time and their energy counters.
cd "$(dirname "$0")/../.." && . tests/serve/lib.sh
exec python3 tests/usage/usage.py
