#: what Power is lost in a reclaim, and again in the rollback that takes it back in the next boot: the group ends whole.
#: kernel 6.12
#: parts gpu nvme
#: disk yes
#: boots 5
#: limit 300
#: tools /usr/bin/udevadm
#: files tests/lab/guest/devices.sh /lib/udev/rules.d/80-drivers.rules /lib/udev/rules.d/50-udev-default.rules
. /lab/lib.sh
. /lab/devices.sh
boot_with_udev
devices_ready
rolled_back() {
  exits "rollback exits 0" 0 bulkhead rollback --yes
  same "and every device is the guest's, as before the reclaim" guest "$(state)"
  same "with nothing in flight" no "$(in_flight && echo yes || echo no)"
}
case $BOOT in
  1)
    remember_host
    echo "$at_host" >/disk/notes/host
    exits "apply exits 0" 0 $give
    sync
    check "reclaim comes to its 17th sync" stopped_at fdatasync 17 $take_back --json
    say "the power goes: $(state)"
    lose_power
    ;;
  2)
    at_host=$(note host)
    same "the boot gave all to the host" host "$(state)"
    check "rollback comes to its 11th sync" stopped_at fdatasync 11 bulkhead rollback --yes --json
    say "the power goes: $(state)"
    lose_power
    ;;
  3)
    at_host=$(note host)
    say "booted with: $(state)"
    rolled_back
    # A whole reclaim, and its rollback cut off in the same boot.
    exits "reclaim exits 0" 0 $take_back
    check "its rollback comes to its 13th sync" stopped_at fdatasync 13 bulkhead rollback --yes --json
    say "the power goes: $(state)"
    lose_power
    ;;
  4)
    at_host=$(note host)
    say "booted with: $(state)"
    rolled_back
    check "a rollback of what is left, the apply, comes to its 7th sync" stopped_at fdatasync 7 bulkhead rollback --yes --json
    say "the power goes: $(state)"
    lose_power
    ;;
  5)
    at_host=$(note host)
    say "booted with: $(state)"
    exits "rollback exits 0" 0 bulkhead rollback --yes
    same "and every device is the host's, as before the apply" host "$(state)"
    exits "another has nothing to do" 0 bulkhead rollback --yes
    same "and does nothing" host "$(state)"
    ;;
esac
