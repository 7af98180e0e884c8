#!/usr/bin/env python3
"""Every route x every role, own things and another tenant's, against the table below, which was written down from the
promise of the documentation and not from the program's own table. A route that is in the OpenAPI document and not here
is a failure."""
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from daemon import PREFIX, Checks, Place, pretty  # noqa: E402

A, O, T, U = "admin", "operator", "tenant", "auditor"
ALL = {A, O, T, U}


def small(**more):
    """A lease of which there is room for hundreds."""
    return {"class": "share", "memory": 64 << 20, "weight": 1, "ttlSeconds": 600, **more}


# operation: (method, path, body, roles that may on things of their own tenant, roles that may on another's)
# A tenant that may not know of a thing gets 404 (403 also says no more where it may do this to nothing at all).
TABLE = {
    "listLeases": ("GET", "/leases", None, ALL, ALL),  # a tenant's list has its own alone: looked at below
    "createLease": ("POST", "/leases", "lease", {A, O, T}, {A, O}),
    "getLease": ("GET", "/leases/{lease}", None, ALL, {A, O, U}),
    "getLeasePlace": ("GET", "/leases/{lease}/place", None, ALL, {A, O, U}),
    "renewLease": ("POST", "/leases/{lease}/renew", {"ttlSeconds": 700}, {A, O, T}, {A, O}),
    "releaseLease": ("DELETE", "/leases/{lease}", None, {A, O, T}, {A, O}),
    "evictLease": ("POST", "/leases/{lease}/evict", {"why": "the table is walked"}, {A, O}, {A, O}),
    "cordonGpu": ("PUT", "/gpus/{gpu}/cordon", {"why": "the table is walked"}, {A, O}, {A, O}),
    "uncordonGpu": ("DELETE", "/gpus/{gpu}/cordon", None, {A, O}, {A, O}),
    "watchEvents": ("GET", "/events", None, ALL, ALL),  # again: a tenant's stream has its own alone
    "listTenants": ("GET", "/tenants", None, ALL, ALL),
    "createTenant": ("POST", "/tenants", "tenant", {A}, {A}),
    "getTenant": ("GET", "/tenants/{tenant}", None, ALL, {A, O, U}),
    "putTenant": ("PUT", "/tenants/{tenant}", "same-tenant", {A, O}, {A, O}),
    "endTenant": ("DELETE", "/tenants/{tenant}", None, {A}, {A}),
    "getQuota": ("GET", "/tenants/{tenant}/quota", None, ALL, {A, O, U}),
    "putQuota": ("PUT", "/tenants/{tenant}/quota", {"leases": 50}, {A, O}, {A, O}),
    "listTokens": ("GET", "/tokens", None, {A, U}, {A, U}),
    "createToken": ("POST", "/tokens", "token", {A}, {A}),
    "revokeToken": ("DELETE", "/tokens/{token}", None, {A}, {A}),
    "getHost": ("GET", "/host", None, {A, O, U}, {A, O, U}),
    "drain": ("PUT", "/host/drain", {"draining": False}, {A, O}, {A, O}),
    "getTelemetry": ("GET", "/telemetry", None, ALL, ALL),  # a tenant reads of its own alone
    "getTelemetryHistory": ("GET", "/telemetry/history?gpu=0&signal=power", None, {A, O, U}, {A, O, U}),  # 404 for those who have no GPU
    "putRest": ("PUT", "/telemetry/rests/walk", {"seconds": 1}, {A, O}, {A, O}),
    "endRest": ("DELETE", "/telemetry/rests/walk", None, {A, O}, {A, O}),
    "listIncidents": ("GET", "/incidents", None, ALL, ALL),  # a tenant reads of what its programs are in alone
    "getHealing": ("GET", "/healing", None, {A, O, U}, {A, O, U}),
    "listAlarms": ("GET", "/alarms", None, ALL, ALL),  # a tenant reads of what touches its leases alone
    "getUsage": ("GET", "/usage", None, ALL, ALL),  # a tenant reads of its own alone
    "listAudit": ("GET", "/audit", None, {A, U}, {A, U}),
    "verifyAudit": ("GET", "/audit/verdict", None, {A, U}, {A, U}),
    "whoami": ("GET", "/whoami", None, ALL, ALL),
}
OPEN = {"getOpenapi"}
# Beside the document: Prometheus text, and what a load balancer asks.
METRICS = {A, O, U}


