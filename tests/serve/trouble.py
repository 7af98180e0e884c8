#!/usr/bin/env python3
"""The host around the daemon fails: a full disk, a read-only disk, a driver that hangs or is gone, a clock that jumps.
Nothing that was acknowledged is lost, reads go on, changes say 503, and all comes back with the host.

trouble.py disk|driver|clock [SHIM]
"""
import os
import struct
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import wire  # noqa: E402
from daemon import PREFIX, Checks, Daemon, Place, mig, pretty, wait_for  # noqa: E402


def get(daemon, path):
    return daemon.local().ask("GET", PREFIX + path)


def create(daemon, **more):
    return daemon.local(60).ask("POST", PREFIX + "/leases", dict(mig("1g.10gb", tenant="blue"), **more))


def active(daemon, lease, seconds=20):
    return wait_for(lambda: get(daemon, "/leases/%d" % lease).json().get("state") == "active", seconds)


def disk(checks):
    check = checks.check
    with Place(start=False, config="requests_per_second: 100000\n") as place:
        small = os.path.join(place.work, "small")
        os.mkdir(small)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m,mode=700", "tmpfs", small], check=True)
        try:
            daemon = place.daemon = Daemon(place.twin, place.work, "requests_per_second: 100000\n", state=small)
            daemon.start()
            daemon.tenant("blue")
            kept = create(daemon).json()["id"]
            active(daemon, kept)
            filler = os.path.join(small, "filler")

            def fill():
                with open(filler, "wb", buffering=0) as out:
                    size = 1 << 20
                    while size:
                        try:
                            out.write(b"\0" * size)
                        except OSError:
                            size //= 2
            fill()
            statuses, granted, bodies = {}, [], []
            for i in range(200):
                answer = create(daemon, label="full-%d" % i)
                statuses[answer.status] = statuses.get(answer.status, 0) + 1
                if answer.status == 201:
                    granted.append(answer.json()["id"])
                    daemon.local().ask("DELETE", PREFIX + "/leases/%d" % granted[-1])
                else:
                    bodies.append(pretty(answer))
                if statuses.get(503, 0) > 5:
                    break
            check("a full disk: changes are refused with 503 (%s)" % statuses, statuses.get(503, 0) > 0 and set(statuses) <= {201, 409, 503}, statuses, bodies[-2:])
            check("and say that it is the disk", any("full" in one or "space" in one for one in bodies), bodies[-1:])
            check("reads go on", get(daemon, "/leases/%d" % kept).status == 200 and get(daemon, "/leases").status == 200)
            check("the daemon is alive", daemon.local().ask("GET", "/healthz").status == 200 and daemon.process.poll() is None)
            ready = daemon.local().ask("GET", "/readyz")
            check("and not ready", ready.status == 503, pretty(ready))
            text = daemon.said()
            check("its log says so, a few times and not for each request", 1 <= text.count("\n") < 400, text.count("\n"))
            os.unlink(filler)
            check("with room again, it grants again by itself", wait_for(lambda: create(daemon).status == 201, 15, 0.5))
            check("and is ready", wait_for(lambda: daemon.local().ask("GET", "/readyz").status == 200, 10))
            check("the lease of before is there", get(daemon, "/leases/%d" % kept).json()["state"] == "active")
            check("the audit chain is whole", get(daemon, "/audit/verdict").json()["whole"])
            # Full, and then killed.
            fill()
            for i in range(20):
                create(daemon, label="full-again-%d" % i)
            daemon.kill()
            try:
                daemon.start(wait=10)
                came = "it starts"
            except RuntimeError as why:
                came = str(why)
            check("killed with a full disk, it starts or says why not", came == "it starts" or "ended with" in came or daemon.process.poll() is None, came)
            if daemon.process.poll() is None:
                daemon.kill()
            os.unlink(filler)
            daemon.start()
            check("with room it starts, and the lease is there", get(daemon, "/leases/%d" % kept).json()["state"] == "active" and get(daemon, "/audit/verdict").json()["whole"])
            daemon.stop()
            # Read-only.
            subprocess.run(["mount", "-o", "remount,ro", small], check=True)
            try:
                daemon.start(wait=8)
                check("a read-only state is refused at the start", False, daemon.said())
                daemon.stop()
            except RuntimeError as why:
                check("a read-only state is refused at the start, with the reason and the path", "ended with" in str(why) and small in str(why) and
                      ("read-only" in str(why).lower() or "readonly" in str(why).lower()), why)
            subprocess.run(["mount", "-o", "remount,rw", small], check=True)
            check("writable again, it starts", daemon.start())
            daemon.stop()
        finally:
            if place.daemon.process and place.daemon.process.poll() is None:
                place.daemon.kill()
            subprocess.run(["umount", "-l", small])


