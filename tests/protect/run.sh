#!/usr/bin/env bash
# Protection on a twin with the real daemon: a failed fan, the power brake, a sagging rail, link errors, eight jobs that
# start together; observe and act; kill -9 in the middle of an action.
cd "$(dirname "$0")/../.." && . tests/serve/lib.sh
exec python3 tests/protect/protect.py "$@"
