#!/usr/bin/env python3
"""Stand-ins for a machine without a GPU, so that `run.py --dry-run` can exercise every scene: a tenant that sleeps
instead of computing, bulkhead's commands with the options spelt as they are, programs that answer with made-up figures.
Measures nothing.
"""
import argparse
import json
import os
import subprocess
import sys
import time

REGISTRY = "/dev/shm/bench-gpu-dry"


class Nvml:
    def identity(self):
        return {"gpu": "no GPU (dry run)", "uuid": "GPU-00000000-0000-0000-0000-000000000000", "driver": "none"}

    def processes(self):
        return {}

    def memory(self):
        return 80 << 30, 1 << 30


def worker(kind, index, path):
    from board import Slot

    slot, done, due = Slot(path, int(index)), 0, None
    pause = {"train": 0.027, "gemm": 0.0016}.get(kind, 0.002)
    time.sleep(0.05)
    slot.ready()
    while slot.run() != 2:
        if slot.run() == 0 or kind == "idle":
            due = None
            time.sleep(0.002)
        elif kind == "serve" and slot.run() == 1:
            due = (due or time.monotonic()) + 0.01
            time.sleep(max(0.0, due - time.monotonic()) + 0.001)
            end = time.monotonic()
            slot.push(end, end - due)
        else:
            time.sleep(pause)
            done += 1
            slot.push(time.monotonic(), done)
    return 0


def share(words):
    parser = argparse.ArgumentParser(prog="bulkhead share")
    verbs = parser.add_subparsers(dest="verb", required=True)
    run, change, show, test = (verbs.add_parser(v) for v in ("run", "set", "list", "selftest"))
    change.add_argument("tenant")
    for verb in (run, change):
        verb.add_argument("--weight", type=int)
        verb.add_argument("--class", choices=("interactive", "batch", "background"))
        verb.add_argument("--ceiling")
        verb.add_argument("--memory")
    for verb in (run, test):
        verb.add_argument("--gpu")
    run.add_argument("--name")
    run.add_argument("--guard", action="store_true")
    run.add_argument("--untested", action="store_true")
    show.add_argument("--json", action="store_true")
    test.add_argument("--json", action="store_true")
    program = words[words.index("--") + 1 :] if "--" in words else []
    options = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    os.makedirs(REGISTRY, exist_ok=True)
    if options.verb == "run":
        arbiter, child = subprocess.Popen(["sleep", "600"]), subprocess.Popen(program)
        file = f"{REGISTRY}/{options.name}"
        with open(file + ".new", "w") as out:
            json.dump(
                {
                    "name": options.name,
                    "now": {"arbiter": arbiter.pid, "processes": [child.pid], "inForceMicroseconds": 900},
                },
                out,
            )
        os.rename(file + ".new", file)
        while child.poll() is None:
            if arbiter.poll() is not None:
                arbiter = subprocess.Popen(["sleep", "600"])
            time.sleep(0.002)
        arbiter.kill()
        os.unlink(file)
        return child.returncode if child.returncode >= 0 else 128 - child.returncode
    if options.verb == "list":
        print(
            json.dumps(
                {
                    "tenants": [
                        json.load(open(f"{REGISTRY}/{f}")) for f in os.listdir(REGISTRY) if not f.endswith(".new")
                    ]
                }
            )
        )
    if options.verb == "set" and not os.path.exists(f"{REGISTRY}/{options.tenant}"):
        print(f"bulkhead: no tenant {options.tenant}", file=sys.stderr)
        return 2
    if options.verb == "selftest":
        print(json.dumps({"slices": True, "pauses": True, "memory": True}))
    return 0


def kernels(words):
    if words[0] == "worker":
        return worker(*words[1:])
    if words[0] == "costs":
        print(json.dumps({"context_ms": 1.0, "launch_ns": 1000.0, "alloc_free_ns": 1000.0, "memory_query_ns": 100.0}))
    elif words[0] in ("clients", "contexts"):
        print(json.dumps({"processes": int(words[1]), "up": int(words[1]), "failed": 0, "seconds": 0.1}))
    else:
        time.sleep(float(words[1]))
    return 0


def leak(words):
    for path in words[1:] or ("cuMemAlloc", "VMM churn", "churn, then all"):
        print(f"BEGIN {path}|{time.monotonic()}", flush=True)
        time.sleep(0.05)
        answer = json.dumps({"mib": 4096, "refusal": "CUDA_ERROR_OUT_OF_MEMORY", "note": ""})
        print(f"END {path}|{time.monotonic()}|{answer}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(
        {"worker": lambda w: worker(*w), "share": share, "kernels": kernels, "leak": leak}[sys.argv[1]](sys.argv[2:])
    )
