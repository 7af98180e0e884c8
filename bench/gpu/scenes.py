"""The scenes: each fills a dictionary with what it saw, as it goes. Judging is report.py's."""
import json
import os
import signal
import statistics
import subprocess
import threading
import time

from nvml import Watch
from schemes import Unavailable
from tenants import SceneFailed, Stage, signal_group

KINDS = ("gemm", "train", "small", "graph", "coop")
SCHEMES = ("native", "bulkhead", "mps", "hami", "vgpu-manager", "xsched", "xsched-pup")
MIB, GIB = 1 << 20, 1 << 30


class Scene:
    def __init__(self, name, run, full, quick):
        self.name, self.run, self.full, self.quick = name, run, full, quick

    def estimate(self, options):
        whole = self.quick if options.quick else self.full
        if self.name == "shares" and options.kinds:
            whole *= len(options.kinds.split(",")) / len(KINDS)
        if self.name == "peers" and options.schemes:
            whole *= len(options.schemes.split(",")) / len(SCHEMES)
        return whole * (0.2 if options.dry_run else 1)


def split_words(text, default):
    return [w for w in text.split(",") if w] or list(default)


# ---- 0: does this driver obey?
def selftest(bench, data):
    bench.bulkhead.start()
    data.update(bench.bulkhead.selftest())
    bench.say(f"   {data}")


# ---- 1, 2: shares received against asked, and what sharing costs in throughput
TWO = ((10, 90), (25, 75), (50, 50))
THREE = ((10, 40, 50), (75, 15, 10), (90, 5, 5))
FOUR = ((10, 20, 30, 40), (25, 25, 25, 25), (75, 10, 10, 5))


def share_row(kind, asked, window, tenants, exclusive):
    parts = [window.rate(t) / exclusive for t in tenants]
    whole = sum(parts)
    received = [100 * p / whole if whole else 0.0 for p in parts]
    wanted = [100 * a / sum(asked) for a in asked]
    return {
        "kind": kind,
        "asked": wanted,
        "received": received,
        "rates": [window.rate(t) for t in tenants],
        "sum": whole,
        "errors": [abs(a - b) for a, b in zip(wanted, received)],
    }


def shares_of(bench, kind, data):
    look = 6 if kind == "train" else 4
    with Stage(bench) as stage:
        native = stage.start(kind, bench.native)
        stage.wait()
        alone = [stage.window([native], look).rate(native)]
        tenants = [stage.start(kind, bench.bulkhead) for _ in range(4 if bench.quick else 2)]
        stage.wait()
        # One tenant with the others idle, against nobody managed; in turns, since clocks drift.
        held = []
        for _ in range(1 if bench.quick else 2):
            held.append(stage.window([tenants[0]], look).rate(tenants[0]))
            alone.append(stage.window([native], look).rate(native))
        rows = []
        for splits in (TWO, THREE, FOUR) if not bench.quick else (TWO, THREE[:1], FOUR[:1]):
            while len(tenants) < len(splits[0]):
                tenants.append(stage.start(kind, bench.bulkhead))
                stage.wait()
            for split in splits:
                for k, tenant in enumerate(tenants):
                    bench.bulkhead.set(tenant.name, weight=split[k] if k < len(split) else min(split))
                running = tenants[: len(split)]
                rows.append((split, stage.window(running, look), running))
        alone.append(stage.window([native], look).rate(native))
        exclusive = statistics.mean(alone)
        if not exclusive:
            raise SceneFailed(f"{kind}: nothing done alone")
        for split, window, running in rows:
            row = share_row(kind, split, window, running, exclusive)
            data["rows"].append(row)
            bench.say(
                f"   {kind:6} asked {'/'.join(f'{a:g}' for a in split):12} received "
                f"{'/'.join(f'{r:.1f}' for r in row['received']):22} sum {100 * row['sum']:.1f} %"
            )
        first = statistics.mean(alone[:-1])
        data["idle"].append(
            {
                "kind": kind,
                "exclusive": exclusive,
                "held": statistics.mean(held),
                "ratio": statistics.mean(held) / first,
                "drift": (max(alone) - min(alone)) / exclusive,
            }
        )
        bench.say(
            f"   {kind:6} one busy, one idle: {100 * data['idle'][-1]['ratio']:.1f} % of {exclusive:.1f}/s alone "
            f"(which varied by {100 * data['idle'][-1]['drift']:.1f} %)"
        )


