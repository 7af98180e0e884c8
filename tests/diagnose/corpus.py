"""Every line of the corpus alone; then a million lines of noise (a quarter where BULKHEAD_QUICK is not 0); then 100,000 lines as a bundle. Prints ok / not ok."""
import io, json, os, random, subprocess, sys, tarfile, time

program, corpus, room = sys.argv[1:4]
passed = failed = 0


def check(good, what):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    print(("ok - " if good else "not ok - ") + what)


def run(*args, text=None):
    done = subprocess.run([program, *args], input=text, capture_output=True, timeout=300)
    return done.returncode, done.stdout


def incidents(text):
    code, out = run("diagnose", "--json", "--from", "-", text=text.encode())
    assert code in (0, 1), out
    return json.loads(out)["incidents"]


def measure(path, name):
    """(what was expected, what was said, the line) of each line that is not as labelled."""
    rows = [line.rstrip("\n").split("\t", 2) for line in open(path, encoding="utf-8") if not line.startswith("#")]
    true_positive = false_positive = missed = 0
    wrong = []
    for expected, source, line in rows:
        kind, _, what = expected.partition(":")
        said = None
        if kind == "rule":  # "?": somebody ought to be told, whatever the rule is called
            code, out = run("explain", "--json", line)
            said = json.loads(out)["title"] if code == 0 else None
            found = said is not None and (what == "?" or said.startswith(what + " "))
            false_positive += said is not None and not found
        else:
            said = [f"xid:{i['xid']}" if i["xid"] is not None else f"sxid:{i['sxid']}" if i["sxid"] is not None else f"rule:{i['rule']}"
                    for i in incidents(line + "\n")]
            if kind == "none":
                false_positive += len(said)
                wrong += [(expected, said, line)] if said else []
                continue
            found = kind == "detail" or said == [expected]
            false_positive += sum(c != expected for c in said if kind != "detail")
        true_positive, missed = true_positive + found, missed + (not found)
        if not found:
            wrong.append((expected, said, line))
    precision = true_positive / max(1, true_positive + false_positive)
    recall = true_positive / max(1, true_positive + missed)
    print(f"# {name}: {len(rows)} lines, {sum(r[0].startswith('none') for r in rows)} of them nothing; precision {precision:.3f}, recall {recall:.3f}")
    for one in wrong:
        print("#", one)
    return wrong


for file, name in (("lines.tsv", "the corpus that the rules were written with"), ("heldout.tsv", "lines found afterwards"),
                   ("heldout2.tsv", "lines found after those"), ("heldout3.tsv", "and after those")):
    check(not measure(os.path.join(corpus, file), name), name + ": every line is said to be what it is")

# Whole pieces of logs: each incident that is in one, and no other.
right = due = said_at_all = 0
with open(os.path.join(corpus, "pastes.tsv"), encoding="utf-8") as listed:
    for name, expected, _ in (line.rstrip("\n").split("\t") for line in listed if not line.startswith("#")):
        with open(os.path.join(corpus, "pastes", name + ".log"), encoding="utf-8") as pasted:
            said = {one["id"].rsplit("#", 1)[0] for one in incidents(pasted.read())}
        wanted = set() if expected == "none" else set(expected.split())
        right, due, said_at_all = right + len(said & wanted), due + len(wanted), said_at_all + len(said)
        if said != wanted:
            print("#", name, "wanted", sorted(wanted), "said", sorted(said))
print(f"# pasted logs: {due} incidents in them; precision {right / max(1, said_at_all):.3f}, recall {right / due:.3f}")
check(right == due == said_at_all, "what people pasted of their logs: every incident in it, and no other")

# Noise: real words of kernel logs in every order, broken pieces of the rules' own words among them.
random.seed(8)
words = ["NVRM:", "Xid", "(PCI:0000:3b:00):", "79,", "nvidia", "AER:", "BAR", "1:", "eth0:", "link", "up", "usb", "1-1:", "new", "EXT4-fs",
         "(sda1):", "mounted", "segfault", "at", "0", "ip", "error", "4", "in", "libc.so.6", "audit:", "type=1400", "vfio", "group", "DMAR:", "mce:",
         "CPU0:", "temperature", "normal", "pid=7,", "name=python3,", "GPU", "has", "fallen", "systemd[1]:", "Started", "Session", "c1"]
