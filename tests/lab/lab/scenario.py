"""A scenario is one shell file: lines "#: key words" say what machine it wants, the rest runs in the guest."""
import os, re

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KERNELS = ("6.1", "6.12", "own")


class Scenario:
    def __init__(self, path):
        self.path, self.name = path, os.path.basename(path)[:-3]
        self.what = ""           # one sentence
        self.set = "full"        # fast: also in ./do test; named: only when it is named
        self.kernels = ["6.1"]   # a boot for each
        self.parts = []          # of machine.PARTS
        self.iommu = "intel"     # of machine.IOMMU
        self.append = ["intel_iommu=on", "iommu=nopt"]  # more words of the kernel's command line
        self.qemu = 7            # 10: needs the backport
        self.cpu = ""            # more words of -cpu
        self.metal = True        # "metal no": the machine says that it is a virtual one
        self.disk = False        # a disk that survives power loss, mounted where the journal is
        self.limit = 120         # seconds for all boots of one kernel, twice that where the host is busy
        self.boots = 1           # how often the power may be lost, and one
        self.modules = []        # test modules compiled for this kernel (tests/lab/modules)
        self.files = []          # PATH in the repository, put into /lab
        self.tools = []          # more programs of this host for the guest, by their paths, with their libraries
        self.host = {}           # mark -> QMP command: what the host does when the guest says "mark NAME"
        with open(path) as f:
            for number, line in enumerate(f, 1):
                if line.startswith("#:"):
                    self.take(*line[2:].strip().partition(" ")[::2], number)
        from machine import IOMMU, PARTS
        for part in self.parts:
            self.expect(part in PARTS, f"no part '{part}'; there are {', '.join(PARTS)}")
        self.expect(self.iommu in IOMMU, f"no iommu '{self.iommu}'; there are {', '.join(IOMMU)}")
        self.expect(self.what, "a line '#: what ...' says in one sentence what it shows")

    def expect(self, good, words):
        if not good:
            raise SystemExit(f"{os.path.relpath(self.path)}: {words}")

    def take(self, key, value, number):
        value = value.strip()
        if key in ("what", "set", "iommu", "cpu"):
            setattr(self, key, value)
        elif key in ("qemu", "limit", "boots"):
            setattr(self, key, int(value))
        elif key in ("parts", "append", "modules", "files", "tools"):
            setattr(self, key, value.split())
        elif key == "kernel":
            self.kernels = value.split()
            self.expect(set(self.kernels) <= set(KERNELS), f"kernel is one of {', '.join(KERNELS)}")
        elif key in ("disk", "metal"):
            setattr(self, key, value != "no")
        elif key == "host":
            mark, _, words = value.partition(" ")
            self.host[mark] = words
        else:
            self.expect(False, f"line {number}: no key '{key}'")


def all_scenarios():
    folder = os.path.join(HERE, "scenarios")
    return [Scenario(os.path.join(folder, n)) for n in sorted(os.listdir(folder)) if re.fullmatch(r"[a-z0-9-]+\.sh", n)]
