# Sourced by every scenario, in the guest (busybox sh). The same words as tests/lib.sh: a check prints "ok - sentence" or
# "not ok - sentence" with what was seen.
pci=/sys/bus/pci/devices
out=

ok() { echo "ok - $1"; }
not_ok() { echo "not ok - $1"; shift; [ $# = 0 ] || printf '%s\n' "$@" | head -40 | sed 's/^/    /'; }
say() { echo "# $*"; }

# check "sentence" COMMAND...: the command succeeds.
check() {
  local sentence=$1
  shift
  if out=$("$@" 2>&1); then ok "$sentence"; else not_ok "$sentence" "$* -> exit $?" "$out"; fi
}
# exits "sentence" CODE COMMAND...: the exit code is exactly CODE; output is left in $out.
exits() {
  local sentence=$1 want=$2 got=0
  shift 2
  out=$("$@" 2>&1) || got=$?
  if [ "$got" = "$want" ]; then ok "$sentence"; else not_ok "$sentence" "$* -> exit $got, wanted $want" "$out"; fi
}
# says "sentence" PATTERN TEXT: the text matches the extended regular expression.
says() { if printf '%s\n' "$3" | grep -qE -- "$2"; then ok "$1"; else not_ok "$1" "wanted /$2/ in:" "$3"; fi; }
# same "sentence" WANT GOT
same() { if [ "$2" = "$3" ]; then ok "$1"; else not_ok "$1" "wanted:" "$2" "got:" "$3"; fi; }

# ---- what the kernel says, read without bulkhead
load() { modprobe -a "$@" 2>/dev/null; }
find_devices() { # VENDOR:DEVICE in hex, as lspci prints them
  local d
  for d in $pci/*; do
    [ "$(cat $d/vendor):$(cat $d/device)" = "0x${1%:*}:0x${1#*:}" ] && basename $d
  done
}
find_device() { find_devices "$1" | head -1; }
driver_of() { if [ -e $pci/$1/driver ]; then basename "$(readlink $pci/$1/driver)"; else echo none; fi; }
group_of() { if [ -e $pci/$1/iommu_group ]; then basename "$(readlink $pci/$1/iommu_group)"; else echo none; fi; }
members_of() { ls $pci/$1/iommu_group/devices 2>/dev/null | tr '\n' ' ' | sed 's/ $//'; }
override_of() { cat $pci/$1/driver_override; }
until_true() { # SECONDS COMMAND...: waits for it
  local left=$(($1 * 10))
  shift
  while ! "$@" >/dev/null 2>&1; do
    left=$((left - 1))
    [ $left -gt 0 ] || return 1
    sleep 0.1
  done
}
# One write(2) by hand, as an administrator or another tool would; the status is that of the write.
put() { ( printf '%s' "$1" >"$2" ) 2>/tmp/put; }

# ---- by the machine's parts (tests/lab/lab/machine.py)
nvme() { find_device 1b36:0010; }
gpu() { local g; g=$(find_device 1af4:1042); [ -n "$g" ] || g=$(find_device 1af4:1001); echo "$g"; }
edu() { find_device 1234:11e8; }
igb() { find_device 8086:10c9; }
hand_to_vfio() {
  put vfio-pci $pci/$1/driver_override
  [ -e $pci/$1/driver ] && put "$1" $pci/$1/driver/unbind
  put "$1" /sys/bus/pci/drivers_probe
}

# ---- a slot's power: without it a device answers nothing, and the kernel is not told. slot_power DEVICE on|off
config_byte() { dd if=$1/config bs=1 skip=$2 count=1 2>/dev/null | hexdump -e '1/1 "%u"'; }
capability() { # FOLDER NUMBER: where it begins
  local at=$(config_byte $1 52)
  while [ $at != 0 ] && [ $(config_byte $1 $at) != $2 ]; do at=$(config_byte $1 $((at + 1))); done
  echo $at
}
slot_power() {
  local port=$(dirname "$(readlink -f $pci/$1)") at now
  at=$(($(capability $port 16) + 25)) # the upper half of slot control; bit 2 is the power controller's, 1 is off
  now=$(config_byte $port $at)
  case $2 in off) now=$((now | 4)) ;; on) now=$((now & ~4)) ;; esac
  printf "\\$(printf %o $now)" | dd of=$port/config bs=1 seek=$at 2>/dev/null
}

# ---- what the doctor found: "doctor_looks [OPTION...]", then by the check's id
doctor_looks() { bulkhead doctor --json "$@" >/tmp/doctor.json; }
verdict() { jq -r --arg id "$1" '.findings[] | select(.id == $id) | .verdict' /tmp/doctor.json; }
words() { jq -r --arg id "$1" '.findings[] | select(.id == $id) | tostring' /tmp/doctor.json; }

# ---- power (needs "#: disk yes" and "#: boots N"). The host kills the machine without a word to the guest and starts it
# again on the same disk, with BOOT one higher. What the guest had not flushed is gone.
power_fails_in() { echo "LAB power-loss $1"; } # MILLISECONDS; the scenario goes on until then
lose_power() {
  power_fails_in 0
  while :; do sleep 60; done
}

# ---- kill -9 at the N-th system call of a process: killed_at CALL[:PART] N COMMAND...: true when the command, or a process it
# made, was killed there (with cut_how=end: all of it), false when each made fewer calls of that kind, on files whose path has
# PART in it. The exit code is in $code.
killed_at() {
  local call=$1 n=$2
  shift 2
  code=0
  lab_cut ${cut_how:-kill} $call $n "$@" >/tmp/killed 2>&1 || code=$?
  [ $code = 137 ]
}
# kill_everywhere "CALL..." AFTER COMMAND...: kills the command at its first, second ... call of each kind until it survives, and runs
# AFTER each time with what happened in $where. The command must be one that can be begun again. $kills counts.
kill_everywhere() {
  local calls=$1 after=$2 call n
  shift 2
  kills=0
  for call in $calls; do
    n=1
    while killed_at $call $n "$@"; do
      where="killed at $call $n"
      kills=$((kills + 1))
      $after
      n=$((n + 1))
    done
    where="survived $((n - 1)) of $call"
    say "$call: $((n - 1)) kills"
    [ $code = 0 ] || not_ok "$where: it ends well" "exit $code" "$(cat /tmp/killed)"
    $after
  done
}
