#!/usr/bin/env python3
"""kill -9 at every point, and what the next run makes of it.

strace kills the process on entering its N-th call of one kind that writes, locks, sends or kills, N = 1, 2, 3 ...
until a run survives; the points are found by counting, not by hooks in the program. Two ways: the parent alone (the
worker dies with it), and whoever gets there first of parent and worker. After each kill the next verb must bring the
host exactly to the node file, or exactly back; somebody else's instance stays; the journal can be read.

usage: crash.py BULKHEAD NVIDIA_SMI WORKDIR [--quick] [--jobs N] [--only CALL,CALL]
"""
import argparse, glob, hashlib, json, multiprocessing, os, shutil, signal, subprocess, sys, time

HERE = os.path.dirname(os.path.abspath(__file__))
# Calls by which the program changes anything outside its own memory; openat creates files, close lets locks go.
SYSCALLS = ["pwrite64", "write", "fdatasync", "fsync", "rename", "unlink", "ftruncate", "fcntl", "flock", "sendto",
            "sendmsg", "mkdir", "rmdir", "link", "kill", "fchmod", "chmod", "symlink", "clone", "wait4", "socketpair",
            "execve", "recvfrom", "munmap", "close", "openat"]
SPARSE = {"openat": 23, "close": 23, "munmap": 7, "fcntl": 5}  # frequent and mostly reading: every so many
# The quick run takes the calls that leave something outside the process, at the 1st, 7th, 43rd ... call.
QUICK = ["pwrite64", "write", "fdatasync", "fsync", "rename", "unlink", "fcntl", "sendto", "sendmsg", "mkdir", "clone"]
QUICK_GROWTH = 6

BEFORE = """apiVersion: bulkhead/v1
kind: Node
gpus:
  - select: {index: "0"}
    mode: mig
    layout: [{profile: 3g.40gb, at: 4}, {profile: 1g.10gb, at: 0}, {profile: 1g.10gb, at: 1}]
"""
# Every kind of step: destroy, mend (create-compute), create, MIG mode, persistence, power, clocks, governor, unit, files.
AFTER = """apiVersion: bulkhead/v1
kind: Node
gpus:
  - select: {index: "0"}
    mode: mig
    layout: [{profile: 2g.20gb, at: 4}, {profile: 1g.10gb, at: 0}, {profile: 1g.10gb, at: 1}]
    power_limit_w: 450
  - select: {index: "1"}
    mode: mig
    layout: [4g.40gb, {profile: 1g.10gb+me, at: 4}]
    persistence: true
    clocks: {lock_mhz: [1200, 1500]}
host:
  kernel_args: [iommu=pt]
  cpu_governor: performance
  units: [{name: nvidia-dcgm.service, enabled: true, active: true}]
  modprobe: [{name: bulkhead-test.conf, lines: ["options nvidia NVreg_EnableGpuFirmware=1"]}]
"""
KINDS = {"destroy-instance", "create-instance", "create-compute", "set-mig-mode", "set-persistence", "set-power-limit",
         "lock-clocks", "set-governor", "set-unit", "set-file"}


class Failure(Exception):
    pass


