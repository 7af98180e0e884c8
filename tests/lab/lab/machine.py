"""The machine a scenario asks for: q35 with parts put in by name."""
import os, shutil, subprocess, tempfile, time

# Root ports sit together in slot 4, one a part, so that parts do not move each other.
def port(number, *more):
    extra = "".join("," + m for m in more)
    return ["-device", f"pcie-root-port,id=rp{number},chassis={number + 1},slot={number + 1},bus=pcie.0,addr=4.{number}"
            + (",multifunction=on" if number == 0 else "") + extra]


PARTS = {
    # An NVMe controller with SR-IOV: four virtual functions.
    "nvme": port(1) + ["-device", "nvme-subsys,id=ss0", "-device", "nvme,id=nv0,serial=BHNVME01,subsys=ss0,bus=rp1,"
                       "sriov_max_vfs=4,sriov_vq_flexible=8,sriov_vi_flexible=4,max_ioqpairs=10,msix_qsize=7"],
    # The same with room in the device for 127 virtual functions, more than the bridge window holds without reallocation.
    "nvme-large": port(1) + ["-device", "nvme-subsys,id=ss0", "-device", "nvme,id=nv0,serial=BHNVME01,subsys=ss0,bus=rp1,"
                             "sriov_max_vfs=127,sriov_vq_flexible=254,sriov_vi_flexible=127,max_ioqpairs=1024,msix_qsize=1024"],
    # What a GPU looks like to the bus: a 3D controller, its audio function and its USB-C controller in one IOMMU group.
    # (Of a link faster than 5 GT/s Linux wants to see that it is up again after a reset, which QEMU's ports do not show.)
    "gpu": port(2, "x-speed=5") + ["-blockdev", "null-co,node-name=nul0,size=1048576,read-zeroes=on",
                      "-device", "virtio-blk-pci,id=gpu0,drive=nul0,bus=rp2,addr=0.0,multifunction=on,class=0x0302",
                      # Each says that there are others, as GPUs' do: Linux looks for that when it finds one anew, and groups by it.
                      "-device", "intel-hda,id=gpu0a,bus=rp2,addr=0.1,multifunction=on",
                      "-device", "qemu-xhci,id=gpu0u,bus=rp2,addr=0.2,multifunction=on"],
    # Two strangers behind a conventional PCI bridge share one IOMMU group.
    "bridge": port(3) + ["-device", "pcie-pci-bridge,id=br0,bus=rp3", "-device", "edu,id=edu0,bus=br0,addr=1",
                         "-device", "e1000,id=e0,bus=br0,addr=2,romfile="],
    # A network card with SR-IOV (QEMU 8 and later).
    "igb": port(4) + ["-device", "igb,id=igb0,bus=rp4,romfile="],
    # One with two ports: functions of one slot that Linux knows (82576) to be isolated from each other, each in a group of its own.
    "igb-two": port(6, "x-speed=5") + ["-device", "igb,id=igb1,bus=rp6,addr=0.0,multifunction=on,romfile=,x-pcie-ari-nextfn-1=on",
                                       "-device", "igb,id=igb2,bus=rp6,addr=0.1,multifunction=on,romfile="],
    # A baseboard management controller on the ISA bus, reached in band.
    "bmc": ["-device", "ipmi-bmc-sim,id=bmc0{sdr}", "-device", "isa-ipmi-kcs,bmc=bmc0,ioport=0xca2,irq=5"],
    # One that is played outside (bmc.py): it tells thresholds, is awkward, and can go deaf.
    "bmc-outside": ["-chardev", "socket,id=bmcline,path={folder}/bmc,reconnect=1", "-device", "ipmi-bmc-extern,id=bmc0,chardev=bmcline",
                    "-device", "isa-ipmi-kcs,bmc=bmc0,ioport=0xca2,irq=5"],
    # The display the firmware starts on.
    "display": ["-device", "VGA,bus=pcie.0,addr=2.0,romfile="],
    # Two NUMA nodes; what sits on the second root complex belongs to node 1.
    "numa": ["-object", "memory-backend-ram,id=m0,size=512M", "-object", "memory-backend-ram,id=m1,size=512M",
             "-numa", "node,nodeid=0,cpus=0,memdev=m0", "-numa", "node,nodeid=1,cpus=1,memdev=m1",
             "-device", "pxb-pcie,id=pxb1,bus_nr=128,numa_node=1,bus=pcie.0",
             "-device", "pcie-root-port,id=rpn,chassis=20,slot=20,bus=pxb1", "-device", "nvme,id=nvn,serial=BHNVME02,bus=rpn"],
    # A device with 64 GiB of BAR, as a data centre GPU has.
    "big-bar": port(5) + ["-object", "memory-backend-memfd,id=big,size=64G,share=on,reserve=off",
                          "-device", "ivshmem-plain,memdev=big,bus=rp5"],
}
IOMMU = {
    "intel": ["-device", "intel-iommu,intremap=on,device-iotlb=on,aw-bits=48"],
    "no-remapping": ["-device", "intel-iommu,intremap=off"],
    "amd": ["-device", "amd-iommu,intremap=on"],
    "none": [],
}


