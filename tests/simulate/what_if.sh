#!/usr/bin/env bash
# plan --what-if on a twin: what fits, what has to move, what it costs whom; and the table of models against the driver.
cd "$(dirname "$0")/../.." && . tests/lib.sh
bulkhead=$BIN/bulkhead
twin=$work/twin
export COLUMNS=200
check "the twin comes up" "$bulkhead" twin up dgx-h100 --dir "$twin"
export BULKHEAD_ROOT=$twin/root BULKHEAD_NVML=$twin/lib/libnvidia-ml.so.1
ask() { "$bulkhead" plan --what-if "$@"; }
answer() {  # answer EXPRESSION ARGUMENT...: a Python expression over the JSON document d
  local expression=$1
  shift
  ask "$@" --json | python3 -c "import json, sys; d = json.load(sys.stdin); print($expression)"
}

# ---- nothing has MIG on yet
exits "with MIG off everywhere it does not fit" 1 ask '4 x 3g.40gb'
says "and the way out is to turn it on where nobody works" 'way out: turn MIG on on GPU 0, GPU 1, which nobody uses' "$out"
same "as few GPUs as will do" "[0, 1]" "$(answer '[g["gpu"] for g in d["turnMigOn"]["gpus"]]' '4 x 3g.40gb')"

cat >"$work/node.yaml" <<'YAML'
apiVersion: bulkhead/v1
kind: Node
gpus:
  - select: {index: [0, 1, 2, 3]}
    mode: mig
    layout: [3g.40gb, 2g.20gb, 1g.10gb, 1g.10gb]
  - select: {index: [4, 5]}
    mode: mig
    layout: [1g.10gb, 1g.10gb]
YAML
check "some GPUs are cut" "$bulkhead" apply -f "$work/node.yaml" --yes
slices() { "$bulkhead" inventory --json | python3 -c '
import json, sys
for g in json.load(sys.stdin)["gpus"]: print(g["index"], g["mig"]["enabled"], [(i["id"], i["profile"], i["placement"], i["compute_instances"]) for i in g["mig"]["instances"]])'; }
before=$(slices)

exits "what fits, fits now" 0 ask '2 x 3g.40gb'
says "nothing has to move" '^2 x 3g.40gb fit now; nothing has to move.' "$out"
says "the places are named" 'GPU 4, GPU 5: 3g.40gb at 4' "$out"
exits "after moves" 0 ask '3 x 3g.40gb'
says "they are counted" '^3 x 3g.40gb fit after 2 moves; nobody would notice.' "$out"
says "and listed with what is lost" '1g.10gb gi[0-9]+ +GPU [45] at [0-9] +GPU [45] at [0-9] +0 MiB +nobody uses it; it gets a new UUID' "$out"
says "nothing is changed" '^Nothing was changed.' "$out"
exits "what does not fit exits 1" 1 ask '20 x 3g.40gb'
says "it says how many would" '^20 x 3g.40gb do not fit: 3 of 20 would, after 2 moves.' "$out"
says "and how many GPUs are missing" 'way out: 9 more NVIDIA H100' "$out"
exits "idle GPUs with MIG off are a way out" 1 ask '6 x 3g.40gb'
says "and they are named" 'turn MIG on on GPU 6, GPU 7, which nobody uses .*: then all fit' "$out"
exits "several kinds at once" 0 ask '3g.40gb, 2 x 1g.10gb'
same "in one or in several options" "$(ask '3g.40gb, 2 x 1g.10gb')" "$(ask '3g.40gb' --what-if '2x1g.10gb')"
exits "a bound on the moves is kept" 1 ask '3 x 3g.40gb' --moves 1
says "and what it would take is said" 'way out: 2 moves would make room for all: --moves 2' "$out"
same "as few moves as will do" "with-moves 2" "$(answer 'd["answer"], len(d["moves"])' '3 x 3g.40gb' | tr -d "(),'")"
same "the moves are legal one after another" ok "$(ask '3 x 3g.40gb' --json >"$work/answer.json"; "$bulkhead" inventory --json >"$work/a.json"; python3 - "$work/answer.json" "$work/a.json" <<'PY'
import json, sys
answer, host = (json.load(open(path)) for path in sys.argv[1:])
size = {p["name"]: p["memory_slices"] for g in host["gpus"] for p in g["mig"]["profiles"]}
taken = {(g["index"], i["placement"]["start"] + k) for g in host["gpus"] for i in g["mig"]["instances"] for k in range(i["placement"]["size"])}
def cover(place, name): return {(place["gpu"], place["start"] + k) for k in range(size[name])}
for move in answer["moves"]:
    to, source = cover(move["to"], move["profile"]), cover(move["from"], move["profile"])
    assert not to & taken and source <= taken
    taken = taken - source | to
for place in answer["places"]:
    new = cover(place, place["profile"])
    assert not new & taken
    taken |= new
assert len(answer["places"]) == 3
print("ok")
PY
)"
same "two askings say the same" "$(ask '3 x 3g.40gb')" "$(ask '3 x 3g.40gb')"
same "the twin is as before" "$before" "$(slices)"

