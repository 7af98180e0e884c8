#!/usr/bin/env python3
"""Benchmarks of the API of `bulkhead serve`, each with its peer or floor in the same run.

    bench/api.py [get] [watch] [lease] [sizing] [--runs 15] [--seconds 2] [--disk DIR]

get      authenticated GET of one lease, 64 connections, keep-alive, TLS 1.3, wrk; nginx serves the same bytes; runs alternate
watch    1,000 watchers over TLS, one change: until all have it; memory of the daemon a watcher
lease    create and release of a lease on a slice that is there; the floor is one fsync'ed SQLite transaction on the same disk
sizing   8 GPUs, 56 slices had, 200 watchers, 50 requests a second: the daemon's share of 4 cores
"""
import argparse
import json
import os
import re
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "serve"))
import wire  # noqa: E402
from daemon import BIN, PREFIX, Daemon, Place, free_port, mig, wait_for  # noqa: E402

LOAD = os.path.join(BIN, "api_load")
SLICES = """apiVersion: bulkhead/v1
kind: Node
gpus:
  - select: {index: "0-7"}
    mode: mig
    layout: [1g.10gb, 1g.10gb, 1g.10gb, 1g.10gb, 1g.10gb, 1g.10gb, 1g.10gb]
"""
CONFIG = "requests_per_second: 1000000\nstreams: 2000\n"
bad = []


def goal(text, holds):
    print("  %s: %s" % ("holds" if holds else "MISSED", text), flush=True)
    if not holds:
        bad.append(text)


def quartiles(values, unit="", digits=2):
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return "%.*f%s (quartiles %.*f .. %.*f)" % (digits, middle, unit, digits, low, digits, high)