class Machine:
    def __init__(self, args, number):
        self.bulkhead, self.smi = args.bulkhead, args.nvidia_smi
        self.dir = os.path.join(args.work, f"twin-crash-{number}")
        self.root = os.path.join(self.dir, "root")
        self.node = os.path.join(args.work, f"after-{number}.yaml")
        self.before_node = os.path.join(args.work, f"before-{number}.yaml")
        with open(self.node, "w") as f: f.write(AFTER)
        with open(self.before_node, "w") as f: f.write(BEFORE)
        self.env = dict(os.environ, BULKHEAD_ROOT=self.root, BULKHEAD_NVML=f"{self.dir}/lib/libnvidia-ml.so.1", NO_COLOR="1")
        self.journal = os.path.join(self.root, "var/lib/bulkhead")
        self.saved = os.path.join(args.work, f"journal-{number}")

    def run(self, *command, prefix=(), ok=True, env=None):
        done = subprocess.run([*prefix, *command], env=env or self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
        if ok and done.returncode != 0:
            raise Failure(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def verb(self, *words, **how):
        return self.run(self.bulkhead, *words, **how)

    def nvidia_smi(self, *words):
        return self.run(self.smi, *words, env=dict(self.env, LD_LIBRARY_PATH=f"{self.dir}/lib"))

    def up(self):
        if os.path.exists(self.dir):
            self.run(self.bulkhead, "twin", "down", "--dir", self.dir, ok=False)
        self.verb("twin", "up", "--profile-file", f"{HERE}/small.yaml", "--dir", self.dir, "--stepped")
        # The twin's initramfs shows what it was made of, so that a forgotten update is seen.
        self.run(f"{self.root}/usr/sbin/update-initramfs", "-u")
        self.run(f"{self.root}/usr/sbin/update-grub")
        self.run(self.bulkhead, "apply", "-f", self.before_node, "--yes")
        # A stop of dcgm, so that the unit has a way to go; a compute instance of ours taken away by hand (R37);
        # an instance of somebody else's.
        self.set_unit()
        self.nvidia_smi("mig", "-i", "0", "-dci", "-gi", str(self.instance_at(0, 1)["id"]))
        self.nvidia_smi("mig", "-i", "0", "-cgi", "19", "-C")
        self.nvidia_smi("-i", "1", "-pm", "0")
        self.original = self.look()
        shutil.rmtree(self.saved, ignore_errors=True)
        shutil.copytree(self.journal, self.saved)
        plan = json.loads(self.verb("plan", "-f", self.node, "--json").stdout)
        self.kinds = {step["action"]["kind"] for step in plan["plan"]["steps"]}
        self.verb("apply", "-f", self.node, "--yes")
        self.target = self.look()
        self.verb("rollback", "--yes")
        self.must_equal(self.original, "after an apply and a rollback with no kill")
        self.reset()

    def set_unit(self):
        # As an administrator would, over the twin's own systemd socket.
        script = f"mount --bind {self.root}/run/systemd /run/systemd && systemctl disable --now nvidia-dcgm.service"
        self.run("unshare", "-m", "sh", "-c", script)

    def down(self):
        self.run(self.bulkhead, "twin", "down", "--dir", self.dir, ok=False)

    def reset(self):
        shutil.rmtree(self.journal, ignore_errors=True)
        shutil.copytree(self.saved, self.journal)

    def status(self):
        return json.loads(self.run(self.bulkhead, "twin", "status", "--dir", self.dir, "--json").stdout)

    def instance_at(self, gpu, start):
        return next(i for i in self.status()["gpus"][gpu]["instances"] if i["start"] == start)

    def look(self):
        """The host as the twin itself knows it, without what moves by itself."""
        state = self.status()
        out = {}
        for gpu in state["gpus"]:
            out[f"gpu{gpu['index']}"] = {
                "mig": gpu["mig"], "limit": gpu["power_limit_watts"], "persistence": gpu["persistence"], "clocks": gpu["clock_lock_mhz"],
                "instances": sorted([i["start"], i["profile"], i["size"], i["half_made"], sorted([c["profile"], c["size"]] for c in i["compute"])]
                                    for i in gpu["instances"])}
        out["units"] = {u["name"]: u for u in state["units"]}
        for path in sorted(glob.glob(f"{self.root}/sys/devices/system/cpu/cpufreq/policy*/scaling_governor")):
            out[path[len(self.root):]] = open(path).read().strip()
        for top in ("etc/default", "etc/modprobe.d", "boot"):
            for folder, _, files in os.walk(os.path.join(self.root, top)):
                out[folder[len(self.root):] + "/"] = "directory"
                for name in files:
                    path = os.path.join(folder, name)
                    if name.endswith(".new"): continue  # the commands' own: made again by their next run
                    out[path[len(self.root):]] = hashlib.sha256(open(path, "rb").read()).hexdigest()
        return out

    def must_equal(self, wanted, when):
        seen = self.look()
        if seen != wanted:
            lines = [f"  {key}: {wanted.get(key)} -> {seen.get(key)}" for key in sorted(wanted.keys() | seen.keys()) if wanted.get(key) != seen.get(key)]
            raise Failure(f"{when}, the host is not as it must be (wanted -> seen):\n" + "\n".join(lines))


def killed_run(machine, verb, syscall, number, follow):
    """Runs the verb with a kill at the number-th call; True when it was killed or could not go on."""
    words = {"apply": ["apply", "-f", machine.node, "--yes"], "rollback": ["rollback", "--yes"]}[verb]
    strace = ["strace", "-qq", "-o", "/dev/null", *(["-f"] if follow else []), "-e", f"trace={syscall}", "-e", f"inject={syscall}:signal=SIGKILL:when={number}"]
    done = machine.verb(*words, prefix=strace, ok=False)
    return done.returncode != 0, done


def in_flight(history):
    return any(step["state"] == "intended" for run in history for step in run["steps"])


def one_point(machine, verb, syscall, number, follow):
    """Returns False when the run survived: there are no further points."""
    if verb == "rollback":
        machine.verb("apply", "-f", machine.node, "--yes")
    hit, first = killed_run(machine, verb, syscall, number, follow)
    history = json.loads(machine.verb("history", "--json").stdout)
    began = history[0]["verb"] == verb and history[0]["run"] > (1 if verb == "apply" else 2)
    said = ""
    if verb == "apply":
        if began and number % 2 == 0 and history[0]["state"] == "failed" and not in_flight(history) and machine.look() == machine.original:
            pass  # the worker alone was killed: the parent took all back itself, and a rollback would take back the run before
        elif began and number % 2 == 0:
            said = machine.verb("rollback", "--yes").stdout
            machine.must_equal(machine.original, "after a rollback")
        else:
            said = machine.verb("apply", "-f", machine.node, "--yes").stdout
            machine.must_equal(machine.target, "after a second apply")
            machine.verb("verify", "-f", machine.node)
    else:
        if number % 2 == 0:
            said = machine.verb("apply", "-f", machine.node, "--yes").stdout
            machine.must_equal(machine.target, "after an apply over a rollback that was cut off")
    # In the end everything goes back: the run that was cut off and the one that continued it together.
    for _ in range(3):
        if machine.look() == machine.original and not in_flight(json.loads(machine.verb("history", "--json").stdout)): break
        said += machine.verb("rollback", "--yes").stdout
    machine.must_equal(machine.original, "after the last rollback")
    if in_flight(json.loads(machine.verb("history", "--json").stdout)):
        raise Failure("the journal still holds a step in flight")
    machine.reset()
    return hit


def enumerate_points(job):
    args, worker, verb, syscall, follow = job
    machine = MACHINES[worker] if worker in MACHINES else None
    if machine is None:
        machine = Machine(args, os.getpid())
        machine.up()
        MACHINES[worker] = machine
    stride = SPARSE.get(syscall, 1)
    number = 1
    points, failures = 0, []
    while True:
        try:
            hit = one_point(machine, verb, syscall, number, follow)
        except (Failure, subprocess.TimeoutExpired, KeyError, IndexError) as e:
            failures.append(f"{verb}, {syscall} #{number}{', worker too' if follow else ''}: {e}")
            if len(failures) >= 3: return verb, syscall, follow, points, failures
            machine.up()
            hit = True
        if not hit: break
        points += 1
        number = number * QUICK_GROWTH + 1 if args.quick else number + stride
    return verb, syscall, follow, points, failures


MACHINES = {}


def finish_machine(_):
    time.sleep(0.2)
    for machine in MACHINES.values(): machine.down()
    MACHINES.clear()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("bulkhead"), parser.add_argument("nvidia_smi"), parser.add_argument("work")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    first = Machine(args, 0)
    passed, failed = 0, 0

    def say(good, sentence, *more):
        nonlocal passed, failed
        passed, failed = passed + (1 if good else 0), failed + (0 if good else 1)
        print(("ok - " if good else "not ok - ") + sentence, flush=True)
        for text in more: print("    " + text.replace("\n", "\n    "), flush=True)

    try:
        first.up()
    except Failure as e:
        say(False, "the small machine comes up and an apply can be taken back", str(e))
        first.down()
        print(f"{passed} passed, {failed} failed")
        return 1
    first.down()
    say(first.kinds == KINDS, "the plan of the crash test has every kind of step", *([] if first.kinds == KINDS else [f"missing {KINDS - first.kinds}, new {first.kinds - KINDS}"]))
    jobs = [(args, 0, verb, syscall, follow) for verb in ("apply", "rollback") for follow in (False, True) for syscall in (QUICK if args.quick else SYSCALLS)
            if not args.only or syscall in args.only.split(",")]
    points = {}
    with multiprocessing.Pool(args.jobs) as pool:
        for verb, syscall, follow, count, failures in pool.imap_unordered(enumerate_points, jobs):
            where = f"{verb} killed on entering {syscall}" + (", parent or worker" if follow else "")
            points[(verb, follow)] = points.get((verb, follow), 0) + count
            if failures: say(False, f"{where}: {count} points", *failures)
            elif count: say(True, f"{where}: {count} points, each finished or undone by the next run")
        pool.map(finish_machine, range(args.jobs * 4), chunksize=1)
    total = sum(points.values())
    say(total >= (60 if args.quick else 1000) or bool(args.only), f"{total} points in all")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
