"""`bulkhead apply` changes a MIG mode beside a running daemon, on boards that allow it only while nobody else has the driver open."""
import json
import os
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "serve"))
from daemon import BIN, PREFIX, Checks, Place, pretty, wait_for  # noqa: E402

NODE = """apiVersion: bulkhead/v1
kind: Node
gpus:
  - select: {index: "0-3"}
    mode: exclusive
"""
CUT = NODE.replace('"0-3"', '"1-3"') + """  - select: {index: "0"}
    mode: mig
    layout: [3g.40gb, 1g.10gb]
"""


def main():
    checks = Checks()
    check = checks.check
    with Place(config="requests_per_second: 100000\n", node=NODE) as place:
        daemon, twin = place.daemon, place.twin
        admin = daemon.local()
        cut = os.path.join(place.work, "cut.yaml")
        with open(cut, "w") as out:
            out.write(CUT)

        def ages():
            return [gpu["values"].get("power", {}).get("ageMs", 1e9) for gpu in admin.ask("GET", PREFIX + "/telemetry").json()["gpus"]]

        def states():
            return {gpu["state"] for gpu in admin.ask("GET", PREFIX + "/telemetry").json()["gpus"]}

        def mode():
            return json.loads(twin.bulkhead("inventory", "--json").stdout)["gpus"][0]["mig"]["enabled"]

        def rests():
            lines = admin.ask("GET", PREFIX + "/audit?limit=1000").json()["items"]
            return [line["verb"] for line in lines if line["what"].startswith("telemetry/")]

        check("the GPUs are sampled", wait_for(lambda: states() == {"sampling"}), states())
        twin.bulkhead("twin", "break", "other-clients", "--dir", twin.dir)
        alone = dict(twin.environment)
        alone.pop("BULKHEAD_URL", None)
        blind = subprocess.run([BIN + "/bulkhead", "apply", "-f", cut, "--yes"], env=alone, capture_output=True, text=True)
        check("who does not ask the daemon is told by the driver that somebody has the GPU open, and all is as it was",
              blind.returncode == 2 and "in use" in (blind.stdout + blind.stderr).lower() and
              mode() is False, blind.returncode, blind.stdout, blind.stderr)
        twin.environment["BULKHEAD_URL"] = "unix:" + daemon.socket
        done = twin.bulkhead("apply", "-f", cut, "--yes", check=False)
        check("apply asks it to rest, and the mode changes", done.returncode == 0, done.stdout, done.stderr)
        check("the slices are there", len(json.loads(twin.bulkhead("inventory", "--json").stdout)["gpus"][0]["mig"].get("instances", [])) == 2)
        check("then the GPUs are sampled again, the new slices too", wait_for(lambda: states() == {"sampling"} and max(ages()) < 3000 and
              len(admin.ask("GET", PREFIX + "/telemetry").json()["gpus"][0]["slices"]) == 2, 60), states(), ages())
        check("the audit log has the rest and its end", rests()[-2:] == ["rest", "resume"], rests())
        before = len(rests())
        again = twin.bulkhead("apply", "-f", cut, "--yes", check=False)
        check("where no mode changes nobody rests", again.returncode == 0 and len(rests()) == before, again.stdout, rests())
        back = twin.bulkhead("rollback", "--yes", check=False)
        check("a rollback of the mode asks as well", back.returncode == 0 and
              mode() is False, back.stdout, back.stderr)
        check("nothing rests after it", wait_for(lambda: states() == {"sampling"}), states())

        # A command that is killed in the middle of its step.
        twin.bulkhead("twin", "break", "hang-call", "--function", "nvmlDeviceSetMigMode", "--delay-ms", "6000", "--times", "1", "--dir", twin.dir)
        stuck = subprocess.Popen([BIN + "/bulkhead", "apply", "-f", cut, "--yes"], env=twin.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        check("while a change is under way the GPUs rest, and values carry their age", wait_for(lambda: states() == {"resting"} and min(ages()) > 1500, 20),
              states(), ages())
        stuck.send_signal(signal.SIGKILL)
        stuck.wait()
        check("when the command is killed the GPUs are sampled again", wait_for(lambda: states() == {"sampling"} and max(ages()) < 3000, 12), states(), ages())
        time.sleep(4)  # the worker of the killed command is in its call still
        settled = wait_for(lambda: twin.bulkhead("apply", "-f", cut, "--yes", check=False).returncode == 0, 30)
        check("and the next apply settles what it left", settled)

        # The API itself.
        path = PREFIX + "/telemetry/rests/test"
        held = admin.ask("PUT", path, {"seconds": 2})
        check("a rest is held by name, for seconds", held.status == 200 and held.json()["sampler"] > 0, pretty(held))
        check("it is over by itself", wait_for(lambda: states() == {"sampling"} and max(ages()) < 1500, 12), states(), ages())
        first, second = admin.ask("PUT", path, {"seconds": 60}), admin.ask("PUT", path + "2", {"seconds": 60})
        admin.ask("DELETE", path)
        time.sleep(1.5)
        check("two hold it: the end of one is not the end of it", first.status == second.status == 200 and states() == {"resting"}, states())
        admin.ask("DELETE", path + "2")
        check("the end of the last one is", wait_for(lambda: states() == {"sampling"}, 10), states())
        wrong = [admin.ask("PUT", path, body).status for body in ({"seconds": 0}, {"seconds": 121}, {}, {"seconds": 5, "x": 1})]
        check("nobody rests for ever, or by mistake", wrong == [400] * 4 and admin.ask("PUT", PREFIX + "/telemetry/rests/" + "a" * 65, {"seconds": 5}).status == 400, wrong)
        auditor = daemon.tls(daemon.token("auditor")["secret"])
        check("who only looks may not", auditor.ask("PUT", path, {"seconds": 5}).status == 403)
        admin.ask("PUT", path, {"seconds": 100})
        began = time.monotonic()
        check("a daemon ends while its sampler rests", daemon.stop() == 0 and time.monotonic() - began < 15, time.monotonic() - began)
        # Its socket may lie about: nobody is there.
        free = twin.bulkhead("apply", "-f", twin.node, "--yes", check=False)
        check("without a daemon apply goes on alone", free.returncode == 0, free.stdout, free.stderr)
    checks.done()


if __name__ == "__main__":
    main()