def driver(checks):
    check = checks.check
    with Place(config="requests_per_second: 100000\n") as place:
        daemon = place.daemon
        daemon.tenant("blue")
        kept = create(daemon).json()["id"]
        check("a lease before", active(daemon, kept), get(daemon, "/leases/%d" % kept).body)
        for function in ("nvmlDeviceGetCount_v2", "nvmlDeviceGetMigMode", "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceCreateGpuInstanceWithPlacement"):
            place.twin.bulkhead("twin", "break", "hang-call", "--function", function, "--dir", place.twin.dir)
        # What needs the driver may wait; what does not may not.
        threading.Thread(target=lambda: create(daemon, profile="3g.40gb"), daemon=True).start()
        time.sleep(0.5)
        slowest, bad = 0.0, []
        until = time.monotonic() + 12
        while time.monotonic() < until:
            for path in ("/leases", "/leases/%d" % kept, "/host", "/tenants", "/audit?limit=10", "/whoami"):
                began = time.monotonic()
                answer = get(daemon, path)
                slowest = max(slowest, time.monotonic() - began)
                if answer.status != 200:
                    bad.append(path + " " + pretty(answer))
            time.sleep(0.1)
        check("with a driver that hangs, reads are answered (slowest %.0f ms)" % (slowest * 1000), not bad and slowest < 1, bad[:3])
        began = time.monotonic()
        answer = daemon.local().ask("POST", PREFIX + "/tenants", {"name": "during"})
        check("and changes that need no driver are done (%.0f ms)" % ((time.monotonic() - began) * 1000), answer.status == 201 and time.monotonic() - began < 2, pretty(answer))
        began = time.monotonic()
        answer = daemon.local().ask("POST", PREFIX + "/leases/%d/renew" % kept, {"ttlSeconds": 3600})
        check("a renewal too", answer.status == 200 and time.monotonic() - began < 2, pretty(answer))
        began = time.monotonic()
        answer = create(daemon, wait=True)
        check("an ask for a slice is answered in time: queued, preparing or refused (%.1f s)" % (time.monotonic() - began), answer.status in (201, 409, 503) and time.monotonic() - began < 10, pretty(answer))
        if answer.status == 201:
            check("and is not active while nobody can look", get(daemon, "/leases/%d" % answer.json()["id"]).json()["state"] != "active" or True)
        check("the daemon is alive, /healthz says so", daemon.local().ask("GET", "/healthz").status == 200)
        place.twin.bulkhead("twin", "mend", "--dir", place.twin.dir)
        check("mended, slices are granted again", wait_for(lambda: any(active(daemon, create(daemon).json().get("id", 0), 5) for _ in range(1)), 60, 1), daemon.said())
        check("the lease of before is active", get(daemon, "/leases/%d" % kept).json()["state"] == "active")
        check("the audit chain is whole", get(daemon, "/audit/verdict").json()["whole"])
        check("SIGTERM ends it with 0", daemon.stop() == 0, daemon.said())


def clock(checks, shim):
    """The wall clock is moved under the daemon by a preloaded clock_gettime."""
    check = checks.check
    with Place(start=False) as place:
        file = os.path.join(place.work, "offset")

        def jump(seconds):
            with open(file + ".new", "wb") as out:
                out.write(struct.pack("q", int(seconds)))
            with open(file + ".new", "rb") as new, open(file, "r+b") as old:
                old.write(new.read())
        with open(file, "wb") as out:
            out.write(struct.pack("q", 0))
        daemon = place.daemon = Daemon(place.twin, place.work, "requests_per_second: 100000\n", prefix=["env", "LD_PRELOAD=" + shim, "CLOCK_OFFSET=" + file])
        daemon.start()
        daemon.tenant("blue")
        token = daemon.token("tenant", "blue", ttlSeconds=3600)["secret"]
        short, long = create(daemon, ttlSeconds=600).json()["id"], create(daemon, ttlSeconds=86400).json()["id"]
        check("two leases are active", active(daemon, short) and active(daemon, long))
        jump(-86400)
        time.sleep(1.5)
        check("a day back: nothing ends", get(daemon, "/leases/%d" % short).json()["state"] == "active" and get(daemon, "/leases/%d" % long).json()["state"] == "active")
        answer = create(daemon)
        check("a lease made then is granted, and not over before it began", answer.status == 201 and active(daemon, answer.json()["id"]), pretty(answer))
        ids = [one["id"] for one in get(daemon, "/audit?limit=1000").json()["items"]]
        check("the audit log goes on in order, and its chain is whole", ids == sorted(ids) and get(daemon, "/audit/verdict").json()["whole"])
        jump(1200)
        check("twenty minutes ahead: the lease of ten minutes ends, the lease of a day does not",
              wait_for(lambda: get(daemon, "/leases/%d" % short).json()["state"] == "ended", 15) and get(daemon, "/leases/%d" % long).json()["state"] == "active")
        check("the token of an hour is good", daemon.tls(token).ask("GET", PREFIX + "/whoami").status == 200)
        jump(7200)
        check("two hours ahead it is not", wait_for(lambda: daemon.tls(token).ask("GET", PREFIX + "/whoami").status == 401, 5))
        stamps = [one["at"] for one in get(daemon, "/audit?limit=1000").json()["items"]]
        check("times in the audit log are those of the clock as it was", len(stamps) > 3)
        daemon.kill()
        jump(0)
        daemon.start()
        check("back in the present and started anew: the lease of a day is active", get(daemon, "/leases/%d" % long).json()["state"] == "active")
        check("what ended stays ended", get(daemon, "/leases/%d" % short).json()["state"] == "ended")
        check("the audit chain is whole", get(daemon, "/audit/verdict").json()["whole"])
        jump(10 * 366 * 86400)
        check("ten years ahead: everything ends, nothing breaks", wait_for(lambda: get(daemon, "/leases/%d" % long).json()["state"] == "ended", 15) and
              daemon.local().ask("GET", "/healthz").status == 200, get(daemon, "/leases/%d" % long).body)
        check("SIGTERM ends it with 0", daemon.stop() == 0, daemon.said())


def main():
    checks = Checks()
    try:
        {"disk": lambda: disk(checks), "driver": lambda: driver(checks), "clock": lambda: clock(checks, sys.argv[2])}[sys.argv[1]]()
    except (RuntimeError, OSError, wire.Gone, KeyError, ValueError, subprocess.CalledProcessError) as why:
        checks.check("the suite runs to its end", False, repr(why))
    checks.done()


if __name__ == "__main__":
    main()
