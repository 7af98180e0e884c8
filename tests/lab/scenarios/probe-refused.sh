#: what A driver that refuses a device, on the way to a guest and on the way back: said by name, and nothing is left without a driver.
#: kernel 6.1 6.12
#: parts gpu nvme
#: modules fakeid moody
#: files tests/lab/guest/devices.sh
. /lab/lib.sh
. /lab/devices.sh
devices_ready
sound=${gpu%.0}.1
one_node() { printf 'apiVersion: bulkhead/v1\nkind: Node\ndevices:\n  - {pci: "%s", mode: passthrough}\n' $1 >$node; }

# ---- on the way to a guest: the kernel's vfio-pci refuses some devices by their ids, as Intel's QuickAssist
insmod /lab/fakeid.ko map=1b36:0010=8086:0435:010802
one_node $pf
exits "apply of a device that vfio-pci refuses fails" 2 $give
says "names the device, the write and what the kernel made of it" "$pf: drivers_probe: no driver took it" "$out"
says "says where the reason stands" 'dmesg' "$out"
says "where it does" 'disallow|denylist' "$(dmesg)"
same "the device is with its driver, held to nothing" "nvme/(null)" "$(drivers_of $pf)"
same "no rule for the next boot is left" no "$(test -e /etc/udev/rules.d/10-bulkhead-vfio.rules && echo yes || echo no)"
same "and nothing is in flight" no "$(in_flight && echo yes || echo no)"
exits "there is nothing to reclaim" 0 bulkhead reclaim $pf --yes

# ---- on the way back: a driver that took the device this morning refuses it now
insmod /lab/moody.ko
put $sound $pci/$sound/driver/unbind
put moody $pci/$sound/driver_override
put $sound /sys/bus/pci/drivers_probe
same "the GPU's sound has another driver" moody/moody "$(drivers_of $sound)"
one_node $gpu
exits "the GPU is given away" 0 $give
same "whole" "vfio-pci/vfio-pci vfio-pci/vfio-pci vfio-pci/vfio-pci" "$(drivers_of $functions)"
echo 5 >/sys/module/moody/parameters/refuse
exits "reclaim fails where the driver refuses" 2 bulkhead reclaim $gpu --yes
says "by the function's name" "$sound: drivers_probe: no driver took it" "$out"
same "and leaves the GPU with the guest, whole" "vfio-pci/vfio-pci vfio-pci/vfio-pci vfio-pci/vfio-pci" "$(drivers_of $functions)"
same "which can open it" viable "$(lab_vfio status $(group_of $gpu))"
same "with nothing in flight" no "$(in_flight && echo yes || echo no)"
echo 0 >/sys/module/moody/parameters/refuse
exits "when the driver takes it again, so does reclaim" 0 bulkhead reclaim $gpu --yes
same "with the override it had" moody/moody "$(drivers_of $sound)"
