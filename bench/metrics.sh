#!/usr/bin/env bash
# /metrics of 8 GPUs, 56 slices, 50 tenants: its time and its CPU, and while a GPU hangs.
cd "$(dirname "$0")/.."
if [ "$(id -u)" != 0 ]; then
  echo "needs root: not run"
  exit 0
fi
exec python3 bench/metrics.py --hang