def shares(bench, data):
    bench.bulkhead.start()
    data.update(rows=[], idle=[], failures=[])
    for kind in split_words(bench.options.kinds, KINDS):
        try:
            shares_of(bench, kind, data)
        except (SceneFailed, RuntimeError) as error:
            data["failures"].append(f"{kind}: {error}")
            bench.say(f"   {kind} FAILED: {error}")


# ---- 3: an interactive tenant beside training
def latency_row(scheme, beside, window, serve, trainers, train_alone, left):
    # What is left over: the GPU less the time that the requests answered in this window need when they run alone.
    best_effort = sum(window.rate(t) for t in trainers)
    row = {"scheme": scheme, "beside": beside, "requests": len(window.latencies[serve.slot])}
    for name, fraction in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)):
        row[name] = window.p(serve, fraction)
    if trainers:
        row["best_effort"] = best_effort
        if train_alone and left:
            row["kept"] = best_effort / (train_alone * left)
    return row


def tell_latency(bench, row):
    number = lambda key: "-" if row.get(key) is None else f"{row[key]:.2f}"
    bench.say(
        f"   {row['scheme']:12} {row['beside']:28} p50 {number('p50')} p90 {number('p90')} p99 {number('p99')} max {number('max')} ms"
        + (f"; best effort {row['best_effort']:.1f}/s" if "best_effort" in row else "")
        + (f", {100 * row['kept']:.0f} % of what is left over" if "kept" in row else "")
    )


def interactive(bench, data):
    bench.bulkhead.start()
    data["rows"] = []

    def see(scheme, beside, window, serve, trainers):
        row = latency_row(scheme, beside, window, serve, trainers, data.get("train_alone"), data.get("left"))
        data["rows"].append(row)
        tell_latency(bench, row)

    with Stage(bench) as stage:
        serve_native = stage.start("serve", bench.native)
        trainers_native = [stage.start("train", bench.native) for _ in range(3)]
        serve = stage.start("serve", bench.bulkhead, cls="interactive")
        trainers = [stage.start("train", bench.bulkhead)]
        stage.wait()
        closed = stage.window([serve_native], 3, other=[serve_native]).rate(serve_native)
        data["left"] = max(0.0, 1 - 100 / closed) if closed else 0.0
        data["train_alone"] = stage.window([trainers_native[0]], 4).rate(trainers_native[0])
        bench.say(
            f"   requests back to back {closed:.0f}/s, so 100/s leave {100 * data['left']:.1f} % over; training alone "
            f"{data['train_alone']:.2f}/s"
        )
        see("native", "alone", stage.window([serve_native], 8), serve_native, [])
        see("bulkhead", "alone", stage.window([serve], 8), serve, [])
        see(
            "native",
            "one trainer",
            stage.window([serve_native, trainers_native[0]], 8),
            serve_native,
            trainers_native[:1],
        )
        see("bulkhead", "one trainer", stage.window([serve, trainers[0]], 20, settle=3), serve, trainers)
        see(
            "native", "three trainers", stage.window([serve_native, *trainers_native], 8), serve_native, trainers_native
        )
        trainers += [stage.start("train", bench.bulkhead) for _ in range(2)]
        stage.wait()
        see("bulkhead", "one trainer, two idle", stage.window([serve, trainers[0]], 8, settle=4), serve, trainers[:1])
        window = stage.window([serve, *trainers], 25, settle=4)
        see("bulkhead", "three trainers", window, serve, trainers)
        data["trainer_rates"] = [window.rate(t) for t in trainers]
        after = stage.window([trainers_native[0]], 4).rate(trainers_native[0])
        data["train_alone_after"] = after
        see("native", "alone, after", stage.window([serve_native], 6), serve_native, [])


