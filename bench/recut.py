#!/usr/bin/env python3
"""Re-cut of 8 GPUs, one instance changed on each, against the least possible: a compute instance and a GPU instance
destroyed and made again on each GPU, 4 driver calls, 32 in all.

usage: recut.py BULKHEAD   (libnvidia-ml.so.1 of the twin beside it). Prints one JSON object.
"""
import json, os, subprocess, sys, tempfile, time

bulkhead = os.path.abspath(sys.argv[1])
node = "apiVersion: bulkhead/v1\nkind: Node\ngpus:\n  - select: {{index: \"0-7\"}}\n    mode: mig\n    layout: [3g.40gb, 2g.20gb, {}]\n"
with tempfile.TemporaryDirectory(prefix="bulkhead-bench.") as work:
    twin = f"{work}/twin"
    run = lambda *w: subprocess.run([bulkhead, *w], check=True, capture_output=True, text=True, env=env).stdout
    env = dict(os.environ)
    run("twin", "up", "dgx-h100", "--dir", twin)
    env.update(BULKHEAD_ROOT=f"{twin}/root", BULKHEAD_NVML=f"{twin}/lib/libnvidia-ml.so.1")
    try:
        for name, last in (("a", "1g.10gb"), ("b", "1g.20gb")):
            with open(f"{work}/{name}.yaml", "w") as f: f.write(node.format(last))
        run("apply", "-f", f"{work}/a.yaml", "--yes")
        results = []
        for name in "ba" * 3:
            start = time.monotonic()
            out = json.loads(run("apply", "-f", f"{work}/{name}.yaml", "--yes", "--json"))
            out["wall_ms"] = (time.monotonic() - start) * 1000
            kinds = [step["action"]["kind"] for step in out["plan"]["steps"]]
            assert out["verdict"] == "applied" and sorted(kinds) == ["create-instance"] * 8 + ["destroy-instance"] * 8, (out["verdict"], kinds)
            results.append(out)
        calls, wall = results[-1]["driver_calls"], sorted(r["wall_ms"] for r in results)[len(results) // 2]
        cost = json.loads(run("inventory", "--json", "--cost"))["cost"]["driver_calls"]
        print(json.dumps({"recut_gpus": 8, "driver_calls_acting_and_reading_back": calls, "least_driver_calls": 32, "ratio": round(calls / 32, 2),
                          "driver_calls_of_one_look_at_all_8": sum(c["calls"] for c in cost),
                          "wall_ms_median": round(wall), "of_which": "plan, journal of 16 steps (fsync each), acts, read back, second plan"}))
    finally:
        run("twin", "down", "--dir", twin)
