#: what What bulkhead says of the host is what the kernel says.
#: kernel 6.1 6.12
#: parts nvme gpu bridge numa
. /lab/lib.sh
load nvme vfio-pci
exits "inventory of a host without the vendor's driver exits 0" 0 bulkhead inventory --json
echo "$out" >/tmp/inventory.json
field() { jq -r "$1" /tmp/inventory.json; }
same "the kernel's release" "$(uname -r)" "$(field .host.kernel)"
same "its command line" "$(cat /proc/cmdline)" "$(field .host.kernel_cmdline)"
same "the boot" "$(cat /proc/sys/kernel/random/boot_id)" "$(field .host.boot_id)"
same "processors" "$(nproc)" "$(field .host.cpus_online)"
same "NUMA nodes and their processors" \
  "$(for n in /sys/devices/system/node/node*; do echo "${n##*node} $(cat $n/cpulist)"; done)" \
  "$(field '.host.numa_nodes[] | "\(.id) \(.cpus)"')"
same "the machine's name" "$(cat /sys/class/dmi/id/sys_vendor) $(cat /sys/class/dmi/id/product_name)" "$(field .host.machine)"
says "why the driver's version is missing" 'no NVIDIA kernel module is loaded' "$(field .driver.version.unavailable)"
