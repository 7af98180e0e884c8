#: what A kernel with IOMMUFD: each device has a file of its own, and the proof goes through it as well.
#: kernel own
#: parts nvme
. /lab/lib.sh
pf=$(nvme)
until_true 5 test -e $pci/$pf/driver
same "the kernel has IOMMUFD" yes "$(test -e /dev/iommu && echo yes)"
exits "the device is given away" 0 lab_passthrough give $pf
says "and proved through its own file too" 'IOMMUFD|iommufd' "$out"
same "which is there" 1 "$(ls /dev/vfio/devices | wc -l)"
exits "it comes back" 0 lab_passthrough reclaim $pf
until_true 5 test -e $pci/$pf/driver
same "to its driver" nvme "$(driver_of $pf)"