# ---- 4: ceilings on an idle GPU
def ceilings(bench, data):
    bench.bulkhead.start()
    data["rows"] = []
    for kind in ("spin", "gemm", "train") if not bench.quick else ("spin", "gemm"):
        with Stage(bench) as stage:
            native, tenant = stage.start(kind, bench.native), stage.start(kind, bench.bulkhead)
            stage.wait()
            alone = stage.window([native], 3).rate(native)
            for ceiling in (30,) if bench.quick else (10, 30, 60):
                bench.bulkhead.set(tenant.name, ceiling=ceiling)
                part = 100 * stage.window([tenant], 4, settle=1.0).rate(tenant) / alone
                data["rows"].append({"kind": kind, "ceiling": ceiling, "received": part, "error": part - ceiling})
                bench.say(f"   {kind:6} at most {ceiling} %: did {part:.1f} % of its work alone")
            bench.bulkhead.set(tenant.name, ceiling="none")
            part = 100 * stage.window([tenant], 2, settle=1.0).rate(tenant) / alone
            data["rows"].append({"kind": kind, "ceiling": None, "received": part, "error": part - 100})
            bench.say(f"   {kind:6} ceiling taken away: {part:.1f} %")


# ---- 5: what calls cost
def answer_of(stage, scheme, argv, timeout=60, **asked):
    process = stage.program(scheme, argv, stdout=subprocess.PIPE, **asked)
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise SceneFailed(f"{' '.join(argv[-2:])} ({scheme.name}): no end in {timeout} s") from None
    lines = [line for line in out.decode(errors="replace").splitlines() if line.startswith("{")]
    if not lines:
        with open(process.log, errors="replace") as log:
            raise SceneFailed(
                f"{' '.join(argv[-2:])} ({scheme.name}): exit {process.returncode}, no answer: {log.read()[-300:].strip()}"
            )
    return json.loads(lines[-1])


def costs(bench, data):
    bench.bulkhead.start()
    variants = (
        ("native", bench.native, {}),
        ("held", bench.bulkhead, {}),
        ("held, capped", bench.bulkhead, {"memory": "20GiB"}),
        ("guard", bench.bulkhead, {"guard": True, "memory": "20GiB"}),
    )
    seen, data["failures"] = {}, []
    with Stage(bench) as stage:
        for _ in range(2 if bench.quick else 5):  # in turns, since clocks drift
            for name, scheme, asked in variants:
                try:
                    seen.setdefault(name, []).append(answer_of(stage, scheme, [*bench.kernels(), "costs"], **asked))
                except SceneFailed as error:
                    data["failures"].append(f"{name}: {error}")
    data["rows"] = []
    for name, answers in seen.items():
        row = {
            "variant": name,
            "runs": len(answers),
            **{k: statistics.median(a[k] for a in answers) for k in answers[0]},
        }
        data["rows"].append(row)
        bench.say(
            f"   {name:14} launch {row['launch_ns']:.0f} ns, 1 MiB alloc+free {row['alloc_free_ns'] / 1e3:.1f} us, "
            f"memory query {row['memory_query_ns'] / 1e3:.2f} us, context {row['context_ms']:.0f} ms"
        )


