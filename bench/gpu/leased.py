"""This machine's daemon and leases of a share on its GPU, for the benches that need tenants the daemon knows."""
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "..", "tests", "serve")]
from daemon import BIN, PREFIX, Daemon, pretty, wait_for  # noqa: E402


def node_of(gpu):
    return 'apiVersion: bulkhead/v1\nkind: Node\ngpus:\n  - select: {index: "%d"}\n    mode: share\n' % gpu


class Host:
    """This machine, as tests/serve/daemon.py wants one."""

    def __init__(self, work, node):
        self.dir, self.environment, self.node = work, dict(os.environ, NO_COLOR="1"), os.path.join(work, "node.yaml")
        with open(self.node, "w") as out:
            out.write(node)

    def run(self, *words):
        return subprocess.Popen(list(words), env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def down(self):
        pass


def with_daemon(name, machine_of, measure):
    """What measure(machine, daemon) returns, of the machine that machine_of(work) makes; nothing stays behind."""
    work = tempfile.mkdtemp(prefix="bulkhead-%s." % name, dir=os.environ.get("TMPDIR", "/tmp"))
    os.chmod(work, 0o755)
    machine = machine_of(work)
    try:
        daemon = Daemon(machine, work, "requests_per_second: 10000\n").start()
        try:
            return measure(machine, daemon)
        finally:
            daemon.stop(20)
    finally:
        machine.down()
        subprocess.run(["rm", "-rf", work], check=False)


def share_lease(api, tenant, memory=1 << 30):
    """Half of the GPU's time and so many bytes of it for the tenant, active: its number."""
    made = api.ask("POST", PREFIX + "/leases", {"tenant": tenant, "class": "share", "weight": 500, "memory": memory, "ttlSeconds": 3600})
    if made.status != 201:
        raise RuntimeError("no lease: " + pretty(made))
    lease = made.json()["id"]
    if not wait_for(lambda: api.ask("GET", PREFIX + "/leases/%d" % lease).json()["state"] == "active", 30):
        raise RuntimeError("the lease of %s does not begin" % tenant)
    return lease


def run_in(machine, gpu, lease, *words):
    return machine.run(BIN + "/bulkhead", "share", "run", "--untested", "--gpu", str(gpu), "--name", "lease-%d" % lease, "--", *words)
