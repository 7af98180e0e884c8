#!/usr/bin/env bash
# Healing on a twin with the real daemon: each act with the right victims, what holds it back, kill -9 in the middle of one.
cd "$(dirname "$0")/../.." && . tests/serve/lib.sh
exec python3 tests/heal/heal.py "$@"
