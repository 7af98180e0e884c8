#!/usr/bin/env bash
# inventory against nvidia-smi -q on a twin of a DGX H100, and on the real driver where there is one.
set -uo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d "${TMPDIR:-/tmp}"/bulkhead-bench.XXXXXX)
trap '"$BIN/bulkhead" twin down --dir "$work/twin" >/dev/null 2>&1; rm -rf "$work"' EXIT
"$BIN/bulkhead" twin up dgx-h100 --dir "$work/twin" >/dev/null || exit 1
status=0
echo "twin of a DGX H100:"
python3 bench/inventory.py --bulkhead "$BIN/bulkhead" --smi "$DEPS/usr/lib/nvidia/current/nvidia-smi" --twin "$work/twin" || status=1
if [ -e /dev/nvidiactl ] && command -v nvidia-smi >/dev/null; then
  echo "this machine's GPUs:"
  python3 bench/inventory.py --bulkhead "$BIN/bulkhead" || status=1
fi
exit $status
