#!/usr/bin/env bash
# The real nvidia-smi against the twin: the whole life of MIG, what it prints and how it exits.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
smi=$DEPS/usr/lib/nvidia/current/nvidia-smi
[ -x "$smi" ] || { echo "# no nvidia-smi at $smi"; exit 1; }
inventory() { "$BIN/bulkhead" inventory --json; }

twin_up dgx-h100
uuids=$(inventory | python3 -c 'import json,sys; print("\n".join(g["uuid"] for g in json.load(sys.stdin)["gpus"]))')

run "$smi" -L
exits "-L exits 0" 0
is "-L lists the UUIDs of bulkhead's inventory, in order" "$uuids" "$(sed -n 's/^GPU .*(UUID: \(.*\))/\1/p' <<<"$output")"

run "$smi"
exits "the default page exits 0" 0
says "the default page names the driver and CUDA versions" 'Driver Version: 580\.159\.04 +CUDA Version: 13\.0'
is "the default page has eight boards of 81559 MiB at 700 W" 8 "$(grep -cE '/ 700W \|.*/ 81559MiB' <<<"$output")"

run "$smi" -q
exits "-q exits 0" 0
is "-q sees eight boards" 8 "$(grep -c 'Product Name *: NVIDIA H100 80GB HBM3' <<<"$output")"
says "-q reads the shutdown temperature" 'GPU Shutdown Temp *: 95 C'
says "-q reads the fabric's state" 'State *: Completed'
is "-q prints no error words" "" "$(grep -E 'Unknown Error|Invalid Argument|Uninitialized' <<<"$output" || true)"

run "$smi" -q -x
exits "-q -x exits 0" 0
grep -v '<!DOCTYPE' <<<"$output" >"$scratch/q.xml"
if python3 - "$scratch/q.xml" "$(inventory)" <<'PY'
import json, sys, xml.etree.ElementTree as tree
xml = tree.parse(sys.argv[1]).getroot()
host = json.loads(sys.argv[2])
boards = xml.findall("gpu")
assert len(boards) == len(host["gpus"]) == int(xml.find("attached_gpus").text), len(boards)
for board, gpu in zip(boards, host["gpus"]):
    assert board.find("uuid").text == gpu["uuid"], gpu["uuid"]
    assert board.find("pci/pci_bus_id").text.lower()[4:] in json.dumps(gpu).lower(), board.find("pci/pci_bus_id").text
PY
then ok "-q -x is XML that agrees with bulkhead's inventory on UUIDs and bus ids"; else not_ok "-q -x is XML that agrees with bulkhead's inventory on UUIDs and bus ids" "see above"; fi

run "$smi" --query-gpu=index,name,mig.mode.current,memory.total,power.limit --format=csv,noheader -i 2
is "--query-gpu answers for one board" "2, NVIDIA H100 80GB HBM3, Disabled, 81559 MiB, 700.00 W" "$output"
run "$smi" topo -m
exits "topo -m exits 0" 0
is "topo -m shows eighteen NVLinks between all pairs" 56 "$(grep -E '^GPU[0-9]' <<<"$output" | grep -o NV18 | wc -l)"

run "$smi" -i 0 -mig 1
exits "-mig 1 exits 0" 0
says "-mig 1 takes effect at once on Hopper" '^Enabled MIG Mode for GPU 00000000:1B:00\.0'
run "$smi" mig -i 0 -lgip
is "mig -lgip lists seven profiles" 7 "$(grep -c 'MIG [1-7]g' <<<"$output")"
says "mig -lgip has 3g.40gb at 39.50 GiB with 60 SM, two of two free" 'MIG 3g\.40gb +9 +2/2 +39\.50 +No +60 '
run "$smi" mig -i 0 -lgipp
says "mig -lgipp gives 2g its starts" 'Profile ID 14 Placements: \{0,2,4\}:2'
says "mig -lgipp gives 7g the whole board" 'Profile ID +0 Placement : \{0\}:8'

run "$smi" mig -i 0 -cgi 9,14,19 -C
exits "mig -cgi 9,14,19 -C exits 0" 0
is "the instances get the ids that the driver's policy gives" "1 5 13" "$(sed -n 's/.*created GPU instance ID *\([0-9]*\) on.*/\1/p' <<<"$output" | xargs)"
run "$smi" mig -lgi
says "mig -lgi places 3g.40gb at 0:4" 'MIG 3g\.40gb +9 +1 +0:4'
says "mig -lgi places 2g.20gb at 4:2" 'MIG 2g\.20gb +14 +5 +4:2'
says "mig -lgi places 1g.10gb at 6:1" 'MIG 1g\.10gb +19 +13 +6:1'
is "bulkhead's inventory has the same instances" "1 5 13" "$(inventory | python3 -c 'import json,sys
def walk(x):
    if isinstance(x, dict):
        for k, v in x.items():
            if k == "instances" and isinstance(v, list): yield from v
            else: yield from walk(v)
    elif isinstance(x, list):
        for v in x: yield from walk(v)
