"""Kernel modules of the tests, compiled against the headers of the lab's kernels, which are unpacked, not installed."""
import glob, os, re, shutil, subprocess

import fetch

SOURCES = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "modules")


def headers(place, kernel):
    into = os.path.abspath(os.path.join(place, f"headers-{kernel}"))
    version = os.path.basename(glob.glob(os.path.join(place, f"kernel-{kernel}/lib/modules/*"))[0])
    if not os.path.isdir(into):
        archive = fetch.Archive(place)
        try:
            wanted = [f"linux-headers-{version}", re.sub(r"-amd64$|\+deb\d+-amd64$", "", f"linux-headers-{version}") + "-common"]
            if not archive.newest(re.escape(wanted[1])):  # 6.12.1+deb12-amd64 goes with 6.12.1+deb12-common
                wanted[1] = f"linux-headers-{version}".replace("-amd64", "-common")
            kbuild = archive.newest(r"linux-kbuild-" + re.escape(version.replace("-amd64", ""))) or archive.newest(r"linux-kbuild-" + re.escape(kernel))
            archive.unpack(into, *wanted, *([kbuild] if kbuild else []))
        finally:
            shutil.rmtree(archive.place, ignore_errors=True)
        # The packages name each other by where they would be installed.
        for path in glob.glob(f"{into}/usr/src/linux-headers-*/Makefile") + glob.glob(f"{into}/usr/src/linux-headers-*/.kernelvariables"):
            with open(path) as f:
                text = f.read()
            with open(path, "w") as f:
                f.write(re.sub(r"(?<![\w.])/usr/", f"{into}/usr/", text))
    return f"{into}/usr/src/linux-headers-{version}"


def built(place, kernel, module):
    """The path of MODULE.ko for `kernel`."""
    out = os.path.join(place, "modules", kernel)
    target, source = os.path.join(out, f"{module}.ko"), os.path.join(SOURCES, f"{module}.c")
    if os.path.exists(target) and os.path.getmtime(target) > os.path.getmtime(source):
        return target
    os.makedirs(out, exist_ok=True)
    shutil.copy(source, out)
    with open(os.path.join(out, "Makefile"), "w") as f:
        f.write(f"obj-m := {module}.o\n")
    done = subprocess.run(["make", "-s", "-C", headers(place, kernel), f"M={os.path.abspath(out)}", "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules"], capture_output=True, text=True)
    if done.returncode != 0:
        raise fetch.Unavailable(f"the module {module} does not compile: {done.stderr.strip()[-400:]}")
    return target
