#!/usr/bin/env python3
"""Alarms open, say what they see, are acted on, and close themselves. The twin's boards have the H100's numbers with a tenth
of its heat capacity, so that what takes ten minutes on a board takes one here."""
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "serve"))
from daemon import BIN, PREFIX, Checks, Daemon, Twin, json, pretty, wait_for  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.join(HERE, "..", "..")
HEAD = "apiVersion: bulkhead/v1\nkind: Node\ngpus:\n  - select: {all: true}\n    mode: exclusive\n"
OBSERVE = HEAD + "protect: {mode: observe, ceiling: 60, node_power: 4kW}\n"
ACT = HEAD + "protect: {mode: act, ceiling: 60, harshest: clocks}\n"
LADDER = """apiVersion: bulkhead/v1
kind: Node
gpus:
  - select: {index: "0"}
    mode: mig
    layout: [3g.40gb, 3g.40gb]
  - select: {index: "1"}
    mode: share
  - select: {index: "2-7"}
    mode: exclusive
protect: {mode: %s, ceiling: 40, harshest: fence}
"""
QUICK = os.environ.get("BULKHEAD_QUICK", "1") != "0"


def small_boards(work):
    """The profile of a DGX H100 whose boards warm up ten times as fast."""
    where = os.path.join(work, "profile")
    shutil.copytree(os.path.join(ROOT, "twin", "profiles"), where)
    chip = os.path.join(where, "chips", "h100-sxm-80gb.yaml")
    with open(chip) as got:
        text = got.read()
    with open(chip, "w") as out:
        out.write(text.replace("c_die: 250, c_sink: 2000", "c_die: 25, c_sink: 200"))
    return os.path.join(where, "dgx-h100.yaml")


class Machine:
    def __init__(self, node, apply=False):
        self.work = tempfile.mkdtemp(prefix="bulkhead-test.", dir=os.environ.get("TMPDIR", "/tmp"))
        os.chmod(self.work, 0o755)
        directory = os.path.join(self.work, "twin")
        subprocess.run([BIN + "/bulkhead", "twin", "up", "--profile-file", small_boards(self.work), "--dir", directory],
                       check=True, stdout=subprocess.DEVNULL)
        self.twin = Twin.__new__(Twin)
        self.twin.dir = directory
        self.twin.environment = dict(os.environ, BULKHEAD_TWIN=directory, BULKHEAD_ROOT=directory + "/root",
                                     BULKHEAD_NVML=directory + "/lib/libnvidia-ml.so.1", LD_LIBRARY_PATH=directory + "/lib",
                                     NO_COLOR="1")
        self.twin.environment.pop("BULKHEAD_STATE", None)
        self.twin.node = os.path.join(self.work, "node.yaml")
        self.node(node)
        if apply:
            self.twin.apply()
        self.daemon = Daemon(self.twin, self.work, "requests_per_second: 100000\n").start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.daemon.process.poll() is None:
            self.daemon.stop(10)
        self.twin.down()
        shutil.rmtree(self.work, ignore_errors=True)

    def node(self, text):
        with open(self.twin.node, "w") as out:
            out.write(text)

    def reload(self, text):
        self.node(text)
        self.daemon.process.send_signal(signal.SIGHUP)

    def twin_do(self, *words):
        self.twin.bulkhead("twin", *words)

    def boards(self):
        return json.loads(self.twin.bulkhead("twin", "status", "--json").stdout)["gpus"]

    def alarms(self, client=None):
        return (client or self.daemon.local()).ask("GET", PREFIX + "/alarms").json()

    def open(self, client=None):
        return {alarm["id"]: alarm for alarm in self.alarms(client)["open"]}

    def closed(self):
        return {alarm["id"]: alarm for alarm in self.alarms()["recent"]}

    def measure(self, index):
        return next((m for m in self.alarms()["measures"] if m["index"] == index), None)

    def lease(self, tenant, **more):
        return self.daemon.local().ask("POST", PREFIX + "/leases",
                                       {"class": "exclusive", "tenant": tenant, "ttlSeconds": 3600, **more}).json()

    def gpu(self, index):
        return next(g for g in self.daemon.local().ask("GET", PREFIX + "/host").json()["gpus"] if g["index"] == index)

    def audit(self):
        return self.daemon.local().ask("GET", PREFIX + "/audit?limit=1000").json()["items"]

    def protect_runs(self):
        runs = json.loads(self.twin.bulkhead("history", "--json").stdout)
        runs = runs["runs"] if isinstance(runs, dict) else runs
        return [run for run in runs if run.get("verb") == "protect"]

    def index_of(self, lease):
        return next(g["index"] for g in self.daemon.local().ask("GET", PREFIX + "/host").json()["gpus"]
                    if g["gpu"] == lease["devices"][0]["gpu"])


    def meter(self, watts):
        """What a supply's meter would show the kernel of the whole machine's power."""
        chip = os.path.join(self.twin.dir, "root/sys/class/hwmon/hwmon7")
        os.makedirs(chip, exist_ok=True)
        for name, text in (("name", "supply"), ("power1_label", "Total_Power"), ("power1_input", str(int(watts * 1e6)))):
            with open(os.path.join(chip, name + ".new"), "w") as out:
                out.write(text + "\n")
            os.replace(os.path.join(chip, name + ".new"), os.path.join(chip, name))


