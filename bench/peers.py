"""Who does what about the same Xid: bulkhead, DCGM, gpud and NVSentinel, with NVIDIA's own catalogue as judge.

    python3 bench/peers.py --dcgm TREE --gpud TREE --nvsentinel TREE [--all]

A TREE is a checkout, or a git directory without one. Nothing of theirs is kept here: their tables are read out of their
sources, and the judge is the workbook that NVSentinel carries unchanged. What is compared is what each would have done
(to restart a program, to reset a GPU ...), not words. bulkhead is asked as its users ask it: a line in, a remedy out.
"""
import argparse
import collections
import io
import json
import os
import re
import subprocess
import xml.etree.ElementTree as xml
import zipfile

NAMES = ["nothing", "program", "VM", "GPU reset", "GPU out", "host"]  # mildest first
BUCKETS = {  # what the catalogue's bucket does; None: the code alone does not decide it
    "IGNORE": 0, "RESTART_APP": 1, "XID_154_EVAL": 1, "CHECK_APP": 1, "RESTART_VM": 2, "RESET_GPU": 3, "WORKFLOW_XID_48": 3,
    "CHECK_UVM": 3, "CONTACT_SUPPORT": 4, "CHECK_MECHANICALS": 4, "RESTART_BM": 5, "WORKFLOW_XID_45": None, "XID_154": None,
    "WORKFLOW_NVLINK_ERR": None, "WORKFLOW_NVLINK5_ERR": None, "UPDATE_SWFW": None, "": None}
ACTS = {"none": 0, "end-process": 1, "drain-slice": 2, "recreate-slice": 2, "reset-gpu": 3, "rescan": 3,
        "restart-fabric-manager": 3, "quarantine": 4, "reboot": 5}
SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


class Tree:
    def __init__(self, path):
        self.path, self.bare = path, not os.path.isdir(os.path.join(path, "modules")) and not os.path.isdir(os.path.join(path, "components"))
        self.bare = self.bare and os.path.exists(os.path.join(path, "HEAD"))

    def read(self, name):
        if self.bare:
            return subprocess.run(["git", "-C", self.path, "show", "HEAD:" + name], check=True, capture_output=True).stdout
        with open(os.path.join(self.path, name), "rb") as file:
            return file.read()

    def commit(self):
        return subprocess.run(["git", "-C", self.path, "log", "-1", "--format=%h %cs", "HEAD"], capture_output=True, text=True).stdout.strip()


def workbook(content):
    """{sheet: [{column: text}]}"""
    book = zipfile.ZipFile(io.BytesIO(content))
    text_of = lambda node: "".join(t.text or "" for t in node.iter(SHEET + "t"))
    shared = [text_of(item) for item in xml.fromstring(book.read("xl/sharedStrings.xml")).iter(SHEET + "si")]
    sheets = {}
    for number, sheet in enumerate(xml.fromstring(book.read("xl/workbook.xml")).iter(SHEET + "sheet"), 1):
        rows = []
        for row in xml.fromstring(book.read(f"xl/worksheets/sheet{number}.xml")).iter(SHEET + "row"):
            cells = {}
            for cell in row.iter(SHEET + "c"):
                value = cell.find(SHEET + "v")
                if value is not None:
                    text = shared[int(value.text)] if cell.get("t") == "s" else value.text
                    cells[re.match("[A-Z]+", cell.get("r")).group()] = text
            rows.append(cells)
        sheets[sheet.get("name")] = rows
    return sheets


def switch_of(source, function):
    """The cases of a Go function that maps a string: {"RESET_GPU": "the body"}, default under None."""
    body = re.search(r"^func " + function + r"\(.*?^}", source, re.S | re.M).group()
    body = re.sub(r"//.*", "", body)
    cases = {}
    for labels, text in re.findall(r"\n\s*(case [^:]*|default):(.*?)(?=\n\s*case |\n\s*default:|\n\t}\n)", body, re.S):
        for label in re.findall(r'"([^"]*)"', labels) or [None]:
            cases[label] = text
    return cases


