#: what Writes that succeed and change nothing: a probe without a driver, an override lost.
#: kernel 6.1 6.12
#: parts nvme gpu
. /lab/lib.sh
load vfio-pci nvme
pf=$(nvme)
until_true 5 test -e $pci/$pf/driver
same "bind of a device whose driver it is not" ENODEV "$(lab_write /sys/bus/pci/drivers/vfio-pci/bind $pf)"
same "unbind of a device that is not bound to it" ENODEV "$(lab_write /sys/bus/pci/drivers/vfio-pci/unbind $pf)"
same "bind of a device that is not there" ENODEV "$(lab_write /sys/bus/pci/drivers/vfio-pci/bind 9999:00:00.0)"
put nosuchdriver $pci/$pf/driver_override
put $pf $pci/$pf/driver/unbind
same "a probe for a driver that does not exist succeeds" ok "$(lab_write /sys/bus/pci/drivers_probe $pf)"
same "and leaves the device without one" none "$(driver_of $pf)"
same "an empty write to the override" ok "$(lab_write $pci/$pf/driver_override '')"
same "changes nothing" nosuchdriver "$(override_of $pf)"
same "a line end" ok "$(lab_write $pci/$pf/driver_override '\n')"
same "clears it" '(null)' "$(override_of $pf)"
hand_to_vfio $pf
same "bound by an override" vfio-pci "$(driver_of $pf)"
put 1 $pci/$pf/remove
same "removed, the device is gone" gone "$(test -e $pci/$pf || echo gone)"
put 1 /sys/bus/pci/rescan
until_true 5 test -e $pci/$pf/driver
same "found again, it belongs to the host: the override is lost" "nvme (null)" "$(driver_of $pf) $(override_of $pf)"
