#: what Power is lost at every sync of the journal while devices are given away or taken back: never neither host nor guest.
#: kernel 6.1
#: parts gpu nvme
#: disk yes
#: boots 90
#: limit 3600
#: tools /usr/bin/udevadm
#: files tests/lab/guest/devices.sh /lib/udev/rules.d/80-drivers.rules /lib/udev/rules.d/50-udev-default.rules
. /lab/lib.sh
. /lab/devices.sh
power_walk 1 90
