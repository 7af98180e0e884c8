#!/usr/bin/env python3
"""Fuzzes a running daemon from its own OpenAPI document.

For every operation: requests that the document allows, and the same ones broken (types, bounds, missing and unknown keys,
duplicate keys, huge and strange values, deep and torn JSON, wrong content types, bad headers, bad paths and queries), as every
role and as nobody, over the Unix socket and over TLS. Checked of every answer:
  - there is one: no crash, no hang; no 5xx but 503
  - its status is in the document (or is one of HTTP itself for what was broken below the API), so is its content type, and its
    body fits the schema; a problem says its own status
  - what the document forbids is not accepted
  - no secret of a token is in it, but in the answer to its creation

fuzz.py --socket PATH [--url https://127.0.0.1:PORT --ca FILE] [--seconds 30] [--seed N] [--pid PID] [--report FILE]
The socket's peer (root) must be an admin. Prints one line per check, then "N passed, M failed".
"""
import argparse
import base64
import json
import os
import random
import re
import sys
import threading
import time
import traceback

try:
    from re import _parser as sre_parse
except ImportError:
    import sre_parse

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import wire  # noqa: E402

# Of HTTP itself, before a route is found or a body is read: no document lists them for each route.
TRANSPORT = {400, 405, 408, 411, 413, 414, 415, 417, 429, 431, 501, 503, 505}
SECRET = re.compile(rb"bh_[A-Za-z0-9]{4,}_[0-9a-f]{64}")
STRANGE = ["", " ", "\0", "a\0b", "\u202e", "\ud83d", "🦀" * 50, "é" * 100, "../../etc/passwd", "%00", "'; DROP TABLE leases; --",
           "<script>", "${jndi:ldap://x}", "{{7*7}}", "a" * 65536, "\r\nX: y", "null", "NaN", "0", "-1", "1e3", "０", "\uffff",
           "\x7f", "A" * 63, "a" * 64, "-a", "a-", "a.b", "Ⅷ", "1g.10gb", "1g.10gb+me", "GPU-*", "*", "[", "**" * 1000]
NUMBERS = [0, -1, 1, 2, 9, 10, 59, 60, 64, 65, 1000, 1001, 2**31 - 1, 2**31, 2**32, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1,
           2**64, 10**30, -2**63, -2**63 - 1, 0.5, 1.0, -0.0, 1e308, 1e-308]


def sample(pattern, rng):
    """A string that matches a (simple) regular expression."""
    def walk(tree):
        out = ""
        for op, value in tree:
            op = str(op)
            if op == "LITERAL":
                out += chr(value)
            elif op == "IN":
                kind, what = rng.choice([one for one in value if str(one[0]) != "NEGATE"])
                out += chr(rng.randint(*what)) if str(kind) == "RANGE" else chr(what)
            elif op in ("MAX_REPEAT", "MIN_REPEAT"):
                low, high, inner = value
                for _ in range(rng.choice([low, min(int(high), low + 8), rng.randint(low, min(int(high), 80))])):
                    out += walk(inner)
            elif op == "SUBPATTERN":
                out += walk(value[-1])
            elif op == "BRANCH":
                out += walk(rng.choice(value[1]))
            elif op == "ANY":
                out += rng.choice("abc")
            elif op != "AT":
                raise ValueError("pattern %s: %s" % (pattern, op))
        return out
    return walk(sre_parse.parse(pattern))