# ---- somebody works there
"$bulkhead" inventory --json | python3 -c '
import json, sys
for g in json.load(sys.stdin)["gpus"]:
    for i in g["mig"].get("instances", []):
        for c in i["compute_instances"]: print("%d:%d:%d" % (g["index"], i["id"], c["id"]))' |
  while read -r slice; do "$bulkhead" twin attach "$slice" --name train --memory 3GiB --dir "$twin" >/dev/null; done
exits "with tenants at work the same does not fit" 1 ask '3 x 3g.40gb'
says "who is in the way is named" '[0-9]g.[0-9]0gb \(gi[0-9]+ of GPU [0-9]\), in use by pid [0-9]+ \(.*\): --evict' "$out"
exits "--evict counts on ending them" 0 ask '3 x 3g.40gb' --evict
says "and says what they lose" 'pid [0-9]+ \(.*\) would be ended, [0-9]+ MiB to load again' "$out"
says "noticed moves are counted, in MiB" '2 would be noticed, 6144 MiB to load again' "$out"
same "nobody was ended" "$(ask '3 x 3g.40gb')" "$(ask '3 x 3g.40gb')"

# ---- a fleet
"$bulkhead" inventory --json >"$work/a.json"
sed 's/"hostname": "[^"]*"/"hostname": "other"/' "$work/a.json" >"$work/b.json"
unset BULKHEAD_ROOT BULKHEAD_NVML
exits "a fleet from files, without a GPU here" 0 ask '4 x 3g.40gb' --inventory "$work/a.json" "$work/b.json" --root "$work"
says "hosts are named" '2 hosts, 12 GPUs with MIG on' "$out"
says "and stand before their GPUs" 'other GPU 4' "$out"
refused() {
  local sentence=$1 pattern=$2
  shift 2
  exits "$sentence" 2 "$bulkhead" plan "$@"
  says "  and says so" "$pattern" "$out"
}
refused "one host twice" 'is there already' --what-if 3g.40gb --inventory "$work/a.json" "$work/a.json"
refused "a file that is no inventory" 'is no inventory' --what-if 3g.40gb --inventory "$work/answer.json"
printf '{' >"$work/broken.json"
refused "a file that is no JSON" 'broken.json' --what-if 3g.40gb --inventory "$work/broken.json"
sed 's/"memory_slices": 8/"memory_slices": 8000/' "$work/a.json" >"$work/absurd.json"
refused "an absurd geometry" 'memory_slices' --what-if 3g.40gb --inventory "$work/absurd.json"
sed 's/"start": [0-9]*/"start": 0/' "$work/a.json" >"$work/overlap.json"
refused "instances that lie on each other" 'plan: ' --what-if 3g.40gb --inventory "$work/overlap.json"
refused "a profile nobody has" "did you mean: bulkhead plan --what-if '3 x 3g.40gb'" --what-if '3 x 3g.40bg' --inventory "$work/a.json"
refused "none of it" 'is not in 1 to' --what-if '0 x 3g.40gb' --inventory "$work/a.json"
refused "a node file as well" 'two questions' --what-if 3g.40gb -f "$work/node.yaml"
refused "neither" 'bulkhead plan -f node.yaml' --
refused "an inventory without a question" 'belong to --what-if' --inventory "$work/a.json"

# ---- the table of models says what the driver says
profiles='
import json, sys
keys = ("id", "name", "compute_slices", "memory_slices", "memory_bytes", "multiprocessors", "copy_engines", "decoders", "encoders", "jpeg_engines", "optical_flow", "max_instances", "starts")
d = json.load(sys.stdin)
mig = d["mig"] if "mig" in d else d["gpus"][0]["mig"]
print(mig["memory_slices"], sorted(str([p[k] for k in keys]) for p in mig["profiles"]))'
same "h100-80gb is as the twin's driver says" "$(python3 -c "$profiles" <"$work/a.json")" "$("$bulkhead" simulate --list --json | python3 -c '
import json, sys
print(json.dumps(next(m for m in json.load(sys.stdin)["models"] if m["name"] == "h100-80gb")))' | python3 -c "$profiles")"
for pair in hgx-h200:h200 dgx-a100:a100-80gb; do
  "$bulkhead" twin up "${pair%%:*}" --dir "$work/twin-${pair#*:}" >/dev/null
  BULKHEAD_ROOT=$work/twin-${pair#*:}/root BULKHEAD_NVML=$work/twin-${pair#*:}/lib/libnvidia-ml.so.1 "$bulkhead" inventory --json >"$work/${pair#*:}.json"
  same "${pair#*:} is as the twin's driver says" "$(python3 -c "$profiles" <"$work/${pair#*:}.json")" "$("$bulkhead" simulate --list --json | MODEL=${pair#*:} python3 -c '
import json, os, sys
print(json.dumps(next(m for m in json.load(sys.stdin)["models"] if m["name"] == os.environ["MODEL"])))' | python3 -c "$profiles")"
done
export BULKHEAD_ROOT=$twin/root BULKHEAD_NVML=$twin/lib/libnvidia-ml.so.1
exits "a simulation takes the geometry of the host's driver" 0 "$bulkhead" simulate --mig host --gpus 10 --jobs 1000 --policy ours --json
same "and gives what the table gives" "$("$bulkhead" simulate --mig h100 --gpus 10 --jobs 1000 --policy ours --json | grep acceptedPercent | head -1)" "$(grep acceptedPercent <<<"$out" | head -1)"
done_testing
