#: what kill -9 in the middle of giving devices away and of taking them back (kill-devices has every point).
#: set fast
#: kernel 6.12
#: parts gpu nvme
#: files tests/lab/guest/devices.sh
#: limit 180
. /lab/lib.sh
. /lab/devices.sh
devices_ready
remember_host
kills=0 halfway=0 told=0 trouble=
# By the file that is written, not by a count: these points are there whatever else a run writes.
cut_how=end
cut_off "$give" write:drivers_probe 2 "bulkhead rollback --yes" host
cut_off "$give" write:drivers_probe 4 "$give" guest
cut_how=kill
cut_off "$take_back" write:vfio-pci/unbind 2 "$take_back" host
verdict_of_kills 3
