"""Starting tenants, running windows over them, and leaving nothing behind."""
import os
import signal
import subprocess
import sys
import time

import board as board_module
from board import OTHER, REST, RUN

HERE = os.path.dirname(os.path.abspath(__file__))
TORCH = ("gemm", "train", "serve")


class SceneFailed(Exception):
    pass


class Tenant:
    def __init__(self, kind, scheme, asked, slot, process, log):
        self.kind, self.scheme, self.asked, self.slot, self.process, self.log = kind, scheme, asked, slot, process, log

    @property
    def name(self):
        return self.asked.name

    def tail(self):
        try:
            with open(self.log, errors="replace") as file:
                lines = [line.strip() for line in file if line.strip()]
            return " / ".join(lines[-3:])[-500:]
        except OSError:
            return ""


class Window:
    """What was seen between two moments."""

    def __init__(self, start, end, rates, latencies):
        self.start, self.end, self.rates, self.latencies = start, end, rates, latencies

    def rate(self, tenant):
        return self.rates[tenant.slot]

    def p(self, tenant, fraction):
        value = board_module.percentile(self.latencies[tenant.slot], fraction)
        return None if value is None else value * 1e3


class Stage:
    """The tenants of one scene. Use as a context: whatever happens, they end with it."""

    serial = 0

    def __init__(self, bench):
        Stage.serial += 1
        self.bench, self.tenants, self.extra = bench, [], []
        self.board = board_module.Board(os.path.join(bench.temporary, f"board{Stage.serial}"))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def name(self, kind):
        return f"b{Stage.serial}-{kind}-{len(self.tenants) + len(self.extra)}"

    def popen(self, scheme, asked, argv, log=None, stdout=None):
        words, additions = scheme.command(asked, argv)
        environment = {**os.environ, **self.bench.environment, **additions}
        handle = open(log or os.devnull, "wb")
        try:
            process = subprocess.Popen(
                words,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout or handle,
                stderr=handle,
                start_new_session=True,
                cwd=HERE,
            )
        except OSError as error:
            raise SceneFailed(f"{words[0]}: {error}") from None
        finally:
            handle.close()
        return process

    def start(self, kind, scheme, **asked):
        """One tenant, starting; wait() until all are ready."""
        slot, name = self.board.new_slot(), self.name(kind)
        what = self.bench.asked(name, **asked)
        log = os.path.join(self.bench.temporary, name + ".log")
        process = self.popen(scheme, what, self.bench.worker(kind, slot, self.board.path), log)
        tenant = Tenant(kind, scheme, what, slot, process, log)
        self.tenants.append(tenant)
        return tenant

    def program(self, scheme, argv, stdout=None, **asked):
        """A program that is not driven by the board."""
        name = self.name("program")
        log = os.path.join(self.bench.temporary, name + ".log")
        process = self.popen(scheme, self.bench.asked(name, **asked), argv, log, stdout)
        process.log, process.tenant_name = log, name
        self.extra.append(process)
        return process

    def wait(self, timeout=90):
        end = time.monotonic() + timeout
        while True:
            self.alive()
            missing = [t for t in self.tenants if not self.board.is_ready(t.slot)]
            if not missing:
                return
            if time.monotonic() > end:
                raise SceneFailed(
                    f"not ready after {timeout} s: {', '.join(t.name for t in missing)}: {missing[0].tail()}"
                )
            time.sleep(0.02)

    def alive(self, tenants=None):
        for tenant in tenants or self.tenants:
            code = tenant.process.poll()
            if code is not None:
                raise SceneFailed(f"tenant {tenant.name} ({tenant.scheme.name}) ended with {code}: {tenant.tail()}")

    def rest(self):
        for tenant in self.tenants:
            self.board.command(tenant.slot, REST)

    def go(self, running, other=()):
        for tenant in self.tenants:
            self.board.command(tenant.slot, OTHER if tenant in other else RUN if tenant in running else REST)

    def window(self, running, seconds, settle=0.8, other=(), during=None):
        """Lets exactly these run and says what they did. `other`: those that run the other way (serve: closed loop)."""
        seconds *= self.bench.pace
        self.go(running, other)
        time.sleep(settle)
        start = time.monotonic()
        if during:
            during(start)
        time.sleep(max(0.0, start + seconds - time.monotonic()))
        end = time.monotonic()
        time.sleep(0.05)  # so that the step across the end can be interpolated
        self.alive(running)
        closed = {t.slot for t in other}
        serve = [t for t in running if t.kind == "serve" and t.slot not in closed]
        return Window(
            start,
            end,
            {t.slot: self.board.rate(t.slot, start, end) for t in running if t not in serve},
            {t.slot: self.board.values(t.slot, start, end) for t in serve},
        )

    def stop(self, *tenants):
        for tenant in tenants:
            self.board.command(tenant.slot, board_module.END)
        self._end([t.process for t in tenants], grace=8)
        self.tenants = [t for t in self.tenants if t not in tenants]

    def close(self):
        for tenant in self.tenants:
            self.board.command(tenant.slot, board_module.END)
        self._end([t.process for t in self.tenants], grace=8)
        self._end(self.extra, grace=0.2)
        self.tenants, self.extra = [], []
        self.board.close()

    @staticmethod
    def _end(processes, grace):
        """Waits, asks, kills. Each leads a session of its own; what it leaves there gets a second and goes too."""
        for kind, patience in ((None, grace), (signal.SIGTERM, 3), (signal.SIGKILL, 3)):
            for process in processes:
                if kind and process.poll() is None:
                    signal_group(process.pid, kind)
            wait_until(lambda: all(p.poll() is not None for p in processes), patience)
        wait_until(lambda: not any(signal_group(p.pid, 0) for p in processes), 1)
        for process in processes:
            signal_group(process.pid, signal.SIGKILL)


def signal_group(group, kind):
    """False: there is no such group."""
    try:
        os.killpg(group, kind)
        return True
    except (ProcessLookupError, PermissionError):
        return False


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def torch_worker(kind, slot, path):
    return [sys.executable, os.path.join(HERE, "worker.py"), kind, str(slot), path]