# ---- 6: bytes past the cap
def watched_leak(bench, scheme, cap, paths=(), **asked):
    """Runs the suite under a scheme with NVML watched; a row a path."""
    rows = []
    with Stage(bench) as stage:
        _, before = bench.nvml.memory()
        watch = Watch(bench.nvml, ignore=bench.nvml.processes())
        watch.start()
        process = stage.program(scheme, [*bench.leak(), str(cap >> 20), *paths], stdout=subprocess.PIPE, **asked)
        killer = threading.Timer(240, signal_group, (process.pid, signal.SIGKILL))
        killer.start()
        begun, own = {}, None
        for line in process.stdout:
            words = line.decode(errors="replace").strip().split("|", 2)
            if words[0].startswith("BEGIN ") and len(words) == 2:
                begun[words[0][6:]] = float(words[1])
            elif words[0].startswith("END ") and len(words) == 3:
                name, end = words[0][4:], float(words[1])
                try:
                    row = {"path": name, "seconds": round(end - begun[name], 2), **json.loads(words[2])}
                except (ValueError, KeyError):
                    row = {
                        "path": name,
                        "mib": 0,
                        "refusal": "none",
                        "note": "an answer that is no JSON",
                        "broken": True,
                    }
                row["peak"], row["gpu"], row["processes"] = watch.peak(begun.get(name, end), end + 0.02)
                row["gpu"] = max(0, row["gpu"] - before)
                # The driver keeps some memory for itself beside each process's: as much as beside a plain one's peak.
                if own is None:
                    own = max(0, row["gpu"] - row["peak"])
                row["past"] = max(0, row["peak"] - cap)
                row["gpu_past"] = max(0, row["gpu"] - cap - own * max(1, row["processes"]) - 8 * MIB)
                rows.append(row)
                bench.say(
                    f"   {scheme.name:9} {name:28} NVML peak {row['peak'] / (1 << 20):7.0f} MiB, GPU {row['gpu'] / (1 << 20):7.0f} MiB, "
                    f"{row['refusal']}{'; ' + row['note'] if row['note'] else ''}"
                    + (
                        f"   PAST by {max(row['past'], row['gpu_past']) >> 20} MiB"
                        if row["past"] or row["gpu_past"]
                        else ""
                    )
                )
        process.wait(timeout=20)
        killer.cancel()
        watch.stop()
        if watch.error:
            raise SceneFailed(f"NVML stopped answering: {watch.error}")
        left_behind = bench.nvml.memory()[1] - before
        samples = watch.samples
        gaps = sorted(b[0] - a[0] for a, b in zip(samples, samples[1:]))
    if not rows:
        with open(process.log, errors="replace") as log:
            raise SceneFailed(f"the suite said nothing: exit {process.returncode}: {log.read()[-300:].strip()}")
    return {
        "rows": rows,
        "left_behind": left_behind,
        "own": own,
        "samples": len(samples),
        "sample_p99_ms": 1e3 * gaps[int(len(gaps) * 0.99)] if gaps else None,
        "exit": process.returncode,
    }


def memory(bench, data):
    bench.bulkhead.start()
    cap = 4 * GIB
    data["cap"] = cap
    data["held"] = watched_leak(bench, bench.bulkhead, cap, memory="4GiB")
    full = [r for r in data["held"]["rows"] if r["path"] in ("cuMemAlloc", "churn, then all")]
    data["usable"] = [{"path": r["path"], "part": r["peak"] / cap} for r in full]
    # Without a cap the same suite must go past it, else it proves nothing.
    data["native"] = watched_leak(
        bench, bench.native, cap, paths=("cuMemAlloc", "default pool", "managed") if bench.quick else ()
    )


# ---- 7: starting, dying, misbehaving
def children_of(pid):
    found = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found += [int(word) for word in file.read().split()]
    except OSError:
        pass
    return found


