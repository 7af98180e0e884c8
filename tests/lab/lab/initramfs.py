"""The guest's file system: an archive of busybox, kernel modules and real tools (kept), then one of what is under test
and the scenario (made for each boot). The kernel unpacks such archives one after the other.
"""
import glob, os, re, shutil, stat, subprocess, tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
MODULES = """vfio vfio-pci vfio_iommu_type1 iommufd pci-stub nvme igb igbvf e1000 ipmi_si ipmi_devintf snd-hda-intel xhci-pci
  virtio_pci virtio_blk virtio_net ahci sd_mod ext4 crc32c_generic crc32c_intel aer_inject qemu_fw_cfg""".split()
TOOLS = """/usr/bin/bash /usr/bin/ipmitool /usr/sbin/driverctl /usr/bin/lspci /usr/bin/setpci /usr/bin/jq /usr/bin/strace /usr/bin/realpath""".split()


class Cpio:
    """A newc archive in memory."""

    def __init__(self):
        self.parts, self.count, self.folders = [], 0, set()

    def entry(self, name, mode, data=b""):
        self.count += 1
        encoded = name.encode() + b"\0"
        fields = [self.count, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0]
        head = b"070701" + b"".join(b"%08X" % f for f in fields) + encoded
        self.parts += [head, b"\0" * (-len(head) % 4), data, b"\0" * (-len(data) % 4)]

    def folder(self, name):
        if name and name not in self.folders:
            self.folder(os.path.dirname(name))
            self.folders.add(name)
            self.entry(name, stat.S_IFDIR | 0o755)

    def text(self, name, data, mode=0o644):
        self.folder(os.path.dirname(name))
        self.entry(name, stat.S_IFREG | mode, data)

    def link(self, name, target):
        self.folder(os.path.dirname(name))
        self.entry(name, stat.S_IFLNK | 0o777, target.encode())

    def file(self, name, source):
        with open(source, "rb") as f:
            self.text(name, f.read(), 0o755 if os.access(source, os.X_OK) else 0o644)

    def program(self, source, name=None):
        """A program with the libraries that the loader would give it here."""
        name = name or source
        self.file(name.lstrip("/"), source)
        seen = subprocess.run(["ldd", source], capture_output=True, text=True)
        for library in re.findall(r"(?:=> )?(/\S+) \(0x", seen.stdout):
            if library not in self.folders:
                self.folders.add(library)  # a name, taken once
                self.file(library.lstrip("/"), os.path.realpath(library))

    def bytes(self):
        self.entry("TRAILER!!!", 0)
        # Each archive of a row starts at a multiple of four; 512 is what cpio(1) pads to.
        whole = b"".join(self.parts)
        return whole + b"\0" * (-len(whole) % 512)


def unpacked_modules(kernel, into):
    """The wanted modules and what they need, uncompressed, with an index of their own."""
    trees = glob.glob(os.path.join(kernel, "lib/modules/*"))
    if not trees:
        return  # the lab's own kernel has everything inside
    tree = trees[0]
    version = os.path.basename(tree)
    if not os.path.exists(os.path.join(tree, "modules.dep")):
        subprocess.run(["depmod", "-b", kernel, version], check=True)
    needs = {}
    with open(os.path.join(tree, "modules.dep")) as f:
        for line in f:
            path, _, rest = line.partition(":")
            needs[re.sub(r"\.ko.*", "", os.path.basename(path)).replace("-", "_")] = [path, *rest.split()]
    for name in MODULES:
        for path in needs.get(name.replace("-", "_"), []):  # a kernel without it has it inside, or not at all
            target = os.path.join(into, "lib/modules", version, re.sub(r"\.(xz|zst)$", "", path))
            if os.path.exists(target):
                continue
            os.makedirs(os.path.dirname(target), exist_ok=True)
            source = os.path.join(tree, path)
            with open(target, "wb") as f:
                tool = {".xz": ["xz", "-dc"], ".zst": ["zstd", "-dc"]}.get(os.path.splitext(path)[1], ["cat"])
                subprocess.run([*tool, source], stdout=f, check=True)
    for index in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        if os.path.exists(os.path.join(tree, index)):
            shutil.copy(os.path.join(tree, index), os.path.join(into, "lib/modules", version, index))
    subprocess.run(["depmod", "-b", into, version], check=True)


def base(place, kernel):
    """The kept archive of one kernel; made again when this file or a tool is newer."""
    kept = os.path.join(place, f"base-{kernel}.cpio")
    programs = [t for t in TOOLS if os.path.exists(t)]
    busybox = shutil.which("busybox")
    newest = max(os.path.getmtime(os.path.realpath(p)) for p in [*programs, busybox, os.path.abspath(__file__)])
    if os.path.exists(kept) and os.path.getmtime(kept) > newest:
        return kept
    archive = Cpio()
    for folder in "proc sys dev tmp run etc root mnt usr/bin usr/sbin sbin lib64 var/lib/bulkhead".split():
        archive.folder(folder)
    archive.file("bin/busybox", busybox)
    for applet in subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split():
        if applet not in ("busybox", "bash", "realpath", "lspci"):
            archive.link(f"bin/{applet}", "busybox")
    archive.link("sbin/modprobe", "../bin/busybox")
    archive.link("bin/bash", "../usr/bin/bash")  # where scripts look for it
    for program in programs:
        archive.program(program)
    with tempfile.TemporaryDirectory(dir=place) as staging:
        unpacked_modules(os.path.join(place, f"kernel-{kernel}"), staging)
        for folder, _, names in os.walk(os.path.join(staging, "lib")):
            for name in names:
                path = os.path.join(folder, name)
                archive.file(os.path.relpath(path, staging), path)
    with open(kept + ".new", "wb") as f:
        f.write(archive.bytes())
    os.rename(kept + ".new", kept)
    return kept


def make(place, kernel, out, scenario, programs, files=()):
    """`out`: the kept archive, then init, the guest's library, `scenario`, `programs` {path: name} and `files` [(path, name)]."""
    archive = Cpio()
    guest = os.path.join(os.path.dirname(HERE), "guest")
    with open(os.path.join(guest, "init"), "rb") as f:
        archive.text("init", f.read(), 0o755)
    archive.file("lab/lib.sh", os.path.join(guest, "lib.sh"))
    archive.file("lab/scenario", scenario)
    for source, name in programs.items():
        archive.program(source, name)
    for source, name in files:
        archive.file(name, source)
    with open(out, "wb") as f, open(base(place, kernel), "rb") as kept:
        shutil.copyfileobj(kept, f)
        f.write(archive.bytes())