class Port(threading.Thread):
    """An InfiniBand port that carries packets and damages a part of them."""

    def __init__(self, machine, name):
        super().__init__(daemon=True)
        self.dir = os.path.join(machine.twin.dir, "root/sys/class/infiniband", name, "ports/1/counters")
        os.makedirs(self.dir)
        self.part, self.packets, self.errors, self.ends = 0.0, 0, 0.0, False
        self.write()
        self.start()

    def write(self):
        for name, value in (("port_rcv_packets", self.packets), ("port_rcv_errors", int(self.errors))):
            with open(os.path.join(self.dir, name + ".new"), "w") as out:
                out.write("%d\n" % value)
            os.replace(os.path.join(self.dir, name + ".new"), os.path.join(self.dir, name))

    def run(self):
        while not self.ends:
            self.packets += 1_000_000
            self.errors += 1_000_000 * self.part
            self.write()
            time.sleep(0.5)


def observed(checks):
    with Machine(OBSERVE) as machine:
        machine.daemon.tenant("blue")
        machine.daemon.tenant("red")
        blue = machine.daemon.tls(machine.daemon.token("tenant", "blue")["secret"])
        red = machine.daemon.tls(machine.daemon.token("tenant", "red")["secret"])
        lease = machine.lease("blue")
        index = machine.index_of(lease)
        bad, good = Port(machine, "mlx5_0"), Port(machine, "mlx5_1")
        good.part = 0.5e-4
        checks.check("nothing is wrong with a healthy machine", wait_for(lambda: machine.alarms()["mode"] == "observe", 10) and
                     not machine.open(), machine.alarms())
        machine.twin_do("load", str(index), "--busy", "0.9")
        machine.twin_do("break", "power-brake", "--gpu", str(index))
        machine.twin_do("break", "sagging-rail")
        bad.part = 3e-4
        torn, worn = (index + 1) % 8, (index + 2) % 8
        machine.twin_do("break", "link-errors", "--gpu", str(torn), "--count", "300")
        machine.twin_do("break", "link-errors", "--gpu", str(worn), "--count", "50")
        machine.meter(4300)
        brake, links = "power-brake.gpu%d" % index, "link-errors.gpu%d" % torn
        soon, late = {brake, "rail.P12V", "node-power.host"}, {links, "link-errors.mlx5_0/1"}
        seen = wait_for(lambda: soon <= set(machine.open()), 60, 0.3)
        checks.check("the power brake, a sagging rail and too much power of the node open alarms", seen, sorted(machine.open()))
        opened = machine.open()
        checks.check("the brake's alarm says how long, and that it is not the tenant's doing",
                     brake in opened and "by the rack or its supply" in opened[brake]["what"] and
                     opened[brake]["severity"] == "critical" and opened[brake]["evidence"], opened.get(brake))
        checks.check("a rail's alarm has the volts", "11.20 V" in opened.get("rail.P12V", {}).get("what", ""), opened)
        checks.check("the tenant whose lease is there sees it, without a word of others",
                     machine.open(blue).get(brake, {}).get("leases") == [lease["id"]] and
                     not machine.alarms(blue)["measures"], machine.alarms(blue))
        checks.check("another tenant sees nothing of it", not machine.open(red), machine.open(red))
        would = wait_for(lambda: (machine.measure(index) or {}).get("rung", 0) >= 2, 30, 0.5)
        measure = machine.measure(index)
        checks.check("observing, it says what it would have done", would and measure["doing"] == "would", measure)
        checks.check("and does nothing: limits, leases and cordons are as they were",
                     all(b["power_limit_watts"] == 700 for b in machine.boards()) and "cordon" not in machine.gpu(index) and
                     not machine.protect_runs(), [b["power_limit_watts"] for b in machine.boards()])
        metrics = machine.daemon.local().ask("GET", "/metrics").body.decode()
        checks.check("/metrics has the alarm", re.search(r'bulkhead_alarm\{alarm="%s",kind="power-brake"' % re.escape(brake), metrics),
                     [line for line in metrics.splitlines() if "alarm" in line])
        page = machine.twin.bulkhead("alarms", "--url", "unix:" + machine.daemon.socket, check=False)
        checks.check("`bulkhead alarms` shows it and exits 1", page.returncode == 1 and brake in page.stdout and
                     "nothing of this was done" in page.stdout, page.stdout, page.stderr)
        machine.twin_do("mend", "sagging-rail")
        machine.twin_do("mend", "power-brake")
        machine.meter(2000)
        seen = wait_for(lambda: late <= set(machine.open()) | set(machine.closed()), 90, 0.5)
        checks.check("damaged packets of a port and damaged flits of NVLink open alarms", seen, sorted(machine.open()))
        opened = set(machine.open()) | set(machine.closed())
        checks.check("below one in ten thousand they open none", "link-errors.mlx5_1/1" not in opened and
                     "link-errors.gpu%d" % worn not in opened, sorted(opened))
        ratio = {gpu["index"]: gpu["values"].get("nvlink_error_ratio", {}).get("value")
                 for gpu in machine.daemon.local().ask("GET", PREFIX + "/telemetry").json()["gpus"]}
        checks.check("and the ratios are those that were planted: 0.03 % and 0.005 %",
                     abs((ratio[torn] or 0) - 3e-4) < 0.6e-4 and abs((ratio[worn] or 0) - 0.5e-4) < 0.1e-4, ratio)
        bad.part = 0
        machine.twin_do("mend")
        # A brake and links have to be well for a minute, which is waited for where time is.
        ends = {"rail.P12V", "node-power.host"} if QUICK else soon | late
        gone = wait_for(lambda: not set(machine.open()) & ends, 180, 0.5)
        checks.check("mended, the alarms close themselves", gone, machine.open())
        closed = machine.closed()
        checks.check("and say on what evidence", ends <= set(closed) and
                     all(any(line.startswith("closed: ") for line in closed[name]["evidence"]) for name in ends), closed)
        if QUICK:
            return finish(bad, good)
        wait_for(lambda: not machine.open(), 60, 0.5)
        quiet = machine.twin.bulkhead("alarms", "--url", "unix:" + machine.daemon.socket, "--json", check=False)
        checks.check("then `bulkhead alarms` exits 0", quiet.returncode == 0 and json.loads(quiet.stdout)["open"] == [],
                     quiet.stdout, quiet.stderr)
        verbs = [(line["verb"], line["what"]) for line in machine.audit()]
        checks.check("each decision is a line of the audit log",
                     ("open", "alarm/" + brake) in verbs and ("close", "alarm/" + brake) in verbs and
                     any(verb == "would-step" for verb, _ in verbs), verbs[-40:])
        finish(bad, good)


