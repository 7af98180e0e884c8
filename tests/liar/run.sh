#!/usr/bin/env bash
# A driver that lies: whatever it answers, a verb ends in time, within its memory, with words and an exit code of
# its own; whatever it says it did, only what reads back counts.
cd "$(dirname "$0")/../.." && . tests/lib.sh
twin=$work/twin
bulkhead=$BIN/bulkhead
check "the twin comes up" "$bulkhead" twin up dgx-h100 --dir "$twin"
export BULKHEAD_TWIN=$twin BULKHEAD_ROOT=$twin/root BULKHEAD_NVML=$BIN/libliar.so
state() { "$bulkhead" twin status --dir "$twin" --json | python3 -c '
import json, sys
for g in json.load(sys.stdin)["gpus"]:
    print(g["index"], g["mig"], g["power_limit_watts"], g["persistence"], sorted((i["start"], i["profile"], len(i["compute"])) for i in g["instances"]))'; }
# Bounded: 20 s, 1 GiB of address space, 4 MiB of output.
bounded() { (ulimit -v 1048576; timeout -k 1 20 "$@" 2>&1 | head -c 4194304; exit "${PIPESTATUS[0]}"); }

cat >"$work/have.yaml" <<'YAML'
apiVersion: bulkhead/v1
kind: Node
gpus:
  - select: {index: "0"}
    mode: mig
    layout: [{profile: 3g.40gb, at: 4}, {profile: 1g.10gb, at: 0}]
YAML
cat >"$work/want.yaml" <<'YAML'
apiVersion: bulkhead/v1
kind: Node
gpus:
  - select: {index: "0"}
    mode: mig
    layout: [{profile: 2g.20gb, at: 4}, {profile: 1g.10gb, at: 0}, {profile: 1g.10gb, at: 1}]
  - select: {index: "1"}
    mode: mig
    layout: [4g.40gb]
    persistence: false
  - select: {index: "2"}
    mode: share
    power_limit_w: 500
YAML
exits "with nothing to lie about it is the twin" 0 bounded "$bulkhead" apply -f "$work/have.yaml" --yes
before=$(state)
exits "and a plan is made" 0 "$bulkhead" plan -f "$work/want.yaml" --json
plan=$out

# ---- answers
answers="device-count name-unterminated name-control uuid-equal uuid-control uuid-unterminated uuid-empty pci-wild memory-zero memory-wild
  temperature-wild code-unknown fields-untouched fields-wild limits-crossed mig-mode-wild placement-count placement-wild instance-count
  instance-null instance-wild compute-count mig-device-count process-grows process-count"
for lie in $answers; do
  bad=""
  for verb in inventory "inventory --json" doctor "plan -f $work/want.yaml" "verify -f $work/want.yaml"; do
    got=0; out=$(BULKHEAD_LIE=$lie bounded "$bulkhead" $verb) || got=$?
    case $got in 0 | 1 | 2) ;; *) bad+="$verb: exit $got: $(tail -c 300 <<<"$out")"$'\n' ;; esac
    [ -n "$out" ] || bad+="$verb: says nothing"$'\n'
    LC_ALL=C grep -qP '[\x00-\x08\x0b-\x1f\x7f]' <<<"$out" && bad+="$verb: lets control bytes through"$'\n'
    grep -q 'terminate called\|std::\|basic_string' <<<"$out" && bad+="$verb: speaks of C++: $out"$'\n'
    [ "$verb" = "inventory --json" ] && ! python3 -c 'import json,sys; json.loads(sys.stdin.read())' <<<"$out" 2>/dev/null && [ "$got" = 0 ] && bad+="no JSON"$'\n'
  done
  same "$lie: reading verbs end with words" "" "$bad"
  got=0; out=$(BULKHEAD_LIE=$lie bounded "$bulkhead" apply -f "$work/want.yaml" --yes) || got=$?
  if [ "$got" = 0 ]; then
    # It may not concern an apply. Then the node file must hold, as the truth reads.
    check "$lie: apply went through, and it is true" "$bulkhead" verify -f "$work/want.yaml"
    exits "$lie: and can be taken back" 0 "$bulkhead" rollback --yes
  else
    echo "# $lie: $(grep -m1 . <<<"$out")"
    same "$lie: apply ends as refused or failed" yes "$([ "$got" = 1 ] || [ "$got" = 2 ] && echo yes || echo "exit $got: $out")"
  fi
  same "$lie: and nothing is left of it" "$before" "$(state)"
done

# Where the answer decides what people are told.
export BULKHEAD_LIE
BULKHEAD_LIE=uuid-equal; exits "two GPUs of one name are not planned for" 1 bounded "$bulkhead" plan -f "$work/want.yaml"
says "and it is said" 'two GPUs this UUID' "$out"
BULKHEAD_LIE=device-count; bounded "$bulkhead" inventory >"$work/out"
says "a count that cannot be is not believed" '2147483648' "$(cat "$work/out")"
BULKHEAD_LIE=process-grows; bounded "$bulkhead" inventory >"$work/out"
says "processes that cannot be listed are not taken for none" 'process' "$(cat "$work/out")"

# ---- commands
for lie in limit-ignored persistence-ignored mig-mode-ignored create-ignored create-elsewhere compute-ignored destroy-ignored; do
  BULKHEAD_LIE=$lie
  exits "$lie: apply fails" 2 bounded "$bulkhead" apply -f "$work/want.yaml" --yes
  says "$lie: because it reads back otherwise" 'reads back|the driver made it at|cannot be read back' "$out"
  said=$out
  BULKHEAD_LIE=
  got=$(state)
  if [ "$got" = "$before" ]; then
    ok "$lie: the host is as before"
  else
    # It may be impossible to undo while the driver lies; then that is said, and an honest driver settles it.
    says "$lie: what cannot be undone is said" 'cannot be taken back|could not be undone|left' "$said"
    exits "$lie: rollback with an honest driver" 0 bounded "$bulkhead" rollback --yes
    same "$lie: brings the host back" "$before" "$(state)"
  fi
  same "$lie: no step is in flight" 0 "$("$bulkhead" history --json | grep -c '"intended"')"
done
same "the same plan as in the beginning" "$plan" "$("$bulkhead" plan -f "$work/want.yaml" --json)"
done_testing
