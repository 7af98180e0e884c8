#: what Virtual functions of a network card: other bus numbers, and a PF whose driver goes while they live.
#: kernel 6.12
#: qemu 10
#: parts igb
. /lab/lib.sh
load vfio-pci vfio_iommu_type1 igb
pf=$(igb)
until_true 5 test -e $pci/$pf/driver
put 0 $pci/$pf/sriov_drivers_autoprobe
same "four virtual functions" ok "$(lab_write $pci/$pf/sriov_numvfs 4)"
first=$(basename "$(readlink $pci/$pf/virtfn0)")
same "their address follows from offset and stride, not from the function's number" "128 2" "$(cat $pci/$pf/sriov_offset $pci/$pf/sriov_stride | xargs)"
bus=0x$(echo $pf | cut -d: -f2)
same "so the first is 128 functions further" "$(printf '0000:%02x:10.0' $bus)" "$first"
hand_to_vfio $first
says "it opens" '^open msix=[1-9]' "$(lab_vfio open $(group_of $first) $first)"
put $pf $pci/$pf/driver/unbind
same "a PF that loses its driver takes its virtual functions along" 0 "$(cat $pci/$pf/sriov_numvfs)"
same "and the guest's device with them" gone "$(test -e $pci/$first || echo gone)"
