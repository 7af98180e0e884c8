#!/usr/bin/env bash
# What a tenant does with a lease: login at a terminal, a program in a share, a container with a slice.
cd "$(dirname "$0")/../.." && . tests/serve/lib.sh
exec python3 tests/serve/tenant.py