host = json.load(sys.stdin)
print(*sorted(i.get("gpu_instance", i.get("id")) for i in walk(host["gpus"][0])))')"
run "$smi" mig -lci
is "mig -lci lists three compute instances" 3 "$(grep -c 'MIG [123]g' <<<"$output")"
run "$smi" mig -lcip
says "mig -lcip shows the 2g's profiles as on a real H100" 'MIG 1c\.2g\.20gb +7 +0/1 +26 '
run "$smi" -L
is "-L shows three MIG devices" 3 "$(grep -c 'UUID: MIG-' <<<"$output")"
first=$(grep -o 'MIG-[0-9a-f-]*' <<<"$output" | head -1)
run "$smi" -i 0
says "the default page shows the slice's memory" '0MiB / 40448MiB'

run "$smi" mig -i 0 -cgi 9
exits "a profile that does not fit exits 23 (insufficient resources)" 23
run "$smi" mig -i 0 -dgi
exits "destroying a GPU instance with a compute instance exits 19 (in use)" 19
run "$smi" mig -i 1 -lgi
exits "mig -lgi on a board without MIG exits 6 (not found)" 6
run "$smi" -i 0 -mig 0
says "-mig 0 with instances stays pending" 'pending disable state'
pid=$("$BIN/bulkhead" twin attach 0:1:0 --name python3 --memory 20GiB --dir "$twin")
run "$smi" --query-compute-apps=pid,process_name,used_memory --format=csv,noheader
is "--query-compute-apps lists the process attached to a slice" "$pid, python3, 20480 MiB" "$output"
run "$smi" -i 0
says "the default page shows it under its instances" "^\\| +0 +1 +0 +$pid +C +python3 +20480MiB"
run "$smi" mig -i 0 -gi 1 -dci
exits "destroying a busy compute instance exits 19 (in use)" 19
"$BIN/bulkhead" twin detach --all --dir "$twin" >/dev/null
run "$smi" -i 0 -am 1
says "accounting on a board in MIG mode is not supported" 'Unable to set Accounting Mode .*: Not Supported'
run "$smi" mig -i 0 -dci
exits "mig -dci exits 0" 0
run "$smi" mig -i 0 -dgi
exits "mig -dgi exits 0" 0
run "$smi" mig -i 0 -cgi 9:0 -C
run "$smi" -L
is "a slice made again at its place has its old UUID" "$first" "$(grep -o 'MIG-[0-9a-f-]*' <<<"$output" | head -1)"
run "$smi" mig -i 0 -dci
run "$smi" mig -i 0 -dgi
run "$smi" -i 0 -mig 0
says "-mig 0 takes effect" '^Disabled MIG Mode'

run "$smi" -i 1 -pl 500
exits "-pl 500 exits 0" 0
is "and is read back" "500.00 W" "$("$smi" --query-gpu=power.limit --format=csv,noheader -i 1)"
run "$smi" -i 1 -pl 50
exits "-pl below the least exits 2 (invalid argument)" 2
run "$smi" -i 1 -lgc 1200,1500
says "-lgc locks the clocks" 'gpuClkMin 1200, gpuClkMax 1500'
run "$smi" -i 1 -pm 0
is "-pm 0 is read back" "Disabled" "$("$smi" --query-gpu=persistence_mode --format=csv,noheader -i 1)"
run "$smi" -i 9
exits "a GPU that is not there exits 6 (not found)" 6
if [ "$(id -u)" -eq 0 ] && command -v setpriv >/dev/null; then
  chmod 755 "$scratch"
  run setpriv --reuid 65534 --regid 65534 --clear-groups "$smi" -i 1 -pl 400
  exits "without root -pl exits 4 (no permission)" 4
fi

twin_up l40s-4
run "$smi" -i 0 -mig 1
says "-mig 1 on a chip without MIG says so" 'Unable to enable MIG Mode .*: Not Supported'
run "$smi" -i 0 -r
exits "a reset of a board whose primary function nobody can name exits 3 (not supported)" 3
