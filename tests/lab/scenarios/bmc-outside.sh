#: what An awkward BMC: small pieces, a lost reservation, thresholds of its own, a sensor that is off, and deafness.
#: parts bmc-outside
. /lab/lib.sh
load ipmi_si ipmi_devintf
until_true 10 test -e /dev/ipmi0
exits "reading all of it exits 0" 0 lab_sensors
ours=$out
# ipmitool sensor: name, value, unit, status, lower non-recoverable ... upper non-recoverable
theirs=$(ipmitool sensor 2>/dev/null | awk -F' *[|] *' 'function n(x) { return x ~ /na/ ? "na" : sprintf("%g", x) }
  $2 != "na" { print $1 "|" n($2) "|" $3 "|" n($10) "|" n($9) "|" n($8) "|" n($7) "|" n($6) "|" n($5) }')
same "values, units and thresholds are those of ipmitool" "$theirs" "$(echo "$ours" | grep -v 'PSU2')"
says "a sensor that is off says so" '^PSU2 Power\|the BMC does not scan it' "$ours"
says "a curve without a formula is converted by the factors of its reading" '^VRM Temp\|4.7\|degrees C' "$ours"

ipmitool raw 0x30 0x01 12 >/dev/null
deaf=$(lab_time /tmp/deaf lab_sensors 2000)
says "a deaf BMC is an error with the command that it does not answer" 'error\|.*(no answer to command|hangs in command)' "$deaf"
same "within the time that was given, and half a second" yes "$(awk '{ print $1 < 3000000 ? "yes" : $1 }' /tmp/deaf)"
says "with more time it is that, or the machine's own word for it" 'error\|.*(no answer to command|timed out itself)' "$(lab_sensors 6000)"
until_true 30 lab_sensors
same "when it hears again, it is read again" "$ours" "$(lab_sensors)"