def finish(*ports):
    for port in ports:
        port.ends = True


def ladder(checks):
    """All rungs, on a board whose heat no limit can mend."""
    with Machine(LADDER % "act", apply=True) as machine:
        for name in ("blue", "red"):
            machine.daemon.tenant(name)
        # A background share beside the leases, by hand: it is paused, not ended.
        low = subprocess.Popen([BIN + "/bulkhead", "twin", "run", "--dir", machine.twin.dir, "--", BIN + "/bulkhead", "share", "run", "--gpu", "1",
                                "--class", "background", "--ceiling", "40", "--name", "low", "--untested", "--", "sleep", "600"],
                               env=machine.twin.environment, stdout=subprocess.DEVNULL, stderr=open(os.path.join(machine.work, "low.log"), "w"))
        try:
            stays = machine.lease("blue", **{"class": "mig", "profile": "3g.40gb"})
            goes = machine.lease("red", **{"class": "mig", "profile": "3g.40gb", "preemptible": True})

            def lease(one):
                return machine.daemon.local().ask("GET", PREFIX + "/leases/%d" % one["id"]).json()

            def ceiling():
                shares = json.loads(machine.twin.bulkhead("share", "list", "--json").stdout)
                shares = shares if isinstance(shares, list) else shares.get("tenants", shares.get("shares", []))
                return next((one.get("ceilingPercent") for one in shares if one.get("name") == "low"), "none")

            checks.check("two leases share a board, and a background share has another",
                         wait_for(lambda: lease(stays)["state"] == lease(goes)["state"] == "active" and ceiling() == 40, 20, 0.3),
                         lease(stays), lease(goes), ceiling(), open(os.path.join(machine.work, "low.log")).read())
            # What the memory and the driver do wrong is held, on boards of nobody.
            machine.twin_do("break", "ecc", "--gpu", "5", "--count", "2")
            machine.twin_do("break", "hang-call", "--function", "nvmlDeviceGetFieldValues", "--gpu", "6", "--delay-ms", "30000", "--times", "1")
            for board in ("0", "1"):
                machine.twin_do("break", "failed-fan", "--gpu", board)
                machine.twin_do("load", board, "--watts", "350")
            checks.check("on a hot board limits come first: no lease has ended",
                         wait_for(lambda: (machine.measure(0) or {}).get("rung", 0) >= 5, 90, 0.3) and lease(goes)["state"] == "active",
                         machine.measure(0), machine.open())
            for board in ("0", "1"):
                machine.twin_do("load", board, "--watts", "900")
            checks.check("then the background share gets one part in a hundred of the time", wait_for(lambda: ceiling() == 1, 40, 0.3), ceiling(), machine.measure(1))
            checks.check("then the lease that may be taken is ended, with the reason",
                         wait_for(lambda: lease(goes)["state"] not in ("active", "preparing"), 60, 0.2) and "protection" in json.dumps(lease(goes)),
                         lease(goes), machine.measure(0))
            checks.check("last of all, every lease of the board", wait_for(lambda: lease(stays)["state"] not in ("active", "preparing"), 60, 0.2),
                         lease(stays), machine.measure(0))
            audit = machine.audit()
            ends = [line["what"] for line in audit if line.get("from") == "protection" and line["what"].startswith("lease/")]
            checks.check("in that order", list(dict.fromkeys(ends)) == ["lease/%d" % goes["id"], "lease/%d" % stays["id"]],
                         ends, [line for line in audit if line["what"].startswith("lease/")][-6:])
            uuid = machine.gpu(0)["gpu"]
            rungs = [line["detail"]["rung"] for line in audit if line["verb"] == "step" and line["what"] == "gpu/" + uuid]
            checks.check("one rung at a time, each a line of the audit log", rungs == list(range(1, 9)), rungs)
            checks.check("the share was paused by name", "share/low" in [line["what"] for line in audit if line["verb"] == "pause"], audit[-30:])
            checks.check("memory errors and a driver that is silent hold the board", wait_for(
                lambda: {"memory-errors.gpu5", "memory-pending.gpu5"} <= set(machine.open()) and
                ("silent.gpu6" in machine.open() or "silent.gpu6" in machine.closed()), 40, 0.5) and "cordon" in machine.gpu(5), sorted(machine.open()))
            machine.reload(LADDER % "observe")
            checks.check("observing again, the share has its ceiling back, the limits are lifted and the boards may be leased",
                         wait_for(lambda: ceiling() == 40 and "cordon" not in machine.gpu(0) and
                                  all(b["power_limit_watts"] == 700 for b in machine.boards()), 60, 0.5),
                         ceiling(), machine.gpu(0), [b["power_limit_watts"] for b in machine.boards()])
        finally:
            low.terminate()
            low.wait(20)


