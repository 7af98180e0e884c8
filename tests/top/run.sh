#!/usr/bin/env bash
# bulkhead top in a real terminal (tmux), and dmon for scripts, against a twin with eight H100, slices and a daemon.
cd "$(dirname "$0")/../.." && . tests/lib.sh
unset BULKHEAD_URL BULKHEAD_TOKEN BULKHEAD_FINGERPRINT BULKHEAD_CA XDG_CONFIG_HOME COLUMNS LINES
command -v tmux >/dev/null || { not_ok "tmux is there"; done_testing; }
export HOME=$work/home
mkdir -p "$HOME"
b=$BIN/bulkhead
twin=$work/twin
check "a twin comes up" timeout 60 "$b" twin up dgx-h100 --dir "$twin"
export BULKHEAD_ROOT=$twin/root BULKHEAD_NVML=$twin/lib/libnvidia-ml.so.1 BULKHEAD_STATE=$work/state
printf 'apiVersion: bulkhead/v1\nkind: Node\ngpus:\n  - select: {index: "0-3"}\n    mode: mig\n    layout: [3g.40gb, 2g.20gb, 1g.10gb, 1g.10gb]\n' >"$work/node.yaml"
check "four GPUs are cut" timeout 60 "$b" apply -f "$work/node.yaml" --yes
check "a program works in a slice" timeout 10 "$b" twin attach 0:2:0 --name trainer --memory 30GiB --busy 0.9 --dir "$twin"
evil=$(printf 'ev\033[31mil\007')
check "one with escape sequences in its name works on a whole GPU" timeout 10 "$b" twin attach 5 --name "$evil" --memory 60GiB --busy 0.7 --dir "$twin"
check "another is at its power limit" timeout 10 "$b" twin load 6 --watts 900 --busy 1 --dir "$twin"

# ---- one page
# A board's power and use rise over a second or more, as on silicon: the page is read once they are there.
for _ in $(seq 60); do
  grep -qE '^ +6 .*power cap' <<<"$(COLUMNS=80 timeout 20 "$b" top --once)" && break
  sleep 0.25