def main():
    checks = Checks()
    with Place(config="requests_per_second: 100000\n") as place:
        daemon = place.daemon
        admin = daemon.local()
        for name in ("blue", "red"):
            daemon.tenant(name)
        roles = {A: daemon.token(A), O: daemon.token(O), U: daemon.token(U), T: daemon.token(T, "blue", "ada")}
        clients = {role: daemon.tls(token["secret"]) for role, token in roles.items()}
        document = admin.ask("GET", PREFIX + "/openapi.json").json()
        operations = {operation["operationId"] for item in document["paths"].values() for operation in item.values()}
        checks.check("this table has every operation of the document and no other", operations == set(TABLE) | OPEN,
                     "document alone: %s" % (operations - set(TABLE) - OPEN), "here alone: %s" % (set(TABLE) | OPEN - operations - OPEN))

        count = [0]
        last_gpu = admin.ask("GET", PREFIX + "/host").json()["gpus"][-1]["gpu"]

        def lease_of(tenant):
            answer = admin.ask("POST", PREFIX + "/leases", small(tenant=tenant))
            if answer.status != 201:
                raise RuntimeError("no lease to try on: " + pretty(answer))
            return answer.json()["id"]

        def fresh(operation, own):
            """(path, body) with a thing of `blue` (own) or `red` that may be changed or ended, and what ends it."""
            tenant = "blue" if own else "red"
            method, path, body, _, _ = TABLE[operation]
            count[0] += 1
            undo = None
            if "{lease}" in path:
                lease = lease_of(tenant)
                path = path.replace("{lease}", str(lease))
                undo = ("DELETE", "/leases/%d" % lease)
            if "{gpu}" in path:
                path = path.replace("{gpu}", last_gpu)
                undo = ("DELETE", "/gpus/%s/cordon" % last_gpu)
            if "{token}" in path:
                path = path.replace("{token}", daemon.token(T, tenant, "victim")["id"])
            if "{tenant}" in path:
                if operation == "endTenant":
                    tenant = "t%d" % count[0]
                    daemon.tenant(tenant)
                path = path.replace("{tenant}", tenant)
            if body == "lease":
                body = small(tenant=tenant)
            elif body == "tenant":
                body = {"name": "n%d" % count[0]}
            elif body == "same-tenant":
                body = {"name": tenant, "note": "by %d" % count[0]}
            elif body == "token":
                body = {"user": "x", "role": T, "tenant": tenant}
            return method, PREFIX + path, body, undo

        def streams(client):
            return client.events(PREFIX + "/events", 0.1)[0]

        wrong = []
        tried = 0
        for operation, (method, _, _, own_may, others_may) in TABLE.items():
            for role, client in clients.items():
                for own in (True, False):
                    if operation == "endTenant" and role == T and own:
                        continue  # its own tenant is `blue`, which the other rows need: looked at below
                    method, path, body, undo = fresh(operation, own)
                    tried += 1
                    if operation == "watchEvents":
                        status, said = streams(client), ""
                    else:
                        answer = client.ask(method, path, body)
                        status, said = answer.status, pretty(answer)
                        if operation == "createLease" and status == 201:
                            undo = ("DELETE", "/leases/%d" % answer.json()["id"])
                    may = role in (own_may if own else others_may)
                    good = status // 100 == 2 if may else status in (403, 404)
                    if not may and not own and role == T and operation in ("getLease", "getLeasePlace", "renewLease", "releaseLease", "getTenant", "getQuota"):
                        good = status == 404  # it may do this to its own: whether another's is there is not said
                    if not good:
                        wrong.append("%s %s of %s as %s: %s %s" % (operation, path, "its own" if own else "another", role, status, said[:200]))
                    if undo:
                        admin.ask(undo[0], PREFIX + undo[1])
        checks.check("every route x role does what the table says (%d requests)" % tried, not wrong, *wrong)

        # What is there and what is not look alike to who may not know.
        lease = lease_of("red")
        there, not_there = clients[T].ask("GET", PREFIX + "/leases/%d" % lease), clients[T].ask("GET", PREFIX + "/leases/999999")
        strip = lambda answer, number: answer.body.decode().replace(str(number), "N")  # noqa: E731
        checks.check("another's lease and none look the same", there.status == not_there.status == 404 and
                     strip(there, lease) == strip(not_there, 999999), pretty(there), pretty(not_there))
        mine, other, none = (clients[T].ask("GET", PREFIX + "/tenants/" + name) for name in ("blue", "red", "nobody"))
        checks.check("another tenant and none look the same", other.status == none.status == 404 and
                     other.body.replace(b"red", b"N") == none.body.replace(b"nobody", b"N") and mine.status == 200, pretty(other), pretty(none))

        # Lists and streams of a tenant have its own alone.
        own = lease_of("blue")
        listed = clients[T].ask("GET", PREFIX + "/leases?limit=1000").json()["items"]
        checks.check("a tenant's list of leases has its own alone", listed and {one["tenant"] for one in listed} == {"blue"} and
                     own in [one["id"] for one in listed], listed[:3])
        listed = clients[T].ask("GET", PREFIX + "/tenants").json()["items"]
        checks.check("a tenant's list of tenants has itself alone", [one["name"] for one in listed] == ["blue"], listed)
        status, _, text = clients[T].events(PREFIX + "/events", 1, headers=[("Last-Event-ID", "0")])
        checks.check("a tenant's stream, from the first event on, has nothing of another", status == 200 and '"blue"' in text and "red" not in text
                     and "victim" not in text, text[:1500])
        status, _, text = clients[T].events(PREFIX + "/events?lease=%d" % lease, 0.5, headers=[("Last-Event-ID", "0")])
        checks.check("a stream of another's one lease says nothing", status in (404, 403) or "data:" not in text, text[:500])
        status, _, text = clients[A].events(PREFIX + "/events", 1, headers=[("Last-Event-ID", "0")])
        checks.check("an admin's stream has both", '"blue"' in text and '"red"' in text, text[:300])

        # Nobody, and those who were somebody.
        expired = daemon.token(A, ttlSeconds=60)
        revoked = daemon.token(A)
        admin.ask("DELETE", PREFIX + "/tokens/" + revoked["id"])
        secret = roles[A]["secret"]
        forged = secret[:-1] + ("0" if secret[-1] != "0" else "1")
        nobodies = {"nobody": None, "a revoked token": revoked["secret"], "a token with one digit changed": forged,
                    "another's id with this secret": "_".join(["bh", roles[T]["id"], secret.split("_")[-1]]),
                    "an id that is none": "bh_zzzz_" + "0" * 64}
        wrong = []
        for name, token in nobodies.items():
            client = daemon.tls(token)
            for operation, (method, path, body, _, _) in TABLE.items():
                for word, value in (("{lease}", str(lease)), ("{tenant}", "blue"), ("{token}", roles[T]["id"])):
                    path = path.replace(word, value)
                body = body if not isinstance(body, str) else {"name": "x"}
                if operation == "watchEvents":
                    status = streams(client)
                else:
                    status = client.ask(method, PREFIX + path, body).status
                if status != 401:
                    wrong.append("%s as %s: %d" % (operation, name, status))
            if client.ask("GET", "/metrics").status not in (401, 403, 404):
                wrong.append("/metrics as " + name)
        checks.check("nobody and who was somebody get 401 on every route", not wrong, *wrong)
        answer = daemon.tls(expired["secret"]).ask("GET", PREFIX + "/whoami")
        checks.check("the token that will expire works before", answer.status == 200, pretty(answer))

        # Others' rights by way of one's own.
        answer = clients[T].ask("POST", PREFIX + "/leases", small(priority=50))
        checks.check("a tenant may not ask for priority above 0", answer.status in (400, 403), pretty(answer))
        answer = clients[T].ask("POST", PREFIX + "/leases", small(priority=-1))
        checks.check("a tenant may ask for less", answer.status == 201, pretty(answer))
        if answer.status == 201:
            clients[T].ask("DELETE", PREFIX + "/leases/%d" % answer.json()["id"])
        answer = clients[O].ask("POST", PREFIX + "/tokens", {"user": "me", "role": "admin"})
        checks.check("an operator makes no admin of itself", answer.status == 403, pretty(answer))
        for key in ("X-Forwarded-For", "X-Real-IP", "X-Remote-User", "Forwarded", "X-HTTP-Method-Override"):
            answer = clients[T].ask("GET", PREFIX + "/host", headers=[(key, "admin")])
            if answer.status != 403:
                checks.check("%s gives no right" % key, False, pretty(answer))
        answer = clients[T].ask("GET", PREFIX + "/leases/%d?tenant=red" % lease)
        checks.check("?tenant= gives no right", answer.status == 404, pretty(answer))
        for path in ("/leases/%d" % lease, "/leases//%d" % lease, "/leases/%%3%d" % lease, "/tenants/blue/../red", "/tenants/blue%2F..%2Fred",
                     "/leases/0%d" % lease, "/leases/+%d" % lease, "/leases/%d.0" % lease, "/tenants/red/", "//tenants//red/quota",
                     "/Tenants/red", "/tenants/red;a", "/tenants/RED", "/tenants/blue,red", "/tenants/*"):
            answer = clients[T].ask("GET", PREFIX + path)
            if answer.status not in (400, 403, 404):
                checks.check("no spelling of a path reaches another's thing: " + path, False, pretty(answer))
        checks.check("no spelling of a path reaches another's thing", True)
        answer = clients[T].ask("DELETE", PREFIX + "/tenants/blue")
        checks.check("a tenant may not end itself", answer.status == 403, pretty(answer))

        # Metrics and health.
        wrong = ["%s: %d" % (role, client.ask("GET", "/metrics").status) for role, client in clients.items()
                 if (client.ask("GET", "/metrics").status == 200) != (role in METRICS)]
        checks.check("/metrics is for those who may read metrics", not wrong, *wrong)
        nobody = daemon.tls()
        checks.check("/healthz and /readyz need no token", nobody.ask("GET", "/healthz").status == 200 and nobody.ask("GET", "/readyz").status == 200)
        metrics = clients[A].ask("GET", "/metrics").body.decode()
        checks.check("no secret is in the metrics", "bh_" not in metrics, metrics[:500])

        # What was refused is in the audit log, without the secret.
        lines = []
        after = ""
        while True:
            page = clients[U].ask("GET", PREFIX + "/audit?limit=1000" + after).json()
            lines += page["items"]
            if not page.get("next"):
                break
            after = "&after=" + page["next"]
        text = json.dumps(lines)
        checks.check("refusals are in the audit log", any("refused" in one["outcome"] or "forbidden" in one["outcome"] or "denied" in one["outcome"] for one in lines),
                     lines[-3:])
        checks.check("no secret is in the audit log", not any(token["secret"].split("_")[-1] in text for token in roles.values()))
        verdict = clients[U].ask("GET", PREFIX + "/audit/verdict").json()
        checks.check("the audit chain is whole after all this", verdict["whole"] and verdict["lines"] >= len(lines), verdict)
        checks.check("no secret is in the daemon's log", "bh_" not in daemon.said(), daemon.said())
    checks.done()


if __name__ == "__main__":
    main()