def acted(checks):
    with Machine(ACT) as machine:
        machine.daemon.tenant("blue")
        lease = machine.lease("blue")
        index = machine.index_of(lease)
        watt = lambda: machine.boards()[index]["power_limit_watts"]  # noqa: E731
        machine.twin_do("load", str(index), "--watts", "700")
        time.sleep(12)
        checks.check("a loaded board with its fan is below the ceiling, and left alone",
                     machine.boards()[index]["temperature_c"] < 60 and not machine.open() and watt() == 700,
                     machine.boards()[index], machine.open())
        machine.twin_do("break", "failed-fan", "--gpu", str(index))
        checks.check("a failed fan is an alarm before the heat is there",
                     wait_for(lambda: "fan.SYS_FAN2" in machine.open(), 20, 0.3), machine.open())
        heat = "heat.gpu%d" % index
        checks.check("overheating is an alarm", wait_for(lambda: heat in machine.open(), 60, 0.3), machine.open(), machine.boards()[index])
        checks.check("its first measure is that nobody new gets the GPU",
                     wait_for(lambda: "cordon" in machine.gpu(index), 20, 0.3) and
                     machine.gpu(index)["cordon"]["by"] == "bulkhead", machine.gpu(index))
        # The limit is set while the driver hangs, and the daemon dies in the middle of it.
        machine.twin_do("break", "hang-call", "--function", "nvmlDeviceSetPowerManagementLimit", "--delay-ms", "4000", "--times", "1")
        under_way = wait_for(lambda: (machine.measure(index) or {}).get("doing") == "under-way" and
                             any(run.get("state") == "running" for run in machine.protect_runs()), 60, 0.1)
        checks.check("the next one is a lower power limit, journalled before it is set", under_way, machine.measure(index), machine.protect_runs())
        machine.daemon.kill()
        time.sleep(5)
        machine.daemon.start()
        lowered = wait_for(lambda: watt() < 700, 60, 0.5)
        checks.check("kill -9 in the middle of it: the next daemon goes on", lowered, watt(), machine.alarms())
        cooled = wait_for(lambda: machine.boards()[index]["temperature_c"] < 60, 150, 1)
        hot = machine.boards()[index]
        checks.check("the board comes below the ceiling, its fan still standing", cooled, hot)
        checks.check("the other boards are as they were", all(b["power_limit_watts"] == 700 for b in machine.boards() if b["index"] != index),
                     [b["power_limit_watts"] for b in machine.boards()])
        checks.check("the lease was never touched",
                     machine.daemon.local().ask("GET", PREFIX + "/leases/%d" % lease["id"]).json()["state"] == "active")
        measure = machine.measure(index)
        checks.check("what is in force says what it was before", measure and measure["powerLimitBeforeWatts"] == 700 and
                     measure["powerLimitWatts"] == watt(), measure)
        if QUICK:
            machine.reload(OBSERVE)
            checks.check("observing again, all of it is taken back", wait_for(lambda: watt() == 700 and "cordon" not in machine.gpu(index), 40, 0.3),
                         watt(), machine.gpu(index))
            return
        # Killed while all of it is in force: the journal, the book and the readings know.
        machine.daemon.kill()
        machine.twin_do("mend")
        machine.twin_do("load", str(index), "--watts", "300")
        machine.daemon.start()
        checks.check("after another kill -9 the limit is lifted when readings say that all is well",
                     wait_for(lambda: watt() == 700, 240, 1), watt(), machine.alarms())
        checks.check("and the GPU may be leased again", wait_for(lambda: "cordon" not in machine.gpu(index), 120, 1), machine.gpu(index))
        checks.check("every change was a run of the journal, and none is unfinished",
                     len(machine.protect_runs()) >= 2 and all(run.get("state") != "running" for run in machine.protect_runs()),
                     machine.protect_runs())
        # By hand meanwhile: somebody else's word stays.
        machine.reload(OBSERVE)
        checks.check("the mode can be changed while it runs", wait_for(lambda: machine.alarms()["mode"] == "observe", 10), machine.alarms())


