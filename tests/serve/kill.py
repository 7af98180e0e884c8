#!/usr/bin/env python3
"""kill -9 at random under load, N times. After each start: no lease that was acknowledged is lost, no slice is granted
twice, what was given back stays given back, the same idempotency key yields the same lease, the audit chain is whole, and
what the leases say is in the hardware.

kill.py [ROUNDS [SEED]]
"""
import json
import os
import random
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import wire  # noqa: E402
from daemon import PREFIX, Checks, Place, mig, wait_for  # noqa: E402

HOLDS = {"preparing", "active", "releasing"}


class Load(threading.Thread):
    """One tenant's client: creates, renews and releases until the daemon dies; remembers what was acknowledged, and what
    was asked without an answer."""

    def __init__(self, daemon, number, token, rng, memory):
        super().__init__(daemon=True)
        self.daemon_, self.number, self.rng, self.memory = daemon, number, rng, memory
        self.client = wire.Client(daemon.url, token, ca=daemon.certificate, timeout=20)
        self.done = 0
        self.strange = []

    def run(self):
        mine = self.memory
        try:
            while True:
                chance = self.rng.random()
                live = [i for i, one in mine["leases"].items() if one["state"] == "live"]
                if chance < 0.55 or not live:
                    key = "%d-%d" % (self.number, mine["next"])
                    mine["next"] += 1
                    body = self.rng.choice([mig("1g.10gb"), mig("1g.10gb"), mig("2g.20gb"), mig("3g.40gb"), {"class": "exclusive", "ttlSeconds": 600},
                                            {"class": "share", "memory": 4 << 30, "weight": 100, "ttlSeconds": 600}])
                    body = dict(body, label=key)
                    mine["asked"][key] = body
                    answer = self.client.ask("POST", PREFIX + "/leases", body, [("Idempotency-Key", key)])
                    if answer.status == 201:
                        lease = answer.json()
                        mine["leases"][lease["id"]] = {"state": "live", "key": key, "body": body, "devices": self.devices(lease)}
                    elif answer.status not in (409, 429, 503):
                        self.strange.append("%d %r" % (answer.status, answer.body[:300]))
                    del mine["asked"][key]
                elif chance < 0.8 or len(live) > 8:
                    lease = self.rng.choice(live)
                    mine["leases"][lease]["state"] = "perhaps"  # until the answer
                    answer = self.client.ask("DELETE", PREFIX + "/leases/%d" % lease)
                    if answer.status == 200:
                        mine["leases"][lease]["state"] = "given back"
                    else:
                        mine["leases"][lease]["state"] = "live"
                        if answer.status not in (429, 503):
                            self.strange.append("release: %d %r" % (answer.status, answer.body[:300]))
                else:
                    lease = self.rng.choice(live)
                    answer = self.client.ask("POST", PREFIX + "/leases/%d/renew" % lease, {"ttlSeconds": 700})
                    if answer.status == 200:
                        mine["leases"][lease]["expires"] = answer.json().get("expires")
                    elif answer.status not in (409, 429, 503):
                        self.strange.append("renew: %d %r" % (answer.status, answer.body[:300]))
                self.done += 1
        except (OSError, wire.Gone, ValueError):
            return  # killed

    @staticmethod
    def devices(lease):
        return [one["device"] for one in lease["devices"] if one["device"]] if lease["state"] == "active" else []


def all_leases(client):
    out, after = [], ""
    while True:
        answer = client.ask("GET", PREFIX + "/leases?limit=1000" + after)
        if answer.status != 200:
            raise RuntimeError("no list: %d %s" % (answer.status, answer.body))
        out += answer.json()["items"]
        if not answer.json().get("next"):
            return out
        after = "&after=" + answer.json()["next"]


