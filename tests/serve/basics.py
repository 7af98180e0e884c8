#!/usr/bin/env python3
"""The API as its users meet it, spoken by curl: leases from asking to giving back, tenants, quotas, tokens, pages, ETags,
idempotency keys, streams that resume, bounds, errors."""
import json
import os
import re
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import wire  # noqa: E402
from daemon import PREFIX, Checks, Daemon, Place, mig, wait_for  # noqa: E402


class Said:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    def json(self):
        try:
            return json.loads(self.body)
        except ValueError:
            return {}

    def __str__(self):
        return "%d %s %s" % (self.status, self.headers, self.body[:800])


def curl(base, path, *words, method=None, token=None, body=None, headers=()):
    """curl's own exit code as status when nothing came back."""
    command = ["curl", "-sS", "--max-time", "30", "-D", "-", *base[0]]
    if method:
        command += ["-X", method]
    if token:
        command += ["-H", "Authorization: Bearer " + token]
    for one in headers:
        command += ["-H", one]
    if body is not None:
        command += ["-H", "Content-Type: application/json", "--data-binary", "@-"]
    done = subprocess.run(command + list(words) + [base[1] + path], input=(body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()),
                          capture_output=True)
    if done.returncode != 0 and not done.stdout:
        return Said(-done.returncode, {}, done.stderr.decode())
    text = done.stdout
    while text.startswith(b"HTTP/1.1 100"):
        text = text.split(b"\r\n\r\n", 1)[1]
    head, _, rest = text.partition(b"\r\n\r\n")
    lines = head.decode().strip().split("\r\n")
    return Said(int(lines[0].split()[1]), {one.split(":", 1)[0].lower(): one.split(":", 1)[1].strip() for one in lines[1:]}, rest.decode("utf-8", "replace"))


