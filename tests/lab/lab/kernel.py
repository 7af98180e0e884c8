"""A kernel of the lab's own, "own": what Debian's kernels leave out (IOMMUFD with device nodes, groups without an IOMMU), compiled
from Debian's source package with tests/lab/kernel.config. Half a minute to fetch, about ten to compile; once.
"""
import glob, os, shutil, subprocess, tempfile

import fetch

CONFIG = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "kernel.config")
TOOLS = ["make", "gcc", "flex", "bison", "bc"]


def build(place):
    """Fills place/kernel-own with vmlinux. Raises fetch.Unavailable with the reason."""
    into = os.path.join(place, "kernel-own")
    if os.path.exists(os.path.join(into, "vmlinux")):
        return
    lacking = [t for t in TOOLS if not shutil.which(t)]
    if lacking:
        raise fetch.Unavailable(f"compiling a kernel needs {', '.join(lacking)}")
    archive = fetch.Archive(place)
    roomy = "/dev/shm" if shutil.disk_usage("/dev/shm").free > 6 << 30 else os.path.abspath(place)
    work = tempfile.mkdtemp(prefix="bulkhead-kernel.", dir=roomy)
    try:
        package = archive.newest(r"linux-source-6\.\d+")
        if not package:
            raise fetch.Unavailable("the configured Debian archive has no linux-source")
        archive.unpack(f"{work}/package", package)
        subprocess.run(["tar", "-C", work, "-xf", glob.glob(f"{work}/package/usr/src/linux-source-*.tar.*")[0]], check=True)
        tree = glob.glob(f"{work}/linux-source-*")[0]
        with open(f"{work}/log", "w") as log:
            for command in (["make", "allnoconfig", f"KCONFIG_ALLCONFIG={CONFIG}"], ["make", f"-j{os.cpu_count()}", "vmlinux"]):
                if subprocess.run(command, cwd=tree, stdout=log, stderr=log, stdin=subprocess.DEVNULL).returncode != 0:
                    shutil.copy(f"{work}/log", os.path.join(place, "kernel-own.log"))
                    raise fetch.Unavailable(f"the kernel does not compile; see {place}/kernel-own.log")
        os.makedirs(into, exist_ok=True)
        subprocess.run(["strip", "--strip-debug", "-o", os.path.join(into, "vmlinux"), f"{tree}/vmlinux"], check=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(archive.place, ignore_errors=True)
