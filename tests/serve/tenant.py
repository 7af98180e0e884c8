#!/usr/bin/env python3
"""What a tenant does with a lease, with the programs a tenant would use: a login at a terminal, a CUDA program held in a
share, a slice in a container of podman's (where podman and runc are there)."""
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from daemon import BIN, PREFIX, Checks, Place, wait_for  # noqa: E402

BULKHEAD = os.path.join(BIN, "bulkhead")


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, words, environment):
        self.child, self.end = pty.fork()
        if self.child == 0:
            os.execvpe(words[0], words, environment)
        self.seen = ""

    def until(self, pattern, seconds=15):
        stop = time.monotonic() + seconds
        while not re.search(pattern, self.seen) and time.monotonic() < stop:
            if not select.select([self.end], [], [], 0.1)[0]:
                continue
            try:
                got = os.read(self.end, 4096)
            except OSError:
                break
            if not got:
                break
            self.seen += got.decode("utf-8", "replace")
        return re.search(pattern, self.seen) is not None

    def type(self, text):
        os.write(self.end, text.encode())

    def code(self):
        self.until("(?!)", 5)
        _, status = os.waitpid(self.child, 0)
        os.close(self.end)
        return os.waitstatus_to_exitcode(status)


def login(checks, place, home):
    daemon = place.daemon
    token = daemon.token("tenant", "vision", "ada")["secret"]
    environment = dict(place.twin.environment, HOME=home)
    shown = subprocess.run(["openssl", "x509", "-in", daemon.certificate, "-noout", "-fingerprint", "-sha256"],
                           capture_output=True, text=True, check=True).stdout.split("=")[1].strip()
    terminal = Terminal([BULKHEAD, "login", daemon.url], environment)
    asked = terminal.until(r"are they the same\?")
    checks.check("login at a terminal shows the server's fingerprint and asks", asked and shown.lower() in terminal.seen.lower(), terminal.seen)
    terminal.type("n\n")
    checks.check("who says no has sent nothing and kept nothing",
                 terminal.code() == 1 and not os.path.exists(home + "/.config/bulkhead/login.json"), terminal.seen)
    terminal = Terminal([BULKHEAD, "login", daemon.url], environment)
    terminal.until(r"are they the same\?")
    terminal.type("y\n")
    checks.check("who says yes is asked for the token", terminal.until(r"token \(not shown\)"), terminal.seen)
    terminal.type(token + "\n")
    code = terminal.code()
    checks.check("and is logged in", code == 0 and "as ada, tenant of vision" in terminal.seen, code, terminal.seen)
    checks.check("the token was not shown while it was typed", token not in terminal.seen, terminal.seen)
    mode = os.stat(home + "/.config/bulkhead/login.json").st_mode & 0o777
    checks.check("what was kept is nobody else's to read", mode == 0o600, oct(mode))
    return environment


