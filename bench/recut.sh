#!/usr/bin/env bash
# Re-cut of 8 GPUs on a twin that recut.py starts itself. Needs root, as changing MIG does.
exec python3 "$(dirname "$0")/recut.py" "$BIN/bulkhead"