def cpu_seconds(pid):
    """Of the process and of its children that were waited for."""
    with open("/proc/%d/stat" % pid) as got:
        fields = got.read().rpartition(")")[2].split()
    return sum(int(one) for one in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def memory(pid):
    """(resident, private) bytes."""
    with open("/proc/%d/smaps_rollup" % pid) as got:
        text = got.read()
    size = lambda name: int(re.search(name + r":\s+(\d+) kB", text)[1]) << 10  # noqa: E731
    return size("Rss"), size("Private_Dirty") + size("Private_Clean")


def tokens(place, number):
    """A file of that many tokens of tenant blue."""
    name = os.path.join(place.work, "tokens")
    with open(name, "w") as out:
        for i in range(number):
            out.write(place.daemon.token("tenant", "blue", "user%d" % i)["secret"] + "\n")
    os.chmod(name, 0o600)
    return name


def lease_on(daemon, token, **more):
    client = daemon.tls(token)
    answer = client.ask("POST", PREFIX + "/leases", mig("1g.10gb", **more))
    if answer.status != 201:
        sys.exit("no lease: %d %s" % (answer.status, answer.body.decode()))
    lease = answer.json()["id"]
    if not wait_for(lambda: client.ask("GET", PREFIX + "/leases/%d" % lease).json()["state"] == "active"):
        sys.exit("lease %d does not become active" % lease)
    return lease


def load(*words, stdin=None):
    done = subprocess.run([LOAD, *map(str, words)], input=stdin, capture_output=True, text=True)
    if done.returncode != 0:
        print("api_load %s: %s" % (" ".join(map(str, words[:1])), done.stderr), file=sys.stderr)
        os._exit(1)  # also from a thread
    return json.loads(done.stdout)


def bench_get(options):
    print("\nGET of one lease, 64 connections, wrk -t1, %d alternating runs of %g s" % (options.runs, options.seconds))
    with Place(CONFIG, SLICES, apply=True) as place:
        daemon = place.daemon
        daemon.tenant("blue")
        token = daemon.token("tenant", "blue")["secret"]
        lease = lease_on(daemon, token)
        path = PREFIX + "/leases/%d" % lease
        answer = daemon.tls(token).ask("GET", path)
        # The same bytes: the body, and the headers that ours has and nginx has not by itself.
        site = os.path.join(place.work, "site")
        os.mkdir(site)
        os.chmod(place.work, 0o755)
        with open(os.path.join(site, "lease"), "wb") as out:
            out.write(answer.body)
        extra = "".join('add_header %s "%s";' % (name, value.replace('"', '\\"')) for name, value in answer.headers
                        if name not in ("date", "content-type", "content-length", "connection", "etag", "server"))
        key = os.path.splitext(daemon.certificate)[0] + ".key"
        arms = {"bulkhead": (daemon.url + path, None)}
        for workers in (1, "auto"):
            port = free_port()
            conf = os.path.join(place.work, "nginx-%s.conf" % workers)
            with open(conf, "w") as out:
                out.write("""worker_processes %s; pid %s.pid; error_log %s.log; daemon off; user root;
events { worker_connections 1024; }
http { access_log off; sendfile on; keepalive_requests 10000; default_type application/json; etag on; open_file_cache max=16; types {}
  server { listen 127.0.0.1:%d ssl; ssl_certificate %s; ssl_certificate_key %s; ssl_protocols TLSv1.3; root %s; %s } }
""" % (workers, conf, conf, port, daemon.certificate, key, site, extra))
            process = subprocess.Popen(["nginx", "-c", conf, "-p", place.work], stdin=subprocess.DEVNULL)
            arms["nginx, %s worker%s" % (workers, "" if workers == 1 else "")] = ("https://127.0.0.1:%d/lease" % port, process)
        time.sleep(0.5)

        def once(url):
            done = subprocess.run(["wrk", "-t1", "-c64", "-d%gs" % options.seconds, "--latency", "-H", "Authorization: Bearer " + token, url],
                                  capture_output=True, text=True, check=True)
            if "Non-2xx" in done.stdout:
                sys.exit("wrk: not all answers were 200:\n" + done.stdout)
            p99 = re.search(r"99%\s+([\d.]+)(us|ms|s)", done.stdout)
            return float(re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)[1]), float(p99[1]) * {"us": 1e-3, "ms": 1, "s": 1e3}[p99[2]]
        try:
            sizes = {}
            for name, (url, _) in arms.items():
                got = wire.Client("https://127.0.0.1:" + url.split(":")[2].split("/")[0], token, ca=daemon.certificate).ask("GET", "/" + url.split("/", 3)[3])
                sizes[name] = (got.status, len(got.body), sum(len(k) + len(v) + 4 for k, v in got.headers))
                once(url)
            print("  answers (status, body bytes, header bytes): " + "; ".join("%s %s" % item for item in sizes.items()))
            rates, latency = {name: [] for name in arms}, {name: [] for name in arms}
            for turn in range(options.runs):
                for name in list(arms)[turn % 3:] + list(arms)[:turn % 3]:
                    rate, p99 = once(arms[name][0])
                    rates[name].append(rate)
                    latency[name].append(p99)
            for name in arms:
                print("  %-20s %s requests/s, p99 %s" % (name, quartiles(rates[name], "", 0), quartiles(latency[name], " ms")))
            for name in list(arms)[1:]:
                ratios = [a / b for a, b in zip(rates["bulkhead"], rates[name])]
                print("  bulkhead / %s: median %.3f (%.3f .. %.3f)" % (name, statistics.median(ratios), min(ratios), max(ratios)))
                goal("at least half of %s" % name, statistics.median(ratios) >= 0.5)
        finally:
            for _, process in arms.values():
                if process:
                    process.terminate()
                    process.wait()


