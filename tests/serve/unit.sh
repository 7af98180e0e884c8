#!/usr/bin/env bash
# systemd's side of the daemon: what it is told, the sockets it hands over, the watchdog, and the unit files themselves.
cd "$(dirname "$0")/../.." && . tests/serve/lib.sh
exec python3 tests/serve/unit.py
