#!/usr/bin/env python3
"""What software slices do on a real GPU, side by side with what else there is.

./do bench-gpu [--quick] [--only NAMES] [--out DIR]. Scenes run one after another, each on its own; one that fails says why
and the others go on. Results are written after every scene (results.json, RESULTS.part.md, shares.svg, interactive.svg),
so a run that is cut off keeps what it has.

Received share of a tenant: its rate divided by its rate alone on the GPU, normalised over the tenants of that window.
"""
import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback

sys.dont_write_bytecode = True  # the tree stays as it was
import report
import scenes
import schemes
from tenants import HERE, SceneFailed, TORCH, torch_worker

ROOT = os.path.dirname(os.path.dirname(HERE))


class Bench:
    """What the scenes share: programs, schemes, the GPU's NVML, how long to look."""

    def __init__(self, options):
        self.options, self.quick, self.dry = options, options.quick, options.dry_run
        self.pace = 0.1 if self.dry else 0.6 if self.quick else 1.0  # windows are this much shorter
        self.environment = {
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "ignore",
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        }
        self.built = os.path.join(ROOT, "build/bench-gpu")
        self.native = schemes.Native()
        program = os.path.abspath(options.bulkhead)
        if self.dry:
            import dry

            self.nvml, program = dry.Nvml(), os.path.join(HERE, "dry.py")
        else:
            import nvml

            self.nvml = nvml.Nvml()
        self.bulkhead = schemes.Bulkhead(program)
        self.identity = self.nvml.identity()
        self.temporary = tempfile.mkdtemp(
            prefix="bench-gpu-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        )
        peers = os.path.abspath(options.peers)
        self.peers = [
            schemes.Mps(),
            schemes.Hami(peers),
            schemes.VgpuManager(peers, self.identity["uuid"]),
            schemes.XSched(peers, "HPF"),
            schemes.XSched(peers, "PUP"),
        ]

    def asked(self, name, **what):
        return schemes.Asked(name, **what)

    def worker(self, kind, slot, path):
        if self.dry:
            return [sys.executable, os.path.join(HERE, "dry.py"), "worker", kind, str(slot), path]
        return torch_worker(kind, slot, path) if kind in TORCH else [self.kernels()[0], "worker", kind, str(slot), path]

    def _compile(self, name, words):
        if self.dry:
            return [sys.executable, os.path.join(HERE, "dry.py"), name]
        out, source = os.path.join(self.built, name), os.path.join(HERE, words[-1])
        if not os.path.exists(out) or os.path.getmtime(out) < os.path.getmtime(source):
            os.makedirs(self.built, exist_ok=True)
            done = subprocess.run(
                [*words[:-1], source, "-o", out, *self.driver_library(), "-lpthread"],
                capture_output=True,
                text=True,
            )
            if done.returncode != 0:
                raise SceneFailed(f"{name} does not build: {done.stderr.strip()[-600:]}")
        return [out]

    def driver_library(self):
        """How to link with libcuda: the driver's own, else the toolkit's stub."""
        known = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout.splitlines()
        for line in known:
            if line.strip().startswith("libcuda.so.1 ") and "x86-64" in line:
                return ["-Xlinker", line.split()[-1]]
        return [f"-L{self.cuda}/lib64/stubs", "-lcuda"]

    @property
    def cuda(self):
        return os.environ.get("CUDA_HOME", "/usr/local/cuda")

    def kernels(self):
        return self._compile(
            "kernels",
            [
                self.cuda + "/bin/nvcc",
                "-O2",
                "-std=c++17",
                "-gencode",
                "arch=compute_90,code=sm_90",
                "-gencode",
                "arch=compute_80,code=compute_80",
                "kernels.cu",
            ],
        )

    def leak(self):
        return self._compile("leak", ["gcc", "-O2", f"-I{self.cuda}/include", "leak.c"])

    def say(self, text):
        print(f"{time.monotonic() - self.started:6.1f}  {text}", flush=True)


def settled_gpu(bench):
    """Waits for the GPU to be empty, so that one scene's leavings are not the next one's neighbours."""
    for _ in range(100):
        if not bench.nvml.processes():
            return
        time.sleep(0.1)
    bench.say(f"the GPU is not empty: pids {sorted(bench.nvml.processes())}")


def keep_logs(folder, path):
    """What the tenants said, the ends of it."""
    with open(path, "w") as out:
        for name in sorted(os.listdir(folder)):
            if name.endswith(".log") and os.path.getsize(os.path.join(folder, name)):
                with open(os.path.join(folder, name), errors="replace") as log:
                    out.write(f"== {name}\n{log.read()[-3000:]}\n")


def merge(files, out):
    results = None
    for name in files:
        with open(name) as file:
            one = json.load(file)
        if results and one["gpu"] != results["gpu"]:
            sys.exit(f"bench-gpu: {name} was measured on {one['gpu']}, the one before on {results['gpu']}")
        one["scenes"] = {**(results["scenes"] if results else {}), **one["scenes"]}
        results = one
    report.write(results, out)
    return 0


def main():
    parser = argparse.ArgumentParser(
        prog="./do bench-gpu",
        description="Software slices measured on a real GPU, beside their peers.",
        epilog="scenes: " + ", ".join(f"{s.name} (~{s.full} s, quick ~{s.quick} s)" for s in scenes.ALL),
    )
    parser.add_argument("--quick", action="store_true", help="shorter windows, fewer combinations")
    parser.add_argument("--only", default="", metavar="NAMES", help="scenes to run, with commas between")
    parser.add_argument("--kinds", default="", metavar="NAMES", help="of the scene shares: " + ",".join(scenes.KINDS))
    parser.add_argument(
        "--schemes", default="", metavar="NAMES", help="of the scene peers: " + ",".join(scenes.SCHEMES)
    )
    parser.add_argument("--out", default=os.path.join(ROOT, "build/bench-gpu/out"), metavar="DIR")
    parser.add_argument(
        "--budget",
        type=float,
        default=0,
        metavar="SECONDS",
        help="start no scene that would not end by then (0: no limit)",
    )
    parser.add_argument("--bulkhead", default=os.path.join(ROOT, "build/bin/bulkhead"), metavar="FILE")
    parser.add_argument(
        "--peers", default=os.path.join(ROOT, ".peers"), metavar="DIR", help="what bench/gpu/peers.sh built"
    )
    parser.add_argument(
        "--merge", nargs="+", metavar="FILE", help="no run: one page from several results.json, later ones winning"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="no GPU: CPU stand-ins everywhere; exercises this script, measures nothing",
    )
    options = parser.parse_args()

    wanted = [w for w in options.only.split(",") if w]
    unknown = [w for w in wanted if w not in {s.name for s in scenes.ALL}]
    if unknown:
        parser.error(f"no scene {unknown[0]}; there are {', '.join(s.name for s in scenes.ALL)}")
    chosen = [s for s in scenes.ALL if not wanted or s.name in wanted]
    os.makedirs(options.out, exist_ok=True)
    if options.merge:
        return merge(options.merge, options.out)
    try:
        bench = Bench(options)
    except (OSError, RuntimeError) as error:
        sys.exit(f"bench-gpu: no GPU to measure ({error}); --dry-run tries the script without one")
    bench.started = time.monotonic()
    results = {
        "when": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "quick": options.quick,
        "dry": options.dry_run,
        **bench.identity,
        "scenes": {},
    }
    bench.say(f"{results['gpu']}, driver {results['driver']}; about {sum(s.estimate(options) for s in chosen):.0f} s")
    failures = 0
    try:
        for scene in chosen:
            begun, estimate = time.monotonic(), scene.estimate(options)
            if options.budget and begun - bench.started + estimate > options.budget:
                results["scenes"][scene.name] = {
                    "status": "not run",
                    "reason": f"needs {estimate:.0f} s, which the budget no longer has",
                }
                bench.say(f"== {scene.name}: not run, out of time")
                continue
            bench.say(f"== {scene.name} (about {estimate:.0f} s)")
            data = {}
            try:
                scene.run(bench, data)
                data["status"] = "failed" if data.get("failures") else "ok"
                if data.get("failures"):
                    data["reason"] = "; ".join(data["failures"])
            except (
                SceneFailed,
                schemes.Unavailable,
                RuntimeError,
                OSError,
                subprocess.SubprocessError,
                ValueError,
                KeyError,
                ZeroDivisionError,
            ) as error:
                data["status"], data["reason"] = "failed", f"{type(error).__name__}: {error}"
                data["trace"] = traceback.format_exc()[-2000:]
            data["seconds"] = round(time.monotonic() - begun, 1)
            failures += data["status"] == "failed"
            if data["status"] == "failed":
                bench.say(f"   FAILED: {data['reason']}")
            results["scenes"][scene.name] = data
            report.write(results, options.out)
            settled_gpu(bench)
    except KeyboardInterrupt:
        results["interrupted"] = True
    finally:
        for scheme in bench.peers:
            scheme.stop()
        report.write(results, options.out)
        keep_logs(bench.temporary, os.path.join(options.out, "logs.txt"))
        shutil.rmtree(bench.temporary, ignore_errors=True)
        if bench.dry:
            import dry

            shutil.rmtree(dry.REGISTRY, ignore_errors=True)
    print(open(os.path.join(options.out, "RESULTS.part.md")).read())
    bench.say(f"written: {options.out}/results.json, RESULTS.part.md, shares.svg, interactive.svg")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
