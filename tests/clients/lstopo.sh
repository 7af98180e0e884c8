#!/usr/bin/env bash
# hwloc's lstopo with its NVML plugin against the twin.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
lstopo=$(command -v lstopo-no-graphics) || lstopo=$DEPS/usr/bin/lstopo-no-graphics
plugins=$(dirname "$(find "$DEPS/usr/lib" -name hwloc_nvml.so | head -1)")
[ -x "$lstopo" ] && [ -f "$plugins/hwloc_nvml.so" ] || { echo "# no lstopo or no NVML plugin"; exit 1; }
twin_up dgx-h100
libraries=$LD_LIBRARY_PATH:$DEPS/usr/lib/x86_64-linux-gnu
# The plugin hangs each GPU under its PCI function: inside `twin run` lstopo sees the twin's PCI devices.
run "$BIN/bulkhead" twin run --dir "$twin" -- env HWLOC_PLUGINS_PATH="$plugins" LD_LIBRARY_PATH="$libraries" "$lstopo" --of xml --whole-io
exits "lstopo exits 0" 0
printf '%s\n' "$output" | sed -n '/<?xml/,$p' >"$scratch/topology.xml"
run python3 - "$scratch/topology.xml" "$("$BIN/bulkhead" inventory --json)" <<'PY'
import json, sys, xml.etree.ElementTree as tree
devices = {}
for o in tree.parse(sys.argv[1]).getroot().iter("object"):
    if o.get("subtype") == "NVML":
        devices[o.get("name")] = {i.get("name"): i.get("value") for i in o.findall("info")}
host = [g["uuid"] for g in json.loads(sys.argv[2])["gpus"]]
print(len(devices), [devices.get(f"nvml{i}", {}).get("NVIDIAUUID") for i in range(len(devices))] == host, {d.get("GPUModel") for d in devices.values()})
PY
is "lstopo finds eight NVML devices with the inventory's UUIDs" "8 True {'NVIDIA H100 80GB HBM3'}" "$output"
