#: what Sensors of the BMC, read in band, are what ipmitool reads.
#: kernel 6.1 6.12
#: parts bmc
. /lab/lib.sh
says "without a driver it says what to load" 'no BMC driver is there.*modprobe -a ipmi_si ipmi_devintf' "$(lab_sensors)"
load ipmi_si ipmi_devintf
until_true 5 test -e /dev/ipmi0
# Set Sensor Reading: raw octets, one a sensor. The second is below zero, the last converts by 1/x.
number=1
for raw in 0x37 0xf6 0x80 0x4b 0xc8 0x60 0x32; do
  ipmitool raw 0x04 0x30 $number 0x01 $raw 0 0 0 0 >/dev/null 2>&1
  number=$((number + 1))
done
exits "reading all of it exits 0" 0 lab_sensors
ours=$out
same "name, value and unit of every sensor" "$(ipmitool -c sdr elist full 2>/dev/null | cut -d, -f1-3)" \
  "$(echo "$ours" | cut -d'|' -f1-3 | tr '|' ,)"
# QEMU's BMC answers no command for thresholds (ipmitool prints na), so these come from the records (lab/sdr.py).
says "thresholds, upper non-recoverable first" '^CPU0 Temp\|55\|degrees C\|100\|95\|90\|5\|na\|na$' "$ours"
says "with a factor and an offset" '^Inlet Temp\|60\|degrees C\|na\|81\|76\|na\|na\|na$' "$ours"
says "and lower ones" '^FAN1\|7500\|RPM\|na\|na\|na\|800\|500\|na$' "$ours"

# ---- less time than it takes, and drivers that go
start=$(cut -d' ' -f1 /proc/uptime)
hurried=$(lab_sensors 15)
says "with 15 ms it says what it could not read" 'no answer|no time left' "$hurried"
same "and ends within 2 s" yes "$(awk -v a=$start -v b=$(cut -d' ' -f1 /proc/uptime) 'BEGIN { print b - a < 2 ? "yes" : b - a }')"
modprobe -r ipmi_si
says "a driver that was taken away is said" '^error\|.*(no BMC driver is there|lost its BMC|no answer)' "$(lab_sensors 3000)"
