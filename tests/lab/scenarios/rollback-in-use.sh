#: what A reclaim's rollback does not pull a device away from a process of the host that opened it since.
#: kernel 6.12
#: parts gpu nvme
#: files tests/lab/guest/devices.sh
. /lab/lib.sh
. /lab/devices.sh
devices_ready
remember_host
exits "apply exits 0" 0 $give
exits "reclaim exits 0" 0 $take_back
same "host" host "$(state)"
disk() { ls $pci/$gpu/virtio*/block 2>/dev/null; }
until_true 5 test -n "$(disk)"
until_true 5 test -b /dev/$(disk)
(exec 3</dev/$(disk); exec sleep 600) &
holder=$!
sleep 0.3
exits "rollback is refused" 1 bulkhead rollback --yes
says "names the holder" "in use by 1 process" "$out"
says "and the way out" "--evict" "$out"
same "nothing was touched" host "$(state)"
exits "with --evict it is done" 0 bulkhead rollback --evict --yes
same "guest" guest "$(state)"
same "and the holder is gone" no "$(kill -0 $holder 2>/dev/null && [ "$(cut -d' ' -f3 /proc/$holder/stat)" != Z ] && echo yes || echo no)"
