#!/usr/bin/env bash
# Each libFuzzer target for SECONDS (first argument), from the corpus in tests/corpus/NAME when there is one.
set -uo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
cmake --preset fuzz >/dev/null || exit 2
passed=0 failed=0
for source in $(git ls-files '*_fuzz.cpp'); do
  name=$(basename "$source" .cpp)
  ninja -C build/fuzz "$name" >/dev/null || { failed=$((failed + 1)); printf 'not ok - %s builds\n' "$name"; continue; }
  mkdir -p "build/fuzz/corpus/$name"
  seeds=()
  [ -d "tests/corpus/$name" ] && seeds=("tests/corpus/$name")
  if build/fuzz/bin/"$name" -max_total_time="$seconds" -timeout=5 -rss_limit_mb=2048 -artifact_prefix="build/fuzz/$name-" \
      "build/fuzz/corpus/$name" "${seeds[@]}" 2>&1 | tail -30 >"build/fuzz/$name.log" && ! ls build/fuzz/"$name"-* >/dev/null 2>&1; then
    passed=$((passed + 1)); printf 'ok - %s: %s s without a finding (%s)\n' "$name" "$seconds" "$(grep -a 'DONE' "build/fuzz/$name.log" | tail -1 | tr -s ' ')"
  else
    failed=$((failed + 1)); printf 'not ok - %s\n' "$name"; cat "build/fuzz/$name.log"
  fi
done
printf '%s passed, %s failed\n' "$passed" "$failed"
[ "$failed" = 0 ]
