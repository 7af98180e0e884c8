#!/usr/bin/env python3
"""Whole-process time of `bulkhead inventory` against `nvidia-smi -q`, on the same driver library, in one run.

    bench/inventory.py --bulkhead build/bin/bulkhead [--smi nvidia-smi] [--twin DIR] [--runs 25]

Runs alternate, so that drift of the machine hits both alike. Prints medians, the spread, driver calls and the ratio;
exits 1 when inventory needs more than half of nvidia-smi's time.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time


def once(command, environment):
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    took = time.perf_counter() - began
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.decode(errors='replace').strip()}")
    return took * 1e3


def quartiles(values):
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:8.2f} ms   (quartiles {low:.2f} .. {high:.2f})"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bulkhead", required=True)
    parser.add_argument("--smi", default="nvidia-smi")
    parser.add_argument("--twin", help="a twin's directory; without it, the real driver")
    parser.add_argument("--runs", type=int, default=25)
    given = parser.parse_args()
    if given.runs < 15:
        parser.error("fewer than 15 runs say nothing")

    environment = dict(os.environ)
    if given.twin:
        twin = os.path.abspath(given.twin)
        environment.update(BULKHEAD_ROOT=f"{twin}/root", BULKHEAD_NVML=f"{twin}/lib/libnvidia-ml.so.1",
                           BULKHEAD_TWIN=twin, LD_LIBRARY_PATH=f"{twin}/lib")
    arms = {
        "bulkhead inventory": [given.bulkhead, "inventory"],
        "bulkhead inventory --json": [given.bulkhead, "inventory", "--json"],
        "nvidia-smi -q": [given.smi, "-q"],
    }
    times = {name: [] for name in arms}
    for name, command in arms.items():  # caches warm for all alike
        once(command, environment)
    for _ in range(given.runs):
        for name, command in arms.items():
            times[name].append(once(command, environment))

    cost = subprocess.run([given.bulkhead, "inventory", "--json", "--cost"], env=environment, capture_output=True, check=True)
    document = json.loads(cost.stdout)
    calls = sum(call["calls"] for call in document["cost"]["driver_calls"])
    print(f"{len(document['gpus'])} GPUs, {given.runs} alternating runs, whole processes")
    for name, values in times.items():
        print(f"  {name:<28}{quartiles(values)}")
    print(f"  driver calls of one inventory: {calls}")
    against = statistics.median(times["nvidia-smi -q"])
    ratio = statistics.median(times["bulkhead inventory"]) / against
    print(f"  inventory / nvidia-smi -q = {ratio:.3f}   (goal: at most 0.5)")
    print(f"  inventory --json / nvidia-smi -q = {statistics.median(times['bulkhead inventory --json']) / against:.3f}")
    return 0 if ratio <= 0.5 else 1


if __name__ == "__main__":
    sys.exit(main())
