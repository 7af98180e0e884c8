#!/usr/bin/env bash
# simulate: a trace and a stream of MIG jobs, their figures, plots and refusals.
cd "$(dirname "$0")/../.." && . tests/lib.sh
bulkhead=$BIN/bulkhead

# A small cluster in openb's columns: 60 nodes, 360 GPUs, pods of many shapes.
awk 'BEGIN { print "sn,cpu_milli,memory_mib,gpu,model"
  for (i = 0; i < 60; ++i) { g = i % 3 == 0 ? 8 : i % 3 == 1 ? 8 : 2; printf "node-%02d,%d,%d,%d,%s\n", i, g * 12000, g * 96000, g, i % 2 ? "T4" : "V100M16" } }' >"$work/nodes.csv"
awk 'BEGIN { srand(7); print "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time"
  for (i = 0; i < 500; ++i) { r = rand(); n = 1; m = r < .3 ? 1000 : r < .5 ? 500 : r < .7 ? 250 : r < .8 ? 330 : r < .9 ? 0 : 1000
    if (m == 0) n = 0; if (r > .9) n = r > .95 ? 8 : 2
    t = i * 40; printf "pod-%03d,%d,%d,%d,%d,%s,LS,Running,%d,%d,%d\n", i, 2000 + int(r * 8) * 1000, 8192, n, m, i % 9 ? "" : "T4", t, t + 4000 + i * 7, t } }' >"$work/pods.csv"