def start_together(machine, count):
    """Eight jobs asked for at once; each begins to draw when its lease is active. (seconds, watts) every tenth of a second."""
    points, begun, ends = [], [], threading.Event()
    status = os.path.join(machine.work, "status")
    base = time.monotonic()

    def watch():
        while not ends.is_set():
            at = time.monotonic() - base
            points.append((at, sum(b["watts"] for b in machine.boards())))
            time.sleep(max(0.0, 0.1 - (time.monotonic() - base - at)))

    def job(number):
        lease = machine.lease("blue", label="job-%d" % number)
        client = machine.daemon.local()
        while lease.get("state") in ("requested", "queued", "preparing"):
            time.sleep(0.02)
            lease = client.ask("GET", PREFIX + "/leases/%d" % lease["id"]).json()
        begun.append(time.monotonic() - base)
        machine.twin_do("load", str(machine.index_of(lease)), "--watts", "650")

    del status
    watcher = threading.Thread(target=watch)
    watcher.start()
    time.sleep(3)
    jobs = [threading.Thread(target=job, args=(n,)) for n in range(count)]
    began = time.monotonic() - base
    for one in jobs:
        one.start()
    for one in jobs:
        one.join()
    time.sleep(4)
    stopped = time.monotonic() - base
    for board in range(count):
        machine.twin_do("load", str(board))
    time.sleep(3)
    ramp = "ramp.host" in machine.open() or "ramp.host" in machine.closed()
    ends.set()
    watcher.join()
    return points, [at - began for at in sorted(begun)], began, stopped, ramp


