"""Twins and daemons for the tests of the API: started on a free port and a temporary state, always stopped."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import wire  # noqa: E402

BIN = os.environ.get("BIN", os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "build", "bin"))
PREFIX = "/api/v1"

# Every pool in one server: slices cut on demand, slices that are there, shares, whole GPUs, passthrough.
NODE = """apiVersion: bulkhead/v1
kind: Node
gpus:
  - select: {index: "0-1"}
    mode: mig
    layout: dynamic
  - select: {index: "2"}
    mode: mig
    layout: [1g.10gb, 1g.10gb, 1g.10gb, 1g.10gb, 1g.10gb, 1g.10gb, 1g.10gb]
  - select: {index: "3-4"}
    mode: share
  - select: {index: "5-7"}
    mode: exclusive
"""

# One GPU cut, the others whole: leases of both classes, and a GPU whose slices differ.
ONE_CUT = """apiVersion: bulkhead/v1
kind: Node
gpus:
  - select: {index: "0"}
    mode: mig
    layout: [3g.40gb, 1g.10gb, 1g.10gb, 1g.10gb]
  - select: {index: "1-7"}
    mode: exclusive
"""


class Checks:
    """Sentences, as tests/lib.sh prints them."""

    def __init__(self):
        self.passed = self.failed = 0

    def check(self, sentence, holds, *seen):
        if holds:
            self.passed += 1
            print("ok - " + sentence, flush=True)
        else:
            self.failed += 1
            print("not ok - " + sentence)
            for one in seen:
                print("    " + str(one)[:1500].replace("\n", "\n    "))
            sys.stdout.flush()
        return bool(holds)

    def done(self):
        print("%d passed, %d failed" % (self.passed, self.failed))
        sys.exit(1 if self.failed else 0)


class Twin:
    def __init__(self, work, profile="dgx-h100", node=NODE):
        self.dir = os.path.join(work, "twin")
        subprocess.run([BIN + "/bulkhead", "twin", "up", profile, "--dir", self.dir], check=True, stdout=subprocess.DEVNULL)
        self.environment = dict(os.environ, BULKHEAD_TWIN=self.dir, BULKHEAD_ROOT=self.dir + "/root",
                                BULKHEAD_NVML=self.dir + "/lib/libnvidia-ml.so.1", LD_LIBRARY_PATH=self.dir + "/lib", NO_COLOR="1")
        self.environment.pop("BULKHEAD_STATE", None)
        self.node = None
        if node:
            self.node = os.path.join(work, "node.yaml")
            with open(self.node, "w") as out:
                out.write(node)

    def bulkhead(self, *words, check=True):
        return subprocess.run([BIN + "/bulkhead", *words], env=self.environment, capture_output=True, text=True, check=check)

    def apply(self):
        done = self.bulkhead("apply", "-f", self.node, "--yes", check=False)
        if done.returncode != 0:
            raise RuntimeError("apply: " + done.stdout + done.stderr)

    def down(self):
        subprocess.run([BIN + "/bulkhead", "twin", "down", "--dir", self.dir], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Daemon:
    """`bulkhead serve` on 127.0.0.1 and a Unix socket. `config`: keys of serve.yaml beside those."""

    def __init__(self, twin, work, config="", state=None, port=None, name="serve", prefix=()):
        self.twin, self.work, self.prefix = twin, work, list(prefix)
        self.state = state or os.path.join(work, "state")
        self.port = port or free_port()
        self.socket = os.path.join(work, name + ".sock")
        self.config = os.path.join(work, name + ".yaml")
        self.log = os.path.join(work, name + ".log")
        self.url = "https://127.0.0.1:%d" % self.port
        self.certificate = os.path.join(self.state, "serve.crt")
        with open(self.config, "w") as out:
            out.write("listen: 127.0.0.1:%d\nsocket: %s\nstate: %s\n" % (self.port, self.socket, self.state))
            if twin.node:
                out.write("node_file: %s\n" % twin.node)
            out.write(config)
        os.makedirs(self.state, mode=0o700, exist_ok=True)
        self.process = None

    def start(self, wait=20):
        self.process = subprocess.Popen(self.prefix + [BIN + "/bulkhead", "serve", "--config", self.config], env=self.twin.environment,
                                        stdin=subprocess.DEVNULL, stdout=open(self.log, "a"), stderr=subprocess.STDOUT)
        until = time.monotonic() + wait
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise RuntimeError("serve ended with %d:\n%s" % (self.process.returncode, self.said()))
            try:
                if wire.Client("unix:" + self.socket, timeout=5).ask("GET", "/readyz").status == 200:
                    return self
            except (OSError, wire.Gone):
                pass
            time.sleep(0.02)
        raise RuntimeError("serve is not ready after %d s:\n%s" % (wait, self.said()))

    def said(self):
        with open(self.log, errors="backslashreplace") as got:
            return got.read()[-4000:]

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self, wait=30):
        """SIGTERM; its exit code."""
        if self.process is None or self.process.poll() is not None:
            return None if self.process is None else self.process.returncode
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(wait)
        except subprocess.TimeoutExpired:
            self.kill()
            return "killed after %d s" % wait

    # As root on the socket: an admin.
    def local(self, timeout=20):
        return wire.Client("unix:" + self.socket, timeout=timeout)

    def tls(self, token=None, timeout=20, cert=None):
        return wire.Client(self.url, token, ca=self.certificate, timeout=timeout, cert=cert)

    def token(self, role, tenant=None, user=None, **more):
        body = {"user": user or role, "role": role, **more}
        if tenant:
            body["tenant"] = tenant
        answer = self.local().ask("POST", PREFIX + "/tokens", body)
        if answer.status != 201:
            raise RuntimeError("no token: %d %s" % (answer.status, answer.body.decode()))
        return answer.json()

    def tenant(self, name, **more):
        answer = self.local().ask("POST", PREFIX + "/tenants", {"name": name, **more})
        if answer.status not in (201, 409):
            raise RuntimeError("no tenant: %d %s" % (answer.status, answer.body.decode()))


class Place:
    """with Place() as place: a work folder, a twin, a running daemon; all gone at the end."""

    def __init__(self, config="", node=NODE, apply=False, start=True, profile="dgx-h100", config_name="serve", disk=None):
        self.config, self.node, self.apply, self.starts, self.profile = config, node, apply, start, profile
        self.disk = disk

    def __enter__(self):
        self.work = tempfile.mkdtemp(prefix="bulkhead-test.", dir=os.environ.get("TMPDIR", "/tmp"))
        os.chmod(self.work, 0o755)  # other users are tenants too
        try:
            self.twin = Twin(self.work, self.profile, self.node)
            if self.apply:
                self.twin.apply()
            self.daemon = Daemon(self.twin, self.work, self.config, state=self.disk)
            if self.starts:
                self.daemon.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if getattr(self, "daemon", None) and self.daemon.process and self.daemon.process.poll() is None:
            self.daemon.stop(10)
        if getattr(self, "twin", None):
            self.twin.down()
        shutil.rmtree(self.work, ignore_errors=True)


def mig(profile="1g.10gb", **more):
    return {"class": "mig", "profile": profile, "ttlSeconds": 600, **more}


def pretty(answer):
    return "%d %s" % (answer.status, answer.body.decode("utf-8", "replace")[:600])


def wait_for(what, seconds=30, step=0.05):
    """The first true value of what(); its last value after `seconds` of a quiet machine: a loaded one gets three times as many."""
    until = time.monotonic() + seconds * (3 if seconds >= 5 else 1)
    while True:
        value = what()
        if value or time.monotonic() > until:
            return value
        time.sleep(step)


__all__ = ["BIN", "PREFIX", "NODE", "ONE_CUT", "Checks", "Twin", "Daemon", "Place", "free_port", "mig", "pretty", "wait_for", "json"]
