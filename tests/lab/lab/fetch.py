"""What the lab is made of, from Debian packages: two kernels and a newer QEMU, unpacked below build/lab, not installed.

Kernel 6.1 is the one of Debian 12, 6.12 its backport. QEMU 10 (igb with virtual functions) is a backport as well. What
cannot be had is said, and the scenarios that need it are skipped with that reason.
"""
import glob, os, re, shutil, subprocess

KERNELS = {"6.1": r"linux-image-6\.1\.\d+-\d+-amd64", "6.12": r"linux-image-6\.12\.\d+\+deb\d+-amd64"}


class Unavailable(Exception):
    """Something from outside is not to be had; the message says what and why."""


def run(*command, **how):
    return subprocess.run(command, check=True, capture_output=True, text=True, **how).stdout


def version_key(name):
    return [int(n) for n in re.findall(r"\d+", name)]


class Archive:
    """apt, asked for main and backports of the archive this machine already uses. Its lists are the lab's own."""

    def __init__(self, place):
        self.place = os.path.abspath(os.path.join(place, "apt"))
        os.makedirs(os.path.join(self.place, "lists/partial"), exist_ok=True)
        targets = run("apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME) $(COMPONENT)", "Created-By: Packages").split("\n")
        main = [t.split() for t in targets if re.fullmatch(r"\S*debian/? \w+ main", t)]
        if not main:
            raise Unavailable("no Debian archive with component main is configured")
        uri, codename, _ = main[0]
        security = [t.split()[0:2] for t in targets if re.fullmatch(r"\S+ \w+-security main", t)]
        sources = os.path.join(self.place, "lab.sources")
        with open(sources, "w") as f:
            for where, suites in [(uri, f"{codename} {codename}-backports"), *[(u, s) for u, s in security]]:
                f.write(f"Types: deb\nURIs: {where}\nSuites: {suites}\nComponents: main\n"
                        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n")
        self.options = ["-o", f"Dir::Etc::sourcelist={sources}", "-o", "Dir::Etc::sourceparts=/dev/null",
                        "-o", f"Dir::State::lists={self.place}/lists", "-o", f"Dir::Cache={self.place}/cache"]
        os.makedirs(os.path.join(self.place, "cache/archives/partial"), exist_ok=True)
        try:
            run("apt-get", *self.options, "update", "-qq")
        except subprocess.CalledProcessError as e:
            raise Unavailable(f"apt-get update failed: {e.stderr.strip().splitlines()[-1:]}") from None

    def newest(self, pattern):
        names = [n for n in run("apt-cache", *self.options, "pkgnames").split() if re.fullmatch(pattern, n)]
        return max(names, key=version_key, default=None)

    def unpack(self, into, *packages):
        fresh = into + ".new"
        shutil.rmtree(fresh, ignore_errors=True)
        os.makedirs(fresh)
        try:
            run("apt-get", *self.options, "download", "-qq", *packages, cwd=fresh)
        except subprocess.CalledProcessError as e:
            raise Unavailable(f"apt-get download {' '.join(packages)}: {e.stderr.strip()[-300:]}") from None
        for package in glob.glob(os.path.join(fresh, "*.deb")):
            run("dpkg", "-x", package, fresh)
            os.unlink(package)
        os.rename(fresh, into)


def plain_kernel(place):
    """The kernel out of its compressed image: QEMU starts it by its PVH entry, without seconds of emulated unpacking."""
    image = glob.glob(os.path.join(place, "boot/vmlinuz-*"))[0]
    with open(image, "rb") as f:
        data = f.read()
    for magic, command in [(b"\xfd7zXZ\0", ["xz", "-dc"]), (b"\x28\xb5\x2f\xfd", ["zstd", "-dc"]), (b"\x1f\x8b\x08", ["gzip", "-dc"])]:
        at = data.find(magic)
        while at >= 0:
            # What follows the stream is not of it, so these programs complain at the end; the ELF header is the judge.
            out = subprocess.run(command, input=data[at:], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
            if out.startswith(b"\x7fELF"):
                with open(os.path.join(place, "vmlinux"), "wb") as f:
                    f.write(out)
                return
            at = data.find(magic, at + 1)


def fetch(place):
    """Fills `place` with kernel-6.1, kernel-6.12 and qemu-10; returns {name: why it is missing}."""
    wanted = [f"kernel-{k}" for k in KERNELS] + ["qemu-10"]
    if all(os.path.isdir(os.path.join(place, w)) for w in wanted):
        return {}
    os.makedirs(place, exist_ok=True)
    missing = {}
    try:
        archive = Archive(place)
    except Unavailable as e:
        return {w: str(e) for w in wanted if not os.path.isdir(os.path.join(place, w))}
    for name, pattern in KERNELS.items():
        into = os.path.join(place, f"kernel-{name}")
        if os.path.isdir(into):
            continue
        package = archive.newest(pattern)
        try:
            if not package:
                raise Unavailable(f"the configured Debian archive has no {pattern}")
            archive.unpack(into, package)
            plain_kernel(into)
        except Unavailable as e:
            missing[f"kernel-{name}"] = str(e)
    into = os.path.join(place, "qemu-10")
    if not os.path.isdir(into):
        try:
            newer = [v for v in re.findall(r"^ *qemu-system-x86 \| (\S+) ", run("apt-cache", *archive.options, "madison", "qemu-system-x86"), re.M)
                     if version_key(v.split(":")[-1])[0] >= 8]
            if not newer:
                raise Unavailable("the configured Debian archive has no backport of QEMU")
            archive.unpack(into, f"qemu-system-x86={newer[0]}", f"qemu-system-common={newer[0]}", f"qemu-system-data={newer[0]}", "seabios")
        except Unavailable as e:
            missing["qemu-10"] = str(e)
    shutil.rmtree(archive.place, ignore_errors=True)
    return missing
