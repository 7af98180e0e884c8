#!/usr/bin/env bash
# The verbs that speak the API, against a daemon on a twin: an administrator on the socket, a tenant over HTTPS.
cd "$(dirname "$0")/../.." && . tests/lib.sh
unset BULKHEAD_URL BULKHEAD_TOKEN BULKHEAD_FINGERPRINT BULKHEAD_CA XDG_CONFIG_HOME
if [ "$(id -u)" != 0 ]; then
  echo "# cli: needs root (an admin on the Unix socket by its uid): not run"
  printf '0 passed, 0 failed\n'
  exit 0
fi
export HOME=$work/home
mkdir -p "$HOME"
b=$BIN/bulkhead
"$b" twin up dgx-h100 --dir "$work/twin" >/dev/null || { not_ok "the twin comes up"; done_testing; }
export BULKHEAD_TWIN=$work/twin BULKHEAD_ROOT=$work/twin/root BULKHEAD_NVML=$work/twin/lib/libnvidia-ml.so.1 LD_LIBRARY_PATH=$work/twin/lib
printf 'apiVersion: bulkhead/v1\nkind: Node\ngpus:\n  - select: {index: "0-1"}\n    mode: mig\n    layout: dynamic\n  - select: {index: "2-3"}\n    mode: share\n  - select: {index: "4-7"}\n    mode: exclusive\n' >"$work/node.yaml"
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$b" serve --listen "127.0.0.1:$port" --socket "$work/api.sock" --state-dir "$work/state" -f "$work/node.yaml" >"$work/log" 2>&1 &
daemon=$!
stop_daemon() { kill "$daemon" 2>/dev/null; wait "$daemon" 2>/dev/null; finish; }
trap stop_daemon EXIT
for _ in $(seq 200); do curl -sf --unix-socket "$work/api.sock" http://localhost/readyz >/dev/null && break; sleep 0.1; done
export BULKHEAD_URL=unix:$work/api.sock

# an administrator
exits "the pools are shown" 0 "$b" gpus
says "dynamic GPUs are of the MIG pool" 'mig +100 %' "$out"
exits "a tenant is made" 0 "$b" tenant put vision --weight 200 leases=2 gpus=1 memory=200GiB
exits "a limit is set, the others stay" 0 "$b" quota set vision leases=3
says "the limit is shown" '^leases +0 +3' "$out"
says "the other stays" '^gpus +0 +1' "$out"
exits "a limit that there is not is refused" 2 "$b" quota set vision apples=3
exits "tenants are listed" 0 "$b" tenant list
says "with what they hold of what they may" 'vision +200 +0 / 3' "$out"
exits "a token is made" 0 "$b" token create --user alice --role tenant --tenant vision --ttl 30d --quiet
token=$out
says "its secret alone" '^bh_[0-9a-f]+_[0-9a-f]+$' "$token"
printf '%s\n' "$token" >"$work/token"
exits "tokens are listed without secrets" 0 "$b" token list
if grep -qF "$token" <<<"$out"; then not_ok "no secret in the list"; else ok "no secret in the list"; fi
id=$("$b" token list --json | python3 -c 'import json, sys; print([t["id"] for t in json.load(sys.stdin)["tokens"] if t["user"] == "alice"][0])')

# login
unset BULKHEAD_URL
url=https://127.0.0.1:$port
certificate=$(find "$work/state" -name '*.crt' | head -1)
pin=$(openssl x509 -in "$certificate" -noout -fingerprint -sha256 | cut -d= -f2)
exits "an unknown certificate is not taken without a person" 2 "$b" login "$url" --token-file "$work/token"
says "its fingerprint is shown" "$pin|$(tr A-F a-f <<<"$pin")" "$out"
exits "a wrong fingerprint is refused" 2 "$b" login "$url" --token-file "$work/token" --fingerprint "$(printf 'ab%.0s' $(seq 32))"
exits "a right one is pinned" 0 "$b" login "$url" --token-file "$work/token" --fingerprint "$pin"
says "it says who we are" 'alice, tenant of vision' "$out"
if grep -qF "$token" <<<"$out"; then not_ok "login prints no token"; else ok "login prints no token"; fi
same "the login is nobody else's to read" 600 "$(stat -c %a "$HOME/.config/bulkhead/login.json")"

# a tenant
exits "a slice is made and waited for" 0 "$b" lease create --class mig --profile 3g.40gb --ttl 1h --wait --json
lease=$("$b" lease list --json | python3 -c 'import json, sys; l = json.load(sys.stdin)["leases"][0]; print(l["id"], l["state"])')
says "it is active" 'active$' "$lease"
lease=${lease% *}
exits "it is shown" 0 "$b" lease show "$lease"
says "with what it promises" '^promise' "$out"
says "and its environment" '^env +CUDA_VISIBLE_DEVICES=MIG-' "$out"
exits "its environment is for a shell" 0 "$b" lease env "$lease"
says "as exports" '^export CUDA_VISIBLE_DEVICES=MIG-' "$out"
exits "a program runs in it" 0 "$b" lease run "$lease" -- sh -c 'echo "in $CUDA_VISIBLE_DEVICES ${BULKHEAD_TOKEN-}"'
says "with its environment" '^in MIG-' "$out"
exits "it is renewed" 0 "$b" lease renew "$lease" --ttl 2h
says "until then" 'in (1h 59m|2h)' "$out"
exits "a program that fails gives its code, in a lease of its own" 7 "$b" lease run --class exclusive --wait -- sh -c 'exit 7'
says "which is given back" 'released' "$out"
exits "beyond the quota is an answer, with reasons" 1 "$b" lease create --class exclusive --count 2
says "the quota is named" 'gpus|GPUs' "$out"
exits "a profile that there is not is refused, with those there are" 1 "$b" lease create --class mig --profile 9g.999gb
says "by name" '3g.40gb' "$out"
exits "a tenant may make no tenants" 2 "$b" tenant put other
says "it is told what to do" 'administrator|right' "$out"
exits "what there is not is said" 2 "$b" lease show 4711
timeout 3 "$b" lease watch "$lease" --json >"$work/watched" 2>&1 &
watcher=$!
sleep 1
exits "it is given back" 0 "$b" lease release "$lease"
wait $watcher
says "and whoever watches sees it" '"release"' "$(cat "$work/watched")"
exits "one's own quota is shown" 0 "$b" quota show

# the log
export BULKHEAD_URL=unix:$work/api.sock
exits "the audit log is listed" 0 "$b" audit list --most 1000
says "with who did what" 'alice \(vision\).*create' "$out"
if grep -qF "$token" <<<"$out"; then not_ok "no secret in the log"; else ok "no secret in the log"; fi
exits "the daemon says that it is whole" 0 "$b" audit verify --remote
exits "a token is revoked" 0 "$b" token revoke "$id"
unset BULKHEAD_URL
exits "and is good no more" 2 "$b" lease list
says "a new login is what helps" 'bulkhead login' "$out"
exits "logout forgets" 0 "$b" logout
kill "$daemon" && wait "$daemon" 2>/dev/null
exits "without the daemon the log is whole" 0 "$b" audit verify --state "$work/state"
sqlite3 "$work/state/book.db" "UPDATE audit SET outcome = 'nothing' WHERE id = 3" 2>"$work/sql" || cat "$work/sql"
exits "a changed line is found" 1 "$b" audit verify --state "$work/state"
says "and named" '3' "$out"
exits "nobody listens: it says what to start" 2 env BULKHEAD_URL="unix:$work/none" "$b" lease list
says "serve" 'bulkhead serve' "$out"
done_testing