def watchers(place, number, rounds, then, change=True):
    """Starts api_load watch; `then` runs when all streams are open; its JSON. Without `change` they only listen."""
    name = tokens(place, max(1, number // 50))
    process = subprocess.Popen([LOAD, "watch", "127.0.0.1", str(place.daemon.port), name, str(number), str(rounds), "POST",
                                PREFIX + "/leases/%d/renew" % place.lease, '{"ttlSeconds": 36@ROUND}'.replace("36@ROUND", "3600")],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stderr.readline()
    if line.strip() != "open":
        sys.exit("api_load watch: " + line + process.stderr.read())
    then()
    if not change:
        process.kill()
        process.wait()
        return {}
    out, error = process.communicate("go\n")
    if process.returncode != 0:
        sys.exit("api_load watch: " + error)
    return json.loads(out)


def bench_watch(options):
    number = 1000
    print("\n%d watchers over TLS 1.3, one change (a renewal), %d changes" % (number, options.runs))
    with Place(CONFIG, SLICES, apply=True) as place:
        daemon = place.daemon
        daemon.tenant("blue")
        place.lease = lease_on(daemon, daemon.token("tenant", "blue")["secret"])
        time.sleep(1)
        before = memory(daemon.process.pid)
        seen = {}

        def look():
            time.sleep(1)
            seen["after"] = memory(daemon.process.pid)
        got = watchers(place, number, options.runs, look)
        last = memory(daemon.process.pid)
        a = got["acknowledged_ms"], got["first_ms"], got["all_ms"]
        print("  from sending the change: answered p50 %.2f ms; first watcher p50 %.2f ms; all p50 %.2f, worst %.2f ms" % (a[0]["p50"], a[1]["p50"], a[2]["p50"], a[2]["most"]))
        print("  memory of the daemon: %.1f KiB a watcher resident, %.1f private when open; %.1f and %.1f after %d changes" % (
            (seen["after"][0] - before[0]) / number / 1024, (seen["after"][1] - before[1]) / number / 1024,
            (last[0] - before[0]) / number / 1024, (last[1] - before[1]) / number / 1024, options.runs))
        goal("all have it in 50 ms (median of %d changes)" % options.runs, a[2]["p50"] <= 50)
        goal("all have it in 50 ms (worst)", a[2]["most"] <= 50)
        goal("at most 100 KiB a watcher", (last[0] - before[0]) / number <= 100 << 10)


def floor_of(directory, number=400):
    """Latencies of bare SQLite transactions, ms: WAL, synchronous=FULL, one row of 900 bytes."""
    name = os.path.join(directory, "floor.db")
    connection = sqlite3.connect(name, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, body BLOB) STRICT")
    body = os.urandom(900)
    out = []
    for _ in range(number):
        began = time.perf_counter()
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO t(body) VALUES (?)", (body,))
        connection.execute("COMMIT")
        out.append((time.perf_counter() - began) * 1e3)
    connection.close()
    return out


def p(values, part):
    values = sorted(values)
    return values[min(len(values) - 1, int(part * len(values)))]


def bench_lease(options):
    disk = tempfile.mkdtemp(prefix="bulkhead-bench.", dir=options.disk)
    print("\nlease create + release over TLS, the MIG slice is there, state on %s (%s)" % (disk, subprocess.run(
        ["findmnt", "-no", "SOURCE,FSTYPE", "-T", disk], capture_output=True, text=True).stdout.strip()))
    try:
        with Place(CONFIG, SLICES, apply=True, disk=os.path.join(disk, "state")) as place:
            daemon = place.daemon
            daemon.tenant("blue")
            name = tokens(place, 8)
            body = json.dumps(mig("1g.10gb"))
            load("cycle", "127.0.0.1", daemon.port, name, 1, 1, body)
            ratios, ours, floors = [], [], []
            for _ in range(max(5, options.runs // 3)):
                one = load("cycle", "127.0.0.1", daemon.port, name, 1, options.seconds, body)
                floor = floor_of(disk)
                ours.append(one)
                floors.append(floor)
                ratios.append(one["pair_ms"]["p99"] / p(floor, 0.99))
            every = [x for one in floors for x in one]
            print("  one connection: create p50 %.3f p99 %.3f ms, release p50 %.3f p99 %.3f ms, both p50 %.3f p99 %.3f ms (medians of %d runs)" % (
                *(statistics.median(one[k][q] for one in ours) for k in ("create_ms", "release_ms", "pair_ms") for q in ("p50", "p99")), len(ours)))
            print("  floor, one transaction: p50 %.3f, p99 %.3f ms; not active yet in the answer: %d of %d; refused: %d" % (
                p(every, 0.5), p(every, 0.99), sum(one["not_active_in_answer"] for one in ours), sum(one["pairs"] for one in ours), sum(one["refused"] for one in ours)))
            print("  p99 of both over p99 of the floor: median %.2f (%.2f .. %.2f)" % (statistics.median(ratios), min(ratios), max(ratios)))
            goal("p99 of create + release at most 3 transactions", statistics.median(ratios) <= 3)
            rates = []
            for connections in (8, 32, 56):
                many = [load("cycle", "127.0.0.1", daemon.port, name, connections, options.seconds, body) for _ in range(5)]
                rates.append(statistics.median(one["pairs_per_s"] for one in many))
                print("  %2d connections: %.0f pairs/s (median of %d), both p50 %.2f p99 %.2f ms, refused %d, not active in the answer %d of %d %s" % (
                    connections, rates[-1], len(many), statistics.median(one["pair_ms"]["p50"] for one in many), statistics.median(one["pair_ms"]["p99"] for one in many),
                    sum(one["refused"] for one in many), sum(one["not_active_in_answer"] for one in many), sum(one["pairs"] for one in many), many[-1]["last_refusal"][:120]))
            goal("at least 2,000 create + release a second", max(rates) >= 2000)
    finally:
        shutil.rmtree(disk, ignore_errors=True)


def bench_sizing(options):
    print("\nsizing: 8 GPUs, 56 slices had, 200 watchers, 50 requests/s for 20 s")
    with Place(CONFIG, SLICES, apply=True) as place:
        daemon = place.daemon
        daemon.tenant("blue")
        token = daemon.token("tenant", "blue")["secret"]
        for _ in range(56):
            place.lease = lease_on(daemon, token, ttlSeconds=3600)
        time.sleep(2)
        pid = daemon.process.pid

        def share(seconds):
            began, cpu = time.monotonic(), cpu_seconds(pid)
            time.sleep(seconds)
            return (cpu_seconds(pid) - cpu) / (time.monotonic() - began) * 100
        idle = share(10)
        out = {}

        def look():
            result = {}
            name = os.path.join(place.work, "tokens")
            thread = threading.Thread(target=lambda: result.update(load("get", "127.0.0.1", daemon.port, name, 1, 22, 45, PREFIX + "/leases/%d" % place.lease)))
            changes = threading.Thread(target=changing)
            out["quiet watchers"] = share(5)
            thread.start()
            changes.start()
            time.sleep(1)
            out["busy"] = share(20)
            thread.join()
            changes.join()
            out.update(result)

        def changing():  # five of the fifty change something, which 200 watchers hear
            client = daemon.tls(token)
            for _ in range(5 * 22):
                began = time.monotonic()
                client.ask("POST", PREFIX + "/leases/%d/renew" % place.lease, {"ttlSeconds": 3600})
                time.sleep(max(0, 0.2 - (time.monotonic() - began)))
        watchers(place, 200, 1, look, change=False)
        print("  of one core: idle with 56 leases %.2f %%; with 200 watchers %.2f %%; with 45 GET/s and 5 renewals/s besides %.2f %%" % (idle, out["quiet watchers"], out["busy"]))
        print("  of 4 cores: %.2f %% busy; GET p50 %.2f p99 %.2f ms; %d of %d not 200; resident %.1f MiB" % (
            out["busy"] / 4, out["ms"]["p50"], out["ms"]["p99"], out["not_200"], out["sent"], memory(pid)[0] / (1 << 20)))
        goal("below 5 % of 4 cores", out["busy"] / 4 < 5)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", choices=[[], "get", "watch", "lease", "sizing"])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--disk", default=os.getcwd(), help="where the state lies for `lease`")
    options = parser.parse_args()
    for name, run in (("get", bench_get), ("watch", bench_watch), ("lease", bench_lease), ("sizing", bench_sizing)):
        if not options.which or name in options.which:
            run(options)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
