#: what kill -9 at every write of every journal transaction while devices change hands: hours, so in parts (--part 1/9).
#: set named
#: kernel 6.12
#: parts gpu nvme
#: files tests/lab/guest/devices.sh
#: limit 14400
. /lab/lib.sh
. /lab/devices.sh
devices_ready
remember_host
kills=0 halfway=0 told=0 trouble=
exits "apply exits 0" 0 $give
same "guest" guest "$(state)"
walk "write fdatasync pwrite64" 1 10000
verdict_of_kills 10
