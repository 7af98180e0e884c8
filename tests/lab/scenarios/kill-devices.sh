#: what kill -9 in the middle of giving devices away and of taking them back: the next run ends with host or guest.
#: kernel 6.12
#: parts gpu nvme
#: files tests/lab/guest/devices.sh
#: limit 7200
. /lab/lib.sh
. /lab/devices.sh
devices_ready
remember_host
kills=0 halfway=0 told=0 trouble=
exits "apply exits 0" 0 $give
same "guest" guest "$(state)"
# Every call but the journal's own writes, and of these the first of each transaction: what was written of a transaction that is not
# committed is not read again, so that its other writes leave what the first leaves (kill-devices-all has them).
walk "write fdatasync row/pwrite64" 1 1000
[ -n "$PART" ] || verdict_of_kills 100
[ -z "$PART" ] || verdict_of_kills 10
