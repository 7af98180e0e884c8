#: what A driver of the initramfs has its device before udev's rule: the override beside it misleads neither apply, reclaim nor rollback.
#: kernel 6.12
#: parts gpu nvme
#: files tests/lab/guest/devices.sh
#: limit 150
. /lab/lib.sh
. /lab/devices.sh
devices_ready
remember_host
beside() { for f in $functions; do put vfio-pci $pci/$f/driver_override; done; }
bound() { for f in $functions; do driver_of $f; done | xargs; }
at_first=$(bound)

# Never given away by us: the rule alone was there.
beside
same "the drivers stay" "$at_first" "$(bound)"
exits "reclaim exits 0" 0 $take_back
same "and only the override goes" host "$(state)"

beside
exits "apply exits 0" 0 $give
same "guest" guest "$(state)"
exits "reclaim exits 0" 0 $take_back
same "and gives back the drivers without the override" host "$(state)"

beside
exits "apply again" 0 $give
exits "and its rollback" 0 bulkhead rollback --yes
same "which leaves the drivers and the override as they were found" "$at_first vfio-pci vfio-pci vfio-pci" "$(bound) $(for f in $functions; do override_of $f; done | xargs)"
exits "reclaim takes the override away" 0 $take_back
same "host" host "$(state)"

# Given away, and a boot brought the drivers back beside the override; the rule is still there.
exits "apply once more" 0 $give
for f in $functions; do
  put $f $pci/$f/driver/unbind
  printf '\n' >$pci/$f/driver_override
  put $f /sys/bus/pci/drivers_probe
done
beside
same "the host's drivers beside the override" "$at_first" "$(bound)"
exits "reclaim exits 0" 0 $take_back
same "host" host "$(state)"
