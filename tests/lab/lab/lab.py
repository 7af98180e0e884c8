#!/usr/bin/env python3
"""Boots the lab's machines and tells what their guests found.

usage: lab.py [--set fast|full] [--accel auto|tcg|kvm] [--kernel 6.1|6.12] [--part I/N] [--from POINT] [--keep DIR] [--list] [SCENARIO...]

Everything a guest prints as "ok - ..." or "not ok - ..." is a check; a machine that hangs, reboots or ends without saying so
is a failed one. Where a signal ends QEMU itself, that says nothing of bulkhead: the scenario goes on, once, in another machine,
from the last point it told or else from its beginning; when that one dies as well there is no verdict.
Exit: 0 when none failed, 1 when one did, 2 when none did and a scenario has no verdict.
"""
import argparse, json, os, re, shutil, signal, socket, subprocess, sys, tempfile, time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import bmc, fetch, initramfs, kernel as own_kernel, machine, modules, scenario as scenarios, sdr

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
PLACE = os.path.join(ROOT, "build/lab")
BIN = os.environ.get("BIN", os.path.join(ROOT, "build/bin"))
DISK_BYTES = 64 << 20


def patience():
    """A busy host gets more time: limits are for hangs, not for slowness."""
    return 1 + os.getloadavg()[0] / (os.cpu_count() or 1)


def qmp(path, words):
    """One command: "device_del id=nv0" becomes {"execute": "device_del", "arguments": {"id": "nv0"}}."""
    name, *pairs = words.split()
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(5)
        s.connect(path)
        stream = s.makefile("rw")
        stream.readline()  # the greeting
        for request in ({"execute": "qmp_capabilities"}, {"execute": name, "arguments": dict(p.split("=", 1) for p in pairs)}):
            stream.write(json.dumps(request) + "\n")
            stream.flush()
            while "return" not in (answer := json.loads(stream.readline())):
                if "error" in answer:
                    raise machine.Broken(f"QEMU refused {words}: {answer['error']['desc']}")