def bare_metal(folder):
    """SMBIOS of a server: QEMU's own says "virtual machine", and the doctor then leaves firmware to the host above."""
    path = os.path.join(folder, "smbios0")
    strings = b"".join(s + b"\0" for s in (b"Bulkhead Lab", b"1.0", b"11/23/2026")) + b"\0"
    # Type 0, 24 octets: three strings, segment, ROM size, characteristics (the second extension octet has no bit 4), versions.
    with open(path, "wb") as f:
        f.write(bytes([0, 24, 0, 0, 1, 2, 0, 0xE8, 3, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 4, 1, 0, 0xFF, 0xFF]) + strings)
    return ["-smbios", f"file={path}", "-smbios", "type=1,manufacturer=Bulkhead Lab,product=Bare Metal", "-smbios", "type=3,manufacturer=Bulkhead Lab"]


class Broken(Exception):
    """The machine did not come up or did not end as it should; the message says how."""


class Died(Broken):
    """A signal ended the emulator: that says nothing about what ran in it."""


def qemu(place, version):
    """The program, its leading arguments and its environment. `version`: 7 is the host's own, 10 the backport."""
    environment = dict(os.environ)
    if version != 10:
        return ["qemu-system-x86_64"], environment
    tree = os.path.join(os.path.abspath(place), "qemu-10/usr")
    # Without this the host's older modules are found first and refused.
    environment["QEMU_MODULE_DIR"] = os.path.join(tree, "lib/x86_64-linux-gnu/qemu")
    folders = [f"{tree}/share/qemu", f"{tree}/share/seabios", "/usr/share/qemu", "/usr/lib/ipxe/qemu"]
    return [f"{tree}/bin/qemu-system-x86_64"] + [a for f in folders for a in ("-L", f)], environment


def command(place, scenario, kernel, accelerator, initrd, folder, boot, disk, point=""):
    program, environment = qemu(place, scenario.qemu)
    fast = ["-accel", "kvm", "-cpu", "host"] if accelerator == "kvm" else ["-accel", "tcg,thread=multi", "-cpu", "max" + (",-hypervisor" if scenario.metal else "") + scenario.cpu]
    machine = "q35,kernel-irqchip=split" if accelerator == "kvm" else "q35"
    devices = list(IOMMU[scenario.iommu]) + port(0)
    if scenario.metal:
        devices += bare_metal(folder)
    for part in scenario.parts:
        devices += [a.replace("{sdr}", f",sdrfile={folder}/sdr.bin" if os.path.exists(f"{folder}/sdr.bin") else "")
                    .replace("{folder}", folder) for a in PARTS[part]]
    if disk:
        devices += ["-drive", f"if=none,id=disk0,file={disk},format=raw,cache=writeback", "-device", "ide-hd,drive=disk0,bus=ide.0"]
    image = os.path.join(place, f"kernel-{kernel}", "vmlinux")
    # no_timer_check: on a loaded host the emulated timer looks broken and the kernel panics with interrupt remapping.
    words = ["console=ttyS0", "quiet", "panic=-1", "no_timer_check", "tsc=reliable", f"lab.boot={boot}"] + (["lab.disk"] if disk else []) + ([f"lab.from={point}"] if point else []) + scenario.append
    return [*program, "-nodefaults", "-no-user-config", "-machine", machine, *fast, "-smp", "2", "-m", "1G", "-display", "none",
            "-no-reboot", *devices, "-serial", f"file:{folder}/console", "-serial", f"file:{folder}/results",
            "-qmp", f"unix:{folder}/qmp,server=on,wait=off", "-kernel", image, "-initrd", initrd, "-append", " ".join(words)], environment
