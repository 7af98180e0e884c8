"""Defines what `bulkhead vm xml` printed in a real libvirtd, and asks libvirt what it understood."""
import os
import subprocess
import sys
import xml.etree.ElementTree as tree

work, first, companion, last, node, cpus = sys.argv[1:7]
failed = 0


def check(sentence, holds, *seen):
    global failed
    print(("ok - " if holds else "not ok - ") + sentence, flush=True)
    if not holds:
        failed += 1
        for one in seen:
            print("    " + str(one)[:1500].replace("\n", "\n    "), flush=True)


def virsh(*words):
    done = subprocess.run(["virsh", "-q", "-c", "qemu:///system", *words], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def read(name):
    with open(os.path.join(work, name)) as file:
        return file.read()


def write(name, text):
    path = os.path.join(work, name)
    with open(path, "w") as file:
        file.write(text)
    return path


# Without KVM libvirt refuses the type and its processor, whatever the rest says: the rest is what is judged then.
kvm = virsh("domcapabilities", "--virttype", "kvm")[0] == 0
print("# KVM: " + ("yes" if kvm else "no: domains are defined with type='qemu'"))


def fitting(text):
    if kvm:
        return text
    for old, new in (("<domain type='kvm'>", "<domain type='qemu'>"), ("mode='host-passthrough'", "mode='maximum'"),
                     ("    <maxphysaddr mode='passthrough'/>\n", "")):
        text = text.replace(old, new)
    return text


def devices(domain):
    out = []
    for hostdev in domain.findall("devices/hostdev"):
        at = hostdev.find("source/address")
        out.append(("%04x:%02x:%02x.%x" % tuple(int(at.get(k), 16) for k in ("domain", "bus", "slot", "function")),
                    hostdev.get("managed")))
    return out


def define(name):
    path = write("fitting.xml", fitting(read(name + ".xml")))
    code, out = virsh("define", "--validate", path)
    check("libvirtd defines %s.xml" % name, code == 0, out)
    code, out = virsh("dumpxml", "--inactive", name)
    return tree.fromstring(out) if code == 0 else tree.Element("domain")


one = define("one")
check("both functions of the group are in it, and libvirt leaves their drivers alone", devices(one) == [(first, "no"), (companion, "no")], devices(one))
vcpu = one.find("vcpu")
check("4 virtual processors", vcpu is not None and vcpu.text == "4")


def numbers(text):
    out = set()
    for part in (text or "").split(","):
        low, _, high = part.partition("-")
        if low:
            out |= set(range(int(low), int(high or low) + 1))
    return out


check("they run on the CPUs near the device", vcpu is not None and numbers(vcpu.get("cpuset")) == numbers(cpus), vcpu is not None and vcpu.get("cpuset"), cpus)
memory = one.find("numatune/memory")
check("its memory comes from the device's node and no other", memory is not None and (memory.get("mode"), memory.get("nodeset")) == ("strict", node))
page = one.find("memoryBacking/hugepages/page")
check("in pages of 2 MiB", page is not None and (page.get("size"), page.get("unit")) == ("2048", "KiB"))
check("which it shares with no other guest", one.find("memoryBacking/nosharepages") is not None)
check("its memory is 4 GiB", one.findtext("memory") == str(4 << 20))

# round trip: what libvirt made of it is valid, and defines the same again
code, dumped = virsh("dumpxml", "--inactive", "one")
path = write("dumped.xml", dumped)
done = subprocess.run(["virt-xml-validate", path, "domain"], capture_output=True, text=True)
check("what libvirt gives back is valid", done.returncode == 0, done.stdout + done.stderr)
check("it is taken away", virsh("undefine", "one")[0] == 0)
check("and defined again from that", virsh("define", path)[0] == 0)
check("nothing was lost on the way", virsh("dumpxml", "--inactive", "one")[1] == dumped)

plain = define("plain")
check("with --no-hugepages it has ordinary pages", plain.find("memoryBacking/hugepages") is None)
check("with --uefi libvirt chooses the firmware", plain.find("os") is not None and plain.find("os").get("firmware") == "efi")
# Ordinary pages and no firmware: what this machine has of those is not the question here.
virsh("undefine", "plain")
virsh("define", write("fitting.xml", fitting(read("plain.xml")).replace(" firmware='efi'", "")))
code, command = virsh("domxml-to-native", "qemu-argv", "--domain", "plain")
check("libvirt would give QEMU both devices", code == 0 and all(('"host":"%s"' % at) in command for at in (first, companion)), command)
both = define("both")
check("devices of two nodes are all in it", [at for at, _ in devices(both)] == [first, companion, last], devices(both))
check("and bind it to no node", both.find("numatune") is None and both.find("vcpu").get("cpuset") is None)
leased = define("leased")
check("a lease's domain has the same devices", devices(leased) == devices(one), devices(leased))
code, out = virsh("define", "--validate", write("fitting.xml", fitting(read("odd.xml"))))
check("a name with marks in it is that name", code == 0 and "a<b>&'c" in virsh("list", "--all", "--name")[1], out)

# the snippet, put where its comments say
snippet = read("snippet.xml").split("<!-- into <devices> -->")
head, body = snippet[0].split("-->", 1)[1], snippet[1]
domain = ("<domain type='kvm'><name>edited</name><memory unit='GiB'>4</memory>%s<os><type machine='q35'>hvm</type></os><cpu mode='host-passthrough'>\n"
          "    <maxphysaddr mode='passthrough'/>\n</cpu><devices>%s</devices></domain>" % (head, body))
code, out = virsh("define", "--validate", write("fitting.xml", fitting(domain)))
check("the elements alone fit into a domain", code == 0, out)

# --hostdev, one element after the other into a domain without devices
bare = "<domain type='kvm'><name>bare</name><memory unit='GiB'>1</memory><os><type machine='q35'>hvm</type></os></domain>"
virsh("define", write("fitting.xml", fitting(bare)))
elements = read("hostdev.xml").split("</hostdev>\n")[:-1]
for element in elements:
    code, out = virsh("attach-device", "bare", write("device.xml", element + "</hostdev>\n"), "--config")
    check("a hostdev element is attached", code == 0, out)
code, out = virsh("dumpxml", "--inactive", "bare")
check("and they are the group's", devices(tree.fromstring(out)) == [(first, "no"), (companion, "no")], out)

for name in virsh("list", "--all", "--name")[1].split("\n"):
    if name:
        virsh("undefine", name)
sys.exit(1 if failed else 0)
