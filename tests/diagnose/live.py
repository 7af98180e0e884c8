"""bulkhead diagnose --live on a twin with a daemon: both sources, whose it is, bursts, losses."""
import json
import os
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "serve"))
from daemon import BIN, ONE_CUT, PREFIX, Checks, Place, wait_for  # noqa: E402



class Live:
    def __init__(self, twin, url, *words):
        self.process = subprocess.Popen([BIN + "/bulkhead", "diagnose", "--live", "--json", "--url", url, *words], env=twin.environment,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        os.set_blocking(self.process.stdout.fileno(), False)
        self.lines, self.rest = [], ""

    def look(self):
        try:
            self.rest += os.read(self.process.stdout.fileno(), 1 << 20).decode()
        except BlockingIOError:
            pass
        *whole, self.rest = self.rest.split("\n")
        self.lines += [json.loads(line) for line in whole]
        return self.lines

    def incidents(self):
        """The last word on each."""
        return {line["incident"]["id"]: line["incident"] for line in self.look() if line["event"] == "incident"}

    def of(self, xid, at=None):
        return [one for one in self.incidents().values() if one["xid"] == xid and (at is None or one["at"] == at)]

    def notes(self):
        return [line["note"] for line in self.look() if line["event"] == "note"]

    def end(self):
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(10)
        os.set_blocking(self.process.stdout.fileno(), True)
        self.rest += self.process.stdout.read()
        self.lines += [json.loads(line) for line in self.rest.split("\n") if line]
        self.rest = ""
        return code, self.lines[-1]


def main():
    checks = Checks()
    check = checks.check
    with Place(node=ONE_CUT, apply=True) as place:
        twin, api = place.twin, place.daemon.local()
        url = "unix:" + place.daemon.socket

        def tell(*words, check=True):
            return twin.bulkhead(*[str(word) for word in words[:2]], "--dir", twin.dir, *[str(word) for word in words[2:]], check=check)

        def attach(*words):
            return int(tell("twin", "attach", *words).stdout.split()[0])

        def lease(tenant, body):
            number = api.ask("POST", PREFIX + "/leases", {**body, "tenant": tenant, "ttlSeconds": 600}).json()["id"]
            wait_for(lambda: api.ask("GET", PREFIX + "/leases/%d" % number).json()["state"] == "active", 30)
            return api.ask("GET", PREFIX + "/leases/%d" % number).json()

        for name in ("blue", "red"):
            place.daemon.tenant(name)
        whole = lease("blue", {"class": "exclusive"})
        slice_ = lease("red", {"class": "mig", "profile": "3g.40gb"})

        def seen():
            return api.ask("GET", PREFIX + "/telemetry").json()["gpus"]

        wait_for(lambda: any(one.get("lease") == slice_["id"] for gpu in seen() for one in gpu["slices"]), 20)
        gpu = next(one for one in seen() if one.get("lease") == whole["id"])
        instance = next(one["gpuInstance"] for one in seen()[0]["slices"] if one.get("lease") == slice_["id"])
        index, other = gpu["index"], next(one["index"] for one in seen() if one["index"] > 0 and one["index"] != gpu["index"])
        mine = attach(index, "--name", "train")
        sliced = attach("0:%d:0" % instance, "--name", "infer")
        stranger = attach(other, "--name", "monitor")

        live = Live(twin, url)
        wait_for(lambda: any(line["event"] == "following" and line["kernel"] and line["driver"] for line in live.look()), 20)
        check("it says that it follows the kernel's log and the driver's events", bool(live.lines), live.lines)
        time.sleep(1.5)

        tell("twin", "xid", index, 31, "--pid", mine)
        wait_for(lambda: live.of(31), 10)
        time.sleep(1)
        got = live.of(31)
        check("one Xid told by two sources is one incident of one event", len(got) == 1 and got[0]["count"] == 1, got)
        one = got[0] if got else {"evidence": [], "blame": {}, "tenants": [], "confidence": {}, "processes": []}
        check("both sources are its evidence, and it is sure of it",
              {e["source"] for e in one["evidence"]} == {"log", "nvml"} and one["confidence"].get("level") == "high", one)
        check("the tenant whose lease holds the GPU is charged", one["blame"].get("charged") == "tenant blue, lease %d" % whole["id"], one)
        check("it names the process", any(str(mine) in name and "train" in name for name in one["processes"]), one)

        tell("twin", "xid", 0, 31, "--pid", sliced)
        wait_for(lambda: live.of(31, "0000:" + seen()[0]["pci"].split(":", 1)[1]), 10)
        time.sleep(1)
        got = [one for one in live.of(31) if one["gpu_instance"] == instance]
        check("in a slice the tenant of that slice's lease is charged",
              len(got) == 1 and got[0]["count"] == 1 and got[0]["blame"]["charged"] == "tenant red, lease %d" % slice_["id"], got)

        tell("twin", "xid", other, 119, "--pid", stranger)
        wait_for(lambda: live.of(119), 10)
        time.sleep(1)
        got = live.of(119)
        check("who only called the driver when it noticed is not blamed",
              len(got) == 1 and got[0]["blame"]["who"] == "innocent" and got[0]["blame"]["charged"] is None, got)

        # Gone before anybody says what it did; its table is remembered.
        lost = attach(other, "--name", "short")
        time.sleep(2.5)
        tell("twin", "xid", other, 13, "--pid", lost)
        tell("twin", "detach", lost)
        wait_for(lambda: live.of(13), 10)
        time.sleep(1)
        got = live.of(13)
        check("a process that is gone is still named by its cgroup", len(got) == 1 and got[0]["blame"]["charged"] == "/system.slice/short-%d.scope" % lost, got)

        # The kernel's side of a process that died before its line was read, as a real kernel writes it.
        ghost = attach(other, "--name", "ghost")
        time.sleep(2.5)
        tell("twin", "detach", ghost)
        address = next(one["pci"] for one in seen() if one["index"] == other)
        kmsg = os.path.join(twin.dir, "root/dev/kmsg")

        def sequence():
            with open(kmsg) as log:
                return max([int(line.split(",")[1]) for line in log if line[:1].isdigit()] + [0])

        def kernel(number, text):
            with open(kmsg, "a") as log:
                log.write("3,%d,%d,-;%s\n" % (number, time.monotonic_ns() // 1000, text))

        kernel(sequence() + 1, "NVRM: Xid (PCI:%s): 68, pid=%d, name=ghost, Ch 00000008" % (address.rsplit(".", 1)[0], ghost))
        wait_for(lambda: live.of(68), 10)
        got = live.of(68)
        check("so is one that was gone before its line came", bool(got) and got[0]["tenants"] == ["/system.slice/ghost-%d.scope" % ghost], got)

        burst = 200
        for _ in range(burst):
            tell("twin", "xid", index, 13, "--pid", mine)
        at = gpu["pci"]
        wait_for(lambda: sum(one["count"] for one in live.of(13, at)) >= burst, 20)
        time.sleep(1)
        got = live.of(13, at)
        check("200 in a burst: one incident, none lost and none twice", len(got) == 1 and got[0]["count"] == burst, [one["count"] for one in got])

        begun = sequence()
        kernel(begun + 38, "NVRM: Xid (PCI:%s): 48, pid='<unknown>', name=<unknown>, DBE (double bit error) ECC Error" % at.rsplit(".", 1)[0])
        wait_for(lambda: live.notes(), 10)
        check("what the kernel overwrote is said", any(note.startswith("37 records") for note in live.notes()), live.notes())

        code, last = live.end()
        check("Ctrl-C ends it with a summary, and 1 says that there were incidents",
              code == 1 and last["event"] == "summary" and last["kernelRecordsLost"] == 37 and last["driver"] is True, code, last)
        check("both sources told of every event of the twin",
              last["driverEvents"] == burst + 4 and last["kernelEvents"] >= burst + 4 + 2, last)
        check("nothing is left of it", subprocess.run(["pgrep", "-P", str(live.process.pid)], capture_output=True).returncode == 1)

        # A host where one of the sources is missing says so and goes on.
        os.rename(kmsg, kmsg + ".away")
        live = Live(twin, url)
        wait_for(lambda: any(line["event"] == "following" for line in live.look()), 20)
        tell("twin", "xid", other, 94)
        wait_for(lambda: live.of(94), 10)
        code, last = live.end()
        check("without the kernel's log the driver's events are told, and that processes have no names",
              code == 1 and last["kernel"] is False and last["driverEvents"] == 1 and any("not read" in note for note in last["notes"]), last)
    checks.done()


main()