class Guest:
    """One machine of a scenario through all its boots."""

    def __init__(self, scenario, kernel, accelerator, folder):
        self.scenario, self.kernel, self.accelerator, self.folder = scenario, kernel, accelerator, folder
        self.lines, self.boot_seconds = [], []
        self.point = ""  # the last that the scenario told, from which it can go on
        self.died = None  # how the emulator ended, when it did by itself

    def prepare(self):
        if "bmc" in self.scenario.parts:
            with open(f"{self.folder}/sdr.bin", "wb") as f:
                f.write(sdr.repository())
        self.controller = bmc.Controller(f"{self.folder}/bmc") if "bmc-outside" in self.scenario.parts else None
        self.make_disk()
        programs = {f"{BIN}/bulkhead": "usr/bin/bulkhead"}
        files = [(os.path.join(ROOT, p), f"lab/{os.path.basename(p)}") for p in self.scenario.files]
        for module in self.scenario.modules:
            files.append((modules.built(PLACE, self.kernel, module), f"lab/{module}.ko"))
        for helper in ("lab_cut", "lab_sensors", "lab_vfio", "lab_write", "lab_time", "lab_passthrough",
                       "lab_answers"):  # tests/lab/programs
            programs[f"{BIN}/{helper}"] = f"usr/bin/{helper}"
        for tool in self.scenario.tools:
            programs[tool] = tool.lstrip("/")
        initramfs.make(PLACE, self.kernel, f"{self.folder}/initrd", self.scenario.path, programs, files)

    def make_disk(self):
        self.disk = f"{self.folder}/disk" if self.scenario.disk else None
        if self.disk:
            with open(self.disk, "wb") as f:
                f.truncate(DISK_BYTES)
            subprocess.run(["mke2fs", "-q", "-t", "ext4", "-F", self.disk], check=True)

    def run(self):
        self.prepare()
        deadline = time.monotonic() + self.scenario.limit * patience()
        number = 1
        try:
            while number <= self.scenario.boots:
                try:
                    if not self.boot(number, deadline):
                        return
                    number += 1
                except machine.Died as e:
                    if self.died:
                        raise machine.Died(f"{self.died}; and the second time: {e}")
                    self.died = str(e)
                    print(f"    # {e}: no verdict; once more from {self.point or 'the beginning'}", flush=True)
                    deadline = time.monotonic() + self.scenario.limit * patience()
                    if not self.point:
                        self.lines = [l for l in self.lines if not l.startswith("ok - ")]  # what failed has failed
                        number = 1
                        self.make_disk()
        finally:
            if self.controller:
                self.controller.close()
        raise machine.Broken(f"power was lost more often than '#: boots {self.scenario.boots}' allows")

    def boot(self, number, deadline):
        """True when the power was lost and the machine has to start again."""
        command, environment = machine.command(PLACE, self.scenario, self.kernel, self.accelerator, f"{self.folder}/initrd",
                                               self.folder, number, self.disk, self.point)
        for name in ("console", "results"):
            open(f"{self.folder}/{name}", "wb").close()
        started = time.monotonic()
        with open(f"{self.folder}/qemu", "wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            return self.follow(process, started, deadline)
        finally:
            process.kill()
            process.wait()
            with open(f"{self.folder}/console", "rb") as one, open(f"{self.folder}/console-all", "ab") as whole:
                whole.write(b"---- boot %d\n" % number + one.read())

    def follow(self, process, started, deadline):
        cut = None  # when the power goes
        with open(f"{self.folder}/results", "rb") as results:
            rest = b""
            while True:
                rest += results.read()
                *whole, rest = rest.split(b"\n")
                for line in (w.decode(errors="replace").rstrip("\r") for w in whole):
                    self.lines.append(line)
                    word = line.split(" ")
                    if word[0] != "LAB":
                        print(f"    {line}" if not re.match(r"(not )?ok - ", line) else line, flush=True)
                    elif word[1] == "booted":
                        self.boot_seconds.append(time.monotonic() - started)
                    elif word[1] == "done":
                        if word[2] != "0":
                            raise machine.Broken(f"the scenario's shell ended with {word[2]}")
                        return False
                    elif word[1] == "power-loss":
                        cut = time.monotonic() + (int(word[2]) if len(word) > 2 else 0) / 1000
                    elif word[1] == "point":
                        self.point = word[2]
                    elif word[1] == "mark" and word[2] in self.scenario.host:
                        words = self.scenario.host[word[2]]
                        if words.startswith("signal "):
                            process.send_signal(signal.Signals[words.split()[1]])
                        else:
                            qmp(f"{self.folder}/qmp", words)
                now = time.monotonic()
                if cut is not None and now >= cut:
                    return True
                if process.poll() is not None:
                    if process.returncode < 0:
                        name = next((s.name for s in signal.Signals if s == -process.returncode), f"signal {-process.returncode}")
                        raise machine.Died(f"{name} ended QEMU itself after {now - started:.0f} s")
                    raise machine.Broken(f"the machine ended by itself (QEMU exit {process.returncode}): {self.tail('qemu')}")
                if now > deadline:
                    raise machine.Broken(f"no end after {now - started:.0f} s" + (f"; --from {self.point} goes on there" if self.point else ""))
                time.sleep(0.005 if cut is not None else 0.03)

    def tail(self, name, lines=3):
        if not os.path.exists(f"{self.folder}/{name}"):
            return "it never started"
        with open(f"{self.folder}/{name}", errors="replace") as f:
            return " / ".join(f.read().strip().splitlines()[-lines:])


def kvm_works():
    """A guest under KVM is three times as quick, where it runs at all: a timed boot is the only proof."""
    with open("/proc/sys/kernel/random/boot_id") as f:
        key = f.read().strip()
    verdict = os.path.join(PLACE, "kvm-verdict")
    if os.path.exists(verdict):
        with open(verdict) as f:
            known, _, answer = f.read().partition(" ")
        if known == key:
            return answer == "yes"
    answer = "no"
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        with tempfile.TemporaryDirectory() as folder:
            with open(f"{folder}/smoke.sh", "w") as f:
                f.write("#: what It boots.\n#: limit 15\necho ok - up\n")
            try:
                Guest(scenarios.Scenario(f"{folder}/smoke.sh"), "6.1", "kvm", folder).run()
                answer = "yes"
            except (machine.Broken, OSError, subprocess.SubprocessError):
                pass
    with open(verdict, "w") as f:
        f.write(f"{key} {answer}")
    return answer == "yes"


def is_part(text):
    """"2/3" is the second of three."""
    if not re.fullmatch(r"[1-9]\d?/[1-9]\d?", text): return False
    one, of = map(int, text.split("/"))
    return one <= of


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--set", choices=["fast", "full"], default="full")
    arguments.add_argument("--accel", choices=["auto", "tcg", "kvm"], default=os.environ.get("BULKHEAD_LAB_ACCEL", "auto"))
    arguments.add_argument("--kernel", choices=scenarios.KERNELS)
    arguments.add_argument("--keep", help="keep each machine's console and results below this directory")
    arguments.add_argument("--part", help="I/N: of a scenario that walks through many points, every N-th from the I-th on (an odd N: steps sync in pairs)")
    arguments.add_argument("--from", dest="point", default="", metavar="POINT",
                           help="go on with a long walk from the point that a run without a verdict named")
    arguments.add_argument("--list", action="store_true")
    arguments.add_argument("names", nargs="*", metavar="SCENARIO")
    options = arguments.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that machines and folders are cleared away
    if options.part and not is_part(options.part):
        raise SystemExit(f"--part {options.part}: wanted is I/N with I from 1 to N")
    chosen = scenarios.all_scenarios()
    unknown = set(options.names) - {s.name for s in chosen}
    if unknown:
        raise SystemExit(f"no scenario {', '.join(sorted(unknown))}; --list shows them")
    chosen = [s for s in chosen if (s.name in options.names if options.names else s.set in ("fast", options.set, "named" if options.list else ""))]
    if options.list:
        for s in chosen:
            print(f"{s.name:24} {s.set:5} {'+'.join(s.kernels):9} {s.what}")
        return 0

    missing = fetch.fetch(PLACE)
    accelerator = options.accel if options.accel != "auto" else "kvm" if "kernel-6.1" not in missing and kvm_works() else "tcg"
    if options.point and not re.fullmatch(r"[A-Za-z0-9_,/:.-]{1,200}", options.point):
        raise SystemExit(f"--from {options.point}: wanted is a point as a run names it")
    passed = failed = skipped = undecided = 0
    boots, began = [], time.monotonic()
    for s in chosen:
        # In the fast set one kernel has to do: the newer one, where a scenario asks for both.
        kernels = [options.kernel] if options.kernel else s.kernels if options.set == "full" or options.names else s.kernels[-1:]
        for kernel in kernels:
            reasons = []
            if kernel == "own":
                try:
                    own_kernel.build(PLACE)
                except fetch.Unavailable as e:
                    reasons.append(str(e))
            reasons += [missing[n] for n in (f"kernel-{kernel}", *(["qemu-10"] if s.qemu == 10 else [])) if n in missing]
            reasons += [f"{tool} is not here" for tool in s.tools if not os.path.exists(tool)]
            try:
                for module in s.modules:
                    if not reasons: modules.built(PLACE, kernel, module)
            except fetch.Unavailable as e:
                reasons.append(str(e))
            print(f"\n== {s.name}, kernel {kernel}: {s.what}", flush=True)
            if reasons:
                skipped += 1
                print(f"skipped: {'; '.join(reasons)}")
                continue
            folder = tempfile.mkdtemp(prefix="bulkhead-lab.")
            if options.part: s.append = s.append + [f"lab.part={options.part}"]
            guest, started, trouble, verdict = Guest(s, kernel, accelerator, folder), time.monotonic(), None, True
            guest.point = options.point
            try:
                guest.run()
            except SystemExit:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            except machine.Died as e:
                verdict, undecided = False, undecided + 1
                print(f"no verdict - {s.name}: {e}" + (f"; --from {guest.point} goes on there" if guest.point else ""))
            except (machine.Broken, OSError, subprocess.SubprocessError) as e:
                trouble = str(e)
                print(f"not ok - {s.name}: the machine ran to its end\n    {trouble}\n    " + guest.tail("console-all", 40).replace(" / ", "\n    "))
            good = sum(l.startswith("ok - ") for l in guest.lines)
            bad = sum(l.startswith("not ok - ") for l in guest.lines) + (trouble is not None)
            if not good and not bad and verdict:
                bad += 1
                print(f"not ok - {s.name} checks something")
            passed, failed, boots = passed + good, failed + bad, boots + guest.boot_seconds
            print(f"-- {s.name}: {good} passed, {bad} failed; {len(guest.boot_seconds)} boots, {time.monotonic() - started:.1f} s", flush=True)
            if options.keep:
                shutil.copytree(folder, os.path.join(options.keep, f"{s.name}-{kernel}"), dirs_exist_ok=True,
                                ignore=shutil.ignore_patterns("initrd", "disk", "qmp"))
            shutil.rmtree(folder, ignore_errors=True)
    if boots:
        print(f"\n{accelerator}: {len(boots)} boots, {sorted(boots)[len(boots) // 2]:.1f} s each (median) until the scenario began; "
              f"{time.monotonic() - began:.0f} s in all, {skipped} skipped")
    if undecided:
        print(f"{undecided} without a verdict: the emulator died, twice each")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 2 if undecided else 0


if __name__ == "__main__":
    sys.exit(main())