lists=(--trace "$work/pods.csv" --nodes-file "$work/nodes.csv")
trace=(simulate "${lists[@]}" --seeds 1..3)
figures() { python3 -c '
import json, sys
d = json.load(sys.stdin)
for p in d["policies"]: print(p["policy"], ["%d %.9f %d" % (r["seed"], r["allocatedPercent"], r["failed"]) for r in p["runs"]])'; }

# ---- a trace
exits "a trace is replayed" 0 "$bulkhead" "${trace[@]}"
says "the page says what was simulated" '^pods: 500 pods, 60 nodes, 360 GPUs; arrivals to 130 %' "$out"
for policy in bulkhead 06-FGD 05-BestFit 01-Random; do says "$policy has its row" "^$policy +3 +[0-9.]+ +[0-9.]+" "$out"; done
says "nothing published is claimed" '^POLICY +SEEDS +IN USE % +SD +TURNED AWAY' "$out"
same "without a terminal there is no progress bar" "" "$("$bulkhead" "${trace[@]}" 2>&1 >/dev/null)"
first=$("$bulkhead" "${trace[@]}" --json | figures)
same "the same seeds give the same figures" "$first" "$("$bulkhead" "${trace[@]}" --json | figures)"
same "one thread gives the same figures" "$first" "$("$bulkhead" "${trace[@]}" --json --threads 1 | figures)"
same "policies do not disturb each other" "$(grep FGD <<<"$first")" "$("$bulkhead" "${trace[@]}" --policy fgd --json | figures)"
if [ "$("$bulkhead" simulate "${lists[@]}" --policy random --seeds 4..6 --json | figures)" != "$(grep Random <<<"$first")" ]; then ok "other seeds give other figures"; else not_ok "other seeds give other figures"; fi
printf 'trace,policy,seeds,allocation_percent_mean,allocation_percent_sd\npods,06-FGD,10,91.25,0.10\nother,05-BestFit,10,1,1\n' >"$work/published_allocation.csv"
exits "figures published beside the trace are shown" 0 "$bulkhead" "${trace[@]}"
says "with the difference" '^06-FGD +3 +[0-9.]+ +[0-9.]+ +91.25 +[+-][0-9.]+' "$out"
says "a policy without one has a dash" '^05-BestFit +3 +[0-9.]+ +[0-9.]+ +- +- ' "$out"
exits "on another fleet nothing is compared" 0 "$bulkhead" "${trace[@]}" --nodes 120
says "the fleet is as large as asked" '120 nodes, 720 GPUs' "$out"
if grep -q PUBLISHED <<<"$out"; then not_ok "and no published figure stands beside" "$out"; else ok "and no published figure stands beside"; fi
exits "a fleet by its GPUs" 0 "$bulkhead" "${trace[@]}" --gpus 1000 --policy best-fit
says "has at least so many" 'nodes, 1[0-9]{3} GPUs' "$out"
exits "the trace's own times" 0 "$bulkhead" "${trace[@]}" --times --policy ours,best-fit
says "are named" "the trace's own arrivals and departures" "$out"
exits "a plot is drawn" 0 "$bulkhead" "${trace[@]}" --plot "$work/use.svg"
check "it is well-formed and has a curve for each policy" python3 -c '
import sys, xml.etree.ElementTree as x
root = x.parse(sys.argv[1]).getroot()
assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 4' "$work/use.svg"
exits "the JSON is whole" 0 bash -c '"$1" "${@:2}" --json | python3 -c "
import json, sys
d = json.load(sys.stdin)
assert d[\"kind\"] == \"Simulation\" and d[\"gpus\"] == 360 and d[\"seeds\"] == [1, 2, 3] and not d[\"stopped\"]
for p in d[\"policies\"]:
    runs = [r[\"allocatedPercent\"] for r in p[\"runs\"]]
    assert abs(sum(runs) / 3 - p[\"allocatedPercent\"][\"mean\"]) < 1e-9 and 50 < p[\"allocatedPercent\"][\"mean\"] <= 100
    assert len(p[\"curve\"]) > 50
"' - "$bulkhead" "${trace[@]}"

# ---- MIG jobs
mig=(simulate --mig h100 --jobs 4000 --gpus 20)
exits "a stream of MIG jobs" 0 "$bulkhead" "${mig[@]}" --mix uniform,small
for policy in 'ours' 'ours\+3' mfi best-fit first-fit free; do says "$policy has its row in each mix" "^small +$policy +1 +[0-9.]+ +[0-9.]+" "$out"; done
says "and says where the geometry is from" 'geometry: read through NVML on an H100' "$out"
exits "a mix of one's own" 0 "$bulkhead" "${mig[@]}" --mix 1g.10gb=3,3g.40gb=1 --policy ours
exits "all mixes, drawn" 0 "$bulkhead" "${mig[@]}" --mix all --policy ours,free --plot "$work/mig.svg"
check "bars are well-formed" python3 -c 'import sys, xml.etree.ElementTree as x; assert x.parse(sys.argv[1]).getroot().tag.endswith("svg")' "$work/mig.svg"
for model in a100-40gb a30 h200 rtx-pro-6000; do exits "$model can be simulated" 0 "$bulkhead" simulate --mig $model --jobs 500 --gpus 4 --policy ours,first-fit; done
exits "what can be chosen is listed" 0 "$bulkhead" simulate --list
says "with a sentence each" '^mfi +[a-z]' "$out"

# ---- stopped (--foreground: else timeout tells child and group, and a second SIGINT ends the program at once)
exits "Ctrl-C ends it with what was done" 1 timeout --foreground --preserve-status -s INT 2 "$bulkhead" simulate --mig h100 --mix uniform --policy ours --jobs 300000 --seeds 1..5000 --threads 1
says "and says how much that was" '^Stopped: [0-9]+ of 5000 runs were done' "$out"
bar=$(script -qec "$bulkhead simulate --mig h100 --mix uniform --policy ours --jobs 400000 --seeds 1..2 --threads 1" /dev/null </dev/null)
says "on a terminal there is a progress bar" '\[#*\.*\] +[0-9]+ %' "$bar"
quiet=$(script -qec "$bulkhead simulate --mig h100 --mix uniform --policy ours --jobs 400000 --seeds 1..2 --threads 1 --quiet" /dev/null </dev/null)
if grep -q '\] *[0-9]* %' <<<"$quiet"; then not_ok "--quiet has none" "$quiet"; else ok "--quiet has none"; fi

# ---- refusals: what, to what, why, what to type
refused() {  # refused "sentence" PATTERN ARGUMENT...
  local sentence=$1 pattern=$2
  shift 2
  exits "$sentence" 2 "$bulkhead" simulate "$@"
  says "  and says so" "$pattern" "$out"
}
refused "nothing to simulate" 'bulkhead simulate --mig h100'
refused "two experiments at once" 'two experiments' --trace a --mig h100
refused "a trace without nodes" '--nodes-file NODES.csv' --trace "$work/pods.csv"
refused "a file that is not there" 'no-such.csv: No such file' --trace "$work/no-such.csv" --nodes-file "$work/nodes.csv"
refused "a policy nobody knows" 'did you mean: --policy best-fit' "${lists[@]}" --policy best-fitt
refused "seeds that are no numbers" 'like --seeds 42..51' "${lists[@]}" --seeds x
refused "too many seeds" 'more than 10000 seeds' --mig h100 --seeds 1..100000000
refused "a fleet said twice" 'give one of them' "${lists[@]}" --nodes 3 --gpus 4
refused "an option of the other experiment" 'belongs? to --trace' --mig h100 --nodes 4
refused "a model nobody knows" 'did you mean: --mig h100-nvl' --mig h100-nv
refused "a mix nobody knows" '--mix: .*' --mig h100 --mix nonsense
refused "a MIG policy nobody knows" '--policy: .*' --mig h100 --policy nonsense
refused "a load of nothing" 'load' --mig h100 --load 0
refused "a holding nobody knows" 'exponential, fixed or heavy' --mig h100 --holding short
refused "more GPUs than anyone has" 'at most 1000000' --mig h100 --gpus 2000000000
refused "a plot in a folder that is not there" '--plot: .*No such file' --mig a30 --jobs 100 --gpus 2 --policy ours --plot "$work/none/x.svg"
sed '5s/.*/node-x,many,1,1,T4/; 9s/,[0-9]*,T4$/,-1,T4/' "$work/nodes.csv" >"$work/bad.csv"
refused "mistakes in a list are told with their lines" 'line 5: cpu_milli' --trace "$work/pods.csv" --nodes-file "$work/bad.csv"
: >"$work/empty.csv"
refused "an empty list" 'empty.csv' --trace "$work/empty.csv" --nodes-file "$work/nodes.csv"
printf 'a,b\n' >"$work/heading.csv"
refused "a list without the columns" 'cpu_milli' --trace "$work/heading.csv" --nodes-file "$work/nodes.csv"
printf 'trace,policy,seeds,allocation_percent_mean,allocation_percent_sd\npods,06-FGD,10,x,0.10\n' >"$work/published_allocation.csv"
refused "published figures that are none" 'line 2: mean or sd is no number' --trace "$work/pods.csv" --nodes-file "$work/nodes.csv"
refused "an option that is mistyped" 'did you mean: bulkhead simulate --seeds' --mig h100 --seed 1
exits "help has examples" 0 "$bulkhead" simulate --help
says "of both experiments" 'bulkhead simulate --mig host --mix' "$out"
unset BULKHEAD_ROOT BULKHEAD_NVML
refused "no GPU and no model" 'simulate' --mig host --nvml /nonexistent
done_testing
