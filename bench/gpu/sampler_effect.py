#!/usr/bin/env python3
"""What a tenant notices of the sampler: driver calls of a CUDA program (build/bin/cuda_latency, on a core of its own) while
`bulkhead dmon` samples and while it is stopped, in turns of random length. For both calls: p50 and p99 with and without, their
ratio, and the interval that nine of ten resamplings of the turns fall into. A control beside it: the turns dealt out at random,
which shows what ratio this machine makes of nothing.

  python3 bench/gpu/sampler_effect.py --seconds 240 [--bin build/bin] [--json FILE]
"""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("--seconds", type=float, default=240)
options.add_argument("--bin", default="build/bin")
options.add_argument("--interval", default="1s", help="of dmon's lines; the sampler's tick stays 100 ms")
options.add_argument("--seed", type=int, default=1)
options.add_argument("--json")
options = options.parse_args()
rng = random.Random(options.seed)
window = 0.25
cores = sorted(os.sched_getaffinity(0))
mine, theirs = cores[len(cores) // 2], cores[1:len(cores) // 2] or cores

sampler = subprocess.Popen([options.bin + "/bulkhead", "dmon", "--interval", options.interval], stdout=subprocess.DEVNULL,
                           preexec_fn=lambda: (os.setsid(), os.sched_setaffinity(0, theirs)))
time.sleep(3)
if sampler.poll() is not None:
    sys.exit("dmon ended with %d" % sampler.returncode)
told = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would stop it
tenant = subprocess.Popen([options.bin + "/cuda_latency", "--seconds", str(options.seconds), "--window", str(window)], stdout=told,
                          preexec_fn=lambda: os.sched_setaffinity(0, {mine}))
turns = []  # (from, to, on)
end = time.monotonic() + options.seconds + 2
on = True
while time.monotonic() < end and tenant.poll() is None:
    os.killpg(sampler.pid, signal.SIGCONT if on else signal.SIGSTOP)
    began = time.monotonic()
    time.sleep(rng.uniform(1.5, 3))
    turns.append((began, time.monotonic(), on))
    on = not on
    if not turns or len(turns) % 40 == 0:
        print("# %d turns" % len(turns), file=sys.stderr)
os.killpg(sampler.pid, signal.SIGCONT)
sampler.terminate()
tenant.wait()
told.seek(0)
lines = [json.loads(line) for line in told]
if not lines or "error" in lines[0]:
    sys.exit("the tenant says: %s" % lines[:1])

# Windows wholly within a turn, a tenth of a second after its beginning.
pieces = []
for began, ended, was_on in turns:
    inside = [line for line in lines if line["at"] > began + 0.1 and line["at"] + window + 0.02 < ended]
    if inside:
        pieces.append((was_on, inside))


def pooled(some, call):
    bins = {}
    for piece in some:
        for line in piece:
            for at, times in line[call]:
                bins[at] = bins.get(at, 0) + times
    return bins


def quantile(bins, part):
    left = sum(bins.values()) * part
    for at in sorted(bins):
        left -= bins[at]
        if left <= 0:
            return 1e-2 * 1.01 ** (at + 0.5)  # us
    return 0.0


def ratio(with_, without, call, part):
    return quantile(pooled(with_, call), part) / quantile(pooled(without, call), part)


having = [piece for was_on, piece in pieces if was_on]
lacking = [piece for was_on, piece in pieces if not was_on]
report = {"turns": len(pieces), "windows": sum(len(piece) for _, piece in pieces)}
for call in ("launch", "alloc"):
    for name, part in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)):
        real = ratio(having, lacking, call, part)
        spread, nothing = [], []
        for _ in range(200):
            spread.append(ratio(rng.choices(having, k=len(having)), rng.choices(lacking, k=len(lacking)), call, part))
            dealt = [piece for _, piece in pieces]
            rng.shuffle(dealt)
            nothing.append(ratio(dealt[:len(having)], dealt[len(having):], call, part))
        spread.sort(), nothing.sort()
        row = {"with_us": quantile(pooled(having, call), part), "without_us": quantile(pooled(lacking, call), part), "ratio": real,
               "from": spread[10], "to": spread[-11], "nothing_from": nothing[10], "nothing_to": nothing[-11], "calls": sum(pooled(having + lacking, call).values())}
        report[call + " " + name] = row
        print("%-6s %-5s with %8.3f us  without %8.3f us  ratio %.4f (%.4f to %.4f)  dealt at random %.4f to %.4f  (%d calls)" % (
            call, name, row["with_us"], row["without_us"], real, row["from"], row["to"], row["nothing_from"], row["nothing_to"], row["calls"]))
if options.json:
    with open(options.json, "w") as out:
        json.dump(report, out)
