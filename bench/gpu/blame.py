#!/usr/bin/env python3
"""Whose fault: two tenants share one GPU, one of them does what a GPU does not forgive, and the daemon says whose it was.

  python3 bench/gpu/blame.py                 on GPU 0 of this machine (root; nobody else on it)

Tenant b faults again and again (each time in a process of its own; then many at once), tenant a computes beside it the whole time and
checks what it computed. Goals: an incident for every kind of fault that the driver logs, each of b's lease, none of a's; as many events
of Xid 31 as there were bad stores; a undisturbed. Exit code 1: not so.
"""
import argparse
import json
import subprocess
import sys
import time

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("--gpu", type=int, default=0)
options.add_argument("--times", type=int, default=20, help="of each kind of fault")
options.add_argument("--burst", type=int, default=200, help="bad stores at the end, a dozen processes at once")
options.add_argument("--json")
options = options.parse_args()
from leased import BIN, PREFIX, Host, node_of, pretty, run_in, share_lease, wait_for, with_daemon  # noqa: E402

# Of an illegal instruction, or of a program that is killed in its kernel, the driver may say nothing.
KINDS = ["address", "misaligned", "illegal", "killed"]


def measure(machine, daemon):
    api, leases = daemon.local(60), {}
    for name in "ab":
        daemon.tenant(name)
        leases[name] = share_lease(api, name, 20 << 30)  # room for a dozen contexts

    def program(name, *words):
        return run_in(machine, options.gpu, leases[name], *words)

    steady = program("a", BIN + "/cuda_fault", "steady", "--gpu", "0")
    time.sleep(3)
    caused = {}

    def cause(kind, times, *more):
        began = time.monotonic()
        said = program("b", BIN + "/cuda_fault", kind, "--times", str(times), *more).communicate(timeout=300)[0]
        done = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        print("%s%s: %d faults in %.1f s; the driver's answers: %s" %
              (kind, " ".join(("",) + more), len(done), time.monotonic() - began, sorted({str(one.get("name", one.get("error"))) for one in done})))
        return done

    for kind in KINDS:
        caused[kind] = cause(kind, options.times)
    caused["burst"] = cause("address", options.burst, "--at-once", "12")

    def incidents():
        answer = api.ask("GET", PREFIX + "/incidents?all=true")
        if answer.status != 200:
            raise RuntimeError(pretty(answer))
        return answer.json()["items"]

    stores = sum(one.get("code") != 0 for one in caused["address"] + caused["burst"])

    def counted(xid):
        return sum(one["count"] for one in incidents() if one["xid"] == xid)

    wait_for(lambda: counted(31) >= stores, 30)
    time.sleep(3)
    found = incidents()
    # The neighbour's program is the launcher's child.
    subprocess.run(["pkill", "-TERM", "-f", "cuda_fault steady --gpu 0"], check=False)
    said, complained = steady.communicate(timeout=60)
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    neighbour = lines[-1] if lines else {"said": complained[-400:]}
    print("neighbour: " + json.dumps(neighbour))
    print(json.dumps(found, indent=1)[:6000])
    mine = [one for one in found if "tenant b, lease %d" % leases["b"] in one["tenants"]]
    wrongly = [one for one in found if "tenant a, lease %d" % leases["a"] in one["tenants"]]
    print("%d incidents: %d name b's lease, %d name a's" % (len(found), len(mine), len(wrongly)))
    print("events by Xid: %s; bad stores: %d" % ({xid: counted(xid) for xid in sorted({one["xid"] for one in found})}, stores))
    good = bool(mine) and not wrongly and counted(31) == stores and len(mine) == len(found) and all(one["blame"] == "application" for one in mine) and neighbour.get("code") == 0 and neighbour.get("right")
    print("blamed rightly, neighbour undisturbed" if good else "NOT as it should be")
    if options.json:
        with open(options.json, "w") as out:
            json.dump({"caused": caused, "incidents": found, "neighbour": neighbour, "good": bool(good)}, out, indent=1)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(with_daemon("blame", lambda work: Host(work, node_of(options.gpu)), measure))