def start(bench, data):
    bench.bulkhead.start()
    data.update(in_force=[], failures=[])
    # From a process's start to its share in force: by the product's own clock, and as the neighbour sees it.
    with Stage(bench) as stage:
        neighbour = stage.start("spin", bench.bulkhead, share=90)
        stage.wait()
        for _ in range(2 if bench.quick else 5):
            stage.go([neighbour])
            began = time.monotonic()
            late = stage.start("spin", bench.bulkhead, share=10)
            stage.wait()
            stage.go([neighbour, late])
            working = time.monotonic()
            time.sleep(1.5)
            row = {
                "in_force_us": bench.bulkhead.now(late.name, "inForceMicroseconds"),
                "context_after_ms": 1e3 * (stage.board.stamp(late.slot) - began),
            }
            # In windows of 0.4 s (rounds of slices are that long at most) from its first work on, every 20 ms: the first
            # after which its share stays within 8 points of 10 %.
            settled = None
            for k in range(50, -1, -1):
                mine, theirs = (
                    stage.board.rate(t.slot, working + k * 0.02, working + k * 0.02 + 0.4) for t in (late, neighbour)
                )
                if not mine + theirs or abs(mine / (mine + theirs) - 0.1) > 0.08:
                    break
                settled = k * 20
            row["seen_within_ms"] = settled
            data["in_force"].append(row)
            bench.say(
                f"   in force {row['in_force_us']} us after its first group (bulkhead); as seen from outside "
                f"{'never' if settled is None else f'from {settled} ms after its first work on'}; context {row['context_after_ms']:.0f} ms "
                f"after its start"
            )
            stage.stop(late)
    # Many at once: processes of one tenant, and tenants.
    data["many"] = []
    clients = 32 if bench.dry else 64 if bench.quick else 256
    for what, count in (("clients", clients), ("contexts", 16 if bench.quick or bench.dry else 64)):
        for name, scheme in (("native", bench.native), ("bulkhead", bench.bulkhead)):
            try:
                with Stage(bench) as stage:
                    row = {
                        "what": f"{count} {what}, one tenant",
                        "scheme": name,
                        **answer_of(stage, scheme, [*bench.kernels(), what, str(count)], timeout=120),
                    }
            except SceneFailed as error:
                data["failures"].append(str(error))
                continue
            data["many"].append(row)
            bench.say(f"   {row['what']:26} {name:9} {row['up']} up in {row['seconds']:.2f} s, {row['failed']} failed")
    tenants = 16 if bench.quick or bench.dry else 64
    for name, scheme in (("native", bench.native), ("bulkhead", bench.bulkhead)):
        with Stage(bench) as stage:
            began = time.monotonic()
            started = [stage.program(scheme, [*bench.kernels(), "clients", "1"]) for _ in range(tenants)]
            for process in started:
                try:
                    process.wait(timeout=max(1, began + 90 - time.monotonic()))
                except subprocess.TimeoutExpired:
                    break
            row = {
                "what": f"{tenants} tenants, start to end",
                "scheme": name,
                "processes": tenants,
                "up": sum(p.poll() == 0 for p in started),
                "seconds": time.monotonic() - began,
            }
            row["failed"] = tenants - row["up"]
            data["many"].append(row)
            bench.say(f"   {row['what']:26} {name:9} {row['up']} good in {row['seconds']:.2f} s")


def living_arbiter(bench, name):
    """Its pid; the registry names the last one a moment longer than that lives. None: no arbiter for three seconds."""
    for _ in range(60):
        pid = bench.bulkhead.now(name, "arbiter")
        if pid and os.path.exists(f"/proc/{pid}"):
            return pid
        time.sleep(0.05)
    return None


