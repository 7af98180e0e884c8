# Sourced by tests/serve/*.sh. Their checks are Python programs (standard library alone) that start twins and daemons on free
# ports and temporary states, and stop them.
set -uo pipefail
: "${BIN:=$PWD/build/bin}" "${BULKHEAD_QUICK:=1}"
export BIN BULKHEAD_QUICK NO_COLOR=1 LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
unset BULKHEAD_ROOT BULKHEAD_NVML BULKHEAD_STATE BULKHEAD_TWIN BULKHEAD_URL BULKHEAD_TOKEN
if [ "$(id -u)" != 0 ]; then
  echo "# $(basename "$0" .sh): needs root (an admin on the Unix socket by its uid): not run"
  printf '0 passed, 0 failed\n'
  exit 0
fi