noise = os.path.join(room, "noise.log")
many = 250_000 if os.environ.get("BULKHEAD_QUICK", "1") == "1" else 1_000_000
with open(noise, "w") as out:
    for i in range(many):
        if i % 50 == 0:
            out.write(f"Nov 23 10:00:00 gpu7 app[{i}]: NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.\n")
        else:
            out.write(f"[{i / 100:13.6f}] " + " ".join(random.choices(words, k=7)).replace("NVRM: Xid (PCI:", "NVRM Xid (PCI:") + "\n")
begin = time.monotonic()
code, out = run("diagnose", "--json", "--from", noise)
took = time.monotonic() - begin
found = json.loads(out)
check(found["incidents"] == [] and found["lines"] == many, f"no incident in {many} lines of noise and forgeries ({os.path.getsize(noise) / 1e6 / took:.0f} MB/s)")
for one in found["incidents"][:5]:
    print("#", one["title"], one["evidence"][0]["text"])
check(any("not believed" in note for note in found["notes"]), "forgeries are said")
os.unlink(noise)

# A bundle of 100,000 lines, one in a hundred a fault.
lines = [f"[{i / 10:13.6f}] " + (f"NVRM: Xid (PCI:0000:{i // 100 % 8 + 16:02x}:00): 31, pid={i}, name=train, Ch 00000010, intr 00000000. MMU Fault"
                                if i % 100 == 0 else " ".join(random.choices(words[10:], k=9))) for i in range(100_000)]
content = ("\n".join(lines) + "\n").encode()
path = os.path.join(room, "bundle.tar.gz")
with tarfile.open(path, "w:gz") as archive:
    info = tarfile.TarInfo("bundle/dmesg.txt")
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
times = []
for _ in range(5):
    begin = time.monotonic()
    code, out = run("diagnose", "--json", "--from", path)
    times.append(time.monotonic() - begin)
found = json.loads(out)
check(code == 1 and sum(i["count"] for i in found["incidents"]) == 1000, "every fault of a bundle of 100,000 lines is counted once")
print(f"# 100,000 lines, {len(content) / 1e6:.1f} MB unpacked: median {sorted(times)[2] * 1000:.0f} ms (goal 200 ms)")

# A process may hide nothing by its name.
burst = "".join(f"[  10.{i:06d}] NVRM: Xid (PCI:0000:3b:00): 13, pid={i}, name=a, b{i}, Ch 1\n" for i in range(200))
got = incidents(burst)
check(len(got) == 1 and got[0]["count"] == 200, "200 in a burst: one incident, none lost")
check(all(i["blame"]["charged"] is None for i in incidents("NVRM: Xid (PCI:0000:3b:00): 119, pid=5, name=nvidia-smi, Timeout\n")), "a caller is never charged")

# What leaves the house has no secrets.
root = os.path.join(room, "root")
os.makedirs(os.path.join(root, "var/log"), exist_ok=True)
with open(os.path.join(root, "var/log/syslog"), "w") as out:
    out.write("Nov 23 10:00:00 h app[1]: HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz password: hunter2 Authorization: Bearer abcdefghijklmnop\n"
              "Nov 23 10:00:00 h kernel: NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.\n")
case = os.path.join(room, "case.tar.gz")
code, out = run("--root", root, "bundle", "--out", case)
packed = tarfile.open(case).extractfile("bundle/var/log/syslog").read().decode()
check(code == 0 and not any(s in packed for s in ("hf_abc", "hunter2", "abcdefghijklmnop")), "a bundle holds no tokens and no passwords")
check([i["xid"] for i in json.loads(run("diagnose", "--json", "--from", case)[1])["incidents"]] == [79], "a bundle can be diagnosed elsewhere")
check(os.stat(case).st_mode & 0o777 == 0o600, "a bundle is its owner's alone")
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)
