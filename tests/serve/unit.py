#!/usr/bin/env python3
"""The daemon under systemd's protocols: sd_notify(3), sd_listen_fds(3), the watchdog; and packaging/ held against systemd's own tools."""
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

from daemon import BIN, Checks, Daemon, Place, free_port, wait_for
import wire

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long
PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT, WALL = 17, 0x4206, 0x4207, 0x40000000
exposure_goal = 5.0  # systemd's own words: below 5 is "OK", below 7 "MEDIUM"


class Manager:
    """The end of NOTIFY_SOCKET that systemd has."""

    def __init__(self, name):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(name)
        self.name = "@" + name[1:] if name[0] == "\0" else name
        self.said = []  # (time, {KEY: value})

    def next(self, seconds):
        """(time, words) of the next datagram; None: there was none in that time."""
        self.socket.settimeout(max(seconds, 0.001))
        try:
            text = self.socket.recv(65536).decode()
        except (socket.timeout, BlockingIOError):
            return None
        self.said.append((time.monotonic(), dict(line.split("=", 1) for line in text.strip().split("\n"))))
        return self.said[-1]

    def hear(self, seconds):
        """Everything said in that time."""
        until, got = time.monotonic() + seconds, []
        while time.monotonic() < until:
            one = self.next(until - time.monotonic())
            if one:
                got.append(one)
        return got

    def until(self, key, seconds=20):
        """The words of the first datagram with that key; None: it did not come."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            one = self.next(end - time.monotonic())
            if one and key in one[1]:
                return one[1]
        return None

    def count(self, key, seconds):
        return sum(key in words for _, words in self.hear(seconds))


def start(daemon, manager, **more):
    daemon.twin.environment = dict(daemon.twin.environment, NOTIFY_SOCKET=manager.name, **more)
    daemon.process = subprocess.Popen([BIN + "/bulkhead", "serve", "--config", daemon.config], env=daemon.twin.environment,
                                      stdin=subprocess.DEVNULL, stdout=open(daemon.log, "a"), stderr=subprocess.STDOUT)
    return manager.until("READY")


def thread_named(pid, name):
    for thread in os.listdir("/proc/%d/task" % pid):
        with open("/proc/%d/task/%s/comm" % (pid, thread)) as got:
            if got.read().strip() == name:
                return int(thread)
    return None


class Stuck:
    """One thread of a process that does not go on, while all others do."""

    def __init__(self, thread):
        self.thread = thread

    def __enter__(self):
        for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
            if libc.ptrace(request, self.thread, None, None) != 0:
                raise OSError(ctypes.get_errno(), "ptrace")
        os.waitpid(self.thread, WALL)
        return self

    def __exit__(self, *_):
        libc.ptrace(PTRACE_DETACH, self.thread, None, None)


def told(checks):
    """READY, RELOADING, STOPPING."""
    with Place(start=False) as place:
        daemon, manager = place.daemon, Manager(os.path.join(place.work, "notify.sock"))
        ready = start(daemon, manager)
        checks.check("READY=1 comes once the daemon serves, with what it does in words",
                     ready and ready["READY"] == "1" and "serving" in ready.get("STATUS", ""), ready, daemon.said())
        checks.check("what was said before READY is a status, and no READY",
                     all(set(words) == {"STATUS"} for _, words in manager.said[:-1]) and len(manager.said) > 1, manager.said)
        checks.check("at READY it answers at once", daemon.local().ask("GET", "/readyz").status == 200)
        checks.check("no watchdog was asked for: none is fed", manager.count("WATCHDOG", 1) == 0)

        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        daemon.process.send_signal(signal.SIGHUP)
        reloading = manager.until("RELOADING")
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        checks.check("SIGHUP: RELOADING=1 with the clock of the moment, as Type=notify-reload asks for",
                     reloading and before <= int(reloading.get("MONOTONIC_USEC", 0)) <= after, reloading, (before, after))
        checks.check("and READY=1 again after it", manager.until("READY"))
        with open(daemon.config, "a") as out:
            out.write("no_such_key: 1\n")
        daemon.process.send_signal(signal.SIGHUP)
        checks.check("a config file with a mistake: READY=1 again all the same, for the old one stays",
                     manager.until("RELOADING") and manager.until("READY") and daemon.local().ask("GET", "/readyz").status == 200, daemon.said())

        daemon.process.send_signal(signal.SIGTERM)
        stopping = manager.until("STOPPING")
        checks.check("SIGTERM: STOPPING=1 before it ends, and it ends with 0", stopping and daemon.process.wait(30) == 0, stopping)
        checks.check("nothing is said after STOPPING", not manager.hear(0.3))
    with Place(start=False) as place:
        manager = Manager("\0bulkhead-test-%d" % os.getpid())
        checks.check("a manager that listens in the abstract namespace is told too", start(place.daemon, manager), place.daemon.said())


def watchdog(checks):
    with Place(start=False) as place:
        daemon, manager = place.daemon, Manager(os.path.join(place.work, "notify.sock"))
        period = 4
        if not checks.check("with WATCHDOG_USEC it is ready", start(daemon, manager, WATCHDOG_USEC=str(period * 1000000)), daemon.said()):
            return
        fed = [at for at, words in manager.hear(6) if "WATCHDOG" in words]
        gaps = [b - a for a, b in zip(fed, fed[1:])]
        checks.check("the watchdog is fed well within its period", len(gaps) >= 3 and max(gaps) < period / 2, gaps)
        loop = thread_named(daemon.process.pid, "control loop")
        if not checks.check("the loop's thread has a name", loop):
            return
        with Stuck(loop):
            began = time.monotonic()
            seen = wait_for(lambda: daemon.local().ask("GET", "/healthz").status == 503, 10)
            checks.check("a control loop that is stuck is no longer healthy, while HTTP still answers", seen)
            manager.hear(0.1)
            checks.check("and the watchdog is fed no more: systemd would end it", manager.count("WATCHDOG", 3) == 0)
            last = max([at for at, words in manager.said if "WATCHDOG" in words])
            checks.check("the last feeding was within a period of the loop's last turn", last - began < period, last - began)
        checks.check("when the loop turns again it is healthy and feeds again",
                     manager.until("WATCHDOG", 5) and wait_for(lambda: daemon.local().ask("GET", "/healthz").status == 200, 5))
        daemon.process.send_signal(signal.SIGSTOP)
        manager.hear(0.3)
        checks.check("a process that is stopped as a whole feeds nobody", manager.count("WATCHDOG", 3) == 0)
        daemon.process.send_signal(signal.SIGCONT)
        checks.check("and lives on", manager.until("WATCHDOG", 5))
    with Place(start=False) as place:
        manager = Manager(os.path.join(place.work, "notify.sock"))
        start(place.daemon, manager, WATCHDOG_USEC="1000000", WATCHDOG_PID="1")
        checks.check("a watchdog of another process is not fed", manager.count("WATCHDOG", 2) == 0)


def handed_over(place, port, local, pid=None, names=None):
    """The daemon with two listening sockets as descriptors 3 and 4; what it is told about them is for `pid`, or itself."""
    tcp = socket.socket()
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    tcp.bind(("127.0.0.1", port))
    tcp.listen(64)
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(local)
    unix.listen(64)
    daemon = place.daemon
    child = os.fork()
    if child == 0:
        try:
            environment = dict(daemon.twin.environment, LISTEN_FDS="2", LISTEN_PID=str(pid or os.getpid()), LISTEN_FDNAMES=names or "a:b")
            log = os.open(daemon.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            # Out of the way first: the descriptors may be 3 and 4 the other way round.
            high = [os.dup(one.fileno()) for one in (tcp, unix) for _ in range(4)][3::4]
            for number, one in zip((3, 4), high):
                os.dup2(one, number)
            os.closerange(5, 1024)
            os.execve(BIN + "/bulkhead", ["bulkhead", "serve", "--config", daemon.config], environment)
        finally:
            os._exit(127)
    return child, tcp, unix


def end(child):
    os.kill(child, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def activation(checks):
    def ready(client):
        def look():
            try:
                return client().ask("GET", "/readyz").status == 200
            except (OSError, wire.Gone):
                return False
        return wait_for(look)

    with Place(start=False) as place:
        daemon, port, local = place.daemon, free_port(), os.path.join(place.work, "given.sock")
        child, tcp, unix = handed_over(place, port, local)
        # Who comes before the daemon is ready waits in the socket and is served.
        early = wire.Client("unix:" + local, timeout=30)
        checks.check("who connects before the daemon is up waits in the handed-over socket, and is served", early.ask("GET", "/healthz").status == 200, daemon.said())
        checks.check("the Unix socket that was handed over serves", ready(lambda: wire.Client("unix:" + local, timeout=5)), daemon.said())
        token = wire.Client("unix:" + local, timeout=5).ask("POST", "/api/v1/tokens", {"user": "ada", "role": "admin"})
        secure = wire.Client("https://127.0.0.1:%d" % port, token.json().get("secret"), ca=daemon.certificate, timeout=5)
        checks.check("the TCP socket that was handed over serves TLS", secure.ask("GET", "/api/v1/host").status == 200)
        checks.check("those of the config file are not bound beside them", not os.path.exists(daemon.socket) and refuses(daemon.port))
        with open("/proc/%d/environ" % child, "rb") as got:
            checks.check("the descriptors came from LISTEN_FDS", b"LISTEN_FDS=2" in got.read())
        inherited = [line for pid in children(child) for line in sockets_of(pid) if line in sockets_of(child, (3, 4))]
        checks.check("no child process has them open", not inherited, inherited)
        checks.check("it ends with 0 and leaves the socket file to its owner", end(child) == 0 and os.path.exists(local))
        tcp.close()
        unix.close()
        os.unlink(local)

        child, tcp, unix = handed_over(place, port, local, pid=1)
        checks.check("sockets of another process (LISTEN_PID) are not taken: its own are bound",
                     ready(lambda: wire.Client("unix:" + daemon.socket, timeout=5)), daemon.said())
        end(child)
        tcp.close()
        unix.close()

    activate = shutil.which("systemd-socket-activate")
    if not activate:
        print("# systemd-socket-activate is not here: not run")
        return
    with Place(start=False) as place:
        daemon, port, local = place.daemon, free_port(), os.path.join(place.work, "given.sock")
        words = [activate, "-l", "127.0.0.1:%d" % port, "-l", local]
        for name in ("BULKHEAD_TWIN", "BULKHEAD_ROOT", "BULKHEAD_NVML", "LD_LIBRARY_PATH"):
            words += ["-E", "%s=%s" % (name, daemon.twin.environment[name])]
        log = open(daemon.log, "a")
        process = subprocess.Popen(words + [BIN + "/bulkhead", "serve", "--config", daemon.config], env=daemon.twin.environment,
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            wait_for(lambda: os.path.exists(local))
            time.sleep(0.3)
            with open("/proc/%d/comm" % process.pid) as got:
                checks.check("systemd-socket-activate: nothing runs until somebody connects", got.read().startswith("systemd-socket"))
            answer = wire.Client("unix:" + local, timeout=30).ask("GET", "/healthz")
            checks.check("the first who connects starts it and is answered", answer.status == 200, daemon.said())
            with open("/proc/%d/comm" % process.pid) as got:
                checks.check("it is the daemon that has the sockets now", got.read().strip() == "bulkhead")
            process.send_signal(signal.SIGTERM)
            checks.check("and it ends with 0", process.wait(30) == 0, daemon.said())
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def refuses(port):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) != 0


def children(pid):
    out = []
    for thread in os.listdir("/proc/%d/task" % pid):
        with open("/proc/%d/task/%s/children" % (pid, thread)) as got:
            out += [int(one) for one in got.read().split()]
    return out


def sockets_of(pid, only=None):
    out = set()
    for name in os.listdir("/proc/%d/fd" % pid):
        if only is not None and int(name) not in only:
            continue
        try:
            target = os.readlink("/proc/%d/fd/%s" % (pid, name))
        except OSError:
            continue
        if target.startswith("socket:"):
            out.add(target)
    return out


def units(checks):
    analyze = shutil.which("systemd-analyze")
    if not analyze:
        print("# systemd-analyze is not here: not run")
        return
    with Place(start=False) as place:
        names = sorted(one for one in os.listdir(os.path.join(ROOT, "packaging")) if one.endswith((".service", ".socket", ".timer", ".path")))
        files = []
        for name in names:
            with open(os.path.join(ROOT, "packaging", name)) as got:
                # The program lies elsewhere until it is installed.
                text = re.sub(r"/usr/bin/bulkhead\b", os.path.realpath(os.path.join(BIN, "bulkhead")), got.read())
            files.append(os.path.join(place.work, name))
            with open(files[-1], "w") as out:
                out.write(text)
        done = subprocess.run([analyze, "verify", "--man=no", *files], capture_output=True, text=True)
        ours = [line for line in (done.stdout + done.stderr).splitlines() if any(name in line for name in names)]
        checks.check("systemd-analyze verify finds nothing wrong with %s" % ", ".join(names), done.returncode == 0 and not ours, done.stdout + done.stderr)
        for name, file in zip(names, files):
            if not name.endswith(".service"):
                continue
            done = subprocess.run([analyze, "security", "--offline=true", "--no-pager", file], capture_output=True, text=True)
            if "unrecognized option" in done.stderr:
                print("# this systemd-analyze does not look at files: exposure not judged")
                return
            level = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
            checks.check("systemd-analyze security: the exposure of %s is below %g" % (name, exposure_goal),
                         level and float(level[1]) < exposure_goal, level[0] if level else done.stdout + done.stderr)
            # systemd's own list of what a service may have; each that we keep is said in the unit file with its reason.
            kept = set(re.findall(r"^CapabilityBoundingSet=(.*)$", open(file).read(), re.M)[0].split())
            reasons = " ".join(line for line in open(file).read().splitlines() if line.startswith("#"))
            missing = [one for one in kept if not re.search(r"\b%s\b" % one.replace("CAP_", "").replace("DAC_OVERRIDE", r"DAC_\*").replace("DAC_READ_SEARCH", r"DAC_\*"), reasons) and "DAC_*" not in reasons]
            checks.check("every capability that %s keeps has its reason beside it" % name, not missing, missing)


def main():
    checks = Checks()
    for one in (told, watchdog, activation, units):
        if len(sys.argv) < 2 or one.__name__ in sys.argv[1:]:
            one(checks)
    checks.done()


if __name__ == "__main__":
    main()
