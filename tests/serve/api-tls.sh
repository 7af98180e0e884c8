#!/usr/bin/env bash
# TLS from outside: openssl s_client and curl.
cd "$(dirname "$0")/../.." && . tests/serve/lib.sh
exec python3 tests/serve/tls.py