def nvsentinel(tree, book):
    source = tree.read("health-monitors/syslog-health-monitor/pkg/common/common.go").decode()
    proto = tree.read("data-models/protobufs/health_event.proto").decode()
    named = set(re.findall(r"(\w+) = \d+;", re.search(r"enum RecommendedAction {(.*?)}", proto, re.S).group(1)))
    cases = switch_of(source, "MapActionStringToProto")
    does = {"NONE": 0, "RESTART_VM": 2, "REPLACE_VM": 2, "COMPONENT_RESET": 3, "CONTACT_SUPPORT": 4, "RESTART_BM": 5}

    def act(bucket):
        if bucket not in named:
            bucket = re.search(r"RecommendedAction_(\w+)", cases.get(bucket, cases[None])).group(1)
        return does.get(bucket, 4)
    by_code = {}
    for row in book["Xids"][1:]:  # its reader counts the cells that are not empty, and takes the ninth
        cells = [row[c].strip() for c in sorted(row, key=lambda c: (len(c), c)) if row[c]]
        if len(cells) >= 9:
            by_code[int(row["B"])] = act(cells[8])
    return lambda code: by_code.get(code, 4), act


def gpud(tree):
    source = tree.read("components/accelerator/nvidia/xid/xid.go").decode()
    table = re.search(r"^var details = .*?^}", source, re.S | re.M).group()
    does = {"IgnoreNoActionRequired": 0, "CheckUserAppAndGPU": 1, "RebootSystem": 5, "HardwareInspection": 4}
    by_code = {}
    for code, entry in re.findall(r"\n\t(\d+): {(.*?)\n\t},", table, re.S):
        actions = re.findall(r"apiv1\.RepairActionType(\w+)", re.sub(r"//.*", "", entry))
        by_code[int(code)] = does[actions[0]] if actions else 0  # the first; a further one is for when it comes again
    cases = switch_of(source, "suggestedActionsFromBucket")

    def act(bucket):
        named = re.search(r"RepairActionType(\w+)", cases.get(bucket, cases.get(None, "")))
        return does[named.group(1)] if named else 0
    return by_code.get, act


def dcgm(tree):
    source = tree.read("modules/health/DcgmHealthWatch.cpp").decode()
    body = re.search(r"BuildXidMappings\(\)\s*{(.*?)\n}", source, re.S).group(1)
    return {int(code): result == "FAIL" for code, result in re.findall(r"{\s*(\d+),\s*{\s*DCGM_HEALTH_RESULT_(\w+)", body)}.get


def ours(program, lines):
    """[act of each line]: each on a GPU of its own, so that none belongs to another."""
    place = lambda i: f"{i // 0x1e0:04x}:{(i % 0x1e0) // 2 + 1:02x}:{i % 2:02x}"
    text = "".join(line.replace("GPU", place(i), 1) + "\n" for i, line in enumerate(lines))
    done = subprocess.run([program, "diagnose", "--json", "--from", "-"], input=text.encode(), capture_output=True)
    found = {i["at"]: i["remedy"]["act"] for i in json.loads(done.stdout)["incidents"] if i["at"]}
    return [ACTS.get(found.get(place(i) + ".0", "none"), 0) for i in range(len(lines))]


def count(judge, answers):
    """How often each agrees with the judge, is milder, is harsher, has no answer."""
    seen = collections.Counter()
    for key, wanted in judge.items():
        got = answers(key)
        seen["unknown" if got is None else "agrees" if got == wanted else "milder" if got < wanted else "harsher"] += 1
    return seen