class Fuzzer(threading.Thread):
    def __init__(self, options, document, seed):
        super().__init__(daemon=True)
        self.options, self.document, self.rng = options, document, random.Random(seed)
        self.schemas = wire.Schemas(document)
        self.prefix = document["servers"][0]["url"]
        self.operations = [(method.upper(), path, operation) for path, item in document["paths"].items()
                           for method, operation in item.items()]
        self.local = wire.Client("unix:" + options.socket, timeout=options.patience)
        self.tokens = {}  # role -> [secret]
        # Values that answers brought, by the name they had there: what a next request is made of.
        self.known = {"profile": ["1g.10gb", "2g.20gb", "3g.40gb", "7g.80gb"], "tenant": ["blue", "red"], "name": ["blue", "red"],
                      "lease": [1, 2], "token": [], "models": ["*H100*"], "memory": [1 << 30, 8 << 30], "after": [], "class": ["mig", "share"]}
        self.etags = []
        self.keys = {}  # Idempotency-Key -> (request, status, body)
        self.failures = []
        self.requests = 0
        self.seen = {}  # operation -> {status: times}
        self.stop = False
        self.deadline = 0

    # ---- making
    def value(self, schema, name="", depth=0):
        rng, schema = self.rng, self.schemas.resolve(schema)
        if schema is True or schema == {}:
            return rng.choice([None, 1, "x", [], {}])
        if "enum" in schema:
            return rng.choice(schema["enum"])
        if "allOf" in schema:
            out = {}
            for sub in schema["allOf"]:
                out.update(self.value(sub, name, depth + 1))
            return out
        kind = schema.get("type")
        known = self.known.get(name)
        if known and rng.random() < 0.7:
            value = rng.choice(known[-50:])
            if not self.schemas.mistakes(value, schema):
                return value
        if kind == "string":
            if "pattern" in schema:
                return sample(schema["pattern"], rng)
            if schema.get("format") == "date-time":
                return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + rng.choice([-3600, 5, 3600, 10**8])))
            longest = schema.get("maxLength", 40)
            size = rng.choice([schema.get("minLength", 0), 1, 8, longest, rng.randint(0, longest)])
            return "".join(rng.choice("abcdefghij -_.:/é🦀") for _ in range(max(min(size, longest), schema.get("minLength", 0))))
        if kind == "integer":
            low, high = schema.get("minimum", -10), schema.get("maximum", 10**6)
            return rng.choice([low, high, min(low + 1, high), rng.randint(low, high), rng.randint(low, min(high, low + 100))])
        if kind == "number":
            return rng.choice([0, 0.5, -1.25, 1e9])
        if kind == "boolean":
            return rng.random() < 0.5
        if kind == "array":
            return [self.value(schema.get("items", True), name, depth + 1) for _ in range(rng.choice([0, 1, 2, schema.get("maxItems", 3)]))]
        if kind == "object":
            out = {}
            properties = schema.get("properties", {})
            for key, sub in properties.items():
                if key in schema.get("required", []) or rng.random() < 0.35:
                    out[key] = self.value(sub, key, depth + 1)
            if isinstance(schema.get("additionalProperties"), dict) and rng.random() < 0.7:
                for _ in range(rng.choice([1, 2, 5])):
                    key = self.value(schema.get("propertyNames", {"type": "string", "minLength": 1, "maxLength": 20}) | {"type": "string"}, "profile")
                    out[key] = self.value(schema["additionalProperties"], key, depth + 1)
            # What the four classes take differs; without this hardly one request would come as far as the placement.
            if "class" in out and "count" in properties and rng.random() < 0.8:
                if out["class"] == "mig":
                    out["profile"] = rng.choice(self.known["profile"][:4])
                else:
                    out.pop("profile", None)
                if out["class"] == "share":
                    out["memory"] = rng.choice([64 << 20, 1 << 30, 8 << 30])
                else:
                    out.pop("memory", None), out.pop("weight", None)
                out.pop("deadline", None), out.pop("models", None)
                out["count"] = rng.choice([1, 1, 1, 2, 64])
                if out["class"] in ("exclusive", "passthrough") and out.get("topology") == "same-gpu":
                    out.pop("topology")
                out["ttlSeconds"] = rng.choice([10, 11, 60, 3600])
            return out
        return None

    def strange(self):
        rng = self.rng
        return rng.choice([rng.choice(STRANGE), rng.choice(NUMBERS), None, True, False, [], {}, [[]], {"a": {"b": []}},
                           [rng.choice(STRANGE)[:300]] * rng.choice([1, 100, 10000]), {str(i): i for i in range(rng.choice([1, 100, 5000]))}])

    def broken(self, value):
        """A value with one thing wrong somewhere, maybe."""
        rng = self.rng
        if isinstance(value, dict) and value and rng.random() < 0.85:
            out = dict(value)
            key = rng.choice(list(out))
            what = rng.randrange(6)
            if what == 0:
                del out[key]
            elif what == 1:
                out[rng.choice(STRANGE[:30] + [key.upper(), key + " ", "__proto__", "tenant", "role", "state", "id"])] = self.strange()
            elif what == 2:
                out[key] = self.broken(out[key])
            elif what == 3 and isinstance(out[key], (int, float)):
                out[key] = rng.choice(NUMBERS + [out[key] + 1, out[key] - 1, -out[key], str(out[key])])
            elif what == 4 and isinstance(out[key], str):
                out[key] = rng.choice(STRANGE + [out[key] + "\0", (out[key][:4000] * 2000)[:2 << 20], out[key][:1 << 20].upper(), " " + out[key]])
            else:
                out[key] = self.strange()
            return out
        if isinstance(value, list) and value and rng.random() < 0.7:
            out = list(value)
            at = rng.randrange(len(out))
            out[at] = self.broken(out[at])
            return (out * rng.choice([1, 1, 50]))[:10000]
        return self.strange()

    def text_of(self, value):
        try:
            return json.dumps(value, ensure_ascii=self.rng.random() < 0.5, allow_nan=True).encode("utf-8", "surrogatepass")
        except (ValueError, UnicodeError):
            return json.dumps(value).encode()

    def torn(self, text):
        """JSON that is none, or barely."""
        rng = self.rng
        at = rng.randrange(len(text) + 1)
        what = rng.randrange(16)
        if what == 0:
            return text[:at]
        if what == 1:
            return text + rng.choice([b"x", b"{}", b",", b"\0", text, b"//", b" " * 70000])
        if what == 2:
            return b"\xef\xbb\xbf" + text
        if what == 3:
            return b"[" * rng.choice([65, 1000, 200000]) + b"]" * rng.choice([0, 65, 1000, 200000])
        if what == 4:
            return b'{"a":' * rng.choice([65, 5000, 100000]) + b"1"
        if what == 5:
            return text.replace(b'"', b"'")
        if what == 6:
            return text[:at] + bytes([rng.randrange(256)]) + text[at + 1:]
        if what == 7:
            return text[:at] + rng.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\x00", b"\\u0000", b"\\ud800"]) + text[at:]
        if what == 8:
            return text.decode("utf-8", "replace").encode("utf-16")
        if what == 9:
            return rng.choice([b"", b" ", b"null", b"NaN", b"Infinity", b"-", b"1", b'"x"', b"[]", b"{}", b"true", b"1e999", b"-0"])
        if what == 10:
            return bytes(rng.randrange(256) for _ in range(rng.choice([1, 10, 1000])))
        if what == 11:
            return b'{"' + b"a" * 100000 + b'":1}'
        if what == 12:
            return b'{"class":"mig",' + b",".join(b'"k%d":%d' % (i, i) for i in range(20000)) + b"}"
        if what == 13:
            return text + b" " * (1 << 20)
        if what == 14:
            return b'{"ttlSeconds":' + b"9" * 50000 + b"}"
        return re.sub(rb":\s*\d+", rng.choice([b":1e400", b":01", b":+1", b":0x10", b":1.", b":.5", b":1_0", b":99999999999999999999"]), text)

    def duplicated(self, text):
        """The first key twice, the second time with something else."""
        got = re.match(rb'\{("[^"\\]*"):', text)
        return text[:-1] + b"," + got[1] + b":" + self.text_of(self.strange()) + b"}" if got else text

    def path_part(self, name, schema):
        rng = self.rng
        if rng.random() < 0.75 and self.known.get(name):
            return str(rng.choice(self.known[name][-rng.choice([3, 50]):])), True
        if rng.random() < 0.4:
            text = self.quote(str(self.value(schema, name)))
            return text, text not in ("", ".", "..")
        odd = rng.choice(["0", "-1", "01", "+1", "1e3", "1.0", " 1", "9223372036854775807", "9223372036854775808", "18446744073709551616",
                          "1" * 1000, "abc", "%00", "%2e%2e", "..", "%2F", "%5c", "a%2fb", "%F0%9F%A6%80", "%ff", "%", "%zz", "*", "~", "",
                          "'", "1;2", "1,2", "{lease}", "nobody", "a" * 5000, "％", "blue%20", "BLUE", "1%09", ".", "%2e"])
        return odd, False

    @staticmethod
    def quote(text):
        return "".join(c if c.isalnum() and c.isascii() or c in "-._~" else "".join("%%%02X" % b for b in c.encode("utf-8", "surrogatepass")) for c in text)

    def identity(self):
        """(name, headers): as whom."""
        rng = self.rng
        chance = rng.random()
        if chance < 0.45:
            return "admin", []
        if chance < 0.85:
            role = rng.choice(["operator", "tenant", "auditor", "admin"])
            if not self.tokens.get(role):
                body = {"user": "fuzz-" + role, "role": role, "ttlSeconds": 7200}
                if role == "tenant":
                    body["tenant"] = rng.choice(["blue", "red"])
                answer = self.local.ask("POST", self.prefix + "/tokens", body)
                if answer.status == 201:
                    self.tokens.setdefault(role, []).append(answer.json()["secret"])
                elif answer.status not in (400, 404, 409, 429, 503):
                    self.fail("a token can be made", answer, b"POST /tokens", json.dumps(body))
            if self.tokens.get(role):
                return role, [("Authorization", "Bearer " + rng.choice(self.tokens[role]))]
            return "admin", []
        good = rng.choice(sum(self.tokens.values(), []) or ["bh_x_" + "0" * 64])
        odd = rng.choice([
            "Bearer", "Bearer ", "bearer " + good, "Bearer  " + good, "Bearer " + good + " ", "Bearer " + good[:-1], "Bearer " + good[:-1] + "g",
            "Bearer " + good.upper(), "Basic " + base64.b64encode(b"admin:admin").decode(), "Bearer " + "a" * 8000, good, "Bearer bh_", "Bearer bh__",
            "Bearer bh_0_" + "0" * 64, "Bearer " + good + "," + good, "Negotiate x", "Bearer é", "Bearer \x01", b"Bearer \xff", "Bearer null"])
        return "odd", [("Authorization", odd)]

    # ---- one case
    def case(self):
        rng = self.rng
        method, path, operation = rng.choice(self.operations)
        valid = True  # as far as the document can tell
        who, headers = self.identity()
        over_tls = self.tls is not None and headers and rng.random() < 0.6
        target = self.prefix
        parts_valid = True
        for piece in re.split(r"(\{[^}]*\})", path):
            if piece.startswith("{"):
                schema = next(p["schema"] for p in operation["parameters"] if p["in"] == "path" and p["name"] == piece[1:-1])
                text, known = self.path_part(piece[1:-1], schema)
                parts_valid = parts_valid and known
                target += text
            else:
                target += piece
        query = []
        key = None
        for parameter in operation.get("parameters", []):
            name, schema = parameter["name"], parameter["schema"]
            if parameter["in"] == "query" and rng.random() < 0.5:
                value = self.value(schema, name)
                if rng.random() < 0.4:
                    value = rng.choice(["", "0", "-1", "1001", "abc", "9" * 40, "1&" + name + "=2", "%00", "é", "1e2", " 5", "a" * 300, "+5", "0x1"])
                    bad = not str(value).isdigit() if schema["type"] == "integer" else False
                    if bad or schema["type"] == "integer" and self.schemas.mistakes(int(value), schema) or len(str(value)) > schema.get("maxLength", 1 << 60):
                        valid = False
                    if "&" in str(value):
                        valid = True  # which of two counts is not in the document
                    if not str(value).isascii() or " " in str(value):
                        parts_valid = False  # no request line any more
                    query.append(name + "=" + str(value))
                else:
                    query.append(name + "=" + self.quote(str(value)))
            elif parameter["in"] == "header" and rng.random() < 0.5:
                if name == "Idempotency-Key":
                    key = rng.choice(list(self.keys)[-20:] or ["k"]) if rng.random() < 0.3 else "k%d" % rng.randrange(10**9)
                    if rng.random() < 0.15:
                        key = rng.choice(["a" * 128, "a" * 129, "a" * 5000, " ", "é", "\x01", "a b", "\t"])
                        valid = valid and len(key) <= 128
                    headers.append((name, key))
                elif name == "If-Match":
                    headers.append((name, rng.choice((self.etags[-20:] or ['"1"']) + ["*", '"0"', '"999999"', "1", '"', 'W/"1"', '"1", "2"', "", "a" * 3000, "é", '"-1"', '"18446744073709551616"'])))
                elif name == "Last-Event-ID":
                    value = rng.choice(["0", "1", "5", "999999999", "-1", "abc", "", "9" * 30, "1 ", "é"])
                    valid = valid and value.isascii() and (value.strip().isdigit() or not value)
                    headers.append((name, value))
                else:
                    headers.append((name, str(self.value(schema, name))))
        if rng.random() < 0.03:
            query.append(rng.choice(["x=y", "=", "&&&", "%", "a=%ff", "&".join("a%d=b" % i for i in range(300)), "limit", "secret=1"]))
        if query:
            target += "?" + "&".join(query)
        if rng.random() < 0.02:
            target = rng.choice([target + "/", target + "/x", "/" + target, target.replace("/api", "/API"), target + "#f", "/", "*", "/api/v2/leases",
                                 "http://localhost" + target, target.replace("/", "//"), "/./" + target, "/metrics", "/healthz", "/readyz", target + "\\"])
            parts_valid = False
        if rng.random() < 0.02:
            method = rng.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW", "get"])
            parts_valid = False
        body = None
        chunked = False
        request_schema = None
        if "requestBody" in operation and rng.random() < 0.98:
            request_schema = operation["requestBody"]["content"]["application/json"]["schema"]
            value = self.value(request_schema)
            if isinstance(value, dict) and "name" in value and "{tenant}" in path and rng.random() < 0.8:
                value["name"] = target.rsplit("/", 1)[-1]
            chance = rng.random()
            if chance < 0.45:
                value = self.broken(value)
                for _ in range(rng.choice([0, 0, 0, 1, 3])):
                    value = self.broken(value)
            body = self.text_of(value)
            if self.schemas.mistakes(value, request_schema, null_is_absent=True):
                valid = False
            if chance > 0.85:
                body = self.torn(body)
                try:
                    valid = valid and len(body) <= 1 << 20 and not self.schemas.mistakes(json.loads(body), request_schema, null_is_absent=True)
                except (ValueError, RecursionError):
                    valid = False
            elif chance > 0.8:
                whole, body = body, self.duplicated(body)
                valid = valid and body == whole
            kind = "application/json"
            if rng.random() < 0.08:
                kind = rng.choice(["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "application/json; charset=utf-16",
                                   "application/json; charset=utf-8", "application/problem+json", "APPLICATION/JSON", "application/jsonx", "a" * 3000, "\x01", "application/json;"])
            if kind is not None and rng.random() < 0.99:
                headers.append(("Content-Type", kind))
            chunked = rng.random() < 0.1
        elif rng.random() < 0.02:
            body = rng.choice([b"{}", b"x", b"{" * 100, b"\0" * 2000])
        if rng.random() < 0.05:
            extra = rng.choice([("Accept", "text/html"), ("Accept", "*/*;q=0"), ("X-Forwarded-For", "127.0.0.1"), ("X-HTTP-Method-Override", "DELETE"),
                                       ("Cookie", "a=b"), ("Range", "bytes=0-1"), ("If-None-Match", "*"), ("If-Modified-Since", "x"), ("Expect", "100-continue"),
                                       ("Expect", "x"), ("Upgrade", "h2c"), ("Connection", "close"), ("Connection", "upgrade"), ("Host", "evil"), ("TE", "trailers"),
                                       ("Transfer-Encoding", "gzip"), ("Content-Encoding", "gzip"), ("X" * 200, "y" * 15000), ("Content-Length", "5"), ("X-A", b"\xff\xfe"),
                                       ("Origin", "https://evil.example"), ("Sec-WebSocket-Key", "x")])
            if extra[0] != "Content-Length" or body is not None:  # else it would wait for a body that is not to come
                headers.append(extra)
            parts_valid = False
        if operation["operationId"] == "revokeToken" and who == "admin" and rng.random() < 0.5:
            return  # else no role keeps a token for long
        stream = any("text/event-stream" in r.get("content", {}) for r in operation["responses"].values())
        data = wire.request(method, target, headers, body, chunked)
        self.requests += 1
        client = self.tls if over_tls else self.local
        try:
            if stream and method == "GET":
                answer = self.watch(client, data)
            else:
                answer = client.say(data, method == "HEAD")
        except wire.Gone as why:
            # A request that is none may be cut off; the server must still be there.
            client.fresh()
            if not self.alive():
                self.fail("the server is there", None, data, "gone: %s" % why)
            elif parts_valid and len(data) < 1 << 20:
                self.fail("every request gets an answer", None, data, str(why))
            return
        except (TimeoutError, OSError) as why:
            client.fresh()
            self.fail("every request is answered in %d s" % self.options.patience, None, data, repr(why))
            return
        except ValueError as why:
            client.fresh()
            self.fail("every answer is HTTP", None, data, str(why))
            return
        self.judge(method, operation, answer, data, valid, parts_valid, request_schema)
        if key is not None and parts_valid and method == "POST" and who == "admin" and not over_tls:
            self.replay(operation, key, data, answer)

    def watch(self, client, data):
        one = wire.Wire(client.target, client.ca, timeout=self.options.patience)
        try:
            one.send(data)
            status, headers = one.head()
            named = dict(headers)
            if named.get("content-type") != "text/event-stream":
                one.left = b"HTTP/1.1 %d x\r\n" % status + b"".join(("%s: %s\r\n" % h).encode() for h in headers) + b"\r\n" + one.left
                return one.answer()
            one.sock.settimeout(0.02)
            try:
                for _ in range(4):
                    one._more()
            except (TimeoutError, wire.Gone, OSError):
                pass
            return wire.Answer(status, headers, one.left, True)
        finally:
            one.close()

    def replay(self, operation, key, data, answer):
        body = data.split(b"\r\n\r\n", 1)[1], data.split(b" ", 2)[1]
        if key in self.keys:
            before, status, identity = self.keys[key]
            if before != body:
                if answer.status // 100 == 2:
                    self.fail("a key with another request is no second creation", answer, data, "")
            elif status == 201 and answer.status not in (429, 503):
                if answer.status not in (200, 201) or self.identity_of(answer) != identity:
                    self.fail("the same key and request get the first answer", answer, data, "first: %s %s" % (status, identity))
        elif answer.status == 201:
            self.keys[key] = (body, answer.status, self.identity_of(answer))

    @staticmethod
    def identity_of(answer):
        try:
            body = answer.json()
            return body.get("id", body.get("name"))
        except (ValueError, AttributeError):
            return None

    # ---- judging
    def judge(self, method, operation, answer, data, valid, parts_valid, request_schema):
        status = answer.status
        name = operation["operationId"]
        self.seen.setdefault(name, {}).setdefault(status, 0)
        self.seen[name][status] += 1
        kind = (answer.header("content-type") or "").split(";")[0]
        if status >= 500 and status not in (503, 501, 505):
            return self.fail("no 5xx but 503", answer, data, "")
        if status in (501, 505) and parts_valid:
            return self.fail("no 5xx but 503", answer, data, "")
        if answer.header("x-content-type-options") != "nosniff":
            self.fail("answers say nosniff", answer, data, "")
        if SECRET.search(answer.body) and not (name == "createToken" and status == 201):
            self.fail("no answer but that to its creation has a secret", answer, data, "")
        if b"\x00" in answer.body:
            self.fail("no answer has a NUL byte", answer, data, "")
        responses = operation["responses"]
        if not parts_valid or method == "HEAD":
            # Another route may have answered: what is checked is that it is JSON of the kind it says.
            if method != "HEAD" and status not in (204, 304) and status >= 400:
                self.problem(answer, data)
            elif method != "HEAD" and status < 300 and kind == "application/json":
                try:
                    answer.json()
                except ValueError as why:
                    self.fail("a JSON answer is JSON", answer, data, str(why))
            return None
        if str(status) not in responses and status not in TRANSPORT:
            return self.fail("the document lists the status", answer, data, "%s lists %s" % (name, ", ".join(responses)))
        if status == 405 and not answer.header("allow"):
            self.fail("405 says what is allowed", answer, data, "")
        if status in (429, 503) and not answer.header("retry-after"):
            self.fail("429 and 503 say when to come back", answer, data, "")
        if status == 401 and not answer.header("www-authenticate"):
            self.fail("401 says how", answer, data, "")
        if status >= 400:
            return self.problem(answer, data)
        if not valid and 200 <= status < 300 and method == operation_method(self, operation):
            wrong = []
            if request_schema is not None:
                try:
                    wrong = self.schemas.mistakes(json.loads(data.split(b"\r\n\r\n", 1)[1]), request_schema, null_is_absent=True)
                except ValueError as why:
                    wrong = [str(why)]
            self.fail("what the document forbids is refused", answer, data, "; ".join(wrong[:5]))
        content = responses.get(str(status), {}).get("content", {})
        if content and kind not in content:
            return self.fail("the content type is the document's", answer, data, "%s, listed: %s" % (kind, list(content)))
        if kind == "text/event-stream":
            self.stream(answer, data)
        elif kind == "application/json" and "application/json" in content:
            try:
                body = answer.json()
            except ValueError as why:
                return self.fail("a JSON answer is JSON", answer, data, str(why))
            wrong = self.schemas.mistakes(body, content["application/json"]["schema"])
            if wrong:
                return self.fail("an answer fits its schema", answer, data, "; ".join(wrong[:5]))
            self.learn(name, body, answer)
        return None

    def problem(self, answer, data):
        if (answer.header("content-type") or "").split(";")[0] != "application/problem+json":
            return self.fail("an error is a problem document", answer, data, "")
        try:
            body = answer.json()
        except ValueError as why:
            return self.fail("a problem document is JSON", answer, data, str(why))
        wrong = self.schemas.mistakes(body, {"$ref": "#/components/schemas/Problem"})
        if wrong:
            return self.fail("a problem fits its schema", answer, data, "; ".join(wrong[:5]))
        if body["status"] != answer.status:
            return self.fail("a problem says its own status", answer, data, "")
        if not body["detail"].strip():
            return self.fail("a problem has a sentence", answer, data, "")
        return None

    def stream(self, answer, data):
        for frame in wire.frames(answer.body.decode("utf-8", "replace")):
            if "data" not in frame:
                continue
            try:
                event = json.loads(frame["data"])
            except ValueError as why:
                return self.fail("an event is JSON", answer, data, str(why))
            wrong = self.schemas.mistakes(event, {"$ref": "#/components/schemas/Event"})
            if wrong:
                return self.fail("an event fits its schema", answer, data, "; ".join(wrong[:5]))
            if "id" in frame and str(event["id"]) != frame["id"]:
                return self.fail("an event's id is its frame's", answer, data, "")
        return None

    def learn(self, name, body, answer):
        if answer.header("etag"):
            self.etags.append(answer.header("etag"))
        if not isinstance(body, dict):
            return
        for item in body.get("items", [body])[:20] if isinstance(body.get("items", []), list) else []:
            if not isinstance(item, dict):
                continue
            for key, value in item.items():
                if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "" and key not in ("secret", "class", "state"):
                    known = self.known.setdefault(key, [])
                    known.append(value)
                    del known[:-100]
            place = {"Lease": "lease", "Token": "token", "Tenant": "tenant"}
            for word, key in place.items():
                if word in name and ("id" in item or "name" in item):
                    self.known.setdefault(key, []).append(item.get("id", item.get("name")) if word != "Tenant" else item.get("name"))
        if body.get("next"):
            self.known["after"].append(body["next"])
        if name == "createToken" and body.get("secret") and self.rng.random() < 0.2:
            self.tokens.setdefault(body["role"], []).append(body["secret"])
            del self.tokens[body["role"]][:-3]

    def fail(self, what, answer, data, why):
        text = data[:3000].decode("utf-8", "replace")
        said = "nothing" if answer is None else "%d %s %s" % (answer.status, answer.headers, answer.body[:1500].decode("utf-8", "replace"))
        self.failures.append((what, why, text, said))
        if len(self.failures) > 200:
            self.stop = True

    def alive(self):
        if self.options.pid:
            try:
                os.kill(self.options.pid, 0)
            except OSError:
                return False
        try:
            return wire.Client("unix:" + self.options.socket).ask("GET", "/healthz").status in (200, 503)
        except (OSError, wire.Gone, ValueError):
            return False

    def run(self):
        try:
            self.work()
        except Exception as why:  # a fuzzer that ends early would pass for one that found nothing
            self.fail("the fuzzer itself works to its end", None, traceback.format_exc().encode(), repr(why))

    def something_held(self):
        """There is a lease to renew and to evict."""
        made = self.local.ask("POST", self.prefix + "/leases", {"class": "share", "memory": 64 << 20, "weight": 1, "tenant": "blue", "ttlSeconds": 600})
        if made.status == 201:
            self.known.setdefault("lease", []).append(made.json()["id"])

    def work(self):
        options = self.options
        self.tls = wire.Client(options.url, ca=options.ca, timeout=options.patience) if options.url else None
        for name in ("blue", "red"):
            self.local.ask("POST", self.prefix + "/tenants", {"name": name})
        self.known["gpu"] = [gpu["gpu"] for gpu in self.local.ask("GET", self.prefix + "/host").json()["gpus"]]
        step = 0
        while time.monotonic() < self.deadline and not self.stop:
            self.case()
            step += 1
            if step % 60 == 1:
                # What the fuzz may have turned off, and what it took, comes back.
                self.local.ask("PUT", self.prefix + "/host/drain", {"draining": False})
                for gpu in self.local.ask("GET", self.prefix + "/host").json().get("gpus", []):
                    if "cordon" in gpu:
                        self.local.ask("DELETE", self.prefix + "/gpus/%s/cordon" % gpu["gpu"])
                for name in ("blue", "red"):
                    if self.local.ask("POST", self.prefix + "/tenants", {"name": name}).status == 409:
                        self.local.ask("PUT", self.prefix + "/tenants/" + name, {"name": name})
                answer = self.local.ask("GET", self.prefix + "/leases?limit=1000")
                for lease in answer.json().get("items", [])[20:] if answer.status == 200 else []:
                    if lease["state"] in ("active", "queued") and self.rng.random() < 0.5:
                        self.local.ask("DELETE", self.prefix + "/leases/%d" % lease["id"])
                self.something_held()
                for role in list(self.tokens):
                    self.tokens[role] = [one for one in self.tokens[role] if self.local.ask(
                        "GET", self.prefix + "/whoami", headers=[("Authorization", "Bearer " + one)]).status != 401]
                if not self.alive():
                    self.fail("the server is there", None, b"GET /healthz", "")
                    break


