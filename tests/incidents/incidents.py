"""The daemon follows the kernel's log and the driver's events: joined, named, closed, kept over kill -9."""
import json
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "serve"))
from daemon import BIN, ONE_CUT, PREFIX, Checks, Place, wait_for  # noqa: E402
from wire import frames  # noqa: E402

BURST = 200


def main():
    checks = Checks()
    check = checks.check
    with Place(node=ONE_CUT, apply=True) as place:
        twin, daemon = place.twin, place.daemon
        api = daemon.local()
        kmsg = os.path.join(twin.dir, "root/dev/kmsg")

        def tell(*words):
            return twin.bulkhead(*[str(word) for word in words[:2]], "--dir", twin.dir, *[str(word) for word in words[2:]])

        def attach(*words):
            return int(tell("twin", "attach", *words).stdout.split()[0])

        def lease(tenant, body):
            number = api.ask("POST", PREFIX + "/leases", {**body, "tenant": tenant, "ttlSeconds": 600}).json()["id"]
            wait_for(lambda: api.ask("GET", PREFIX + "/leases/%d" % number).json()["state"] == "active", 30)
            return api.ask("GET", PREFIX + "/leases/%d" % number).json()

        def incidents(client=None):
            return (client or daemon.local()).ask("GET", PREFIX + "/incidents").json()

        def of(xid, at=None):
            return [one for one in incidents()["items"] if one["xid"] == xid and (at is None or one["at"] == at)]

        def settled(xid, count=1, at=None):
            """The one incident of it, when both sources are in it."""
            both = {"log", "nvml"}
            wait_for(lambda: any(one["count"] >= count and {e["source"] for e in one["evidence"]} == both for one in of(xid, at)), 15)
            return of(xid, at)

        def sequence():
            with open(kmsg) as log:
                return max([int(line.split(",")[1]) for line in log if line[:1].isdigit()] + [0])

        def record(text, number=None, level=3):
            with open(kmsg, "a") as log:
                log.write("%d,%d,%d,-;%s\n" % (level, number or sequence() + 1, time.monotonic_ns() // 1000, text))

        for name in ("blue", "red", "green"):
            daemon.tenant(name)
        whole, slice_ = lease("blue", {"class": "exclusive"}), lease("red", {"class": "mig", "profile": "3g.40gb"})
        tokens = {name: daemon.tls(daemon.token("tenant", name, user=name)["secret"]) for name in ("blue", "red", "green")}
        def seen():
            return api.ask("GET", PREFIX + "/telemetry").json()["gpus"]

        wait_for(lambda: any(one.get("lease") == whole["id"] for one in seen())
                 and any(one.get("lease") == slice_["id"] for one in seen()[0]["slices"]), 20)
        gpus = seen()
        mine = next(one for one in gpus if one.get("lease") == whole["id"])
        index, at = mine["index"], mine["pci"]
        instance = next(one["gpuInstance"] for one in gpus[0]["slices"] if one.get("lease") == slice_["id"])
        other = next(one["index"] for one in gpus if one["index"] not in (0, index))
        train, infer = attach(index, "--name", "train"), attach("0:%d:0" % instance, "--name", "infer")
        stranger = attach(other, "--name", "monitor")
        wait_for(lambda: incidents()["kernel"] and incidents()["driver"], 20)
        check("the daemon follows the kernel's log and the driver's events", incidents()["kernel"] and incidents()["driver"], incidents())

        tell("twin", "xid", index, 31, "--pid", train)
        got = settled(31, at=at)
        check("one Xid of two sources is one incident of one event", len(got) == 1 and got[0]["count"] == 1 and got[0]["open"], got)
        first = got[0] if got else {"id": "", "charged": None}
        check("its tenant is charged", first["charged"] == "tenant blue, lease %d" % whole["id"], first)
        tell("twin", "xid", 0, 31, "--pid", infer)
        got = settled(31, at=gpus[0]["pci"])
        check("in a slice, the tenant of its lease", len(got) == 1 and got[0]["charged"] == "tenant red, lease %d" % slice_["id"], got)
        tell("twin", "xid", other, 119, "--pid", stranger)
        got = settled(119)
        check("who only called the driver then is not charged", len(got) == 1 and got[0]["charged"] == "", got)

        before = len(incidents()["items"])
        record("NVRM: Xid (PCI:%s): 79, GPU has fallen off the bus." % at.rsplit(".", 1)[0], level=14)  # a user's, by its facility
        record("x[%d]: NVRM: Xid (PCI:%s): 79, pid=1, name=x" % (train, at.rsplit(".", 1)[0]))
        time.sleep(1)
        check("the driver's words from a program, or behind a process's name, are no incident", len(incidents()["items"]) == before and not of(79), of(79))

        own = {name: incidents(client)["items"] for name, client in tokens.items()}
        def heard(client):
            """What its stream says of incidents, from the beginning."""
            text = client.events(PREFIX + "/events", 0.3, headers=[("Last-Event-ID", "0")])[2]
            return sorted((one["verb"], one["what"], one.get("tenant", "")) for one in map(json.loads, (f["data"] for f in frames(text) if f.get("data")))
                          if one["kind"] == "incident")

        def opened(client, count):
            wait_for(lambda: len(heard(client)) >= count, 20)
            return heard(client)

        check("a tenant's stream tells of an incident that concerns it, and of no other", opened(tokens["blue"], 1) == [("open", "incident/" + first["id"], "blue")]
              and opened(tokens["red"], 1) == [("open", "incident/" + own["red"][0]["id"], "red")] and heard(tokens["green"]) == [],
              {name: heard(client) for name, client in tokens.items()})
        check("an operator's stream tells of all", {what for _, what, _ in opened(api, 3)} == {"incident/" + one["id"] for one in incidents()["items"]},
              heard(api), [one["id"] for one in incidents()["items"]])
        check("a tenant sees its own incident alone", [one["id"] for one in own["blue"]] == [first["id"]] and own["blue"][0]["leases"] == [whole["id"]]
              and own["blue"][0]["charged"] == "blue", own["blue"])
        check("another tenant its own", len(own["red"]) == 1 and own["red"][0]["leases"] == [slice_["id"]], own["red"])
        check("who has no lease sees none", own["green"] == [], own["green"])
        words = json.dumps(own["red"])
        check("and not a word of others, nor a line of the log", "blue" not in words and "train" not in words and "NVRM" not in words, words)

        # A fault of the GPU itself: nobody is charged, whoever holds it is told.
        tell("twin", "xid", index, 62)
        settled(62)
        got = [one for one in incidents(tokens["blue"])["items"] if one["xid"] == 62]
        check("a fault of the whole GPU is told to who holds it, and not charged", len(got) == 1 and got[0]["charged"] == "", got, of(62))
        check("and not to the others", not [one for one in incidents(tokens["red"])["items"] if one["xid"] == 62])

        for _ in range(BURST):
            tell("twin", "xid", index, 13, "--pid", train)
        got = settled(13, BURST, at)
        check("%d in a burst are one incident, none lost, none twice" % BURST, len(got) == 1 and got[0]["count"] == BURST, [one["count"] for one in got])
        page = daemon.local().ask("GET", PREFIX + "/incidents?limit=2").json()
        rest = daemon.local().ask("GET", PREFIX + "/incidents?limit=1000&after=" + page.get("next", "")).json()
        ids = [one["id"] for one in incidents()["items"]]
        check("pages together are all of them", [one["id"] for one in page["items"] + rest["items"]] == ids and "next" not in rest, ids)

        # What was there before, what comes while nobody follows, and after.
        before = {one["id"]: (one["count"], one["charged"], one["open"]) for one in incidents()["items"]}
        daemon.kill()
        # By hand: the kernel's clock of the twin is its own, a daemon that reads later goes by the host's.
        place_of = next(one["pci"] for one in gpus if one["index"] == other).rsplit(".", 1)[0]
        record("NVRM: Xid (PCI:%s): 94, pid=%d, name=monitor, Contained: SM (0x1). RST: No, D-RST: No" % (place_of, stranger))
        tell("twin", "detach", train)
        daemon.start()
        wait_for(lambda: of(94), 15)
        after = {one["id"]: (one["count"], one["charged"], one["open"]) for one in incidents()["items"]}
        check("after kill -9 every incident is as it was: names, counts, who is charged", {id: after.get(id) for id in before} == before, before, after)
        check("and what came meanwhile is there once", len(after) == len(before) + 1 and len(of(94)) == 1 and of(94)[0]["count"] == 1, after)
        wait_for(lambda: incidents()["driver"], 20)
        tell("twin", "xid", other, 94, "--pid", stranger)
        wait_for(lambda: of(94)[0]["count"] == 2, 15)
        check("the next event of it goes on counting", len(of(94)) == 1 and of(94)[0]["count"] == 2, of(94))

        # Whoever follows the driver is a process of its own: it is started again.
        follower = subprocess.run(["pgrep", "-P", str(daemon.process.pid), "-f", "follow-faults"], capture_output=True, text=True).stdout.split()
        check("one process follows the driver's events", len(follower) == 1, follower)
        if follower:
            os.kill(int(follower[0]), 9)
        wait_for(lambda: not incidents()["driver"], 10)
        wait_for(lambda: incidents()["driver"], 20)
        third = next(one for one in gpus if one["index"] not in (0, index, other))
        tell("twin", "xid", third["index"], 62)
        got = settled(62, at=third["pci"])
        check("killed, it is started again, and both sources tell", len(got) == 1, got)

        # Nobody of the daemon may be in the driver while a MIG mode changes.
        def followers():
            return subprocess.run(["pgrep", "-P", str(daemon.process.pid), "-f", "follow-faults"], capture_output=True, text=True).stdout.split()

        api = daemon.local()
        api.ask("PUT", PREFIX + "/telemetry/rests/mine", {"seconds": 30})
        check("while the daemon rests, nobody follows the driver's events, and it says so", not followers() and wait_for(lambda: not incidents()["driver"], 5), followers())
        record("NVRM: Xid (PCI:%s): 46, pid='<unknown>', name=<unknown>, GPU stopped processing" % third["pci"].rsplit(".", 1)[0])
        check("the kernel's log is followed all the same", wait_for(lambda: of(46), 5), incidents()["notes"])
        api.ask("DELETE", PREFIX + "/telemetry/rests/mine")
        check("after it they are followed again", wait_for(lambda: followers() and incidents()["driver"], 10), incidents()["notes"])

        number = sequence()
        record("NVRM: Xid (PCI:%s): 48, pid='<unknown>', name=<unknown>, DBE" % at.rsplit(".", 1)[0], number + 38)
        wait_for(lambda: incidents()["kernelRecordsLost"] == 37, 10)
        check("records that were overwritten are counted and said", incidents()["kernelRecordsLost"] == 37
              and any("37 records" in note for note in incidents()["notes"]), incidents()["notes"])
        metrics = daemon.local().ask("GET", "/metrics").body.decode()
        opened = sum(int(line.split()[1]) for line in metrics.splitlines() if line.startswith("bulkhead_incidents_open{"))
        check("/metrics counts the open ones, and what was lost", opened == sum(one["open"] for one in incidents()["items"])
              and "bulkhead_kernel_log_lost_total 37" in metrics, opened)

        # The driver is loaded anew: what a reset mends is over; what must be replaced is not.
        record("NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  580.1  Release Build", level=6)
        wait_for(lambda: not of(31, at)[0]["open"], 10)
        got = of(31, at)
        check("a driver loaded anew closes what was, and says so", got and not got[0]["open"] and "loaded anew" in got[0]["closedWhy"], got)
        done = twin.bulkhead("incidents", "--all", "--url", "unix:" + daemon.socket, check=False)
        check("bulkhead incidents shows them with whose they are", "tenant" in done.stdout and "xid-31" in done.stdout and "anew" in done.stdout, done.stdout, done.stderr)
        done = twin.bulkhead("incidents", "--json", "--url", "unix:" + daemon.socket, check=False)
        check("and as JSON for programs", [one["id"] for one in json.loads(done.stdout)["items"]] == [one["id"] for one in incidents()["items"]])

        # Without the log it says so, and the driver's events are told.
        daemon.stop()
        os.rename(kmsg, kmsg + ".away")
        daemon.start()
        wait_for(lambda: incidents()["driver"] and incidents()["items"], 20)
        said = incidents()
        check("without the kernel's log it says so, and keeps what it knew", not said["kernel"] and any("not read" in note for note in said["notes"])
              and set(after) <= {one["id"] for one in said["items"]}, said["notes"])
    checks.done()


main()
