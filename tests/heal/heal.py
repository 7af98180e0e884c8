#!/usr/bin/env python3
"""Faults that the twin reports come through the kernel's log and the driver's events, and what is done about them is read
in the driver, in the leases and in the audit log. The twin's own tool resets its GPUs; its CUDA is what the check computes on."""
import os
import random
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "serve"))
from daemon import BIN, PREFIX, Checks, Place, json, mig, wait_for  # noqa: E402

QUICK = os.environ.get("BULKHEAD_QUICK", "1") != "0"
NODE = """apiVersion: bulkhead/v1
kind: Node
gpus:
  - select: {index: "0"}
    mode: mig
    layout: dynamic
  - select: {index: "1"}
    mode: mig
    layout: [3g.40gb, 3g.40gb]
  - select: {index: "2-7"}
    mode: exclusive
    power_limit_w: 600
heal: {mode: %s, most_an_hour: %d, keep_healthy: %d}
"""
JOURNAL = "/lib/systemd/systemd-journal-remote"
out = Checks()
check = out.check
if not os.access(JOURNAL, os.X_OK):
    print("skipped: no %s; what systemd says comes through the kernel's log, where it writes while there is no journal" % JOURNAL)


class Host(Place):
    def __init__(self, mode="act", most=20, healthy=1, apply=True):
        super().__init__(node=NODE % (mode, most, healthy), apply=apply, start=False)

    def __enter__(self):
        super().__enter__()
        # What the check needs to find the twin's CUDA, as a board's driver is found by itself.
        self.twin.environment["LD_PRELOAD"] = self.twin.dir + "/lib/libbulkhead-twin-device.so"
        self.begin()
        for name in ("vision", "speech"):
            self.daemon.tenant(name)
        return self

    def begin(self):
        """Started, and both sources followed: a twin's kernel log has the twin's clock, so that what stands in it from
        before would seem older than it is."""
        self.daemon.start()
        wait_for(lambda: (lambda seen: seen["kernel"] and seen["driver"])(self.ask("/incidents")), 20)
        time.sleep(0.5)

    def free(self):
        """A whole GPU that nobody has."""
        return [one["index"] for one in self.ask("/host")["gpus"] if one["pool"] == "exclusive" and not one["leases"]][-1]

    def ask(self, path):
        return self.daemon.local().ask("GET", PREFIX + path).json()

    def lease(self, tenant, **body):
        made = self.daemon.local().ask("POST", PREFIX + "/leases", {"tenant": tenant, "ttlSeconds": 3600, **body})
        if made.status not in (201, 202):
            raise RuntimeError("no lease: %d %s" % (made.status, made.body.decode()))
        number = made.json()["id"]
        return wait_for(lambda: next((one for one in [self.one(number)] if one["state"] == "active"), None), 20)

    def one(self, number):
        return self.ask("/leases/%d" % number)

    def twin_says(self, *words):
        environment = {k: v for k, v in self.twin.environment.items() if k != "LD_PRELOAD"}
        done = subprocess.run([BIN + "/bulkhead", "twin", *words, "--dir", self.twin.dir], env=environment, capture_output=True,
                              text=True)
        if done.returncode:
            raise RuntimeError("twin %s: %s" % (" ".join(words), done.stderr))
        return done.stdout.strip()

    def acts(self):
        return self.ask("/healing")["acts"]

    def ended(self, gpu, count=1):
        """The acts on a GPU, oldest first, when `count` of them have ended."""
        def over():
            mine = [act for act in reversed(self.acts()) if act["index"] == gpu and act["doing"] != "under-way"]
            return mine if len(mine) >= count else None
        return wait_for(over, 60) or [act for act in self.acts() if act["index"] == gpu]

    def gpu(self, index):
        return next(one for one in self.ask("/host")["gpus"] if one["index"] == index)

    def index_of(self, lease):
        return next(one["index"] for one in self.ask("/host")["gpus"] if one["gpu"] == lease["devices"][0]["gpu"])

    def shut(self, index):
        return (self.gpu(index).get("cordon") or {}).get("why", "")

    def record(self, text, priority=3):
        """A line of the kernel's log, or with another facility of a program in it."""
        kmsg = os.path.join(self.twin.dir, "root/dev/kmsg")
        with open(kmsg) as log:
            number = max([int(line.split(",")[1]) for line in log if line[:1].isdigit()] + [0]) + 1
        with open(kmsg, "a") as log:
            log.write("%d,%d,%d,-;%s\n" % (priority, number, time.monotonic_ns() // 1000, text))

    def journal(self, *messages, fields=("_PID=1", "_COMM=systemd", "UNIT=nvidia-fabricmanager.service")):
        """Records of the systemd journal, made by systemd's own tool; the fields with an underscore are those journald fills."""
        if not os.access(JOURNAL, os.X_OK):
            for message in messages if "_PID=1" in fields else ():
                self.record("systemd[1]: " + message, 30)
            return
        folder = os.path.join(self.twin.dir, "root/var/log/journal")
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(self.twin.dir, "root/proc/sys/kernel/random/boot_id")) as got:
            boot = got.read().strip().replace("-", "")
        text = "".join("__REALTIME_TIMESTAMP=%d\n__MONOTONIC_TIMESTAMP=%d\n_BOOT_ID=%s\nMESSAGE=%s\n%s\n\n"
                       % (time.time_ns() // 1000, time.monotonic_ns() // 1000, boot, message, "\n".join(fields)) for message in messages)
        subprocess.run([JOURNAL, "--split-mode=none", "-o",
                        os.path.join(folder, "%d.journal" % len(os.listdir(folder))), "-"], input=text.encode(), check=True, capture_output=True)

    def driver(self, index):
        return json.loads(self.twin_says("status", "--json"))["gpus"][index]

    def instance_of(self, lease):
        """Of a lease's slice: the GPU, the driver's number of it, and its device."""
        index, device = self.index_of(lease), lease["devices"][0]["device"]
        return index, next(gi["id"] for gi in self.driver(index)["instances"] for ci in gi["compute"] if ci["uuid"] == device), device

    def contained(self, lease):
        """The driver's words for a memory error that ended every program of one slice, and nobody else's."""
        _, instance, _ = self.instance_of(lease)
        self.record("NVRM: Xid (PCI:%s GPU-I:%02d): 94, pid=4711, name=train.py, Contained: LTC GPC (0x4,0x1). RST: No, D-RST: No"
                    % (lease["devices"][0]["pci"].rsplit(".", 1)[0], instance))

    def cut_off(self, count, kill=True):
        """kill -9 while the act `count` is under way, as its own record shows; a daemon anew; the act when it has ended."""
        def last():
            path = os.path.join(self.daemon.state, "healing.json")
            acts = json.load(open(path)) if os.path.exists(path) else []
            return acts[-1] if len(acts) >= count else None

        def caught():  # looked at while it stands still, so that no act ends between the look and the kill
            self.daemon.process.send_signal(signal.SIGSTOP)
            now = last()
            if now and now["doing"] == "under-way":
                return now
            self.daemon.process.send_signal(signal.SIGCONT)
            return None

        if kill:
            left = wait_for(caught, 20, 0.005) or last()
            self.daemon.kill()
            check("killed -9 in the middle of %s, at %s" % (left["act"], (left["steps"] + ["the end"])[left["stage"]]) if left
                  else "the act begins", left and left["doing"] == "under-way", left)
            self.begin()
        wait_for(lambda: len(self.acts()) >= count and self.acts()[0]["doing"] != "under-way", 90)
        return self.acts()[0]


def words(act):
    return json.dumps(act)


# ---- suggest: it is said, with commands, and nothing is touched
with Host("suggest") as host:
    mine = host.lease("vision", **{"class": "exclusive"})
    at = host.index_of(mine)
    node = os.path.join(host.twin.dir, "root/dev/nvidia%d" % at)
    foreign = subprocess.Popen(["sleep", "300"], stdin=open(node))  # a plain program: only its open file tells of it
    host.twin_says("xid", str(at), "48")
    shown = wait_for(lambda: host.ask("/healing")["open"], 20)
    row = shown[0] if shown else {}
    check("suggest: a fault is shown with the act that mends it", row.get("act") == "reset-gpu", shown)
    check("with whom it costs what", [v["tenant"] for v in row.get("victims", [])] == ["vision"], row)
    check("with the commands", any("--gpu-reset" in line for line in row.get("commands", [])), row)
    check("and why it is not done", any("suggest" in why for why in row.get("held", [])), row)
    time.sleep(2)
    check("nothing is touched", host.one(mine["id"])["state"] == "active" and not host.acts() and not host.shut(at), host.acts())
    page = host.twin.bulkhead("heal", "--url", "unix:" + host.daemon.socket, check=False)
    check("bulkhead heal says the same, exit 1", page.returncode == 1 and "reset-gpu" in page.stdout, page.stdout + page.stderr)
    said = lambda *asked: host.twin.bulkhead(*asked, "--url", "unix:" + host.daemon.socket, check=False)  # noqa: E731
    page = said("heal", "plan", str(at))
    check("bulkhead heal plan GPU: the steps in their order, and what its tenant loses", page.returncode == 1
          and 0 < page.stdout.find("1. cordon") < page.stdout.find("2. evict") < page.stdout.find("6. uncordon")
          and "vision: lease %d on gpu %d" % (mine["id"], at) in page.stdout, page.stdout + page.stderr)
    name = "pid %d (sleep)" % foreign.pid
    check("who else has the GPU open is named in the plan, once the healer looked", wait_for(
        lambda: name in said("heal", "plan", str(at)).stdout, 40, 0.5), name, said("heal", "plan", str(at)).stdout)
    check("and it is let be", foreign.poll() is None)
    foreign.kill()
    foreign.wait()
    if not QUICK:  # it is looked again every ten seconds
        check("when it is gone, no more", wait_for(lambda: (lambda text: "reset-gpu" in text and name not in text)(
            said("heal", "plan", str(at)).stdout), 40, 0.5),
              said("heal", "plan", str(at)).stdout)
    page = said("heal", "plan", "--incident", row.get("incident", ""), "--json")
    check("of one incident, for programs", page.returncode == 1 and [one["act"] for one in json.loads(page.stdout)["plans"]] == ["reset-gpu"],
          page.stdout + page.stderr)
    page = said("heal", "plan", str((at + 1) % 8))
    check("of a GPU without a fault: nothing, exit 0", page.returncode == 0 and "nothing would be done" in page.stdout, page.stdout + page.stderr)
    check("of one that is not there: exit 2, with what to type", said("heal", "plan", "99").returncode == 2
          and "bulkhead gpus" in said("heal", "plan", "99").stderr)
    page = said("incidents")
    check("bulkhead incidents: a fault of the memory whose line names no process is nobody's, not an innocent's",
          page.returncode == 1 and "Xid 48" in page.stdout and "innocent" not in page.stdout
          and any(word in page.stdout for word in ("hardware", "the machine", "nobody named")), page.stdout + page.stderr)
    if not QUICK:
        for code in range(2000, 3100):
            host.record("NVRM: Xid (PCI:%s): %d, pid='<unknown>', name=<unknown>, of the test" % (mine["devices"][0]["pci"].rsplit(".", 1)[0], code))
        wait_for(lambda: "next" in host.ask("/incidents"), 60)
        first, page = host.ask("/incidents"), said("incidents", "--json")
        check("more incidents than one page of the API has: all are shown", len(first["items"]) == 1000
              and len(json.loads(page.stdout)["items"]) > 1000, len(first["items"]), page.stdout[-300:] + page.stderr)

# ---- act: each with the right victims
with Host() as host:
    whole = host.lease("vision", **{"class": "exclusive"})
    other = host.lease("speech", **{"class": "exclusive"})
    at, there = host.index_of(whole), host.index_of(other)
    host.twin_says("break", "ecc", "--gpu", str(at), "--count", "2")
    host.twin_says("xid", str(at), "48")
    done = host.ended(at)
    check("reset-gpu: a double bit error resets its GPU", [(a["act"], a["doing"]) for a in done] == [("reset-gpu", "helped")], words(done))
    ended = host.one(whole["id"])
    check("its lease ended, and was told why", ended["state"] == "ended" and "healing" in ended.get("reason", ""), ended)
    check("the neighbour's goes on", host.one(other["id"])["state"] == "active")
    check("the check computed on it", any("each word as it was" in said for said in done[0]["said"]), words(done))
    check("and it serves again", wait_for(lambda: not host.shut(at), 10), host.shut(at))
    check("with the limit of the node file", "600" in host.twin.bulkhead("inventory", "--json", check=False).stdout)
    check("the incident is closed, with what helped", wait_for(
        lambda: [one for one in host.ask("/incidents")["items"] if not one["open"] and "reset-gpu" in one.get("closedWhy", "")], 10),
        json.dumps(host.ask("/incidents"))[:1500])

    # A slice made anew, and its neighbour on the same GPU.
    left, right = (host.lease(tenant, **mig("3g.40gb")) for tenant in ("vision", "speech"))
    where, device = host.index_of(left), left["devices"][0]["device"]
    instance = next(gi["id"] for gi in json.loads(host.twin_says("status", "--json"))["gpus"][where]["instances"]
                    for ci in gi["compute"] if ci["uuid"] == device)
    check("two tenants are on one GPU", host.index_of(right) == where, left, right)
    pid = host.twin_says("attach", "%d:%d:0" % (where, instance)).split()[-1]
    host.twin_says("xid", str(where), "94", "--pid", pid)
    host.twin_says("detach", pid)
    held = wait_for(lambda: [row for row in host.ask("/healing")["open"] if row["index"] == where and row["held"]], 20)
    check("an error contained in a slice, of a process that nobody answers for: held, with the reason",
          bool(held) and held[0]["act"] == "end-process" and any("no tenant is charged" in why for why in held[0]["held"]), held)
    check("the neighbour on the same GPU keeps its lease", host.one(right["id"])["state"] == "active")

    # A program's own fault: it is ended, and nobody else.
    theirs = host.lease("vision", **{"class": "exclusive"})
    on = host.index_of(theirs)
    programs = []
    for gpu in (on, there):
        programs.append(subprocess.Popen(["sleep", "300"]))
        host.twin_says("attach", str(gpu), "--pid", str(programs[-1].pid), "--name", "train.py")
    host.twin_says("xid", str(on), "31", "--pid", str(programs[0].pid))
    done = host.ended(on, len([act for act in host.acts() if act["index"] == on and act["act"] != "end-process"]) + 1)
    check("end-process: a program's page fault ends that program", done and (done[-1]["act"], done[-1]["doing"]) == ("end-process", "helped"),
          words(done), json.dumps(host.ask("/healing")["open"]), json.dumps(host.ask("/incidents")["items"][:1]))
    check("it is gone", wait_for(lambda: programs[0].poll() is not None, 10))
    check("its tenant keeps the lease", host.one(theirs["id"])["state"] == "active")
    check("and the neighbour's program runs on", programs[1].poll() is None)
    programs.append(subprocess.Popen(["sleep", "300"]))
    host.twin_says("attach", str(on), "--pid", str(programs[-1].pid), "--name", "train.py")
    host.twin_says("xid", str(on), "31", "--pid", str(programs[-1].pid))
    check("the next one as well, and the tenant's own bug still costs it no lease",
          wait_for(lambda: programs[-1].poll() is not None, 20) is not False and programs[-1].poll() is not None
          and host.one(theirs["id"])["state"] == "active", words(host.acts()[:3]))
    for one in programs:
        one.kill()
        one.wait()

    # Shut for good: a GPU that cannot be reset, because somebody else's process stays on it, and that finds errors.
    there = host.free()
    stays = host.twin_says("attach", str(there)).split()[-1]
    host.twin_says("break", "ecc", "--gpu", str(there), "--count", "2")
    host.twin_says("xid", str(there), "48")
    done = host.ended(there, 3)
    acts = [(a["act"], a["doing"]) for a in done]
    check("what does not help is followed by the next act, and at last the GPU is shut",
          acts[:1] == [("reset-gpu", "failed")] and acts[-1] == ("quarantine", "quarantined"), acts)
    check("the reason is in its cordon", "healing" in host.shut(there), host.shut(there))
    refused = host.daemon.local().ask("POST", PREFIX + "/leases", {"tenant": "speech", "class": "exclusive", "ttlSeconds": 60, "count": 6})
    check("and nobody gets it", refused.status == 409 or "cordon" in refused.body.decode() or refused.status >= 400, refused.body.decode())
    host.twin_says("detach", stays)
    host.daemon.stop()
    host.begin()
    check("over a restart of the daemon", "healing" in host.shut(there), host.shut(there))
    opened = host.twin.bulkhead("gpus", "uncordon", str(there), "--url", "unix:" + host.daemon.socket, check=False)
    check("until a person opens it", opened.returncode == 0 and not host.shut(there), opened.stdout + opened.stderr)
    check("the audit chain is whole", host.twin.bulkhead("audit", "verify", "--state-dir", host.daemon.state, check=False).returncode == 0 or
          "whole" in host.daemon.local().ask("POST", PREFIX + "/audit/verify").body.decode())

# ---- the breaker, and the last healthy GPU
with Host(most=1) as host:
    for gpu in (3, 4):
        host.twin_says("xid", str(gpu), "48")
        if gpu == 3:
            host.ended(3)
    held = wait_for(lambda: [row for row in host.ask("/healing")["open"] if row["index"] == 4 and row["held"]], 20)
    check("the breaker holds the second act of the hour", bool(held) and any("last hour" in why for why in held[0]["held"]), held)
    check("and says that it waits for a person", not [a for a in host.acts() if a["index"] == 4], host.acts())

with Host(healthy=8) as host:
    host.twin_says("xid", "5", "48")
    held = wait_for(lambda: [row for row in host.ask("/healing")["open"] if row["index"] == 5 and row["held"]], 20)
    check("too few GPUs would serve: held", bool(held) and any("still serve" in why for why in held[0]["held"]), held)

# ---- kill -9 in the middle of an act
random.seed(7)
with Host() as host:
    rounds = 2 if QUICK else 12
    good, said = 0, []
    for turn in range(rounds):
        lease = host.lease("vision", **{"class": "exclusive"})
        gpu = host.index_of(lease)
        before = len(host.acts())
        host.twin_says("xid", str(gpu), "48")
        wait_for(lambda: len(host.acts()) > before, 20, 0.01)
        time.sleep(random.random() * 0.8)
        host.daemon.kill()
        host.begin()
        wait_for(lambda: all(a["doing"] != "under-way" for a in host.acts()), 60)
        acts = host.acts()
        fine = acts and acts[0]["doing"] in ("helped", "quarantined") and (acts[0]["doing"] == "helped") == (not host.shut(gpu))
        fine = fine and host.one(lease["id"])["state"] in ("ended", "failed")
        good += 1 if fine else 0
        if not fine:
            said.append(words(acts[:2]) + host.shut(gpu) + json.dumps(host.one(lease["id"])))
        if host.shut(gpu):
            host.twin.bulkhead("gpus", "uncordon", str(gpu), "--url", "unix:" + host.daemon.socket, check=False)
    check("killed -9 in the middle, the next daemon finishes: open and checked, or shut with a reason", good == rounds, *said)

    # The fabric: every lease on it, a unit that is started again, and no lease before its GPUs are registered
    before = len(host.acts())
    one, two = host.lease("vision", **{"class": "exclusive"}), host.lease("speech", **mig("3g.40gb"))
    failed = "nvidia-fabricmanager.service: Failed with result 'exit-code'."
    # Anybody may write this with `logger`: journald tells who it was, in fields that nobody else fills.
    host.journal(failed, fields=("_PID=4711", "_UID=1000", "_COMM=logger", "SYSLOG_IDENTIFIER=systemd", "UNIT=nvidia-fabricmanager.service"))
    host.journal(failed, "Started nvidia-fabricmanager.service - NVIDIA fabric manager service.")
    closed = wait_for(lambda: [i for i in host.ask("/incidents")["items"] if i["rule"] == "fm.unit_failed" and not i["open"]], 20)
    check("a Fabric Manager that systemd itself started again: told, over, and nobody's lease ends", bool(closed) and closed[0]["count"] == 1
          and "was started" in closed[0]["closedWhy"] and len(host.acts()) == before and host.one(one["id"])["state"] == "active", closed, host.acts())
    host.journal(failed)
    act = host.cut_off(before + 1)
    check("restart-fabric-manager: the unit is started again, over kill -9",
          (act["act"], act["doing"]) == ("restart-fabric-manager", "helped"), words(act), json.dumps(host.ask("/healing")["open"]))
    check("those on the fabric ended, and nobody else was there", sorted(act["leases"]) == sorted([one["id"], two["id"]])
          and all("healing" in host.one(lease["id"]).get("reason", "") for lease in (one, two)), words(act))
    check("it waited for all GPUs to be on the fabric", any("8 GPUs are on the fabric" in said for said in act["said"]), words(act))
    check("and the host grants again", host.lease("vision", **{"class": "exclusive"})["state"] == "active")

# ---- a slice alone: drained, at the next error made anew, and each cut off by kill -9
with Host() as host:
    left, right = (host.lease(tenant, **mig("3g.40gb")) for tenant in ("vision", "speech"))
    at, _, _ = host.instance_of(left)
    _, _, neighbour = host.instance_of(right)
    check("two tenants have a slice of one GPU", at == host.index_of(right), left, right)
    host.contained(left)
    act = host.cut_off(1, not QUICK)
    check("drain-slice: an error contained in a slice ends the lease there, %s" % ("alone" if QUICK else "over kill -9"),
          (act["act"], act["doing"], act["leases"]) == ("drain-slice", "helped", [left["id"]]), words(act), json.dumps(host.ask("/healing")["open"]))
    check("who had it is told why", "healing: drain-slice" in host.one(left["id"]).get("reason", ""), host.one(left["id"]))
    check("what was free was computed on before it opened", any("every result right" in said for said in act["said"]), words(act))
    check("and it is open again", wait_for(lambda: not host.shut(at), 20), host.shut(at))
    left = host.lease("vision", **mig("3g.40gb"))
    at, _, _ = host.instance_of(left)
    place = left["devices"][0]["start"]
    check("the next lease has a slice on the same GPU", at == host.index_of(right), left)
    host.contained(left)
    act = host.cut_off(2)
    check("recreate-slice: the same error again, and the slice is destroyed, over kill -9",
          (act["act"], act["doing"], act["leases"]) == ("recreate-slice", "helped", [left["id"]]), words(act))
    # The driver gives what is made at a place the UUID that was there before, so that the numbers cannot show it.
    check("at its place, and nothing else is", act["destroyed"] == [{"profile": "3g.40gb", "start": place}]
          and any("3g.40gb at %d was" % place in said for said in act["said"]), words(act))
    check("the neighbour has its lease, and the very device it had", host.one(right["id"])["state"] == "active"
          and neighbour in json.dumps(host.driver(at)), host.one(right["id"]))
    check("the GPU is open again", wait_for(lambda: not host.shut(at), 20), host.shut(at))
    anew = host.lease("vision", **mig("3g.40gb"))
    check("and the next lease gets the place, made anew", (host.index_of(anew), anew["devices"][0]["start"]) == (at, place)
          and anew["devices"][0]["device"] in json.dumps(host.driver(at)), anew)

# ---- partitions of a shared fabric
if not QUICK:
    with Host(apply=False) as host:
        config = os.path.join(host.twin.dir, "root/usr/share/nvidia/nvswitch/fabricmanager.cfg")
        with open(config) as shipped:
            text = shipped.read()
        with open(config, "w") as changed:
            changed.write(text.replace("FABRIC_MODE=0", "FABRIC_MODE=1"))
        host.daemon.stop()
        host.begin()
        host.journal("nvidia-fabricmanager.service: Failed with result 'exit-code'.")
        held = wait_for(lambda: [row for row in host.ask("/healing")["open"] if row["act"] == "restart-fabric-manager"], 20)
        check("partitions that nobody here could replay: the restart is left to a person, with the reason",
              bool(held) and any("FABRIC_MODE=1" in why for why in held[0]["held"]) and not host.acts(), held, host.acts())

out.done()