def operation_method(fuzzer, operation):
    return next(m for m, _, o in fuzzer.operations if o is operation)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--url")
    parser.add_argument("--ca")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pid", type=int)
    parser.add_argument("--patience", type=float, default=20, help="seconds until an answer must be there")
    parser.add_argument("--report", help="a file for every failure in full")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    print("# seed %d" % seed)
    first = wire.Client("unix:" + options.socket).ask("GET", "/api/v1/openapi.json")
    if first.status != 200:
        print("not ok - the OpenAPI document is served\n    %d %r\n0 passed, 1 failed" % (first.status, first.body[:300]))
        return 1
    document = first.json()
    fuzzers = [Fuzzer(options, document, seed * 1000 + i) for i in range(options.threads)]
    deadline = time.monotonic() + options.seconds
    for one in fuzzers:
        one.deadline = deadline
        one.start()
    for one in fuzzers:
        while one.is_alive():
            one.join(10)
            if sys.stderr.isatty():
                print("\r# %d requests, %d failures, %d s left " % (sum(f.requests for f in fuzzers), sum(len(f.failures) for f in fuzzers),
                                                                     deadline - time.monotonic()), end="", file=sys.stderr)
    # Chance gives every operation its turn, on a busy machine not within the time: what was not done once is asked for alone.
    last = fuzzers[0]
    every, patience = last.operations, time.monotonic() + 60
    for one in every:
        name = one[2]["operationId"]
        last.operations = [one]
        while time.monotonic() < patience and last.alive() and not any(200 <= status < 300 for f in fuzzers for status in f.seen.get(name, {})):
            last.something_held()
            for _ in range(20):
                last.case()
    last.operations = every
    failures = [f for one in fuzzers for f in one.failures]
    seen = {}
    for one in fuzzers:
        for name, statuses in one.seen.items():
            for status, times in statuses.items():
                seen.setdefault(name, {}).setdefault(status, 0)
                seen[name][status] += times
    total = sum(one.requests for one in fuzzers)
    for name in sorted(seen):
        print("# %-14s %s" % (name, "  ".join("%d: %d" % (s, n) for s, n in sorted(seen[name].items()))))
    passed = failed = 0
    grouped = {}
    for what, why, text, said in failures:
        grouped.setdefault(what, []).append((why, text, said))
    if options.report:
        with open(options.report, "w") as out:
            for what, why, text, said in failures:
                out.write("== %s\nwhy: %s\n-- sent\n%s\n-- came\n%s\n\n" % (what, why, text, said))
    alive = fuzzers[0].alive()
    for what in ("the fuzzer itself works to its end", "the server is there", "every request gets an answer", "every answer is HTTP", "no 5xx but 503", "the document lists the status",
                 "an answer fits its schema", "a problem fits its schema", "an error is a problem document", "what the document forbids is refused",
                 "no answer but that to its creation has a secret"):
        grouped.setdefault(what, [])
    if not alive:
        grouped["the server is there"].append(("at the end", "", ""))
    for what, cases in grouped.items():
        if not cases:
            passed += 1
            print("ok - %s" % what)
        else:
            failed += 1
            print("not ok - %s (%d times)" % (what, len(cases)))
            for why, text, said in cases[:3]:
                print("    %s" % why)
                print("    sent: %s" % text[:600].replace("\r", "").replace("\n", "\n      "))
                print("    came: %s" % said[:600])
    listed = {operation["operationId"] for item in document["paths"].values() for operation in item.values()}
    missing = sorted(name for name in listed if not any(200 <= s < 300 for s in seen.get(name, {})))
    if missing and options.seconds >= 20:
        failed += 1
        print("not ok - every operation was done at least once\n    never: %s" % ", ".join(missing))
    else:
        passed += 1
        print("ok - every operation was done at least once")
    if total < 10 * options.seconds:
        failed += 1
        print("not ok - it was a fuzz\n    %d requests in %d s" % (total, options.seconds))
    else:
        passed += 1
        print("ok - %d requests in %d s" % (total, options.seconds))
    print("%d passed, %d failed" % (passed, failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
