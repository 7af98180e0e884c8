#!/usr/bin/env bash
# Runs every benchmark: programs bench_* in build/bin and scripts bench/*.sh but this one. Each prints what it compares,
# medians, and a ratio. Name one to run it alone: ./do bench plan
set -uo pipefail
cd "$(dirname "$0")/.."
: "${BIN:=$PWD/build/bin}" "${DEPS:=$PWD/build/deps}"
export BIN DEPS NO_COLOR=1
printf 'machine: %s, %s cores, %s\n' "$(sed -nE 's/^model name\s*: //p' /proc/cpuinfo | head -1)" "$(nproc)" "$(uname -r)"
status=0
for item in "$BIN"/bench_* bench/*.sh; do
  [ -x "$item" ] || [[ $item == *.sh ]] || continue
  name=$(basename "$item" .sh)
  name=${name#bench_}
  [ "$name" = run ] && continue
  [ $# = 0 ] || [[ " $* " == *" $name "* ]] || continue
  printf '\n-- %s\n' "$name"
  if [[ $item == *.sh ]]; then bash "$item" || status=1; else "$item" || status=1; fi
done
exit $status
