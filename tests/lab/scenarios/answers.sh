#: what Every refusal of these files that needs no broken hardware, with its errno: the table in core/passthrough names this scenario.
#: kernel 6.1 6.12
#: parts nvme gpu
. /lab/lib.sh
pf=$(nvme) gpu=$(gpu)
node_of() { echo /dev/vfio/$(group_of $1); }
answer() { printf '%s\n' "$out" | sed -n "s|^$1: ||p"; }
ask() { out=$(lab_answers "$@"); }

# ---- before VFIO is loaded
ask group 0 $pf
same "VFIO is not loaded" ENOENT "$(answer 'open /dev/vfio/vfio')"
modprobe_was=$(cat /proc/sys/kernel/modprobe)
echo /bin/false >/proc/sys/kernel/modprobe
mkdir -p /dev/vfio
mknod /dev/vfio/vfio c 10 196
ask group 0 $pf
same "its file is there and its module is not" ENODEV "$(answer 'open /dev/vfio/vfio')"
rm /dev/vfio/vfio
echo $modprobe_was >/proc/sys/kernel/modprobe
load vfio-pci nvme snd-hda-intel xhci-pci
until_true 5 test -e $pci/$pf/driver
until_true 5 test -e $pci/${gpu%.0}.2/driver
ask group $(group_of $pf) $pf
same "no member is on vfio-pci" ENOENT "$(answer 'open the group')"

# ---- sysfs
same "a bind of what has a driver already" EBUSY "$(lab_write /sys/bus/pci/drivers/nvme/bind $pf)"
same "a probe of nothing" ENODEV "$(lab_write /sys/bus/pci/drivers_probe 9999:00:00.0)"
same "an override longer than a page" EINVAL "$(lab_write $pci/$pf/driver_override $(printf '%4096s' | tr ' ' x))"
same "autoprobe that is no number" EINVAL "$(lab_write $pci/$pf/sriov_drivers_autoprobe perhaps)"
same "a reset method there is not" EINVAL "$(lab_write $pci/$pf/reset_method nosuchreset)"
type=/sys/kernel/iommu_groups/$(group_of $pf)/type
same "a type of groups there is not" EINVAL "$(lab_write $type nosuchtype)"
says "another type while a driver is bound: EBUSY in 6.1, EPERM since" '^(EBUSY|EPERM)$' "$(lab_write $type identity)"
same "removing what is gone" ENOENT "$(lab_write $pci/9999:00:00.0/remove 1)"
lab_write $pci/$pf/reset_method '\n' >/dev/null
same "a reset of what has no way to be reset" ENOTTY "$(lab_write $pci/$pf/reset 1)"
put default $pci/$pf/reset_method
spare=${gpu%.0}.2
exec 7>$pci/$spare/driver_override
put 1 $pci/$spare/remove
same "an override of what is gone since" ENODEV "$(lab_write '&7' vfio-pci)"
exec 7>&-
put 1 /sys/bus/pci/rescan
until_true 5 test -e $pci/$spare/driver

# ---- VFIO
hand_to_vfio $pf
group=$(group_of $pf)
ask group $group $pf
same "the IOMMU's half of VFIO is not loaded" ENODEV "$(answer iommu)"
load vfio_iommu_type1
ask -u 1000 group $group $pf
same "the file is root's alone" EACCES "$(answer 'open the group')"
chmod 600 /dev/vfio/vfio
ask -u 1000 group $group $pf
same "and so may the container's be" EACCES "$(answer 'open /dev/vfio/vfio')"
chmod 666 /dev/vfio/vfio
chown 1000 $(node_of $pf)
ask -u 1000 group $group $pf
same "its owner may lock no memory" ENOMEM "$(answer map)"
ask group $group $pf
same "a device before its container" EINVAL "$(answer 'device without a container')"
same "an IOMMU before its group" EINVAL "$(answer 'iommu without a group')"
same "a second container" EINVAL "$(answer 'container twice')"
same "a second IOMMU" EINVAL "$(answer 'iommu twice')"
same "a page" ok "$(answer map)"
same "the same again" EEXIST "$(answer 'map twice')"
same "the window of interrupts" EINVAL "$(answer 'map the MSI window')"
same "memory that cannot be touched" EFAULT "$(answer 'map memory that cannot be touched')"
same "half of what was mapped" EINVAL "$(answer 'unmap half a page')"
same "a device of another group" ENODEV "$(answer 'a device that is not there')"
same "the device" ok "$(answer device)"
same "an interrupt of no kind" EINVAL "$(answer 'an interrupt of no kind')"
same "a reset" ok "$(answer reset)"
same "a reset when its ways were taken" ENOTTY "$(answer 'reset without a way')"
same "a reset when it had none from the start" EINVAL "$(answer 'reset of one that never had a way')"
hand_to_vfio $gpu
ask group $(group_of $gpu) $gpu
same "a group that is not viable" EPERM "$(answer container)"
ask device /dev/vfio/devices/vfio0
same "no file of its own" ENOENT "$(answer "open the device's file")"
same "and no IOMMUFD" ENOENT "$(answer 'open /dev/iommu')"

# ---- a physical function with VFIO, and its virtual one
echo Y >/sys/module/vfio_pci/parameters/enable_sriov
same "VFIO makes a virtual function, if it is told to" ok "$(lab_write $pci/$pf/sriov_numvfs 1)"
vf=$(basename "$(readlink $pci/$pf/virtfn0)")
until_true 5 test -e $pci/$vf/driver
ask group $(group_of $vf) $vf
same "which takes its physical function's token" EACCES "$(answer device)"
