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
exits "a GPU is cordoned" 0 "$b" gpus cordon 7 --why 'a noisy fan'
says "its cordon is shown with its reason" 'cordoned by .*: a noisy fan' "$("$b" gpus)"
exits "a cordon without a reason is refused" 2 "$b" gpus cordon 6 --why ''
exits "a GPU that is not there cannot be cordoned" 2 "$b" gpus cordon 99 --why 'dust'
exits "all of them are uncordoned" 0 "$b" gpus uncordon all
exits "a tenant is made" 0 "$b" tenant put vision --weight 200 leases=2 gpus=1 memory=200GiB
exits "a limit is set, the others stay" 0 "$b" quota set vision leases=3
says "the limit is shown" '^leases +0 +3' "$out"
says "the other stays" '^gpus +0 +1' "$out"
exits "a limit that there is not is refused" 2 "$b" quota set vision apples=3
exits "memory without a unit is asked about, not taken for bytes" 2 "$b" quota set vision memory=20
exits "nor in a lease" 2 "$b" lease create --class share --memory 20 --tenant vision
says "the unit is named" '20GiB' "$out"
exits "nor is a share of less than a program needs" 2 "$b" lease create --class share --memory 63MiB --tenant vision
says "and the smallest is said" 'smallest share is 64 MiB' "$out"
exits "an administrator says whose lease it is" 2 "$b" lease create --class mig --profile 1g.10gb
says "how" '\-\-tenant NAME' "$out"
exits "what is not there is not ended" 2 "$b" tenant end nobody
says "and is named" 'there is no tenant nobody' "$out"
exits "a lease of more than 90 days is none" 2 "$b" lease renew 1 --ttl 100d
says "how many there may be" 'days up to 90' "$out"
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

# the host drained around it
here() { BULKHEAD_URL=unix:$work/api.sock "$b" "$@"; }
exits "a tenant may not drain the host" 2 "$b" drain
exits "what a drain would do is said" 0 here drain --dry-run
says "and to whom" "^$lease +vision +alice" "$out"
says "nothing was changed by it" '"draining": false' "$(here gpus --json)"
exits "the host is drained" 0 here drain
says "with who is still there" "1 lease goes on; the last ends in .*" "$out"
exits "it gives nothing new" 2 "$b" lease create --class exclusive
says "and says why" 'drain' "$out"
exits "waited for only so long" 1 here drain --wait=1s
says "it says what stays and how to go on" 'stays drained.*undrain' "$out"
same "for programs: who goes on" "True [$lease] 0" "$(here drain --json | python3 -c 'import json, sys; d = json.load(sys.stdin); print(d["draining"], [l["id"] for l in d["goesOn"]], len(d["waits"]))')"
exits "it gives again" 0 here undrain
says "by whose word is in the audit log" ' undrain +host ' "$(here audit list --newest 5)"
exits "a program that fails gives its code, in a lease of its own" 7 "$b" lease run --class exclusive --wait -- sh -c 'exit 7'
says "which is given back" 'released' "$out"

# waiting, with a bound
held=$("$b" lease create --class exclusive --wait --json 2>"$work/said" | python3 -c 'import json, sys; print(json.load(sys.stdin)["id"])')
same "whoever waits beside no terminal is told nothing" '' "$(cat "$work/said")"
exits "waited for only so long" 1 "$b" lease create --class exclusive --wait=2s --progress
says "where it stands and why is said meanwhile" 'lease [0-9]+: the only one of its tenant that waits: .*(gpus|GPUs)' "$out"
says "what stays, and what to type" 'stays in the queue.*' "$out"
says "how to give it up" 'bulkhead lease release [0-9]+' "$out"
waits=$("$b" lease list --json | python3 -c 'import json, sys; print([l["id"] for l in json.load(sys.stdin)["leases"] if l["state"] == "queued"][0])')
exits "one that waits is given up" 0 "$b" lease release "$waits"
"$b" lease create --class exclusive --wait --progress >"$work/asked" 2>"$work/said" &
asker=$!
for _ in $(seq 100); do grep -q 'that wait' "$work/said" && break; sleep 0.1; done
kill -INT $asker && wait $asker
same "Ctrl-C ends the waiting alone" 1 $?
says "it says what stays" 'stopped waiting; lease [0-9]+ stays in the queue' "$(cat "$work/said")"
exits "time that is none is refused before anything is asked for" 2 "$b" lease create --class exclusive --wait=soon
same "one waits, then" 1 "$("$b" lease list --json | python3 -c 'import json, sys; print(len([l for l in json.load(sys.stdin)["leases"] if l["state"] == "queued"]))')"
exits "room is made" 0 "$b" lease release "$held"
waits=$("$b" lease list --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["leases"][0]["id"])')
for _ in $(seq 100); do "$b" lease show "$waits" | grep -q '   active' && break; sleep 0.1; done
says "and it begins without whoever asked" '   active' "$("$b" lease show "$waits")"
exits "and is given back" 0 "$b" lease release "$waits"
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
order=$("$b" audit list --newest 7 --json | python3 -c 'import json, sys; ids = [l["id"] for l in json.load(sys.stdin)["lines"]]; print(len(ids), ids == sorted(ids, reverse=True))')
same "the newest come first, as many as asked for" '7 True' "$order"
says "the newest is the last of the log" "^$(tail -1 <<<"$out" | awk '{print $1}') " "$("$b" audit list --newest 1 | tail -1)"
exits "how many of both ends is asked for once" 2 "$b" audit list --newest 5 --most 5
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
