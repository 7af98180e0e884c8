#!/usr/bin/env python3
"""What a stranger and a hostile tenant would try, while an honest client works on: refused, bounded, others unharmed."""
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import wire  # noqa: E402
from daemon import PREFIX, Checks, Place, mig, pretty, wait_for  # noqa: E402


def resident(pid):
    with open("/proc/%d/status" % pid) as got:
        return int(re.search(r"VmRSS:\s+(\d+) kB", got.read())[1]) << 10


class Honest(threading.Thread):
    """Asks a little, all the time; its slowest answer and what was not 2xx are the harm done."""

    def __init__(self, daemon, token):
        super().__init__(daemon=True)
        self.client = daemon.tls(token, timeout=30)
        self.over, self.times, self.bad = False, [], []

    def run(self):
        turn = 0
        while not self.over:
            began = time.monotonic()
            try:
                turn += 1
                if turn % 20 == 0:
                    answer = self.client.ask("POST", PREFIX + "/leases", mig("1g.10gb"))
                    if answer.status == 201:
                        answer = self.client.ask("DELETE", PREFIX + "/leases/%d" % answer.json()["id"])
                else:
                    answer = self.client.ask("GET", PREFIX + "/leases")
                if answer.status // 100 != 2 and answer.status != 409:
                    self.bad.append(pretty(answer))
            except (OSError, wire.Gone, ValueError) as why:
                self.bad.append(repr(why))
                self.client.fresh()
            self.times.append(time.monotonic() - began)
            time.sleep(0.02)

    def harm(self):
        """What happened since the last look."""
        times, self.times = self.times, []
        bad, self.bad = self.bad, []
        return max(times or [99]), len(times), bad


def raw(daemon, source="127.0.0.1", timeout=10):
    """A TLS connection from an address of choice."""
    plain = socket.socket()
    plain.settimeout(timeout)
    plain.bind((source, 0))
    plain.connect(("127.0.0.1", daemon.port))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(plain)


def read_all(sock, seconds):
    sock.settimeout(seconds)
    out = b""
    try:
        while True:
            piece = sock.recv(65536)
            if not piece:
                return out, True
            out += piece
    except (TimeoutError, socket.timeout):
        return out, False
    except (OSError, ssl.SSLError):
        return out, True


