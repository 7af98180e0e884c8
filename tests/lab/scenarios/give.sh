#: what A whole GPU to a guest and back: every function of its group, proved by opening; and what is refused.
#: kernel 6.1 6.12
#: parts nvme gpu bridge display
. /lab/lib.sh
load nvme e1000 snd-hda-intel xhci-pci
gpu=$(gpu)
audio=${gpu%.0}.1 usb=${gpu%.0}.2
until_true 5 test -e $pci/$usb/driver
before="$(driver_of $gpu) $(driver_of $audio) $(driver_of $usb)"
same "what is read of every function is what sysfs says" \
  "$(for d in $pci/*; do d=$(basename $d); echo "$d $(driver_of $d) $(group_of $d)"; done)" \
  "$(lab_passthrough read | sed -E 's/^([^ ]+) .* driver=([^ ]+) .* group=([^ ]+) .*/\1 \2 \3/')"

# ---- the road
exits "a GPU is given away" 0 lab_passthrough give $gpu
says "with proof: opened, a page mapped, vectors counted, reset" 'proved: opened, a page mapped and unmapped; [1-9][0-9]* MSI-X vectors; reset' "$out"
same "the kernel has all of its functions with vfio-pci" "vfio-pci vfio-pci vfio-pci" "$(driver_of $gpu) $(driver_of $audio) $(driver_of $usb)"
same "and calls the group viable" viable "$(lab_vfio status $(group_of $gpu))"
exits "once more" 0 lab_passthrough give $gpu
same "changes nothing" 0 "$(echo "$out" | grep 'deed:' | grep -vc proved)"
exits "it is taken back" 0 lab_passthrough reclaim $gpu
until_true 5 test -e $pci/$usb/driver
same "to the drivers it had" "$before" "$(driver_of $gpu) $(driver_of $audio) $(driver_of $usb)"
same "and no override stays" "(null) (null) (null)" "$(override_of $gpu) $(override_of $audio) $(override_of $usb)"

# ---- what stands in the way
exits "a group with a stranger is refused" 1 lab_passthrough give $(edu)
says "naming the stranger, what it is and its driver" "$(find_device 8086:100e) \(network card, driver e1000\)" "$out"
exits "the display the firmware started on is refused" 1 lab_passthrough give 0000:00:02.0
says "in its own words" 'is the display that the firmware started on' "$out"
nvme=$(nvme)
put 1 $pci/$nvme/remove
exits "a device that is gone is refused" 1 lab_passthrough give $nvme
says "in its own words" 'is not on the PCI bus' "$out"
put 1 /sys/bus/pci/rescan
until_true 5 test -e $pci/$nvme/driver
exits "and given away once it is there again" 0 lab_passthrough give $nvme
put 1 $pci/$nvme/remove
put 1 /sys/bus/pci/rescan
until_true 5 test -e $pci/$nvme/driver
same "a rescan gives it to the host" nvme "$(driver_of $nvme)"
exits "which is seen, and mended by the next run" 0 lab_passthrough give $nvme
same "for the kernel too" vfio-pci "$(driver_of $nvme)"