def faults(bench, data):
    bench.bulkhead.start()
    data.update(kills=[], neighbours=[], failures=[])
    # SIGKILL of an arbiter and of a whole tenant, with the others watched.
    with Stage(bench) as stage:
        a, b = stage.start("spin", bench.bulkhead, share=25), stage.start("spin", bench.bulkhead, share=75)
        churn = stage.start("alloc", bench.bulkhead, share=25, memory="2GiB")
        stage.wait()
        before = stage.window([a, b, churn], 3)
        share = lambda w: w.rate(a) / (w.rate(a) + w.rate(b)) if w.rate(a) + w.rate(b) else 0.0
        for victim in (churn, a) if bench.quick else (churn, a, churn, b, churn):
            arbiter = living_arbiter(bench, victim.name)
            if not arbiter:
                data["failures"].append(f"{victim.name}: share list names no living arbiter")
                continue
            again = {}

            def strike(begun, victim=victim, arbiter=arbiter, again=again):
                old = set(children_of(victim.process.pid))
                struck = again["struck"] = time.monotonic()
                os.kill(arbiter, signal.SIGKILL)
                while time.monotonic() < struck + 1:
                    if set(children_of(victim.process.pid)) - old:
                        again["respawned_ms"] = 1e3 * (time.monotonic() - struck)
                        break

            window = stage.window([a, b, churn], 2, during=strike)
            gap = stage.board.longest_gap(churn.slot, again["struck"] - 0.05, again["struck"] + 1)
            row = {
                "killed": f"arbiter of {victim.kind}",
                "respawned_ms": again.get("respawned_ms"),
                "longest_call_ms": 1e3 * gap,
                "share_before": 100 * share(before),
                "share_after": 100 * share(window),
                "sum_ratio": (window.rate(a) + window.rate(b)) / (before.rate(a) + before.rate(b)),
            }
            data["kills"].append(row)
            bench.say(
                f"   {row['killed']}: another after {row['respawned_ms'] and round(row['respawned_ms'], 2)} ms; longest allocation call "
                f"{row['longest_call_ms']:.2f} ms; share {row['share_before']:.1f} -> {row['share_after']:.1f} %"
            )
        alone = stage.window([a], 2).rate(a)
        pids = bench.bulkhead.now(b.name, "processes") or []
        struck = {}

        def murder(begun):
            stage.go([a, b])
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # ended by itself, with a parent that was killed first
            struck["at"] = time.monotonic()

        stage.go([a, b])
        time.sleep(1)
        murder(0)
        time.sleep(2.2)
        after = stage.board.rate(a.slot, struck["at"] + 0.2, struck["at"] + 2.0)
        gap = stage.board.longest_gap(a.slot, struck["at"] - 0.05, struck["at"] + 1)
        stage.tenants.remove(b)
        stage.extra.append(b.process)
        stage.alive([a])
        data["kills"].append(
            {"killed": "the whole other tenant", "rate_of_alone": after / alone, "longest_gap_ms": 1e3 * gap}
        )
        bench.say(
            f"   other tenant killed: this one at {100 * after / alone:.1f} % of its rate alone, longest gap {1e3 * gap:.1f} ms"
        )
    # One tenant misbehaves; two neighbours hold a third of the GPU each.
    seconds = 1 if bench.dry else 4
    villains = (
        ("well-behaved", None),
        ("kernel fault", [*bench.kernels(), "faults", str(seconds)]),
        ("memory bomb", [*bench.leak(), "2048", "cuMemAlloc", "churn, then all", "VMM churn", "default pool"]),
        ("launch flood", [*bench.kernels(), "flood", str(seconds)]),
        ("fork bomb", [*bench.kernels(), "forks", str(seconds)]),
    )
    for name, argv in villains:
        try:
            with Stage(bench) as stage:
                good = [stage.start("spin", bench.bulkhead, share=34), stage.start("graph", bench.bulkhead, share=34)]
                other = None if argv else stage.start("spin", bench.bulkhead, share=34)
                stage.wait()
                alone = [stage.window([t], 1.5).rate(t) for t in good]
                if argv:
                    stage.go(good)
                    stage.program(bench.bulkhead, argv, share=34, memory="2GiB")
                    time.sleep(0.3)
                window = stage.window(good + ([other] if other else []), seconds - 1, settle=0.3)
                parts = [100 * window.rate(t) / r for t, r in zip(good, alone)]
                stage.alive(good)
            # They may get more than their third when the other leaves time unused; never less. Held against the row of
            # the well-behaved tenant too, since switching between three costs something whoever the third is.
            row = {"villain": name, "neighbours": parts, "least_of_share": min(parts) / (100 / 3)}
            usual = data["neighbours"][0].get("neighbours") if data["neighbours"] else None
            if usual:
                row["least_of_usual"] = min(p / u for p, u in zip(parts, usual) if u)
        except SceneFailed as error:
            row = {"villain": name, "failed": str(error)}
            data["failures"].append(f"{name}: {error}")
        data["neighbours"].append(row)
        bench.say(
            f"   {name:13} "
            + (
                row.get("failed")
                or f"neighbours at {' and '.join(f'{p:.1f} %' for p in row['neighbours'])} of their rate alone"
            )
        )