def steepest(points, window, until):
    best, j = 0.0, 0
    for i, (at, watts) in enumerate(points):
        if at > until:
            break
        while j < i and at - points[j + 1][0] >= window:
            j += 1
        if at - points[j][0] >= window:
            best = max(best, (watts - points[j][1]) / (at - points[j][0]))
    return best


def ramps(checks, svg):
    curves = {}
    slopes = {}
    def one(name, node):
        with Machine(node) as machine:
            machine.daemon.tenant("blue")
            wait_for(lambda: "bulkhead_gpu_room_kelvin{" in machine.daemon.local().ask("GET", "/metrics").body.decode(), 15)
            time.sleep(2)
            points, begun, began, stopped, ramp = start_together(machine, 8)
            slopes[name] = {w: steepest(points, w, stopped) for w in (1, 5, 10)}
            slopes[name]["last"] = begun[-1]
            slopes[name]["ramp"] = ramp
            slopes[name]["audit"] = [line["verb"] for line in machine.audit()]
            curves[name] = [(at - began, watts) for at, watts in points if at - began >= -2]

    both = [threading.Thread(target=one, args=(name, HEAD + "protect: {mode: %s, ramp: {rate: 1kW/s, burst: 700W}}\n" % mode))
            for name, mode in (("together", "observe"), ("staggered", "act"))]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    if len(slopes) < 2:
        return checks.check("both machines ran", False, slopes)
    print("# steepest rise in W/s over 1, 5, 10 s: together %s, staggered %s; the last job began after %.1f s and %.1f s" % (
        [round(slopes["together"][w]) for w in (1, 5, 10)], [round(slopes["staggered"][w]) for w in (1, 5, 10)],
        slopes["together"]["last"], slopes["staggered"]["last"]))
    checks.check("eight jobs that start together rise several times as fast as they may",
                 slopes["together"][1] > 2000 and slopes["together"]["ramp"], slopes["together"])
    checks.check("observing, the log says how long they would have waited", "would-stagger" in slopes["together"]["audit"])
    checks.check("staggered, the same jobs rise at no more than the budget and its burst",
                 slopes["staggered"][1] <= 1750 and "stagger" in slopes["staggered"]["audit"], slopes["staggered"])
    checks.check("staggered, all of them begin within the time the budget makes of it", 3 < slopes["staggered"]["last"] < 15,
                 slopes["staggered"]["last"])
    checks.check("a stop of all of them together is seen as a ramp as well", slopes["staggered"]["ramp"])
    if svg:
        text = "".join("%s %.2f %.1f\n" % (name, at, watts) for name, points in curves.items() for at, watts in points)
        drawn = subprocess.run([os.path.join(BIN, "protect_plot")], input=text, capture_output=True, text=True)
        checks.check("the figure is drawn", drawn.returncode == 0 and drawn.stdout.startswith("<svg"), drawn.stderr)
        with open(svg, "w") as out:
            out.write(drawn.stdout)


SCENES = {"observe": observed, "ladder": ladder, "act": acted, "ramp": lambda checks: ramps(checks, os.environ.get("PROTECT_SVG", ""))}


def main():
    checks = Checks()
    wanted = sys.argv[1:] or list(SCENES)
    if len(wanted) == 1:
        SCENES[wanted[0]](checks)
        return checks.done()
    # They mostly wait, each for a machine of its own; but what is measured in watts a second is measured alone.
    def run(scenes):
        began = time.monotonic()
        running = [subprocess.Popen([sys.executable, os.path.abspath(__file__), one], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                   for one in scenes]
        for one in running:
            said = one.communicate()[0]
            print("# %s: over after %.0f s" % (one.args[-1], time.monotonic() - began), flush=True)
            for line in said.splitlines():
                found = re.match(r"(\d+) passed, (\d+) failed$", line)
                if found:
                    checks.passed += int(found[1])
                    checks.failed += int(found[2])
                else:
                    print(line, flush=True)
            if one.returncode not in (0, 1):
                checks.check("a scene ends by itself", False, one.args, one.returncode)

    if "ramp" in wanted:
        run(["ramp"])
    run([one for one in wanted if one != "ramp"])
    checks.done()


main()
