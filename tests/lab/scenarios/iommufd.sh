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

# ---- its refusals
hand_to_vfio $pf
file=/dev/vfio/devices/$(ls $pci/$pf/vfio-dev)
answer() { printf '%s\n' "$out" | sed -n "s|^$1: ||p"; }
out=$(lab_answers -u 1000 device $file)
same "the file is root's alone" EACCES "$(answer "open the device's file")"
out=$(lab_answers device $file $(group_of $pf))
same "the group is open through its own file" EBUSY "$(answer 'bind while the group is open')"
same "the device binds" ok "$(answer bind)"
same "once" EINVAL "$(answer 'bind twice')"
same "and attaches" ok "$(answer attach)"
same "to one IOMMUFD alone" EINVAL "$(answer 'bind elsewhere')"