def table(title, counts):
    print(f"\n{title}\n\n| | agrees | milder | harsher | unknown |\n|---|---|---|---|---|")
    for who, seen in counts.items():
        print(f"| {who} | " + " | ".join(str(seen[k]) for k in ("agrees", "milder", "harsher", "unknown")) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for peer in ("dcgm", "gpud", "nvsentinel"):
        parser.add_argument("--" + peer, required=True, metavar="TREE", type=Tree)
    parser.add_argument("--program", default="build/bin/bulkhead")
    parser.add_argument("--all", action="store_true", help="every row, not only those where somebody differs")
    args = parser.parse_args()
    print("DCGM %s, gpud %s, NVSentinel %s" % (args.dcgm.commit(), args.gpud.commit(), args.nvsentinel.commit()))

    book = workbook(args.nvsentinel.read("health-monitors/syslog-health-monitor/pkg/common/Xid-Catalog.xlsx"))
    rows = {int(r["B"]): r for r in book["Xids"][1:] if r.get("B", "").isdigit()}
    used = {code: r for code, r in rows.items() if any(r.get(c, "").strip().lower().startswith(("y", "x", "\u2713")) for c in "EFGH")}
    bucket = {code: r.get("I", "").strip() for code, r in used.items()}
    judge = {code: BUCKETS[b] for code, b in bucket.items() if BUCKETS[b] is not None}
    apart = sorted(code for code in used if code not in judge)
    print(f"catalogue: {len(rows)} codes, {len(used)} in use; {len(judge)} whose bucket says what to do")
    print("not decided by the code alone:", ", ".join(f"{c} {bucket[c] or '(empty)'}" for c in apart))

    sentinel, sentinel_bucket = nvsentinel(args.nvsentinel, book)
    lepton, lepton_bucket = gpud(args.gpud)
    fails = dcgm(args.dcgm)
    codes = sorted(judge)
    mine = dict(zip(codes, ours(args.program, [f"NVRM: Xid (PCI:GPU): {c}, pid=1234, name=python3, some words" for c in codes])))
    peers = {"bulkhead": mine.get, "gpud": lepton, "NVSentinel": sentinel}
    table("What is done, six steps: nothing < program < VM < GPU reset < GPU out until a person looked < host restarted",
          {who: count(judge, says) for who, says in peers.items()})
    # DCGM says WARN or FAIL and nothing of acts: whether the GPU goes on serving.
    serves = {code: int(level >= 3) for code, level in judge.items()}
    two = {who: (lambda code, says=says: None if says(code) is None else int(says(code) >= 3)) for who, says in peers.items()}
    two["DCGM"] = lambda code: None if fails(code) is None else int(fails(code))
    table("Whether the GPU goes on serving, two steps", {who: count(serves, says) for who, says in two.items()})

    decode = [r for r in book["Xid 144-150 Decode"][1:] if r.get("A", "").isdigit() and r.get("F", "").strip() in BUCKETS]
    decode = [r for r in decode if BUCKETS[r["F"].strip()] is not None]
    lines = []
    for row in decode:
        info = int(row["D"].strip().replace("-", "0"), 2)
        status = re.search(r"0x[0-9a-fA-F]+", row.get("E", "")) or re.search("0x0", "0x0")
        unit = row["B"].split("/")[0].strip()
        severity = "Nonfatal" if row.get("K", "").lower().startswith("non") else "Fatal"
        lines.append(f"NVRM: Xid (PCI:GPU): {row['A']}, {unit} {severity} XC0 i0 Link 04 "
                     f"({info:#010x} {int(status.group(), 16):#010x} 0x00000000 0x00000000 0x00000000 0x00000000)")
    wanted = {i: BUCKETS[r["F"].strip()] for i, r in enumerate(decode)}
    mine_decoded = ours(args.program, lines)
    table(f"Xid 144 to 150, {len(decode)} rows of the catalogue's second sheet",
          {"bulkhead": count(wanted, lambda i: mine_decoded[i]), "gpud": count(wanted, lambda i: lepton_bucket(decode[i]["F"].strip())),
           "NVSentinel": count(wanted, lambda i: sentinel_bucket(decode[i]["F"].strip()))})
    for i, row in enumerate(decode):
        if mine_decoded[i] != wanted[i]:
            print(f"bulkhead differs: {lines[i]} -> {NAMES[mine_decoded[i]]}, judge {row['F'].strip()}")

    print("\n| Xid | catalogue | judge | bulkhead | gpud | NVSentinel | DCGM |\n|---|---|---|---|---|---|---|")
    name = lambda level: "-" if level is None else NAMES[level]
    for code in codes:
        says = [mine[code], lepton(code), sentinel(code)]
        fail = fails(code)
        if args.all or any(s is not None and s != judge[code] for s in says) or (fail is not None and int(fail) != serves[code]):
            cells = [name(s) if s == judge[code] or s is None else f"**{name(s)}**" for s in says]
            last = "-" if fail is None else ("FAIL" if fail else "WARN")
            cells.append(last if fail is None or int(fail) == serves[code] else f"**{last}**")
            words = " ".join(rows[code].get("D", "").split())[:60]
            print(f"| {code} | {words}; {bucket[code]} | {name(judge[code])} | " + " | ".join(cells) + " |")


main()
