#: what A GPU's audio and USB functions have drivers of the host: its group cannot be given away.
#: set fast
#: kernel 6.1 6.12
#: parts gpu bridge
. /lab/lib.sh
load vfio-pci vfio_iommu_type1 snd-hda-intel xhci-pci e1000
gpu=$(gpu)
group=$(group_of $gpu)
same "three functions, one group" "$gpu ${gpu%.0}.1 ${gpu%.0}.2" "$(members_of $gpu)"
until_true 5 test -e $pci/${gpu%.0}.2/driver
hand_to_vfio $gpu
same "the GPU alone is bound" vfio-pci "$(driver_of $gpu)"
same "the kernel calls the group not viable" "not viable" "$(lab_vfio status $group)"
hand_to_vfio ${gpu%.0}.1
same "one of its siblings is not enough" "not viable" "$(lab_vfio status $group)"
hand_to_vfio ${gpu%.0}.2
same "all of them are" viable "$(lab_vfio status $group)"
says "and the device opens" '^open msix=[1-9]' "$(lab_vfio open $group $gpu)"

# ---- while it is open
lab_vfio hold $group $gpu 3 >/tmp/held &
until_true 5 grep -q open /tmp/held
same "a second opener is refused" "group: EBUSY" "$(lab_vfio status $group)"
sibling=${gpu%.0}.2
put $sibling $pci/$sibling/driver/unbind
lab_write $pci/$sibling/driver_override '\n' >/dev/null
same "the host's driver cannot take a sibling back" EINVAL "$(lab_write /sys/bus/pci/drivers_probe $sibling)"
wait

# ---- behind a conventional bridge
edu=$(edu)
hand_to_vfio $edu
same "a stranger in the group with a driver of the host" "not viable" "$(lab_vfio status $(group_of $edu))"
stranger=$(find_device 8086:100e)
put $stranger $pci/$stranger/driver/unbind
same "without one it passes today; its driver would break it later" viable "$(lab_vfio status $(group_of $edu))"
