"""An HTTP/1.1 client that says exactly what it is told, and a JSON Schema checker: an outsider's view of the API.

Standard library alone. Nothing here knows the daemon's code; what an answer must be is read from the OpenAPI document.
"""
import json
import re
import socket
import ssl
import time

MOST = 64 << 20  # bytes of one answer


class Gone(Exception):
    """The connection ended before a whole answer came."""


class Answer:
    def __init__(self, status, headers, body, closes):
        self.status, self.headers, self.body, self.closes = status, headers, body, closes

    def header(self, name):
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def json(self):
        return json.loads(self.body)


class Wire:
    """One connection: over a Unix socket ("unix:/path") or TLS ("https://127.0.0.1:8443")."""

    def __init__(self, target, ca=None, cert=None, timeout=20):
        self.target = target
        if target.startswith("unix:"):
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(timeout)
            self.sock.connect(target[5:])
        else:
            host, port = re.fullmatch(r"https://([^:/]+):(\d+)", target).groups()
            raw = socket.create_connection((host, int(port)), timeout=timeout)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            if ca:
                context.load_verify_locations(ca)
            else:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            if cert:
                context.load_cert_chain(*cert)
            self.sock = context.wrap_socket(raw, server_hostname=host)
            self.sock.settimeout(timeout)
        self.left = b""

    def close(self):
        try:
            self.sock.close()
        except OSError:
            pass

    def _more(self):
        try:
            piece = self.sock.recv(65536)
        except (ConnectionError, ssl.SSLError) as why:
            raise Gone(str(why)) from why
        if not piece:
            raise Gone("closed")
        self.left += piece

    def send(self, data):
        """What a server refuses early it may stop reading: its answer is still there."""
        try:
            self.sock.sendall(data)
            return True
        except (ConnectionError, ssl.SSLError):
            return False

    def head(self):
        while b"\r\n\r\n" not in self.left:
            if len(self.left) > 1 << 20:
                raise Gone("a head of more than 1 MiB")
            self._more()
        head, self.left = self.left.split(b"\r\n\r\n", 1)
        lines = head.split(b"\r\n")
        got = re.fullmatch(rb"HTTP/1\.1 (\d{3}) [ -~]+", lines[0])
        if not got:
            raise ValueError("no status line: %r" % lines[0][:200])
        headers = []
        for line in lines[1:]:
            field = re.fullmatch(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~]*)", line)
            if not field:
                raise ValueError("no header: %r" % line[:200])
            headers.append((field[1].decode().lower(), field[2].decode().strip()))
        return int(got[1]), headers

    def answer(self, head_only=False):
        status, headers = self.head()
        while status == 100:
            status, headers = self.head()
        named = dict(headers)
        body = b""
        if not head_only and status not in (204, 304):
            if "transfer-encoding" in named or not named.get("content-length", "").isdigit():
                raise ValueError("an answer without Content-Length: %r" % headers)
            size = int(named["content-length"])
            if size > MOST:
                raise ValueError("an answer of %d bytes" % size)
            while len(self.left) < size:
                self._more()
            body, self.left = self.left[:size], self.left[size:]
        return Answer(status, headers, body, named.get("connection", "").lower() == "close")


def request(method, target, headers=(), body=None, chunked=False):
    """The bytes of one request; header values may be bytes that no client would send."""
    if isinstance(target, str):
        target = target.encode("utf-8", "surrogateescape")
    lines = [method.encode() + b" " + target + b" HTTP/1.1", b"Host: localhost"]
    for name, value in headers:
        value = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")
        lines.append(name.encode() + b": " + value)
    payload = b""
    if body is not None:
        if chunked:
            lines.append(b"Transfer-Encoding: chunked")
            payload = b"".join(b"%x\r\n%s\r\n" % (len(body[i:i + 4096]), body[i:i + 4096]) for i in range(0, len(body), 4096))
            payload += b"0\r\n\r\n"
        else:
            lines.append(b"Content-Length: %d" % len(body))
            payload = body
    return b"\r\n".join(lines) + b"\r\n\r\n" + payload


class Client:
    """Keeps a connection, makes a new one when it ended; adds a token."""

    def __init__(self, target, token=None, ca=None, cert=None, timeout=20):
        self.target, self.token, self.ca, self.cert, self.timeout = target, token, ca, cert, timeout
        self.wire = None

    def fresh(self):
        if self.wire:
            self.wire.close()
        self.wire = None

    def ask(self, method, path, body=None, headers=(), raw=False, chunked=False):
        headers = list(headers)
        if self.token and not any(name.lower() == "authorization" for name, _ in headers):
            headers.append(("Authorization", "Bearer " + self.token))
        if body is not None and not raw:
            body = json.dumps(body).encode()
            if not any(name.lower() == "content-type" for name, _ in headers):
                headers.append(("Content-Type", "application/json"))
        data = request(method, path, headers, body, chunked)
        return self.say(data, method == "HEAD")

    def say(self, data, head_only=False):
        again = self.wire is not None  # an idle connection may have been closed meanwhile
        while True:
            if self.wire is None:
                self.wire = Wire(self.target, self.ca, self.cert, self.timeout)
            whole = self.wire.send(data)
            try:
                answer = self.wire.answer(head_only)
            except Gone:
                self.fresh()
                if not again:
                    raise
                again = False
                continue
            if answer.closes or not whole:
                self.fresh()
            return answer

    def events(self, path, seconds, most=1000, headers=()):
        """Reads a stream for a while: (status, headers, text of the frames that came)."""
        wire = Wire(self.target, self.ca, self.cert, self.timeout)
        try:
            headers = list(headers)
            if self.token:
                headers.append(("Authorization", "Bearer " + self.token))
            wire.send(request("GET", path, headers))
            status, got = wire.head()
            named = dict(got)
            if "content-length" in named:
                while len(wire.left) < int(named["content-length"]):
                    wire._more()
                return status, got, wire.left.decode()
            until = time.monotonic() + seconds
            while time.monotonic() < until and wire.left.count(b"\n\n") < most:
                wire.sock.settimeout(max(0.001, until - time.monotonic()))
                try:
                    wire._more()
                except (TimeoutError, socket.timeout):
                    break
                except Gone:
                    break
            return status, got, wire.left.decode()
        finally:
            wire.close()


