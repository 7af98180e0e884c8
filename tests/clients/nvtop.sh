#!/usr/bin/env bash
# nvtop in a terminal (tmux) against the twin.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
nvtop=$DEPS/usr/bin/nvtop
[ -x "$nvtop" ] && command -v tmux >/dev/null || { echo "# no nvtop or no tmux"; exit 1; }
twin_up dgx-h100
socket=$scratch/tmux
tmux -S "$socket" -f /dev/null new-session -d -x 200 -y 60 "env LC_ALL=C.UTF-8 TERM=screen-256color LD_LIBRARY_PATH=$LD_LIBRARY_PATH:$DEPS/usr/lib/x86_64-linux-gnu BULKHEAD_TWIN=$twin $nvtop; sleep 5"
output=""
for _ in $(seq 40); do
  sleep 0.25
  output=$(tmux -S "$socket" capture-pane -p 2>/dev/null || true)
  grep -q 'Device 7' <<<"$output" && break
done
tmux -S "$socket" kill-server 2>/dev/null || true
is "nvtop shows eight devices" 8 "$(grep -oE 'Device [0-7] ' <<<"$output" | sort -u | wc -l)"
says "nvtop names the board" 'NVIDIA H100 80GB HBM3'
says "nvtop shows the power limit" '/ *700 ?W'
