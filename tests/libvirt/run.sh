#!/usr/bin/env bash
# What `bulkhead vm xml` prints, judged by libvirt itself: its schema, and a real libvirtd that defines it. The devices are a
# twin's; libvirtd runs in a mount namespace of its own, so that the machine's own libvirt is neither needed nor touched.
cd "$(dirname "$0")/../.." && . tests/lib.sh
unset BULKHEAD_URL BULKHEAD_TOKEN BULKHEAD_FINGERPRINT BULKHEAD_CA XDG_CONFIG_HOME
not_run() {
  echo "# libvirt: $1: not run"
  printf '0 passed, 0 failed\n'
  exit 0
}
[ "$(id -u)" = 0 ] || not_run "needs root (a libvirtd of its own)"
export PATH=$PATH:/usr/sbin:/sbin
for tool in virsh libvirtd virt-xml-validate qemu-system-x86_64; do
  command -v "$tool" >/dev/null || not_run "$tool is not installed (libvirt-clients, libvirt-daemon, libvirt-daemon-driver-qemu, qemu-system-x86)"
done
unshare --mount --propagation private true 2>/dev/null || not_run "no mount namespace can be made here"

export HOME=$work/home
mkdir -p "$HOME"
b=$BIN/bulkhead
"$b" twin up dgx-h100 --dir "$work/twin" >/dev/null || { not_ok "the twin comes up"; done_testing; }
export BULKHEAD_TWIN=$work/twin BULKHEAD_ROOT=$work/twin/root BULKHEAD_NVML=$work/twin/lib/libnvidia-ml.so.1 LD_LIBRARY_PATH=$work/twin/lib

# Two GPUs with vfio-pci, as the kernel shows them then. The first has a companion in its group.
pci=$BULKHEAD_ROOT/sys/bus/pci
to_vfio() {
  mkdir -p "$pci/drivers/vfio-pci"
  ln -sfn "$(realpath --relative-to="$(realpath "$pci/devices/$1")" "$pci/drivers/vfio-pci")" "$(realpath "$pci/devices/$1")/driver"
}
field() { cat "$pci/devices/$1/$2"; }
first=$(basename "$(find "$pci/drivers/nvidia/" -name '0000:*' | sort | head -1)")
last=$(basename "$(find "$pci/drivers/nvidia/" -name '0000:*' | sort | tail -1)")
"$b" twin break lost-from-nvml --gpu 0 >/dev/null
"$b" twin break lost-from-nvml --gpu 7 >/dev/null
companion=${first%.0}.1
cp -a "$(realpath "$pci/devices/$first")" "$(dirname "$(realpath "$pci/devices/$first")")/$companion"
chmod u+w "$pci/devices/$first/../$companion/class"
echo 0x040300 >"$pci/devices/$first/../$companion/class"
ln -s "$(readlink "$pci/devices/$first" | sed "s/$first\$/$companion/")" "$pci/devices/$companion"
group=$(basename "$(readlink "$pci/devices/$first/iommu_group")")
ln -s "../../../../bus/pci/devices/$companion" "$BULKHEAD_ROOT/sys/kernel/iommu_groups/$group/devices/$companion"

exits "a device that the host's driver has is refused" 2 "$b" vm xml "$first"
says "by the driver's name, with what to do" 'has driver nvidia.*would not start' "$out"
to_vfio "$first"
exits "so is one whose companion the host has" 2 "$b" vm xml "$first"
says "by the companion's name" "$companion, which shares IOMMU group $group with $first" "$out"
to_vfio "$companion"
to_vfio "$last"
exits "a word that is neither is refused" 2 "$b" vm xml eth0
exits "a device that is not there is refused" 2 "$b" vm xml 0000:fe:1f.7

