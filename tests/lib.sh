# Sourced by tests/*/run.sh. A check prints "ok - sentence" or "not ok - sentence" with what was seen; the last line
# of a suite is "N passed, M failed".
set -uo pipefail
: "${BIN:=$PWD/build/bin}" "${DEPS:=$PWD/build/deps}" "${BULKHEAD_QUICK:=1}"
export BIN DEPS BULKHEAD_QUICK
export NO_COLOR=1 LC_ALL=C.UTF-8
unset BULKHEAD_ROOT BULKHEAD_NVML BULKHEAD_STATE BULKHEAD_TWIN
here=$(cd "$(dirname "${BASH_SOURCE[1]}")" && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}"/bulkhead-test.XXXXXX)
passed=0 failed=0

ok() { passed=$((passed + 1)); printf 'ok - %s\n' "$1"; }
not_ok() { failed=$((failed + 1)); printf 'not ok - %s\n' "$1"; shift; [ $# = 0 ] || printf '%s\n' "$@" | sed 's/^/    /' | head -40; }

# check "sentence" COMMAND...: the command succeeds.
check() {
  local sentence=$1 out
  shift
  if out=$("$@" 2>&1); then ok "$sentence"; else not_ok "$sentence" "$* -> exit $?" "$out"; fi
}
# exits "sentence" CODE COMMAND...: the exit code is exactly CODE; output is left in $out.
exits() {
  local sentence=$1 want=$2 got=0
  shift 2
  out=$("$@" 2>&1) || got=$?
  if [ "$got" = "$want" ]; then ok "$sentence"; else not_ok "$sentence" "$* -> exit $got, wanted $want" "$out"; fi
}
# says "sentence" PATTERN TEXT: the text matches the extended regular expression.
says() {
  if grep -aqE -- "$2" <<<"$3"; then ok "$1"; else not_ok "$1" "wanted /$2/ in:" "$3"; fi
}
# same "sentence" WANT GOT
same() {
  if [ "$2" = "$3" ]; then ok "$1"; else not_ok "$1" "$(diff <(printf '%s\n' "$2") <(printf '%s\n' "$3") | head -40)"; fi
}

finish() {
  local dir
  for dir in "$work"/twin*; do
    [ -e "$dir/state.bin" ] && "$BIN/bulkhead" twin down --dir "$dir" >/dev/null 2>&1
  done
  rm -rf "$work"
}
trap finish EXIT

done_testing() {
  printf '%s passed, %s failed\n' "$passed" "$failed"
  [ "$failed" = 0 ]
  exit
}
