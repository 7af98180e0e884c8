#: what After a boot udev gives devices to VFIO before a driver of the host can, with their owner; the proof is owed again.
#: kernel 6.1 6.12
#: parts gpu nvme
#: disk yes
#: boots 3
#: limit 240
#: tools /usr/bin/udevadm
#: files tests/lab/guest/devices.sh /lib/udev/rules.d/80-drivers.rules /lib/udev/rules.d/50-udev-default.rules
. /lab/lib.sh
. /lab/devices.sh
boot_with_udev
devices_ready
# In 6.12 virtio-pci, the driver of the GPU's first function here, is part of the kernel: it is there before udev.
late=no
case $(uname -r) in 6.12.*) late=yes ;; esac
owner() { stat -c '%u %a' /dev/vfio/$(group_of $1); }
case $BOOT in
  1)
    remember_host
    echo "$at_host" >/disk/notes/host
    exits "apply exits 0" 0 $give
    says "with the owner as a step" "give.*to 1000|1000" "$out"
    same "the device file is the owner's" "1000 660" "$(owner $gpu)"
    same "guest" guest "$(state)"
    sed -i 's/0660/0600/' $node
    exits "another mode in the node file is seen" 0 $give
    same "and set" "1000 600" "$(owner $gpu)"
    says "without opening a device again" '3 steps|4 steps' "$out"
    exits "rollback exits 0" 0 bulkhead rollback --yes
    same "and puts the mode back" "1000 660" "$(owner $gpu)"
    sync
    lose_power
    ;;
  2)
    at_host=$(note host)
    say "$(tail -n +2 /etc/udev/rules.d/10-bulkhead-vfio.rules)"
    if [ $late = yes ]; then
      same "udev came too late for the GPU's first function" "virtio-pci/vfio-pci vfio-pci/vfio-pci vfio-pci/vfio-pci" "$(drivers_of $functions)"
    else
      same "udev gave the GPU to VFIO" "vfio-pci/vfio-pci vfio-pci/vfio-pci vfio-pci/vfio-pci" "$(drivers_of $functions)"
    fi
    same "its file to the owner" "1000 660" "$(owner $gpu)"
    same "and the physical function to the host" nvme "$(driver_of $pf)"
    exits "verify says that it differs: nobody has opened the device since" 1 bulkhead verify -f $node
    says "by name" "$gpu" "$out"
    exits "apply exits 0" 0 $give
    if [ $late = yes ]; then
      says "and binds what udev missed" "$gpu: vfio-pci" "$out"
    else
      same "and binds nothing of the GPU again" 0 "$(echo "$out" | grep -c "$gpu: vfio-pci")"
    fi
    says "but opens it" "$gpu: prove" "$out"
    same "guest" guest "$(state)"
    exits "verify is content" 0 bulkhead verify -f $node
    exits "reclaim exits 0" 0 $take_back
    same "host" host "$(state)"
    sync
    lose_power
    ;;
  3)
    at_host=$(note host)
    same "after a reclaim a boot finds the host's" host "$(state)"
    ;;
esac