# pages of 2 MiB: none, then enough on the device's own node
node=$(field "$first" numa_node)
pages=$BULKHEAD_ROOT/sys/devices/system/node/node$node/hugepages/hugepages-2048kB
err=$("$b" vm xml "$first" --memory 4GiB 2>&1 >/dev/null)
if [ -e "$pages/free_hugepages" ]; then
  says "pages that are missing are said, with the command" "NUMA node $node has [0-9]+ free pages of 2[^ ]* ?MiB, the guest needs 2048.*node$node/hugepages/hugepages-2048kB/nr_hugepages" "$err"
  chmod u+w "$pages"/*
  echo 4096 >"$pages/nr_hugepages"
  echo 4096 >"$pages/free_hugepages"
  same "with enough there is nothing to say" "" "$("$b" vm xml "$first" --memory 4GiB 2>&1 >/dev/null)"
fi
"$b" vm xml "$first" --domain one --memory 4GiB --vcpus 4 >"$work/one.xml" || not_ok "a domain is printed"
"$b" vm xml "$first" --domain plain --memory 2GiB --vcpus 2 --no-hugepages --uefi >"$work/plain.xml" || not_ok "a domain with ordinary pages is printed"
"$b" vm xml "$first" "$last" --domain both --memory 4GiB >"$work/both.xml" 2>"$work/both.note" || not_ok "a domain with devices of two nodes is printed"
says "devices of two nodes pin nothing, and that is said" 'different NUMA nodes' "$(cat "$work/both.note")"
"$b" vm xml "$first" --memory 4GiB >"$work/snippet.xml" || not_ok "the elements are printed"
"$b" vm xml "$first" --hostdev >"$work/hostdev.xml" || not_ok "the hostdev elements are printed"
exits "a name with a slash is refused" 2 "$b" vm xml "$first" --domain ../x
"$b" vm xml "$first" --domain "a<b>&'c" >"$work/odd.xml" 2>/dev/null || not_ok "an odd name is printed"

# a lease of the daemon
printf 'apiVersion: bulkhead/v1\nkind: Node\ngpus:\n  - select: {pci: ["%s"]}\n    mode: passthrough\n  - select: {index: "1-6"}\n    mode: exclusive\n' "$first" >"$work/node.yaml"
(exec "$b" serve --socket "$work/api.sock" --state-dir "$work/state" -f "$work/node.yaml") >"$work/log" 2>&1 &
daemon=$!
stop_daemon() { kill "$daemon" 2>/dev/null; wait "$daemon" 2>/dev/null; finish; }
trap stop_daemon EXIT
for _ in $(seq 200); do curl -sf --unix-socket "$work/api.sock" http://localhost/readyz >/dev/null && break; sleep 0.1; done
export BULKHEAD_URL=unix:$work/api.sock
"$b" tenant put vision leases=4 gpus=4 >/dev/null
lease() { timeout 30 "$b" lease create --tenant vision --class "$1" --wait --json; }
id=$(lease passthrough | python3 -c 'import json, sys; print(json.load(sys.stdin)["id"])' 2>/dev/null)
exits "a lease of class passthrough names its devices" 0 "$b" vm xml "${id:-0}" --domain leased --memory 4GiB
printf '%s\n' "$out" | grep -v '^note: ' >"$work/leased.xml"
same "they are those of the address, whole group and all" "$(grep '<address' "$work/one.xml")" "$(grep '<address' "$work/leased.xml")"
id=$(lease exclusive | python3 -c 'import json, sys; print(json.load(sys.stdin)["id"])' 2>/dev/null)
exits "a lease of another class is refused" 2 "$b" vm xml "${id:-0}"
says "because the host keeps it" 'stays with the host' "$out"
exits "a lease that there is not is refused" 2 "$b" vm xml 987654

for name in one plain both leased odd; do
  check "$name.xml is valid by libvirt's schema" virt-xml-validate "$work/$name.xml" domain
done

cpus=$(field "$first" local_cpulist)
unshare --mount --propagation private --fork --kill-child bash tests/libvirt/with-libvirtd "$work/libvirt" \
  python3 tests/libvirt/define.py "$work" "$first" "$companion" "$last" "$node" "$cpus" >"$work/define.log" 2>&1
status=$?
cat "$work/define.log"
passed=$((passed + $(grep -c '^ok - ' "$work/define.log"))) failed=$((failed + $(grep -c '^not ok - ' "$work/define.log")))
[ $status = 0 ] || [ "$failed" != 0 ] || not_ok "libvirtd defines what was printed" "exit $status"
done_testing
