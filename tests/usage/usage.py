"""bulkhead usage from outside: the daemon counts, is killed, counts on; what it says is what the twin did."""
import csv
import datetime
import io
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "serve"))
from daemon import BIN, ONE_CUT, PREFIX, Checks, Place, json, mig, pretty, wait_for  # noqa: E402

PRICES = """currency: EUR
slice-hour:
  3g.40gb: 3600.00
  1g.10gb: 1.20
  exclusive: 4
kwh: 0.28
gib-hour: 0.002
"""


def microseconds(text):
    then = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    return round((then - datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)) / datetime.timedelta(microseconds=1))


def energy(item):
    return item["idleMillijoules"] + item["dynamicMillijoules"]


def main():
    checks = Checks()
    check = checks.check
    with Place(node=ONE_CUT, apply=True, start=False) as place:
        daemon, twin = place.daemon, place.twin

        def usage(*words, code=0, url=True):
            source = ["--url", "unix:" + daemon.socket] if url else ["--state", daemon.state]
            done = subprocess.run([BIN + "/bulkhead", "usage", *words, *source], env=twin.environment, capture_output=True, text=True)
            if done.returncode != code:
                check("bulkhead usage %s ends with %d" % (" ".join(words), code), False, done.returncode, done.stdout, done.stderr)
            return done.stdout

        def document(*words, url=True):
            return json.loads(usage("--json", *words, url=url))

        def counter(gpu):
            return json.loads(twin.bulkhead("twin", "status", "--json", "--dir", twin.dir).stdout)["gpus"][gpu]["energy_j"] * 1000

        began = time.time()
        first = [counter(gpu) for gpu in range(8)]
        daemon.start()
        api = daemon.local()
        for name in ("blue", "red"):
            daemon.tenant(name)
        twin.bulkhead("twin", "load", "0", "--busy", "0.8", "--dir", twin.dir)
        twin.bulkhead("twin", "load", "1", "--busy", "0.4", "--dir", twin.dir)

        def lease(tenant, body):
            answer = api.ask("POST", PREFIX + "/leases", {**body, "tenant": tenant})
            if answer.status != 201:
                raise RuntimeError("no lease: " + pretty(answer))
            number = answer.json()["id"]
            wait_for(lambda: api.ask("GET", PREFIX + "/leases/%d" % number).json()["state"] == "active", 30)
            return number

        blue = lease("blue", mig("3g.40gb"))
        red = lease("red", mig("1g.10gb"))
        short = lease("red", {"class": "exclusive", "ttlSeconds": 600})
        time.sleep(4)
        api.ask("DELETE", PREFIX + "/leases/%d" % short)
        time.sleep(6)
        wait_for(lambda: document("--by", "lease")["items"], 30, 0.5)
        before = document("--by", "lease")
        check("what is counted adds up while it goes on", before["addsUp"] and before["items"], before)
        # Nothing tells it that its end has come; its leases live.
        daemon.kill()
        time.sleep(5)
        daemon.start()
        api = daemon.local()
        time.sleep(3)
        # The driver is loaded anew: its module's folder in sysfs is another.
        module = os.path.join(twin.dir, "root/sys/module/nvidia")
        os.rename(module, module + ".old")
        subprocess.run(["cp", "-a", module + ".old", module], check=True)
        time.sleep(5)
        for number in (blue, red):
            api.ask("DELETE", PREFIX + "/leases/%d" % number)
        wait_for(lambda: all(api.ask("GET", PREFIX + "/leases/%d" % number).json()["state"] == "ended" for number in (blue, red)), 30)
        records = {number: api.ask("GET", PREFIX + "/leases/%d" % number).json() for number in (blue, red, short)}
        # What was counted is in the file a few seconds later; on a busy machine some more.
        over = max(microseconds(record["ended"]) for record in records.values())
        wait_for(lambda: microseconds(document().get("writtenUntil", "1970-01-01T00:00:00Z")) > over + 2_000_000, 60, 0.5)
        last = [counter(gpu) for gpu in range(8)]
        ended = time.time()
        all_of_it = document("--by", "lease,gpu")

        items = all_of_it["items"]
        gpus = all_of_it["gpus"]
        check("there are eight GPUs in the accounts", len(gpus) == 8, gpus)
        check("all lines together are the GPUs' time, to the microsecond",
              sum(item["unitMicroseconds"] for item in items) == sum(gpu["microseconds"] for gpu in gpus) * all_of_it["unitsOfGpu"])
        check("all lines together are the counters' energy, to the millijoule",
              sum(energy(item) for item in items) == sum(gpu["counterMillijoules"] for gpu in gpus))
        check("it says that they do", all_of_it["addsUp"] is True)
        for gpu in gpus:
            of_gpu = [item for item in items if item["gpu"] == gpu["gpu"]]
            if sum(item["unitMicroseconds"] for item in of_gpu) != gpu["microseconds"] * all_of_it["unitsOfGpu"] or \
                    sum(energy(item) for item in of_gpu) != gpu["counterMillijoules"]:
                check("each GPU's lines are its time and its energy", False, gpu, of_gpu)
                break
        else:
            check("each GPU's lines are its time and its energy", True)

        for number, name in ((blue, "that lived through a kill and a load of the driver"), (red, "beside it"), (short, "that was short")):
            record = records[number]
            due = microseconds(record["ended"]) - microseconds(record["activeSince"])
            got = sum(item["sliceMicroseconds"] for item in items if item.get("lease") == number)
            check("a lease %s is counted from its begin to its end, exactly" % name, got == due, (due, got, record))

        # The twin's own word, read a little before and after. A load of the driver leaves a hole in what is known, and says so.
        wall = (ended - began) * 1e6
        by_index = {gpu["index"]: gpu["gpu"] for gpu in api.ask("GET", PREFIX + "/host").json()["gpus"]}
        for gpu in (0, 1):
            said = [one for one in gpus if one["gpu"] == by_index[gpu]][0]
            passed = last[gpu] - first[gpu]
            watts = passed / (ended - began) / 1000
            check("GPU %d's time is the wall clock's, but for the seconds at both ends" % gpu, wall - 15e6 < said["microseconds"] <= wall, wall, said)
            check("GPU %d's energy is the twin's, but for those seconds and the load of the driver" % gpu,
                  passed - watts * 1000 * 25 < said["counterMillijoules"] <= passed + 1, passed, said)
            check("GPU %d was unmetered for seconds only" % gpu, 0 < said["unmeteredMicroseconds"] < 12e6, said)
        check("the load of the driver began a new epoch", len(all_of_it["epochs"]) == 2, all_of_it["epochs"])
        check("who sat on the loaded GPU used more than nothing", all(
            sum(energy(item) for item in items if item.get("lease") == number) > 0 for number in (blue, red, short)), items)

        # The other roads to the same figures.
        daemon.kill()
        from_file = document("--by", "lease,gpu", url=False)
        check("without a daemon the file says the same", {key: from_file[key] for key in ("addsUp", "by")} ==
              {key: all_of_it[key] for key in ("addsUp", "by")} and all(
                  sum(item["unitMicroseconds"] for item in from_file["items"] if item.get("lease") == number) ==
                  sum(item["unitMicroseconds"] for item in items if item.get("lease") == number) for number in (blue, red, short)))
        prices = os.path.join(place.work, "prices.yaml")
        with open(prices, "w") as out:
            out.write(PRICES)
        priced = document("--by", "lease", "--prices", prices, url=False)
        check("what it costs is the sum of the lines", priced["currency"] == "EUR" and
              round(float(priced["price"]) * 100) == sum(round(float(item["price"]) * 100) for item in priced["items"] if "price" in item), priced)
        of_blue = [item for item in priced["items"] if item.get("lease") == blue][0]
        due = of_blue["sliceMicroseconds"] / 1e6 + energy(of_blue) / 3.6e9 * 0.28 + of_blue["mebibyteMicroseconds"] / 1024 / 3.6e9 * 0.002
        check("a slice at a EUR a second costs its seconds", abs(float(of_blue["price"]) - due) < 0.006, of_blue, due)
        rows = list(csv.DictReader(io.StringIO(usage("--by", "lease", "--format", "csv", url=False))))
        check("CSV has a row for every line", len(rows) == len(priced["items"]), rows)
        check("of one tenant nothing else is told", {item.get("tenant") for item in document("--tenant", "red", url=False)["items"]} == {"red"})
        text = usage(url=False)
        check("the table says who, and how far it may be off", "blue" in text and "may be off by" in text, text)
        page = usage("--by", "lease", "--prices", prices, "--format", "html", url=False)
        check("the page needs nothing from outside", "<script" not in page and "http://" not in page and "https://" not in page and "EUR" in page)
        check("the page says that it adds up", "to the microsecond and the millijoule" in page)
        keep = os.environ.get("BULKHEAD_KEEP_PAGE")
        if keep:
            with open(keep, "w") as out:
                out.write(page)

        # A tenant's token: its own, whatever it asks for.
        daemon.start()
        own = daemon.tls(daemon.token("tenant", "blue", "ada")["secret"])
        answer = own.ask("GET", PREFIX + "/usage?by=lease,gpu")
        told = answer.json()
        check("a tenant is told its own and nothing of the GPUs", answer.status == 200 and {item["tenant"] for item in told["items"]} == {"blue"}
              and "gpus" not in told and "epochs" not in told and not any("gpu" in item for item in told["items"]), pretty(answer))
        check("of another tenant it knows nothing", own.ask("GET", PREFIX + "/usage?tenant=red").status == 404)
        check("nonsense is refused with its name", own.ask("GET", PREFIX + "/usage?from=yesterday").status == 400 and
              own.ask("GET", PREFIX + "/usage?by=colour").status == 400 and own.ask("GET", PREFIX + "/usage?from=2026-11-02&to=2026-11-01").status == 400)
        after = document("--by", "lease")
        check("what ended is not counted again after a start", all(
            sum(item["sliceMicroseconds"] for item in after["items"] if item.get("lease") == number) ==
            sum(item["sliceMicroseconds"] for item in items if item.get("lease") == number) for number in (blue, red, short)))
    checks.done()


main()
