#!/usr/bin/env bash
# The daemon's ear on a twin: two sources and one incident, whose it is, who may read it, what kill -9 leaves.
cd "$(dirname "$0")/../.." && . tests/serve/lib.sh
exec python3 tests/incidents/incidents.py "$@"
