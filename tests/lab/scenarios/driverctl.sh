#: what Side by side with driverctl: how long a bind and an unbind take, and what each makes of what stands in the way.
#: parts nvme gpu bridge
. /lab/lib.sh
load vfio-pci vfio_iommu_type1 nvme
nvme=$(nvme)
until_true 5 test "$(driver_of $nvme)" = nvme
for round in 1 2 3 4 5; do
  lab_time /tmp/driverctl-bind driverctl --nosave set-override $nvme vfio-pci
  same "driverctl binds (round $round)" vfio-pci "$(driver_of $nvme)"
  lab_time /tmp/driverctl-unbind driverctl --nosave unset-override $nvme
  same "and gives it back" nvme "$(driver_of $nvme)"
  lab_time /tmp/ours-bind lab_passthrough bind $nvme
  same "ours binds" vfio-pci "$(driver_of $nvme)"
  lab_time /tmp/ours-unbind lab_passthrough unbind $nvme
  same "and gives it back" nvme "$(driver_of $nvme)"
  lab_time /tmp/ours-give lab_passthrough give $nvme >/dev/null
  same "ours gives it away with its checks and the proof" vfio-pci "$(driver_of $nvme)"
  lab_passthrough reclaim $nvme >/dev/null
done
median() { sort -n $1 | sed -n 3p | awk '{ printf "%.1f", $1 / 1000 }'; }
say "ours, median of 5: bind $(median /tmp/ours-bind) ms, unbind $(median /tmp/ours-unbind) ms; with checks, proof and reset $(median /tmp/ours-give) ms"
say "driverctl, median of 5: bind $(median /tmp/driverctl-bind) ms, unbind $(median /tmp/driverctl-unbind) ms"

total() { sort -n $1 | sed -n 3p; }
same "ours is not slower to bind" yes "$([ $(total /tmp/ours-bind) -le $(total /tmp/driverctl-bind) ] && echo yes)"
same "nor to unbind" yes "$([ $(total /tmp/ours-unbind) -le $(total /tmp/driverctl-unbind) ] && echo yes)"

# ---- what it does where something stands in the way
gpu=$(gpu)
exits "driverctl binds one function of three and says nothing of the others" 0 driverctl --nosave set-override $gpu vfio-pci
load snd-hda-intel xhci-pci
same "the group cannot be used" "not viable" "$(lab_vfio status $(group_of $gpu))"
exits "a driver that does not exist" 1 driverctl --nosave set-override $nvme nosuchdriver
same "is said before anything is done" nvme "$(driver_of $nvme)"