def main():
    checks = Checks()
    check = checks.check
    with Place() as place:  # with the limits as they come
        daemon = place.daemon
        for name in ("blue", "red"):
            daemon.tenant(name)
        token = daemon.token("tenant", "blue", "ada")["secret"]
        hostile = daemon.token("tenant", "red", "mallory")["secret"]
        pid = daemon.process.pid
        honest = Honest(daemon, token)
        honest.start()
        time.sleep(1)
        quiet, asked, bad = honest.harm()
        check("the honest client is served", asked > 10 and not bad, asked, bad[:3])
        start = resident(pid)

        def unharmed(sentence, slowest=1.0):
            most, times, wrong = honest.harm()
            check("%s; meanwhile the honest client had its answers (%d, slowest %.0f ms)" % (sentence, times, most * 1000), not wrong and most < slowest and times > 0, wrong[:3])

        # ---- slow clients
        slow = []
        for i in range(240):
            try:
                one = raw(daemon, "127.0.0.%d" % (10 + i // 200))
                one.sendall(b"GET /api/v1/leases HTTP/1.1\r\nHost: x\r\nX-A: ")
                slow.append(one)
            except OSError:
                pass
        began = time.monotonic()
        closed = 0
        while time.monotonic() - began < 60 and slow:  # 10 s each, and a loaded machine is slow to tell
            for one in list(slow):
                try:
                    one.sendall(b"a")
                except OSError:
                    closed += 1
                    slow.remove(one)
                    continue
            time.sleep(0.5)
        check("clients that send a byte now and then are cut off (%d within %.0f s)" % (closed, time.monotonic() - began), not slow, len(slow))
        unharmed("240 slow headers")
        for one in slow:
            one.close()
        slow = []
        for i in range(100):
            one = socket.socket()
            one.bind(("127.0.0.12", 0))
            one.connect(("127.0.0.1", daemon.port))
            slow.append(one)
        began = time.monotonic()
        gone = sum(read_all(one, max(0.1, 15 - (time.monotonic() - began)))[1] for one in slow)
        check("connections that never greet are cut off (%d of 100 within %.0f s)" % (gone, time.monotonic() - began), gone == 100)
        unharmed("100 without a handshake")
        one = raw(daemon, "127.0.0.13", 60)
        one.sendall(b"POST /api/v1/leases HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nContent-Type: application/json\r\nAuthorization: Bearer " + hostile.encode() + b"\r\n\r\n")
        began = time.monotonic()
        over = False
        while time.monotonic() - began < 45 and not over:
            try:
                one.sendall(b" ")
                over = read_all(one, 0.5)[1]
            except OSError:
                over = True
        check("a body that comes byte by byte is cut off (after %.0f s)" % (time.monotonic() - began), over)
        unharmed("a slow body")
        # Readers that do not read: 40 big answers each, pipelined.
        stuck = []
        for i in range(50):
            one = raw(daemon, "127.0.0.14")
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.setblocking(True)
            try:
                one.sendall((b"GET /api/v1/openapi.json HTTP/1.1\r\nHost: x\r\n\r\n") * 40)
            except OSError:
                pass
            stuck.append(one)
        time.sleep(1)
        unharmed("50 that ask and do not read")
        check("and take no memory to speak of (%d MiB more)" % ((resident(pid) - start) >> 20), resident(pid) - start < 96 << 20)
        for one in stuck:
            one.close()

        # ---- floods
        hold = []
        for i in range(400):
            try:
                one = socket.socket()
                one.settimeout(5)
                one.bind(("127.0.0.15", 0))
                one.connect(("127.0.0.1", daemon.port))
                hold.append(one)
            except OSError:
                break
        time.sleep(0.3)
        refused = sum(read_all(one, 0.01)[1] for one in hold)
        check("one address gets no more than its number of connections (%d of %d refused)" % (refused, len(hold)), refused >= 100)
        unharmed("400 connections of one address")
        for one in hold:
            one.close()
        client = daemon.tls(hostile)
        statuses = {}
        began = time.monotonic()
        while time.monotonic() - began < 5:
            answer = client.ask("GET", PREFIX + "/leases")
            statuses[answer.status] = statuses.get(answer.status, 0) + 1
            if answer.status == 429:
                after = answer.header("retry-after")
        check("a tenant that asks without end gets 429 (%s), with Retry-After" % statuses, statuses.get(429, 0) > 0 and after.isdigit(), statuses)
        unharmed("a tenant that asks without end")
        streams = []
        status = 200
        for i in range(300):
            try:
                one = raw(daemon, "127.0.0.16")
                one.sendall(wire.request("GET", PREFIX + "/events", [("Authorization", "Bearer " + hostile)]))
                got = one.recv(300)
                status = int(got.split()[1]) if got else 0
                if status != 200:
                    break
                streams.append(one)
            except OSError:
                break
        check("streams of one tenant are bounded (%d, then %d)" % (len(streams), status), len(streams) <= 256 and status in (429, 503, 0))
        unharmed("a tenant that watches without end")
        for one in streams:
            one.close()
        time.sleep(4.5)  # its allowance of requests comes back

        auditor = [daemon.tls(daemon.token("auditor", user="auditor%d" % i)["secret"]) for i in range(4)]
        statuses = {}

        def verify(client, until):
            while time.monotonic() < until:
                status = client.ask("GET", PREFIX + "/audit/verdict").status
                statuses[status] = statuses.get(status, 0) + 1
        threads = [threading.Thread(target=verify, args=(one, time.monotonic() + 3)) for one in auditor]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        check("the audit log verified without end: %s" % statuses, statuses.get(200, 0) > 0 and set(statuses) <= {200, 429, 503})
        unharmed("four that verify the audit log without end")

        # ---- sizes
        before = resident(pid)
        one = raw(daemon, "127.0.0.17", 30)
        one.sendall(wire.request("POST", PREFIX + "/leases", [("Authorization", "Bearer " + hostile), ("Content-Length", str(1 << 30)), ("Content-Type", "application/json")]))
        answer, _ = read_all(one, 3)
        check("a body of 1 GiB is 413 before it is sent", answer.startswith(b"HTTP/1.1 413") and b"problem+json" in answer, answer[:300])
        one = raw(daemon, "127.0.0.17", 30)
        one.sendall(wire.request("POST", PREFIX + "/leases", [("Authorization", "Bearer " + hostile), ("Transfer-Encoding", "chunked"), ("Content-Type", "application/json")]))
        sent = 0
        try:
            piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
            while sent < 1 << 30:
                one.sendall(piece)
                sent += 65536
        except OSError:
            pass
        answer, over = read_all(one, 3)
        check("a chunked body of 1 GiB ends after %d KiB" % (sent >> 10), sent < 64 << 20 and (answer.startswith(b"HTTP/1.1 413") or over), answer[:200])
        unharmed("1 GiB bodies")
        # Many bodies at once that never end: the sum is bounded.
        # Who comes between them and stays lies behind them in the heap.
        many, stays = [], []
        for i in range(200):
            try:
                if i % 4 == 0:
                    stays.append(raw(daemon, "127.0.0.20"))
                one = raw(daemon, "127.0.0.%d" % (18 + i // 100), 5)
                one.sendall(wire.request("POST", PREFIX + "/leases", [("Authorization", "Bearer " + hostile), ("Content-Length", str(1 << 20))]) + b" " * 1000000)
                many.append(one)
            except OSError:
                pass
        time.sleep(0.5)
        grown = resident(pid) - before
        check("200 unfinished bodies of 1 MB take %d MiB" % (grown >> 20), grown < 400 << 20)
        unharmed("200 unfinished bodies", 3.0)
        for one in many:
            one.close()
        left = None

        def given_back():
            nonlocal left
            left = resident(pid) - before
            return left < 48 << 20
        check("and are given back when they are cut off", wait_for(given_back, 20), "%d MiB stay" % (left >> 20))
        for one in stays:
            one.close()
        for what, headers in (("one header of 64 KiB", [("X-A", "a" * 65536)]), ("5,000 headers", [("X-%d" % i, "a") for i in range(5000)]),
                              ("a token of 15 KiB", [("Authorization", "Bearer " + "a" * 15000)])):
            answer = daemon.tls().ask("GET", PREFIX + "/whoami", headers=headers)
            check("%s: %d" % (what, answer.status), answer.status in (400, 401, 431), pretty(answer))
        answer = daemon.tls().ask("GET", "/" + "a" * 60000)
        check("an address of 60 KB: %d" % answer.status, answer.status in (414, 431), pretty(answer))
        client = daemon.tls(hostile)
        for what, body in (("a million brackets", b"[" * 1000000), ("nested 200,000 deep", b'{"a":' * 200000), ("a number of 500,000 digits", b'{"class":' + b"9" * 500000 + b"}"),
                           ("100,000 keys", b"{" + b",".join(b'"%d":1' % i for i in range(100000 // 2)) + b"}"), ("a string with half a surrogate", b'{"class":"\\ud800"}'),
                           ("a NUL in a name", b'{"class\\u0000":"mig"}'), ("bytes that are no UTF-8", b'{"label":"\xff\xfe"}')):
            began = time.monotonic()
            answer = client.ask("POST", PREFIX + "/leases", body, raw=True, headers=[("Content-Type", "application/json")])
            took = time.monotonic() - began
            check("%s is %d in %.0f ms, and the answer is short" % (what, answer.status, took * 1000), answer.status in (400, 413) and took < 2 and len(answer.body) < 20000, pretty(answer))
        unharmed("sizes and depths")

        # ---- smuggling, splitting, older protocols
        for what, text in (("two lengths", b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhelloX"), ("length and chunked", b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /api/v1/host HTTP/1.1\r\nHost: x\r\n\r\n"),
                           ("chunked twice", b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"), ("an odd chunked", b"Transfer-Encoding: xchunked\r\n\r\n"), ("a negative length", b"Content-Length: -1\r\n\r\n"),
                           ("a folded header", b"X-A: b\r\n c\r\nContent-Length: 0\r\n\r\n"), ("a space before the colon", b"Content-Length : 0\r\n\r\n"), ("bare LF", b"Content-Length: 0\n\n")):
            one = raw(daemon)
            one.sendall(b"POST /api/v1/leases HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + token.encode() + b"\r\n" + text)
            answer, over = read_all(one, 1.5)
            check("%s: refused once and closed" % what, answer.count(b"HTTP/1.1 ") == (1 if answer else 0) and (answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 501")) or not answer), answer[:500])
        one = raw(daemon)
        one.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        answer, _ = read_all(one, 1.5)
        check("HTTP/2 is refused in HTTP/1.1", answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 505")), answer[:100])

        # ---- guessing, replaying
        answer = daemon.tls(token).ask("POST", PREFIX + "/leases", mig("1g.10gb"), [("Idempotency-Key", "pay")])
        captured = wire.request("POST", PREFIX + "/leases", [("Authorization", "Bearer " + token), ("Content-Type", "application/json"), ("Idempotency-Key", "pay")], b'%s' % __import__("json").dumps(mig("1g.10gb")).encode())
        again = [daemon.tls().say(captured) for _ in range(5)]
        check("a recorded request with its key, sent again, makes nothing new", all(one.status in (200, 201) and one.json()["id"] == answer.json()["id"] for one in again), [pretty(one) for one in again])
        other = daemon.tls(hostile).ask("POST", PREFIX + "/leases", mig("1g.10gb"), [("Idempotency-Key", "pay")])
        check("and in another tenant's hand tells nothing of it", other.status != 200 and (other.status != 201 or other.json()["tenant"] == "red"), pretty(other))
        if shutil_which("openssl"):
            session = os.path.join(place.work, "session")
            subprocess.run(["openssl", "s_client", "-connect", "127.0.0.1:%d" % daemon.port, "-tls1_3", "-sess_out", session], input=b"GET /healthz HTTP/1.0\r\n\r\n", capture_output=True, timeout=20)
            early = os.path.join(place.work, "early")
            with open(early, "wb") as out:
                out.write(captured)
            said = b""
            if os.path.exists(session):
                said = subprocess.run(["openssl", "s_client", "-connect", "127.0.0.1:%d" % daemon.port, "-tls1_3", "-sess_in", session, "-early_data", early],
                                      input=b"", capture_output=True, timeout=20).stdout
            check("0-RTT, which could be replayed by anybody on the way, is not taken", b"Early data was accepted" not in said, said[-500:])
        before_audit = daemon.local().ask("GET", PREFIX + "/audit/verdict").json()["lines"]
        statuses, began, tried = {}, time.monotonic(), 0
        guess = None
        while time.monotonic() - began < 5:
            guess = guess or wire.Client(daemon.url, ca=daemon.certificate)
            answer = guess.ask("GET", PREFIX + "/whoami", headers=[("Authorization", "Bearer bh_%s_%064x" % (token.split("_")[1], tried))])
            statuses[answer.status] = statuses.get(answer.status, 0) + 1
            tried += 1
        check("guessing a token's secret: %s in 5 s" % statuses, set(statuses) <= {401, 429}, statuses)
        check("is slowed down", statuses.get(429, 0) > 0, statuses)
        # The guesser shares the honest client's address (both are 127.0.0.1): its token still works.
        unharmed("a guesser at the same address")
        lines = daemon.local().ask("GET", PREFIX + "/audit/verdict").json()["lines"] - before_audit
        check("%d guesses fill the audit log with %d lines" % (tried, lines), lines < 1000)
        wrong = []
        for text in ("Bearer", "Bearer ", "Basic YWRtaW46YWRtaW4=", "bearer", "Bearer null", "Bearer bh_", "Bearer bh__", token, "Bearer " + token + "x", "Bearer " + token.upper(),
                     "Bearer " + token[:-1], "Bearer " + token + ", Bearer x", "Bearer \xff"):
            answer = daemon.tls().ask("GET", PREFIX + "/leases", headers=[("Authorization", text.encode("latin-1"))])
            if answer.status not in (400, 401, 429):
                wrong.append("%r: %d" % (text, answer.status))
        check("no odd Authorization is let in", not wrong, *wrong)
        revoked = daemon.token("admin")
        kept = daemon.tls(revoked["secret"])
        check("a token works", kept.ask("GET", PREFIX + "/whoami").status == 200)
        watcher = raw(daemon)
        watcher.sendall(wire.request("GET", PREFIX + "/events", [("Authorization", "Bearer " + revoked["secret"])]))
        watcher.recv(300)
        daemon.local().ask("DELETE", PREFIX + "/tokens/" + revoked["id"])
        check("revoked, it does not, on the connection it is on", kept.ask("GET", PREFIX + "/whoami").status in (401, 429))
        daemon.local().ask("POST", PREFIX + "/tenants", {"name": "after-revocation"})
        text, over = read_all(watcher, 3)
        check("and its open stream hears no more", over or b"after-revocation" not in text, text[-400:])

        honest.over = True
        honest.join(10)
        grown = resident(pid) - start
        check("after all this the daemon holds %d MiB more than before" % (grown >> 20), grown < 64 << 20)
        check("the audit chain is whole", daemon.local().ask("GET", PREFIX + "/audit/verdict").json()["whole"])
        check("no token is in its log", "bh_" not in daemon.said(), daemon.said())
        check("SIGTERM ends it with 0", daemon.stop() == 0, daemon.said())
        wait_for(lambda: True)
    checks.done()


def shutil_which(name):
    import shutil
    return shutil.which(name)


if __name__ == "__main__":
    main()
