# Sourced by the client scripts: a twin of one's own, and checks that print one line each.
#   BIN   directory of bulkhead and libnvidia-ml.so.1 (build/bin)
#   DEPS  directory where the clients' packages were unpacked (build/deps)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
BIN=$(cd "${BIN:-$here/build/bin}" && pwd)
DEPS=$(cd "${DEPS:-$here/build/deps}" && pwd)
passed=0
failed=0
scratch=$(mktemp -d "${TMPDIR:-/tmp}"/bulkhead-clients-XXXXXX)
twin=$scratch/twin

finish() {
  local code=$?
  [ -d "$twin" ] && "$BIN/bulkhead" twin down --dir "$twin" >/dev/null 2>&1
  rm -rf "$scratch"
  if [ "$code" -ne 0 ] && [ "$failed" -eq 0 ]; then
    echo "not ok - the script itself stopped with exit code $code"
    failed=1
  fi
  echo "$passed passed, $failed failed"
  [ "$failed" -eq 0 ] && exit 0
  exit 1
}
trap finish EXIT

twin_up() {  # PROFILE
  [ -d "$twin" ] && "$BIN/bulkhead" twin down --dir "$twin" >/dev/null
  "$BIN/bulkhead" twin up "$1" --dir "$twin" >/dev/null
  export BULKHEAD_TWIN=$twin BULKHEAD_ROOT=$twin/root BULKHEAD_NVML=$twin/lib/libnvidia-ml.so.1
  export LD_LIBRARY_PATH=$twin/lib
}
ok() {
  passed=$((passed + 1))
  echo "ok - $1"
}
not_ok() {  # SENTENCE EVIDENCE
  failed=$((failed + 1))
  echo "not ok - $1"
  printf '%s\n' "$2" | head -20 | sed 's/^/#   /'
}
# What the last `run` printed and how it ended.
run() {
  code=0
  output=$("$@" 2>&1) || code=$?
}
is() {  # SENTENCE EXPECTED GOT
  if [ "$2" == "$3" ]; then ok "$1"; else not_ok "$1" "expected '$2', got '$3'"; fi
}
exits() {  # SENTENCE CODE
  if [ "$code" -eq "$2" ]; then ok "$1"; else not_ok "$1" "expected exit code $2, got $code: $output"; fi
}
says() {  # SENTENCE EXTENDED-REGEX
  if grep -Eq -- "$2" <<<"$output"; then ok "$1"; else not_ok "$1" "no line matches /$2/ in: $output"; fi
}