def frames(text):
    """Complete SSE frames: [{"id": .., "event": .., "data": ..}]; comments are left out."""
    out = []
    for block in text.split("\n\n")[:-1]:
        frame = {}
        for line in block.split("\n"):
            if line.startswith(":") or not line:
                continue
            key, _, value = line.partition(":")
            value = value[1:] if value.startswith(" ") else value
            frame[key] = frame[key] + "\n" + value if key in frame else value
        if frame:
            out.append(frame)
    return out


DATE_TIME = re.compile(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])[Tt]([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?([Zz]|[+-]([01]\d|2[0-3]):[0-5]\d)")


class Schemas:
    """JSON Schema 2020-12, the part an OpenAPI document of ours can use; an unknown keyword is an error of its own."""

    KNOWN = {"type", "enum", "const", "required", "properties", "additionalProperties", "propertyNames", "items", "minimum",
             "maximum", "minLength", "maxLength", "pattern", "format", "maxItems", "minItems", "maxProperties", "minProperties",
             "allOf", "anyOf", "oneOf", "$ref", "description", "default", "title", "examples", "example", "deprecated", "readOnly",
             "uniqueItems"}

    def __init__(self, document):
        self.document = document

    def resolve(self, schema):
        while isinstance(schema, dict) and "$ref" in schema:
            at = self.document
            for step in schema["$ref"].removeprefix("#/").split("/"):
                at = at[step.replace("~1", "/").replace("~0", "~")]
            schema = at
        return schema

    @staticmethod
    def is_a(value, kind):
        if kind == "object":
            return isinstance(value, dict)
        if kind == "array":
            return isinstance(value, list)
        if kind == "string":
            return isinstance(value, str)
        if kind == "boolean":
            return isinstance(value, bool)
        if kind == "null":
            return value is None
        if kind == "integer":
            return isinstance(value, int) and not isinstance(value, bool) or isinstance(value, float) and value.is_integer()
        if kind == "number":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        raise ValueError("no type " + kind)

    def mistakes(self, value, schema, at="", null_is_absent=False):
        """Sentences about everything that does not fit; empty: it conforms."""
        out = []
        schema = self.resolve(schema)
        if schema is True or schema == {}:
            return out
        unknown = set(schema) - self.KNOWN
        if unknown:
            raise ValueError("schema keywords this checker does not know: %s" % unknown)
        kinds = schema.get("type")
        if kinds is not None:
            kinds = kinds if isinstance(kinds, list) else [kinds]
            if not any(self.is_a(value, kind) for kind in kinds):
                return ["%s: is %.60r, not %s" % (at or "it", value, "/".join(kinds))]
        if "enum" in schema and value not in schema["enum"]:
            out.append("%s: %.60r is not in the enum" % (at, value))
        for sub in schema.get("allOf", []):
            out += self.mistakes(value, sub, at, null_is_absent)
        for word, wanted in (("anyOf", lambda n: n > 0), ("oneOf", lambda n: n == 1)):
            if word in schema and not wanted(sum(not self.mistakes(value, sub, at) for sub in schema[word])):
                out.append("%s: fits not as %s says" % (at, word))
        if isinstance(value, str):
            if len(value) < schema.get("minLength", 0) or len(value) > schema.get("maxLength", 1 << 60):
                out.append("%s: has %d characters" % (at, len(value)))
            if "pattern" in schema and not re.search(schema["pattern"].replace("$", r"\Z"), value):
                out.append("%s: %.60r does not match %s" % (at, value, schema["pattern"]))
            if schema.get("format") == "date-time" and not DATE_TIME.fullmatch(value):
                out.append("%s: %.60r is no date-time" % (at, value))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if value < schema.get("minimum", -float("inf")) or value > schema.get("maximum", float("inf")):
                out.append("%s: %s is out of bounds" % (at, value))
        elif isinstance(value, list):
            if len(value) > schema.get("maxItems", 1 << 60) or len(value) < schema.get("minItems", 0):
                out.append("%s: has %d items" % (at, len(value)))
            for i, item in enumerate(value):
                out += self.mistakes(item, schema.get("items", True), "%s[%d]" % (at, i), null_is_absent)
        elif isinstance(value, dict):
            for key in schema.get("required", []):
                if key not in value or null_is_absent and value[key] is None:
                    out.append("%s: lacks %s" % (at or "it", key))
            if len(value) > schema.get("maxProperties", 1 << 60):
                out.append("%s: has %d keys" % (at, len(value)))
            for key, item in value.items():
                if "propertyNames" in schema:
                    out += self.mistakes(key, schema["propertyNames"], "%s.%s (its name)" % (at, key))
                if key in schema.get("properties", {}):
                    if not (null_is_absent and item is None):
                        out += self.mistakes(item, schema["properties"][key], "%s.%s" % (at, key), null_is_absent)
                elif schema.get("additionalProperties", True) is False:
                    out.append("%s: has %r, which the document does not know" % (at or "it", key[:60]))
                elif isinstance(schema.get("additionalProperties"), dict):
                    if not (null_is_absent and item is None):
                        out += self.mistakes(item, schema["additionalProperties"], "%s.%s" % (at, key), null_is_absent)
        return out