# ---- 8: the peers, same run, same workloads
def peer(bench, scheme, exclusive, data):
    with Stage(bench) as stage:
        gemms = [stage.start("gemm", scheme, share=25), stage.start("gemm", scheme, share=75)]
        trains = [stage.start("train", scheme, share=30), stage.start("train", scheme, share=70)]
        stage.wait(timeout=150)
        for kind, pair, asked in (("gemm", gemms, (25, 75)), ("train", trains, (30, 70))):
            row = {
                "scheme": scheme.name,
                **share_row(kind, asked, stage.window(pair, 5, settle=2), pair, exclusive[kind]),
            }
            data["shares"].append(row)
            bench.say(
                f"   {scheme.name:12} {kind:6} asked {asked[0]}/{asked[1]} received {row['received'][0]:.1f}/{row['received'][1]:.1f}, "
                f"sum {100 * row['sum']:.1f} %"
            )
        # In the interactive scene there are it and one trainer: the others leave, since some schemes plan for them.
        stage.stop(*gemms, trains[0])
        serve = stage.start("serve", scheme, cls="interactive", share=30)
        stage.wait(timeout=150)
        if not scheme.live:
            alone = latency_row(scheme.name, "alone", stage.window([serve], 4, settle=1), serve, [], None, None)
            data["latency"].append(alone)
            tell_latency(bench, alone)
        row = latency_row(
            scheme.name,
            "one trainer",
            # Its start kept the GPU busy, which takes bulkhead two seconds to forget.
            stage.window([serve, trains[1]], 10, settle=4),
            serve,
            trains[1:],
            exclusive["train"],
            exclusive["left"],
        )
        data["latency"].append(row)
        tell_latency(bench, row)


def peers(bench, data):
    data.update(shares=[], latency=[], unavailable={}, failures=[], notes={})
    with Stage(bench) as stage:
        alone = {k: stage.start(k, bench.native) for k in ("gemm", "train", "serve")}
        stage.wait()
        exclusive = {k: stage.window([alone[k]], 4).rate(alone[k]) for k in ("gemm", "train")}
        closed = stage.window([alone["serve"]], 3, other=[alone["serve"]]).rate(alone["serve"])
        exclusive["left"] = max(0.0, 1 - 100 / closed) if closed else 0.0
        data["exclusive"] = exclusive
    wanted = split_words(bench.options.schemes, SCHEMES)
    for scheme in [bench.native, bench.bulkhead, *bench.peers]:
        if scheme.name not in wanted:
            continue
        try:
            scheme.start()
            data["notes"][scheme.name] = scheme.about()
            peer(bench, scheme, exclusive, data)
        except Unavailable as error:
            data["unavailable"][scheme.name] = str(error)
            bench.say(f"   {scheme.name}: not here: {error}")
        except (SceneFailed, RuntimeError, OSError) as error:
            # A peer that breaks on this workload is a result about the peer; a failure only where it is us.
            data["unavailable"][scheme.name] = f"failed: {error}"
            if scheme is bench.bulkhead:
                data["failures"].append(f"bulkhead: {error}")
            bench.say(f"   {scheme.name} FAILED: {error}")
        finally:
            scheme.stop()


ALL = (
    Scene("selftest", selftest, 20, 20),
    Scene("shares", shares, 490, 230),
    Scene("interactive", interactive, 140, 95),
    Scene("ceilings", ceilings, 80, 35),
    Scene("costs", costs, 45, 20),
    Scene("memory", memory, 110, 50),
    Scene("start", start, 100, 40),
    Scene("faults", faults, 75, 50),
    Scene("peers", peers, 450, 350),
)
