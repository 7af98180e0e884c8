"""Software slices end to end on a twin: real launchers, arbiters and tenants; the driver below is the twin's."""
import json
import os
import signal
import subprocess
import sys
import time

bulkhead, twin, here = sys.argv[1], sys.argv[2], os.path.dirname(os.path.abspath(__file__))
passed = failed = 0
python = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable  # other users can run that one
program = open(here + "/tenant.py").read()


def check(sentence, good, seen=""):
    global passed, failed
    passed, failed = (passed + 1, failed) if good else (passed, failed + 1)
    print(("ok - " if good else "not ok - ") + sentence)
    if not good:
        print("    " + str(seen).replace("\n", "\n    ")[:2000])
    sys.stdout.flush()
    return good


def share(*words, **more):
    return subprocess.run([bulkhead, "share", *words], capture_output=True, text=True, timeout=60, **more)


def tenants():
    return {t["name"]: t for t in json.loads(share("list", "--json").stdout)["tenants"]}


def until(condition, seconds=15):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    return condition()


class Tenant:
    def __init__(self, name, *options):
        self.name = name
        self.process = subprocess.Popen([bulkhead, "share", "run", "--untested", "--name", name, *options, "--", python, "-c", program],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def __call__(self, words):
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def now(self):
        return tenants()[self.name]["now"]

    def end(self):
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        return self.process.wait(timeout=20)


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def alone():
    t = Tenant("a", "--memory", "1GiB", "--weight", "30")
    t("context")
    check("up to its cap a tenant gets every byte, past it the driver's own out-of-memory", t("fill 64") == "16" and t("alloc 2") == "status 51")
    check("what a program asks for its memory is its cap", t("info") == "1024 0", t("info"))
    now = until(lambda: (lambda n: n if n["groups"] and n["groups"][0]["sliceMicroseconds"] else None)(t.now()))
    check("its slice is in force and read back", now and t("slice") == str(now["groups"][0]["sliceMicroseconds"]), now)
    check("list says who it is, what it uses and what was refused", until(lambda: (lambda n: n["usedBytes"] == 1 << 30 and n["refused"] >= 2)(t.now())), t.now())
    check("the program inherits nothing of its launcher", "memfd" not in t("fds") and "seccomp" not in t("fds") and "share" not in t("fds"), t("fds"))
    check("the exit code is the program's", t("exit 7") == "" and t.process.wait() == 7)
    left = lambda: [f for f in os.listdir(os.path.join(twin, "root/run/bulkhead/share")) if f != "table.lock"]
    check("nothing of it is left", until(lambda: not left()), left())


def paths():
    t = Tenant("p", "--memory", "1GiB")
    t("context")
    m = t("managed 512")
    check("managed memory counts", t("alloc 512") != "status 51" and t("alloc 2") == "status 51" and until(lambda: t.now()["managedBytes"] == 512 << 20), t.now())
    check("and past the cap it is refused as the kernel would", t("managed 64") == os.strerror(12))
    t("unmanage " + m)
    time.sleep(0.2)  # a mapping just let through is believed for a tenth of a second
    filled = t("fill 64")
    check("what was unmapped is to be had again", filled == "8", filled)
    t.end()
    t = Tenant("p", "--memory", "1GiB")
    t("context")
    check("memory that an exported descriptor keeps stays charged", t("export 512") == "0" and t("fill 64") == "8")
    check("until its process ends", t.end() == 0 and True)
    t = Tenant("p", "--memory", "1GiB")
    t("context")
    check("what forked children hold counts", t("fork 512") == "x0" and t("fill 64") == "8" and t("fork 64") == "x51", t.now())
    for pid in t.now()["processes"]:
        if pid != t.now()["program"]:
            os.kill(pid, signal.SIGKILL)
    check("and comes back when they are gone", until(lambda: t.now()["usedBytes"] == 512 << 20), t.now())
    handle = t("alloc 256")
    check("what was freed is to be had again", t("free " + handle) == "0" and t("churn 300") == "done" and t("fill 64") == "8")
    t.end()


def asking():
    check("a program that is not there is an error with words", share("run", "--untested", "--", "/no/such").returncode == 2)
    check("so is one that cannot be run", share("run", "--untested", "--", "/etc/hostname").returncode == 2)
    r = share("run", "--untested", "--weight", "0", "--", "true")
    check("a weight of nothing is refused", r.returncode == 2 and "1 to 1000" in r.stderr, r.stderr)
    check("a GPU that is not there is named", "no GPU 99" in share("run", "--untested", "--gpu", "99", "--", "true").stderr)
    check("signals are told as a shell does", share("run", "--untested", "--", "sh", "-c", "kill -9 $$").returncode == 137)
    check("a program without GPU work runs as ever", share("run", "--untested", "--", "sh", "-c", "exit 3").returncode == 3)
    t = Tenant("n")
    t("context")
    r = share("run", "--untested", "--name", "n", "--", "true")
    check("two living tenants of one name are refused, with the way out", r.returncode == 2 and "another --name" in r.stderr, r.stderr)
    check("set changes weight, class and cap of a running tenant",
          share("set", "n", "--weight", "7", "--class", "interactive", "--memory", "128MiB").returncode == 0 and
          (lambda a: a["weight"] == 7 and a["class"] == "interactive")(tenants()["n"]))
    check("the new cap holds at once", until(lambda: t("info").startswith("128 ")) and t("fill 64") == "2", t("info"))
    check("set of nobody says so", share("set", "nobody", "--weight", "1").returncode == 2)
    t.end()
    if os.getuid() == 0:
        t = Tenant("u", "--user", "nobody", "--memory", "256MiB")
        check("a tenant of another user is that user", t("uid").split()[0] == str(__import__("pwd").getpwnam("nobody").pw_uid), t("uid"))
        t("context")
        check("and is held all the same", t("fill 64") == "4")
        t.end()


def together():
    a, b = Tenant("a", "--weight", "75"), Tenant("b", "--weight", "25")
    a("context"), b("context")
    slices = lambda: (int(a("slice")), int(b("slice")))
    check("two tenants' slices are as their weights", until(lambda: slices()[0] == 3 * slices()[1]), slices())
    share("set", "b", "--weight", "75")
    check("and follow a change", until(lambda: slices()[0] == slices()[1]), slices())
    wanted = a("slice")
    time.sleep(2.2)
    a("set-slice 90000")
    check("a tenant that sets its own slice is put back", until(lambda: a("slice") == wanted), a("slice"))
    check("and counted", until(lambda: (lambda n: n["selfSet"] + n["reasserted"] > 0)(a.now())), a.now())
    b.end()
    check("who is left alone has the GPU to itself", until(lambda: tenants()["a"]["plan"]["expected"] == 1.0), tenants())
    c = Tenant("c", "--gpu", "1", "--weight", "5")
    c("context 1")
    check("tenants of different GPUs do not divide anything", until(lambda: all(t["plan"]["expected"] == 1.0 for t in tenants().values() if t["now"]["groups"])), tenants())
    share("set", "c", "--ceiling", "30")
    duty = until(lambda: tenants()["c"]["plan"].get("duty"))
    check("a ceiling is a duty cycle", duty and abs(duty["onMicroseconds"] / duty["periodMicroseconds"] - 0.3) < 0.01, duty)
    seen = [tenants()["c"]["now"]["groups"][0]["on"] for _ in range(3) if not time.sleep(0.01)]
    check("top and list show them", "c" in share("top", "--once").stdout and "c" in share("list").stdout and seen is not None)
    a.end(), c.end()


def deaths():
    t, other = Tenant("t", "--memory", "1GiB"), Tenant("o", "--memory", "1GiB")
    t("context"), other("context")
    t("alloc 256")
    for n in range(3):
        before = until(lambda: t.now()["arbiter"])
        os.kill(before, signal.SIGKILL)
        check(f"an arbiter killed ({n + 1}) is replaced, and the tenant allocates on", t("churn 20") == "done" and until(lambda: t.now()["arbiter"] != before))
    now = until(lambda: (lambda n: n if n["usedBytes"] == 256 << 20 and n["groups"] else None)(t.now()))
    check("the new one knows what the tenant holds", now and t("fill 64") == "12", t.now())
    check("and its slice is held again", until(lambda: t("slice") == str(t.now()["groups"][0]["sliceMicroseconds"])), t.now())
    os.kill(t.process.pid, signal.SIGKILL)
    t.process.wait()
    check("a launcher killed leaves its arbiter and the tenant", "t" in tenants() and t("alloc 64") == "status 51" and t("info") == "1024 0", tenants().keys())
    now = t.now()
    share("set", "t", "--ceiling", "10")
    until(lambda: not t.now()["groups"][0]["on"])
    now = t.now()
    os.kill(now["arbiter"], signal.SIGKILL)
    check("with both gone the cap holds", t("alloc 2") in ("error 38", "status 51"), "")
    check("the program runs on", not gone(now["program"]))
    check("another tenant's arbiter clears up after them", until(lambda: "t" not in os.popen(f"cat {twin}/root/run/bulkhead/share/*.json").read().split('"name": "t"')[1:] and not
                                                                  os.path.exists(f"{twin}/root/run/bulkhead/share/{t.process.pid}.json")))
    other("alloc 64")
    check("the neighbour never noticed", other("info").split()[0] == "1024" and len(other.now()["troubles"]) == 0, other.now())
    t.process.stdin.close()
    other.end()
    t = Tenant("k", "--memory", "1GiB")
    t("context")
    arbiter = until(lambda: t.now()["arbiter"])
    os.kill(t.now()["program"], signal.SIGKILL)
    check("a tenant killed is gone from the table, its arbiter with it", t.process.wait() == 137 and until(lambda: gone(arbiter) and "k" not in tenants()))


def spin(name, *options, us=1000, seconds=3, program_options=()):
    return subprocess.Popen([bulkhead, "share", "run", "--untested", *(() if "--gpu" in options else ("--gpu", "0")), "--name", name, *options, "--", bins + "/cuda_spin",
                             "--us", str(us), "--seconds", str(seconds), *program_options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process):
    out, err = process.communicate(timeout=120)
    try:
        return json.loads(out)
    except ValueError:
        return {"error": out + err}


def running(*names, sliced=True):
    def all_run():
        now = {name: t["now"] for name, t in tenants().items()}
        return all(now.get(n) and now[n]["groups"] and (not sliced or now[n]["groups"][0]["sliceMicroseconds"]) for n in names)
    return until(all_run)


def cuda():
    a, b = spin("a", "--weight", "30", seconds=4), spin("b", "--weight", "70", seconds=4)
    check("two CUDA programs start as tenants", running("a", "b"))
    a, b = answer(a), answer(b)
    share_of_a = a.get("busy", 0) / max(a.get("busy", 0) + b.get("busy", 0), 1e-9)
    # Starts and ends do not overlap exactly: the tolerance is theirs. The scheduler's own test is exact.
    check("30 : 70 of a GPU's time is what they get", abs(share_of_a - 0.30) < 0.05, (a, b))
    check("and together nearly all of it", a.get("busy", 0) + b.get("busy", 0) > 0.9, (a, b))
    c = answer(spin("c", "--ceiling", "25"))
    check("a ceiling holds on an idle GPU", 0.15 < c.get("busy", 0) < 0.30, c)
    trainers = [spin(f"t{n}", us=1600, seconds=12) for n in range(3)]
    running("t0", "t1", "t2")
    i = spin("i", "--class", "interactive", us=1000, seconds=6, program_options=("--rate", "50"))
    running("i")
    plan = until(lambda: (lambda t: t if all(t[f"t{n}"]["plan"].get("turnMicroseconds") for n in range(3)) else None)(tenants()))
    check("beside an interactive tenant the others take turns", plan and not plan["i"]["plan"].get("turnMicroseconds"), tenants())
    i, trained = answer(i), [answer(t) for t in trainers]
    check("it gets its answers", i.get("done", i.get("requests", 0)) or "p50_us" in i or "p50" in json.dumps(i), i)
    check("and each of the others makes progress", all(t.get("busy", 0) > 0.15 for t in trained), trained)
    fault = spin("f", program_options=("--fault",))
    neighbour = answer(spin("n", seconds=2))
    check("an illegal address in one tenant is nobody else's", "error" not in neighbour and "700" in str(answer(fault)), neighbour)
    for mode in ((), ("--guard",)):
        r = share("run", "--untested", *mode, "--gpu", "0", "--memory", "1GiB", "--", bins + "/cuda_alloc")
        rows = [json.loads(line) for line in r.stdout.splitlines() if line.startswith("{")]
        check(f"every allocation path of CUDA runs under a cap{' of the guard' if mode else ''}",
              len(rows) > 5 and all(row["total"] <= 1 << 30 for row in rows if "total" in row), r.stdout + r.stderr)
        r = share("run", "--untested", *mode, "--gpu", "0", "--memory", "700MiB", "--", bulkhead, "share", "spin", work + "/board", str(1 << 30))
        check("and past it CUDA is out of memory", r.returncode == 3, (r.returncode, r.stderr))
    g = spin("g", "--guard", "--gpu", "1", seconds=4)
    h = spin("h", "--gpu", "1", seconds=4)
    running("g", "h", sliced=False)
    plan = until(lambda: (lambda t: t if all(n in t and t[n]["plan"].get("turnMicroseconds") for n in "gh") else None)(tenants()))
    check("a tenant of the guard and a held one take turns, on any GPU", plan and plan["g"]["now"]["groups"][0]["gpu"] == 1, tenants())
    g, h = answer(g), answer(h)
    check("and both get on", g.get("busy", 0) > 0.05 and h.get("busy", 0) > 0.05, (g, h))
    r = share("selftest", "--json")
    found = json.loads(r.stdout)
    check("the self-test says that this driver obeys", r.returncode == 0 and found["slices"] and found["pauses"] and found["memory"], found)
    subprocess.run([bulkhead, "twin", "break", "ignores-slices", "--dir", twin], check=True, stdout=subprocess.DEVNULL)
    r = share("selftest", "--json")
    found = json.loads(r.stdout)
    check("and that this one does not", r.returncode == 1 and not found["slices"], found)
    x, y = spin("x", "--weight", "25", seconds=5), spin("y", "--weight", "75", seconds=5)
    running("x", "y", sliced=False)
    plan = until(lambda: (lambda t: t if "x" in t and "y" in t and t["x"]["plan"].get("turnMicroseconds") else None)(tenants()))
    check("then shares are held by turns, and the line says why", plan and "does not obey slices" in plan["x"]["plan"]["why"], plan)
    x, y = answer(x), answer(y)
    check("and turns give what was asked", abs(x.get("busy", 9) / (x.get("busy", 9) + y.get("busy", 0)) - 0.25) < 0.08, (x, y))
    subprocess.run([bulkhead, "twin", "mend", "--dir", twin], check=True, stdout=subprocess.DEVNULL)


bins, work = os.path.dirname(bulkhead), os.path.dirname(twin)
for part in (alone, paths, asking, together, deaths, cuda):
    try:
        part()
    except Exception as error:  # a tenant that died, a command that hung
        check(f"{part.__name__} runs to its end", False, repr(error))
print(f"{passed} passed, {failed} failed")
sys.exit(failed != 0)
