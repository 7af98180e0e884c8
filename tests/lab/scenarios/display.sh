#: what The display the firmware starts on is marked, and NUMA nodes are those of the root complexes.
#: parts display gpu numa
#: modules fakeid
. /lab/lib.sh
insmod /lab/fakeid.ko map=1234:1111=10de:2330:030000,1af4:1042=10de:2331:030200
shown=$(find_device 10de:2330)
same "the kernel marks it" 1 "$(cat $pci/$shown/boot_vga)"
same "a device on the second root complex is of node 1" 1 "$(for d in $(find_devices 1b36:0010); do cat $pci/$d/numa_node; done | sort -u)"
same "what hangs on the first is of no known node" "-1" "$(cat $pci/$(find_device 10de:2331)/numa_node)"
bulkhead inventory --json >/tmp/inventory.json
pci_of() { jq -c --arg a "$1" '[.gpus[], .lost_gpus[]] | .[].pci | select(.address == $a)' /tmp/inventory.json; }
same "inventory says which is the boot display" true "$(pci_of $shown | jq .boot_vga)"
same "and which is not" false "$(pci_of $(find_device 10de:2331) | jq .boot_vga)"
says "an unknown node is said to be unknown" 'the kernel says -1' "$(pci_of $shown | jq -r .numa_node.unavailable)"
same "siblings of the group are named" "$(members_of $(find_device 10de:2331) | cut -d' ' -f2-)" \
  "$(pci_of $(find_device 10de:2331) | jq -r '.iommu_group_siblings | join(" ")')"