done
exits "one page, without a terminal" 0 env COLUMNS=80 timeout 20 "$b" top --once
page=$out
says "the machine is named, with its GPUs" '^dgx-h100  8 GPUs' "$page"
says "a slice, and who works in it" '^ +0 +2 3g\.40gb .* trainer \[[0-9]+\]' "$page"
says "a slice that nobody has is free" '1g\.10gb +free' "$page"
says "what holds the clocks down is said in words" '^ +6 .*power cap' "$page"
same "no line is longer than 80 columns" "" "$(python3 -c 'import sys; print("".join(l for l in sys.stdin.buffer.read().decode().splitlines(True) if len(l) > 81), end="")' <<<"$page")"
if grep -q $'[\033\007]' <<<"$page"; then not_ok "names print no escape sequences"; else ok "names print no escape sequences"; fi
same "in a locale without UTF-8 the page is ASCII" "" "$(LC_ALL=C timeout 20 "$b" top --once | LC_ALL=C grep -a '[^ -~]')"
check "for programs, every GPU with its values, parts and who is there" bash -c "timeout 20 '$b' top --json | python3 -c '
import json, sys
d = json.load(sys.stdin)
g = d[\"gpus\"]
assert len(g) == 8, len(g)
part = next(p for p in g[0][\"parts\"] if p[\"gpu_instance\"] == 2)
assert part[\"profile\"] == \"3g.40gb\" and part[\"processes\"][0][\"name\"] == \"trainer\", part
assert g[6][\"held_down_by\"] == [\"power cap\"], g[6][\"held_down_by\"]
assert g[0][\"values\"][\"power\"][\"age_ms\"] < 5000
assert d[\"alarms\"] == [] and d[\"tenants_known\"] is False'"
exits "where no terminal is, it says what to type" 2 bash -c "timeout 20 '$b' top </dev/null | cat; exit \${PIPESTATUS[0]}"
says "namely --once" 'top --once' "$out"
exits "an interval that makes no sense is refused" 2 timeout 20 "$b" top --once --interval 1ms
exits "a driver that is not there is said" 2 timeout 20 "$b" top --once --nvml "$work/none.so"
says "with the way on" 'bulkhead doctor' "$out"
if ldd "$b" | grep -qE 'curses|tinfo'; then not_ok "it starts where no libncurses is"; else ok "it starts where no libncurses is"; fi

# ---- on a terminal
scenes=0 socket=$work/tmux.0
mux() { tmux -S "$socket" "$@"; }
screen() { mux capture-pane -p 2>/dev/null; }
leave() { mux kill-server 2>/dev/null; }
trap 'leave; finish' EXIT
begin() {  # begin WIDTHxHEIGHT COMMAND: in a shell that notes how the terminal was before and after
  leave
  scenes=$((scenes + 1)) socket=$work/tmux.$scenes  # a server that is ending takes no new session
  rm -f "$work"/rc "$work"/before "$work"/after
  printf 'trap : INT\nstty -g >%s/before\necho before-the-page\n%s\necho $? >%s/rc\nstty -g >%s/after\necho after-the-page\nsleep 100\n' "$work" "$2" "$work" "$work" >"$work/session.sh"
  mux -f /dev/null new-session -d -x "${1%x*}" -y "${1#*x}" "env TERM=screen-256color sh $work/session.sh"
}
shows() {  # shows "sentence" PATTERN: on the screen, within ten seconds
  local i seen=""
  for i in $(seq 100); do
    seen=$(screen)
    if grep -aqE -- "$2" <<<"$seen"; then ok "$1"; return; fi
    sleep 0.1
  done
  not_ok "$1" "wanted /$2/ on:" "$seen"
}
gone() {
  local i
  for i in $(seq 100); do
    [ -e "$work/after" ] && break
    sleep 0.1
  done
  same "$1" "0 $(cat "$work/before" 2>/dev/null)" "$(cat "$work/rc" 2>/dev/null) $(cat "$work/after" 2>/dev/null)"
  shows "and the screen is what it was" '^before-the-page'
}
key() { mux send-keys "$@"; }

begin 80x24 "env -u NO_COLOR $b top"
shows "80x24: the page comes" 'dgx-h100 +8 GPUs'
shows "with slices and who is in them" '3g\.40gb .*trainer'
shows "and graphs of the last minute" '[▁▂▃▄▅▆▇█]'
same "the first line is the title, the last the keys" "dgx-h100 q quit" "$(screen | sed -n 1p | cut -d' ' -f1) $(screen | sed -n 24p | grep -o 'q quit')"
key Down Down
shows "down: the next GPU's slices" '^── GPU 2 '
key Up
shows "up: the one before" '^── GPU 1 '
key Enter
shows "Enter: one GPU with all its values" '^clocks held down by'
key Right
shows "right: the next one" '^── GPU 2 '
key NPage
shows "page down: what is below" '(remap|the last minute)'
key Escape
shows "Escape: back" '^GPU +SM%'
key t
shows "t: by tenant" 'tenants?, [0-9]+ slices? '
key t / t r a i
shows "a filter is typed" '^filter: trai_'
key Enter
shows "and leaves what it matches" 'trainer'
same "and no other GPU" 1 "$(screen | grep -c '/700 ')"
key Escape
key a
shows "a: the alarms" 'no alarms ──'
key h
shows "h: what keys and words mean" 'power brake'
key h p
shows "p: the page stands still" 'paused for'
key p
mux resize-window -x 200 -y 50
shows "200x50: more columns" 'model .*MHz .*pool'
same "down to the new last line" "q quit" "$(screen | sed -n 50p | grep -o 'q quit')"
mux resize-window -x 30 -y 5
shows "too small: it says so" '40x8'
mux resize-window -x 80 -y 24
shows "and back" 'dgx-h100 +8 GPUs'
timeout 10 "$b" twin break hang-call --function nvmlDeviceGetTemperature --gpu 4 --dir "$twin" >/dev/null
timeout 10 "$b" twin break ecc --gpu 1 --count 2 --dir "$twin" >/dev/null
shows "a GPU that hangs says in what, and how long" '^ +4 hung in nvmlDeviceGetTemperature for [0-9]+ s; [0-9]+ s ago: [0-9]+ W'
shows "and is an alarm" '^! GPU 4: its driver call nvmlDeviceGetTemperature'
shows "the others go on" '^ +6 .*/700'
mux capture-pane -p -e >"$work/colours"
says "what is bad is red" $'\033\\[[0-9;]*38;5;160m' "$(cat "$work/colours")"
key q
gone "q: exit code 0, the terminal as before, though a call hangs"
timeout 10 "$b" twin mend --dir "$twin" >/dev/null

begin 80x24 "env NO_COLOR=1 $b top"
shows "NO_COLOR: the page comes" 'dgx-h100 +8 GPUs'
if mux capture-pane -p -e | grep -q $'\033\\[[0-9;]*38;5'; then not_ok "without colours"; else ok "without colours"; fi
key C-c
gone "Ctrl-C: the same end"
begin 80x24 "env LC_ALL=C $b top"
shows "without UTF-8: the page comes" 'dgx-h100 +8 GPUs'
if screen | LC_ALL=C grep -aq '[^ -~]'; then not_ok "in ASCII" "$(screen)"; else ok "in ASCII"; fi
kill -TERM "$(pgrep -f "^$b top" | head -1)"
gone "SIGTERM: the same end"
begin 80x24 "env TERM=nonsense $b top"
shows "a terminal that nobody knows is named, with what to type" 'this terminal \(nonsense\)'
shows "namely another, or --once" 'top --once'
leave

# ---- dmon
exits "dmon: so many lines, then the end" 0 timeout 20 "$b" dmon --count 2 --gpu 6 --interval 200ms
same "a header and two lines" 3 "$(wc -l <<<"$out")"
says "with the power that it draws" '^20[0-9T:.-]+Z +6 +- sampling +(69|70)[0-9]' "$out"
exits "dmon: slices of a GPU" 0 timeout 20 "$b" dmon --count 1 --gpu 0
says "each has its line and its activity from the first one on" '^20[^ ]+ +0 +2 sampling +- +- +- +8[0-9]\.' "$out"
same "for programs, a document a line" "[5] [5]" "$(timeout 20 "$b" dmon --count 2 --json --interval 200ms --gpu 5 | python3 -c 'import json, sys; print(*[[g["gpu"] for g in json.loads(l)["gpus"]] for l in sys.stdin])')"
same "into a pipe a line comes when it is printed" "#time" "$( (timeout 20 "$b" dmon --gpu 0 --interval 200ms & p=$!; sleep 3; kill -KILL $p) 2>/dev/null | head -1 | cut -d' ' -f1)"
(timeout 20 "$b" dmon --interval 100ms 2>"$work/errors"; echo $? >"$work/rc") | head -2 >/dev/null
same "a reader that goes away ends it without a word" "" "$(cat "$work/errors")"
for signal in INT TERM; do
  status=$(python3 - "$b" "$signal" <<'PY'
import signal, subprocess, sys, time
p = subprocess.Popen([sys.argv[1], "dmon", "--interval", "100ms"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
p.stdout.readline(); p.stdout.readline()
p.send_signal(getattr(signal, "SIG" + sys.argv[2]))
rest, errors = p.communicate(timeout=10)
print(p.returncode, errors.decode(), "whole" if rest == b"" or rest.endswith(b"\n") else "cut")
PY
)
  same "SIG$signal ends it: 0, no word, whole lines" "0  whole" "$status"
done
exits "dmon: a GPU that is not there" 2 timeout 20 "$b" dmon --count 1 --gpu 40
exits "dmon: an interval below the sensors'" 2 timeout 20 "$b" dmon --count 1 --interval 10ms
exits "dmon: no driver" 2 timeout 20 "$b" dmon --count 1 --nvml "$work/none.so"
timeout 10 "$b" twin break hang-call --function nvmlDeviceGetTemperature --gpu 4 --dir "$twin" >/dev/null
exits "dmon: with a GPU that hangs it ends all the same" 0 timeout 20 "$b" dmon --count 2 --interval 1s
says "that GPU's line says so" ' 4 +- +hung' "$out"
says "the others are fresh" ' 6 +- sampling +(69|70)[0-9]' "$out"
timeout 10 "$b" twin mend --dir "$twin" >/dev/null
timeout 10 "$b" twin break hang-call --function nvmlInit_v2 --dir "$twin" >/dev/null
exits "dmon: a driver that never starts" 2 timeout 30 "$b" dmon --count 1
timeout 10 "$b" twin mend --dir "$twin" >/dev/null

# ---- with a daemon
if [ "$(id -u)" != 0 ]; then
  echo "# tenants: needs root (an admin on the Unix socket by its uid): not run"
  done_testing
fi
printf 'apiVersion: bulkhead/v1\nkind: Node\ngpus:\n  - select: {index: "5"}\n    mode: share\n  - select: {index: "6-7"}\n    mode: exclusive\n' >"$work/pools.yaml"
timeout 10 "$b" twin detach --all --dir "$twin" >/dev/null
(exec "$b" serve --listen "127.0.0.1:0" --socket "$work/api.sock" --state-dir "$work/served" -f "$work/pools.yaml" >"$work/log" 2>&1) &
daemon=$!
trap 'kill $daemon 2>/dev/null; leave; finish' EXIT
export BULKHEAD_URL=unix:$work/api.sock
for _ in $(seq 100); do timeout 5 "$b" gpus >/dev/null 2>&1 && break; sleep 0.1; done
check "a tenant is made" timeout 10 "$b" tenant put vision leases=8 gpus=3
check "and has a GPU" timeout 10 "$b" lease create --tenant vision --class exclusive --ttl 1h
exits "top knows tenants from the daemon" 0 env COLUMNS=80 timeout 20 "$b" top --once
says "who has which GPU by which lease" '^ +[4-7] +- exclusive +vision +1 ' "$out"
says "and says so in the GPU's row" '^ +[4-7] .* vision$' "$out"
begin 80x24 "$b top"
shows "the page comes, with the tenant" 'vision'
key t
shows "by tenant: the tenant's slices first" '^ +[4-7] +- exclusive +vision'
kill "$daemon"
wait "$daemon" 2>/dev/null
shows "when the daemon goes, what it said has its age" '^tenants are [0-9]+ s old'
key q
gone "q: the end"
done_testing