def main():
    checks = Checks()
    check = checks.check
    with Place(config="requests_per_second: 100000\n") as place:
        daemon = place.daemon
        local = (["--unix-socket", daemon.socket], "http://localhost")
        remote = (["--cacert", daemon.certificate], daemon.url)
        ask = lambda path, *w, **k: curl(local, PREFIX + path, *w, **k)  # noqa: E731

        # ---- first words
        said = curl(local, PREFIX + "/whoami")
        check("root on the Unix socket is an admin, by the kernel's word", said.status == 200 and said.json().get("role") == "admin", said)
        said = curl(remote, PREFIX + "/whoami")
        check("over TLS nobody is anybody without a token", said.status == 401 and said.headers.get("www-authenticate", "").startswith("Bearer")
              and said.headers["content-type"] == "application/problem+json", said)
        said = curl(remote, PREFIX + "/openapi.json")
        check("the OpenAPI document needs no token", said.status == 200 and said.json().get("openapi") == "3.1.0", said)
        admin = daemon.token("admin", user="ops")
        said = curl(remote, PREFIX + "/whoami", token=admin["secret"])
        check("with a token over TLS the name is the token's", said.status == 200 and said.json().get("user") == "ops", said)
        check("the secret has the form that scanners know", re.fullmatch(r"bh_[A-Za-z0-9]+_[0-9a-f]{64}", admin["secret"]), admin["secret"][:8])

        # ---- tenants, quotas
        said = ask("/tenants", body={"name": "blue", "weight": 200, "quota": {"leases": 3, "profiles": {"3g.40gb": 1}}, "note": "the first"})
        check("a tenant is made", said.status == 201 and said.json().get("name") == "blue" and said.headers.get("etag"), said)
        check("a created thing has its place", said.headers.get("location", "").endswith("/tenants/blue"), said)
        check("the same name again is a conflict", ask("/tenants", body={"name": "blue"}).status == 409)
        ask("/tenants", body={"name": "red"})
        said = ask("/tenants/blue")
        check("it is shown with what it holds", said.status == 200 and said.json()["held"]["leases"] == 0 and said.json()["weight"] == 200, said)
        tag = said.headers["etag"]
        said = ask("/tenants/blue", method="PUT", body={"name": "blue", "weight": 300, "quota": {"leases": 3, "profiles": {"3g.40gb": 1}}}, headers=["If-Match: " + tag])
        check("a change with the present ETag is done", said.status == 200 and said.json()["weight"] == 300 and said.headers["etag"] != tag, said)
        said = ask("/tenants/blue", method="PUT", body={"name": "blue", "weight": 400}, headers=["If-Match: " + tag])
        check("a change with an old ETag is 412, and not done", said.status == 412 and ask("/tenants/blue").json()["weight"] == 300, said)
        said = ask("/tenants/blue", method="PUT", body={"name": "red"})
        check("a tenant is not renamed by a PUT to its path", said.status in (400, 409), said)
        said = ask("/tenants/blue/quota", method="PUT", body={"leases": "many", "gpu": 2, "watts": -1})
        check("every mistake of a body is named at once", said.status == 400 and all(w in said.body for w in ("leases", "gpu", "watts")), said)
        said = ask("/tenants/blue/quota")
        check("a refused change changed nothing", said.json().get("leases") == 3, said)

        # ---- a lease from asking to giving back
        user = daemon.token("tenant", "blue", "ada")["secret"]
        rest = lambda path, *w, **k: curl(remote, PREFIX + path, *w, token=user, **k)  # noqa: E731
        said = rest("/leases", body=mig("1g.10gb", label="nightly"))
        lease = said.json()
        check("a lease is granted", said.status == 201 and lease.get("state") in ("active", "preparing", "requested"), said)
        check("201 says where it is and which version", said.headers.get("location", "").endswith("/leases/%d" % lease["id"]) and said.headers.get("etag"), said)
        lease = wait_for(lambda: (lambda one: one if one["state"] == "active" else None)(rest("/leases/%d" % lease["id"]).json()), 20) or lease
        check("it becomes active", lease.get("state") == "active", lease)
        device = (lease.get("devices") or [{}])[0]
        check("an active lease has what a program needs: device, nodes, environment, cores, CDI name, guarantees",
              device.get("device", "").startswith("MIG-") and "/dev/nvidiactl" in device.get("deviceNodes", []) and
              lease["environment"].get("CUDA_VISIBLE_DEVICES") == device["device"] and device.get("cpus") and device.get("cdi") and
              any("not isolated" in one for one in lease["guarantees"]), lease)
        listing = place.twin.bulkhead("inventory", "--json", check=False)
        check("the device is in the hardware", device.get("device", "?") in listing.stdout, device, listing.stderr, listing.stdout[:300])
        before = lease.get("expires")
        said = rest("/leases/%d/renew" % lease["id"], body={"ttlSeconds": 3600})
        check("a renewal is later", said.status == 200 and said.json()["expires"] > before, said)
        said = rest("/leases/%d/renew" % lease["id"], body={"ttlSeconds": 10})
        check("a renewal never shortens", said.status == 200 and said.json()["expires"] > before, said)
        said = rest("/leases/%d/renew" % lease["id"], body={"ttlSeconds": 3600}, headers=['If-Match: "0"'])
        check("a renewal of another version is 412", said.status == 412, said)
        said = curl(remote, PREFIX + "/leases/%d" % lease["id"], "-I", "-o", "/dev/null", token=user)
        check("HEAD says what GET would", said.status == 200 and said.headers.get("etag") and said.body == "", said)
        said = rest("/leases/%d" % lease["id"], headers=["If-None-Match: " + said.headers.get("etag", "")])
        check("GET with the ETag one has is 304 or the same again", said.status in (200, 304), said)
        said = rest("/leases/%d" % lease["id"], method="DELETE")
        check("a release is answered at once", said.status == 200 and said.json()["state"] in ("releasing", "ended"), said)
        ended = wait_for(lambda: rest("/leases/%d" % lease["id"]).json().get("state") == "ended", 20)
        check("and ends when nothing of the tenant is left", ended, rest("/leases/%d" % lease["id"]))
        said = rest("/leases/%d" % lease["id"], method="DELETE")
        check("a second release is no error of ours and no change", said.status in (200, 409), said)

        # ---- refusals
        said = rest("/leases", body=mig("3g.40gb", count=2))
        check("beyond quota is refused with both numbers", said.status == 409 and said.json().get("code") == "quota" and said.json().get("reasons"), said)
        said = rest("/leases", body={"class": "exclusive", "count": 64, "ttlSeconds": 60})
        check("what the host never has is refused with reasons", said.status == 409 and said.json().get("reasons"), said)
        said = rest("/leases", body={"class": "mig", "profile": "9g.999gb", "ttlSeconds": 60})
        check("a profile that does not exist is refused with what there is", said.status in (400, 409) and said.json().get("detail"), said)
        said = rest("/leases", body={"class": "mg", "ttlSeconds": 1, "colour": "red"})
        check("every mistake of an ask is named", said.status == 400 and all(w in said.body for w in ("class", "ttlSeconds", "colour")), said)
        share = {"class": "share", "memory": 8 << 30, "ttlSeconds": 600}
        for key, values in {"memory": (20, (64 << 20) - 1, -1), "weight": (-1, 0, 2**32 + 1, 2**64), "count": (0, -1, 10**9),
                            "ttlSeconds": (0, -1, 2**63), "deadline": ("2020-01-01T00:00:00Z", "1960-01-01T00:00:00Z", 7)}.items():
            answers = [rest("/leases", body={**share, key: value}) for value in values]
            check("a lease's %s that cannot work is refused by its name" % key,
                  all(one.status == 400 and key + ": " in one.json().get("detail", "") for one in answers), *answers)
        said = rest("/leases", body={**share, "memory": 20})
        check("and the smallest share is said", "smallest share is 64 MiB" in said.body, said)
        said = rest("/leases", body=b'{"class": "mig", "profile": ')
        check("torn JSON is 400", said.status == 400, said)
        said = rest("/leases", body=b"[" * 100000)
        check("deep JSON is 400", said.status == 400, said)
        said = rest("/leases", body=b'{"class":"mig","profile":"1g.10gb","label":"' + b"x" * (1 << 20) + b'"}')
        check("more than 1 MiB is 413", said.status == 413 and said.json().get("code") == "too-large", said)
        said = rest("/leases", method="PATCH", body={})
        check("405 says what the path has", said.status == 405 and "GET" in said.headers.get("allow", "") and "POST" in said.headers["allow"], said)
        said = rest("/nothing")
        check("a path that is none is 404 and a problem", said.status == 404 and said.json().get("code") == "not-found", said)
        said = curl(remote, PREFIX + "/leases", "-d", "class=mig", token=user)
        check("a form is no JSON: refused", said.status in (400, 415), said)

        # ---- idempotency keys
        body = mig("1g.10gb", label="once")
        first = rest("/leases", body=body, headers=["Idempotency-Key: a-1"])
        again = rest("/leases", body=body, headers=["Idempotency-Key: a-1"])
        check("the same key and request is the same lease", first.status == 201 and again.status in (200, 201) and first.json()["id"] == again.json()["id"], first, again)
        other = rest("/leases", body=mig("1g.10gb", label="twice"), headers=["Idempotency-Key: a-1"])
        check("the same key with another request is a conflict", other.status == 409, other)
        stranger = daemon.token("tenant", "red", "bob")["secret"]
        said = curl(remote, PREFIX + "/leases", token=stranger, body=body, headers=["Idempotency-Key: a-1"])
        check("another's key of the same name is another key", said.status == 201 and said.json()["id"] != first.json()["id"] and said.json()["tenant"] == "red", said)
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(rest("/leases", body=mig("1g.10gb", label="at once"), headers=["Idempotency-Key: a-2"]))) for _ in range(8)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        made = {one.json().get("id") for one in answers if one.status in (200, 201)}
        check("eight at once with one key make one lease", len(made) == 1, *answers)
        made = [curl(local, PREFIX + "/tenants", body={"name": "keyed", "weight": 2}, headers=["Idempotency-Key: t-1"]) for _ in range(2)]
        check("POST /tenants with a key, twice: made once, the same answer", [one.status for one in made] == [201, 201] and made[0].body == made[1].body, *made)
        said = curl(local, PREFIX + "/tenants", body={"name": "keyed-2"}, headers=["Idempotency-Key: t-1"])
        check("and another tenant by that key is a conflict", said.status == 409, said)
        for twice in ("/events?lease=1&lease=2", "/leases?limit=1&limit=1", "/leases?limit=1&after=x&limit=2"):
            said = rest(twice)
            check("%s: asked for twice is 400, for nobody guesses which is meant" % twice, said.status == 400 and "more than once" in said.body, said)
        said = rest("/leases", body=body, headers=["Idempotency-Key: " + "k" * 129])
        check("a key of more than 128 bytes is refused", said.status == 400, said)

        # ---- pages
        for one in rest("/leases?limit=1000").json()["items"]:
            rest("/leases/%d" % one["id"], method="DELETE")
        ask("/tenants/blue/quota", method="PUT", body={})
        wait_for(lambda: ask("/tenants/blue").json()["held"]["slices"] == 0, 20)
        ids = []
        for i in range(7):
            said = rest("/leases", body=mig("1g.10gb", label="p%d" % i))
            if said.status == 201:
                ids.append(said.json()["id"])
        got, after, pages = [], "", 0
        while pages < 100:
            said = rest("/leases?limit=3" + after)
            got += [one["id"] for one in said.json()["items"]]
            pages += 1
            if len(said.json()["items"]) > 3 or "next" not in said.json():
                break
            after = "&after=" + said.json()["next"]
            if pages == 1:  # made between two pages: no lease is left out or comes twice
                ids.append(rest("/leases", body=mig("1g.10gb", label="between")).json()["id"])
        check("pages of three have every lease once, newest first", len(ids) == 8 and set(ids[:7]) <= set(got) and len(got) == len(set(got)) and
              got == sorted(got, reverse=True) and pages >= 3, ids, got)
        for query in ("limit=0", "limit=1001", "limit=x", "limit=-1", "after=%00", "after=zzz"):
            said = rest("/leases?" + query)
            if said.status != 400:
                check("?%s is refused" % query, False, said)
        check("a page that cannot be is refused", True)

        # ---- streams
        _, _, text = daemon.tls(user).events(PREFIX + "/events", 1, headers=[("Last-Event-ID", "0")])
        frames = wire.frames(text)
        check("a stream from the first event on says what happened", len(frames) > 5 and all("id" in one and "data" in one for one in frames), text[:800])
        numbers = [int(one["id"]) for one in frames]
        check("in order", numbers == sorted(set(numbers)), numbers[:50])
        middle = numbers[len(numbers) // 2]
        _, _, text = daemon.tls(user).events(PREFIX + "/events", 1, headers=[("Last-Event-ID", str(middle))])
        rest_of = [int(one["id"]) for one in wire.frames(text)]
        check("and resumes after Last-Event-ID without a gap", rest_of == [n for n in numbers if n > middle], numbers[-10:], rest_of[-10:])
        process = subprocess.Popen(["curl", "-sN", "--max-time", "8", "--cacert", daemon.certificate, "-H", "Authorization: Bearer " + user,
                                    daemon.url + PREFIX + "/events"], stdout=subprocess.PIPE)
        time.sleep(0.7)
        rest("/leases/%d" % ids[0], method="DELETE")
        curl(remote, PREFIX + "/leases", token=stranger, body=mig("1g.10gb"))
        time.sleep(1.5)
        process.terminate()
        text = process.stdout.read().decode()
        check("curl -N hears of a release as it happens, and of nobody else's", '"lease/%d"' % ids[0] in text and '"red"' not in text, text[:1000])

        # ---- expiry, queue
        ask("/tenants", body={"name": "green"})
        said = ask("/leases", body={"class": "mig", "profile": "1g.10gb", "ttlSeconds": 10, "tenant": "green"})
        short = said.json().get("id")
        check("a lease of ten seconds", said.status == 201, said)
        whole = [ask("/leases", body={"class": "exclusive", "count": 3, "ttlSeconds": 600, "tenant": "green"})]
        check("all whole GPUs are had", whole[0].status == 201, whole[0])
        said = ask("/leases", body={"class": "exclusive", "ttlSeconds": 600, "tenant": "blue"})
        check("no room is a refusal with ways", said.status == 409 and said.json().get("code") == "no-room" and said.json().get("ways"), said)
        said = ask("/leases", body={"class": "exclusive", "ttlSeconds": 600, "tenant": "blue", "wait": True})
        check("wait: queued instead", said.status == 201 and said.json()["state"] == "queued" and said.json().get("reason"), said)
        queued = said.json().get("id")
        ask("/leases/%d" % whole[0].json()["id"], method="DELETE")
        check("and granted when there is room", wait_for(lambda: ask("/leases/%d" % queued).json().get("state") == "active", 20), ask("/leases/%d" % queued))
        check("a lease whose time is over ends by itself", wait_for(lambda: ask("/leases/%d" % short).json().get("state") == "ended", 25), ask("/leases/%d" % short))
        said = ask("/leases", body={"class": "exclusive", "count": 3, "ttlSeconds": 600, "tenant": "green", "wait": True,
                                    "deadline": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 2))})
        check("with a deadline it waits", said.status == 201 and said.json()["state"] == "queued", said)
        late = said.json().get("id")
        check("and fails when it is not granted by then", wait_for(lambda: ask("/leases/%d" % late).json().get("state") == "failed", 15), ask("/leases/%d" % late))
        said = ask("/leases", body={"class": "exclusive", "ttlSeconds": 600, "tenant": "green", "wait": True, "count": 3})
        withdrawn = ask("/leases/%d" % said.json()["id"], method="DELETE")
        check("a waiting lease can be given up", withdrawn.status == 200 and withdrawn.json()["state"] == "ended", withdrawn)

        # ---- the other classes
        said = ask("/leases", body={"class": "share", "memory": 8 << 30, "weight": 250, "ttlSeconds": 600, "tenant": "blue"})
        one = said.json()
        check("a share is granted on a GPU of the shared pool", said.status == 201, said)
        one = wait_for(lambda: (lambda got: got if got.get("state") == "active" else None)(ask("/leases/%d" % one["id"]).json()), 20) or one
        check("with its cap and weight, and what is not isolated in words", one.get("state") == "active" and one["devices"][0].get("memory") == 8 << 30 and
              any("bandwidth" in g for g in one["guarantees"]), one)
        said = ask("/leases", body={"class": "share", "ttlSeconds": 600, "tenant": "blue"})
        check("a share without a cap is refused", said.status == 400 and "memory" in said.body, said)
        said = ask("/leases", body={"class": "exclusive", "ttlSeconds": 600, "tenant": "blue"})
        one = wait_for(lambda: (lambda got: got if got.get("state") == "active" else None)(ask("/leases/%d" % said.json()["id"]).json()), 20) if said.status == 201 else None
        check("a whole GPU is granted", one and one["devices"][0]["device"].startswith("GPU-"), said)

        # ---- suspended, drained, ended
        ask("/tenants/red", method="PUT", body={"name": "red", "suspended": True})
        said = curl(remote, PREFIX + "/leases", token=stranger, body=mig("1g.10gb"))
        check("a suspended tenant gets nothing new", said.status in (403, 409), said)
        ask("/host/drain", method="PUT", body={"draining": True})
        said = rest("/leases", body=mig("1g.10gb"))
        check("a drained host grants nothing new, and says so", said.status == 503 and said.headers.get("retry-after"), said)
        said = rest("/leases/%d" % ids[1], method="DELETE")
        check("but takes back", said.status == 200, said)
        ask("/host/drain", method="PUT", body={"draining": False})
        said = ask("/tenants/blue", method="DELETE")
        check("a tenant that holds leases is not ended", said.status == 409, said)
        said = ask("/host")
        host = said.json()
        check("the host shows each GPU's pool and who has it", said.status == 200 and len(host.get("gpus", [])) == 8 and
              {"mig", "share", "exclusive"} <= {g["pool"] for g in host["gpus"]} and any(g["leases"] for g in host["gpus"]), said)

        # ---- tokens
        made = daemon.token("tenant", "blue", "carol", note="laptop")
        said = ask("/tokens?limit=1000")
        check("tokens are listed without their secrets", made["id"] in said.body and made["secret"] not in said.body and '"secret"' not in said.body, said.body[:300])
        said = ask("/tokens/" + made["id"], method="DELETE")
        check("a revoked token", said.status == 200, said)
        check("is nobody's at once", curl(remote, PREFIX + "/whoami", token=made["secret"]).status == 401)
        said = ask("/tokens", body={"user": "x", "role": "tenant", "tenant": "nobody"})
        check("no token for a tenant that is none", said.status in (400, 404, 409), said)
        said = ask("/tokens", body={"user": "x", "role": "tenant"})
        check("no tenant's token without a tenant", said.status == 400, said)

        # ---- audit
        said = ask("/audit/verdict")
        check("the audit chain is whole", said.json().get("whole") is True and said.json()["lines"] > 50, said)
        lines, after = [], ""
        for _ in range(100):
            page = ask("/audit?limit=100" + after).json()
            lines += page["items"]
            if "next" not in page:
                break
            after = "&after=" + page["next"]
        check("its pages have every line once, oldest first", [one["id"] for one in lines] == list(range(lines[0]["id"], lines[0]["id"] + len(lines))) and
              len(lines) >= said.json()["lines"], [one["id"] for one in lines][:20], said)
        back, after = [], ""
        for _ in range(100):
            page = ask("/audit?order=newest&limit=100" + after).json()
            back += page["items"]
            if "next" not in page:
                break
            after = "&after=" + page["next"]
        check("newest first, pages have the same lines the other way round", [one["id"] for one in back] == [one["id"] for one in lines][::-1], back[:2])
        cursor = ask("/audit?order=newest&limit=1").json()["next"]
        check("a cursor of one order is none of the other", ask("/audit?limit=1&after=" + cursor).status == 400 and ask("/audit?order=sideways").status == 400)
        check("it says who did what to what from where", any(one["user"] == "ada" and one.get("tenant") == "blue" and one["what"].startswith("lease/") and
              one.get("from", "").startswith("127.0.0.1") for one in lines), lines[-3:])

        # ---- metrics and health
        said = curl(local, "/metrics")
        lines = [one for one in said.body.splitlines() if one and not one.startswith("#")]
        good = [one for one in lines if re.fullmatch(r'[a-zA-Z_:][a-zA-Z0-9_:]*(\{([a-zA-Z_][a-zA-Z0-9_]*="([^"\\\n]|\\.)*",?)*\})? [-+0-9.eE]+(Inf|NaN)?', one)]
        check("metrics are Prometheus text", said.status == 200 and said.headers["content-type"].startswith("text/plain") and lines and good == lines,
              [one for one in lines if one not in good][:5], said.headers)
        helped = set(re.findall(r"^# HELP (\S+)", said.body, re.M))
        bare = {re.sub(r"_(bucket|sum|count)$", "", re.split(r"[{ ]", one)[0]) if re.split(r"[{ ]", one)[0] not in helped else re.split(r"[{ ]", one)[0] for one in lines}
        check("each with help and type", bare <= helped and bare <= set(re.findall(r"^# TYPE (\S+)", said.body, re.M)), bare - helped)
        check("/healthz is 200", curl(local, "/healthz").status == 200)

        # ---- the end
        stream = subprocess.Popen(["curl", "-sN", "--max-time", "20", "--unix-socket", daemon.socket, "http://localhost" + PREFIX + "/events"], stdout=subprocess.DEVNULL)
        time.sleep(0.3)
        code = daemon.stop(15)
        check("SIGTERM ends it with 0, streams and all", code == 0 and stream.wait(5) is not None, code, daemon.said())
        check("its socket is gone", not os.path.exists(daemon.socket))
        daemon.start()
        left = ask("/leases?limit=1000").json()["items"]
        check("after a restart the leases are there", {one["id"] for one in left} >= set(ids[2:]), left[:2])
        check("and the audit chain", ask("/audit/verdict").json().get("whole") is True)
        try:
            two = Daemon(place.twin, place.work, state=daemon.state, name="second")
            two.start(wait=8)
            two.stop()
            check("a second daemon on the same state is refused", False, two.said())
        except RuntimeError as why:
            check("a second daemon on the same state is refused, with who holds it", "ended with" in str(why) and re.search(r"pid \d+|in use|another", str(why)), why)
        try:
            two = Daemon(place.twin, place.work, state=place.work + "/other", port=daemon.port, name="third")
            two.start(wait=8)
            two.stop()
            check("a second daemon on the same port is refused", False, two.said())
        except RuntimeError as why:
            check("a second daemon on the same port is refused, with who holds it and what to type", "ended with" in str(why) and "--listen" in str(why), why)
        check("the first one did not mind", ask("/whoami").status == 200)
    checks.done()


if __name__ == "__main__":
    main()
