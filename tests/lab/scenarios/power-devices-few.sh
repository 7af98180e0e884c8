#: what Power is lost in the middle of giving devices away and of taking them back (power-devices has every point).
#: set fast
#: kernel 6.12
#: parts gpu nvme
#: disk yes
#: boots 3
#: limit 180
#: tools /usr/bin/udevadm
#: files tests/lab/guest/devices.sh /lib/udev/rules.d/80-drivers.rules /lib/udev/rules.d/50-udev-default.rules
. /lab/lib.sh
. /lab/devices.sh
[ $BOOT = 1 ] && echo 26 >/disk/notes/up && echo 9 >/disk/notes/down
power_walk 40 3
