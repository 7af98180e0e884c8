#: what A guest dies with the device in its hands; the device is free again.
#: kernel 6.1 6.12
#: parts nvme
. /lab/lib.sh
load vfio-pci vfio_iommu_type1 nvme
pf=$(nvme)
hand_to_vfio $pf
lab_vfio hold $(group_of $pf) $pf 60 >/tmp/held &
until_true 5 grep -q open /tmp/held
kill -9 $!
wait
says "another guest can open it" '^open msix=' "$(lab_vfio open $(group_of $pf) $pf)"
