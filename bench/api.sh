#!/usr/bin/env bash
# The API of `bulkhead serve` on a twin of a DGX H100, against nginx and against a bare SQLite transaction of the same run.
set -uo pipefail
cd "$(dirname "$0")/.."
if [ "$(id -u)" != 0 ]; then echo "needs root (an admin on the Unix socket by its uid)"; exit 0; fi
for program in nginx wrk; do
  command -v "$program" >/dev/null || { echo "needs $program: apt-get install nginx-light wrk"; exit 1; }
done
PYTHONDONTWRITEBYTECODE=1 exec python3 bench/api.py "$@"
