#!/usr/bin/env bash
# What GPUs do, as Prometheus, operators and tenants see it: a twin, the daemon, and a real Prometheus on loopback.
cd "$(dirname "$0")/../.." && . tests/serve/lib.sh
# tests' own Prometheus is unpacked below build/deps by `do`; one that is installed is as good.
export PATH="${DEPS:-$PWD/build/deps}/usr/bin:$PATH"
# Both mostly wait, each for a machine of its own.
said=$(mktemp -d) && trap 'rm -rf "$said"' EXIT
python3 tests/telemetry/rest.py >"$said/rest" 2>&1 &
python3 tests/telemetry/telemetry.py | tee "$said/telemetry"
status=${PIPESTATUS[0]}
wait $! || status=1
cat "$said/rest"
sed -nE 's/^([0-9]+) passed, ([0-9]+) failed$/\1 \2/p' "$said"/* | awk '{ p += $1; f += $2 } END { print p + 0 " passed, " f + 0 " failed" }'
exit $status