def devices_of_hardware(twin):
    """UUIDs of every GPU and MIG device the driver names."""
    text = twin.bulkhead("inventory", "--json").stdout
    found = set()

    def walk(value):
        if isinstance(value, dict):
            for one in value.values():
                walk(one)
        elif isinstance(value, list):
            for one in value:
                walk(one)
        elif isinstance(value, str) and value.startswith(("MIG-", "GPU-")):
            found.add(value)
    walk(json.loads(text))
    return found


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**6)
    rng = random.Random(seed)
    checks = Checks()
    print("# seed %d" % seed, flush=True)
    problems = {"lost": [], "double": [], "back again": [], "key": [], "audit": [], "hardware": [], "expiry": [], "answers": [], "start": [], "stuck": [], "share": []}
    names = ["t%d" % i for i in range(4)]
    with Place(config="requests_per_second: 100000\n") as place:
        daemon = place.daemon
        tokens = {}
        for name in names:
            daemon.tenant(name)
            tokens[name] = daemon.token("tenant", name, name)["secret"]
        memories = [{"next": 0, "leases": {}, "asked": {}} for _ in names]
        lines = retried = granted = done = acknowledged = 0
        slowest = 0.0
        for number in range(rounds):
            loads = [Load(daemon, i, tokens[name], random.Random(rng.random()), memories[i]) for i, name in enumerate(names)]
            for one in loads:
                one.start()
            # Early kills fall into the start and the first cuts; late ones into whatever comes.
            time.sleep(rng.choice([rng.uniform(0.0, 0.05), rng.uniform(0.05, 0.5), rng.uniform(0.5, 1.5)]))
            daemon.kill()
            for one in loads:
                one.join(30)
                done += one.done
                problems["answers"] += one.strange
            began = time.monotonic()
            try:
                if rng.random() < 0.2:  # killed again while it comes back
                    import subprocess
                    daemon.process = subprocess.Popen(daemon.prefix + [os.environ.get("BIN", "build/bin") + "/bulkhead", "serve", "--config", daemon.config],
                                                      env=place.twin.environment, stdin=subprocess.DEVNULL, stdout=open(daemon.log, "a"), stderr=subprocess.STDOUT)
                    time.sleep(rng.uniform(0.0, 0.3))
                    daemon.kill()
                daemon.start(wait=60)
            except RuntimeError as why:
                problems["start"].append(str(why))
                break
            slowest = max(slowest, time.monotonic() - began)
            admin = daemon.local()
            # What was asked and not answered is asked again with its key, and a second time.
            for i, name in enumerate(names):
                client = daemon.tls(tokens[name])
                for key, body in list(memories[i]["asked"].items()):
                    retried += 1
                    first = client.ask("POST", PREFIX + "/leases", body, [("Idempotency-Key", key)])
                    second = client.ask("POST", PREFIX + "/leases", body, [("Idempotency-Key", key)])
                    if first.status == 201:
                        if second.status not in (200, 201) or second.json()["id"] != first.json()["id"]:
                            problems["key"].append("%s: %d, then %d %s" % (key, first.json()["id"], second.status, second.body[:200]))
                        memories[i]["leases"][first.json()["id"]] = {"state": "live", "key": key, "body": body, "devices": Load.devices(first.json())}
                    elif first.status not in (409, 503):
                        problems["key"].append("%s: %d %s" % (key, first.status, first.body[:200]))
                    elif second.status == 201:
                        memories[i]["leases"][second.json()["id"]] = {"state": "live", "key": key, "body": body, "devices": []}
                    del memories[i]["asked"][key]
                # One more that was acknowledged long ago: still the same lease.
                old = [(n, one) for n, one in memories[i]["leases"].items() if one["state"] in ("live", "given back")]
                if old:
                    n, one = rng.choice(old)
                    again = client.ask("POST", PREFIX + "/leases", one["body"], [("Idempotency-Key", one["key"])])
                    if again.status not in (200, 201) or again.json()["id"] != n:
                        problems["key"].append("%s was lease %d, again: %d %s" % (one["key"], n, again.status, again.body[:200]))
            # Preparations and scrubs that were under way are settled.
            settled = wait_for(lambda: not any(one["state"] in ("requested", "preparing", "releasing") for one in all_leases(admin)), 40, 0.1)
            leases = all_leases(admin)
            by_id = {one["id"]: one for one in leases}
            if not settled:
                problems["stuck"].append("round %d: %s" % (number, [(one["id"], one["state"], one.get("reason")) for one in leases
                                                                   if one["state"] in ("requested", "preparing", "releasing")][:5]))
            labels = {}
            for one in leases:
                labels.setdefault((one["tenant"], one.get("label")), []).append(one["id"])
            for label, ids in labels.items():
                if len(ids) > 1:
                    problems["key"].append("%s has leases %s" % (label, ids))
            for memory in memories:
                for lease, one in list(memory["leases"].items()):
                    now = by_id.get(lease)
                    if one["state"] == "live":
                        if now is None:
                            answer = admin.ask("GET", PREFIX + "/leases/%d" % lease)
                            problems["lost"].append("round %d: lease %d is not listed (GET: %d)" % (number, lease, answer.status))
                        elif now["state"] != "active":
                            problems["lost"].append("round %d: lease %d (%s) is %s: %s" % (number, lease, one["body"]["class"], now["state"], now.get("reason")))
                            one["state"] = "given back"
                        else:
                            acknowledged += 1
                            if one["devices"] and Load.devices(now) != one["devices"]:
                                problems["lost"].append("round %d: lease %d had %s, has %s" % (number, lease, one["devices"], Load.devices(now)))
                            one["devices"] = Load.devices(now)
                            if one.get("expires") and now.get("expires", "") < one["expires"]:
                                problems["expiry"].append("lease %d was renewed to %s, has %s" % (lease, one["expires"], now.get("expires")))
                    elif one["state"] == "given back":
                        if now is not None and now["state"] in ("active", "preparing"):
                            problems["back again"].append("lease %d is %s" % (lease, now["state"]))
                        if now is None or now["state"] in ("ended", "failed"):
                            if rng.random() < 0.5:
                                del memory["leases"][lease]
                    elif now is not None:  # a release that was not answered
                        one["state"] = "live" if now["state"] == "active" else "given back"
                        one["devices"] = Load.devices(now)
            holders, shares = {}, {}
            for one in leases:
                if one["state"] in HOLDS:
                    granted += 1
                    for device in one["devices"]:
                        if one["class"] == "share":
                            shares.setdefault(device["gpu"], []).append(one)
                        elif device["device"]:
                            holders.setdefault(device["device"], []).append(one["id"])
            for device, ids in holders.items():
                if len(ids) > 1:
                    problems["double"].append("round %d: %s is of leases %s" % (number, device, ids))
            for gpu, ones in shares.items():
                if sum(one["weight"] for one in ones) > 1000 or gpu in holders:
                    problems["share"].append("%s: %s" % (gpu, [(one["id"], one["weight"]) for one in ones]))
            verdict = admin.ask("GET", PREFIX + "/audit/verdict").json()
            if not verdict["whole"] or verdict["lines"] < lines:
                problems["audit"].append("round %d: %s, before %d lines" % (number, verdict, lines))
            lines = verdict["lines"]
            if number % 10 == 9 or number == rounds - 1:
                there = devices_of_hardware(place.twin)
                for device, ids in holders.items():
                    if device not in there:
                        problems["hardware"].append("round %d: %s of lease %s is not there" % (number, device, ids))
                print("# round %d: %d leases listed, %d audit lines, slowest start %.2f s" % (number + 1, len(leases), lines, slowest), flush=True)
            # Room for the next round.
            live = [(m, lease) for m in memories for lease, one in m["leases"].items() if one["state"] == "live"]
            rng.shuffle(live)
            for memory, lease in live[20:]:
                if admin.ask("DELETE", PREFIX + "/leases/%d" % lease).status == 200:
                    memory["leases"][lease]["state"] = "given back"
        check = checks.check
        check("%d kills, %d requests under load, %d asked again: the daemon always came back (slowest %.2f s)" % (rounds, done, retried, slowest), not problems["start"], *problems["start"])
        check("no acknowledged lease was lost (%d looks)" % acknowledged, not problems["lost"] and acknowledged > 0, *problems["lost"][:10])
        check("no slice was granted twice (%d looks)" % granted, not problems["double"], *problems["double"][:10])
        check("no GPU's shares were sold twice", not problems["share"], *problems["share"][:10])
        check("what was given back stays given back", not problems["back again"], *problems["back again"][:10])
        check("no acknowledged renewal was lost", not problems["expiry"], *problems["expiry"][:10])
        check("the same key yields the same lease, one at most", not problems["key"], *problems["key"][:10])
        check("the audit chain is whole and never shorter (%d lines)" % lines, not problems["audit"], *problems["audit"][:10])
        check("every device of a lease is in the hardware", not problems["hardware"], *problems["hardware"][:10])
        check("nothing stays between two states", not problems["stuck"], *problems["stuck"][:10])
        check("no answer under load was out of order", not problems["answers"], *problems["answers"][:10])
        if not problems["start"]:
            daemon.stop()
            offline = place.twin.bulkhead("audit", "verify", "--state-dir", daemon.state, check=False)
            check("bulkhead audit verify agrees", offline.returncode == 0, offline.stdout + offline.stderr)
        if any(problems.values()):
            print("# the daemon's last words:\n" + daemon.said())
    checks.done()


if __name__ == "__main__":
    main()