def share(checks, place, environment):
    """`lease run` of a share holds the program from outside: its memory is the lease's."""
    run = [BULKHEAD, "twin", "run", "--dir", place.twin.dir, "--", BULKHEAD, "lease", "run"]
    fits = subprocess.run(run + ["--class", "share", "--memory", "2GiB", "--weight", "300", "--wait", "--", BIN + "/cuda_alloc", "--bytes", str(1 << 30), "malloc"],
                          env=environment, capture_output=True, text=True)
    lines = [json.loads(line) for line in fits.stdout.splitlines() if line.startswith("{")]
    got = next((line for line in lines if line["path"] == "malloc"), {})
    checks.check("a program in a share gets memory within its lease", fits.returncode == 0 and got.get("code") == 0, fits.stdout, fits.stderr)
    checks.check("and sees the lease's memory as the GPU's", got.get("total") == 2 << 30, got)
    beyond = subprocess.run(run + ["--class", "share", "--memory", "2GiB", "--weight", "300", "--wait", "--", BIN + "/cuda_alloc", "--bytes", str(3 << 30), "malloc"],
                            env=environment, capture_output=True, text=True)
    checks.check("beyond it CUDA itself answers out of memory", '"code": 2' in beyond.stdout, beyond.stdout, beyond.stderr)
    local = place.daemon.local()
    over = wait_for(lambda: all(one["state"] == "ended" for one in local.ask("GET", PREFIX + "/leases").json()["items"]))
    checks.check("leases made for a program are given back with it", over)

    # A lease that is released ends what runs in it.
    lease = json.loads(subprocess.run([BULKHEAD, "lease", "create", "--class", "share", "--memory", "2GiB", "--weight", "300", "--wait", "--json"],
                                      env=environment, capture_output=True, text=True, check=True).stdout)
    spin = subprocess.Popen(run + [str(lease["id"]), "--", BIN + "/cuda_alloc", "--hold", "60", "malloc"], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = spin.stdout.readline()
    line = line if '"malloc"' in line else spin.stdout.readline()
    tenants = subprocess.run([BULKHEAD, "share", "list", "--json"], env=environment, capture_output=True, text=True).stdout
    checks.check("the share is in the registry under the lease's name", "lease-%d" % lease["id"] in tenants, tenants)
    local.ask("DELETE", PREFIX + "/leases/%d" % lease["id"])
    try:
        code = spin.wait(30)
    except subprocess.TimeoutExpired:
        spin.kill()
        code = "it was still there after 30 s"
    checks.check("a share that is given back ends what runs in it", isinstance(code, int) and code != 0, code, line)
    gone = wait_for(lambda: local.ask("GET", PREFIX + "/leases/%d" % lease["id"]).json()["state"] == "ended")
    checks.check("and the lease is over when nothing of it is left", gone)


def container(checks, place, environment):
    if not shutil.which("podman") or not shutil.which("runc"):
        print("# podman and runc are not there: the CDI file is not tried with a container runtime")
        return
    root = place.work + "/image"
    for folder in ("bin", "dev", "proc", "sys", "etc", "tmp"):
        os.makedirs(os.path.join(root, folder))
    busybox = shutil.which("busybox")
    if not busybox:
        print("# busybox is not there: no container")
        return
    shutil.copy(busybox, root + "/bin/busybox")
    words = [BULKHEAD, "lease", "create", "--class", "mig", "--profile", "3g.40gb", "--ttl", "10m", "--wait", "--json"]
    mine, other = (json.loads(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout) for _ in range(2))
    device = mine["devices"][0]
    # The host's /dev and /run/cdi as the twin has them, in a mount namespace of the test's own.
    nodes = sorted({node for lease in (mine, other) for one in lease["devices"] for node in one["deviceNodes"]})
    script = place.work + "/container.sh"
    with open(script, "w") as out:
        out.write("set -e\nmount --make-rprivate /\nmkdir -p %s/dev\nmount -t tmpfs none %s/dev\n" % (place.work, place.work))
        out.write("cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty /dev/fd %s/dev/ 2>/dev/null || true\n" % place.work)
        for node in nodes:
            out.write("mkdir -p %s%s\nmknod %s%s c 1 3\n" % (place.work, os.path.dirname(node), place.work, node))
        out.write("mkdir -p %s/dev/pts %s/dev/shm /run/cdi\nmount --rbind /dev/pts %s/dev/pts\nmount --rbind /dev/shm %s/dev/shm\n" % ((place.work,) * 4))
        out.write("ln -sf pts/ptmx %s/dev/ptmx\nmount --bind %s/root/run/cdi /run/cdi\nmount --rbind %s/dev /dev\n" % (place.work, place.twin.dir, place.work))
        out.write("exec podman --runtime runc --root %s/podman --runroot %s/podman-run --storage-driver vfs --cgroup-manager cgroupfs"
                  " --events-backend none run --rm --network none --ulimit nofile=1024:1024 --ulimit nproc=1000:1000 --device \"$1\""
                  " --rootfs %s /bin/busybox sh -c '/bin/busybox env; cd /dev; /bin/busybox find . -name \"nvidia*\"'\n" % ((place.work,) * 2 + (root,)))
    done = subprocess.run(["unshare", "-m", "sh", script, device["cdi"]], capture_output=True, text=True, timeout=120)
    if done.returncode != 0 and re.search(r"cgroup|OCI permission|Operation not permitted|mount:", done.stderr):
        print("# this host lets podman start no container: " + done.stderr.strip().split("\n")[-1])
        return
    checks.check("podman starts a container with the lease's CDI name", done.returncode == 0, done.stdout, done.stderr)
    checks.check("it has the slice in its environment, and the lease's number",
                 "CUDA_VISIBLE_DEVICES=" + device["device"] in done.stdout and "BULKHEAD_LEASE=%d" % mine["id"] in done.stdout, done.stdout)
    inside = {"/dev/" + line[2:] for line in done.stdout.splitlines() if line.startswith("./nvidia")} - {"/dev/nvidia-caps"}
    checks.check("it has the slice's device files and no other's", inside == set(device["deviceNodes"]), sorted(inside), device["deviceNodes"])
    local = place.daemon.local()
    for lease in (mine, other):
        local.ask("DELETE", PREFIX + "/leases/%d" % lease["id"])
    gone = wait_for(lambda: not [name for name in os.listdir(place.twin.dir + "/root/run/cdi") if name.startswith("bulkhead.dev")])
    checks.check("the CDI files go with the leases", gone, os.listdir(place.twin.dir + "/root/run/cdi"))


def main():
    checks = Checks()
    with Place() as place:
        home = place.work + "/home"
        os.makedirs(home)
        place.daemon.tenant("vision")
        environment = login(checks, place, home)
        share(checks, place, environment)
        container(checks, place, environment)
    checks.done()


main()
