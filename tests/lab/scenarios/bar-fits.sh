#: what A GPU's window of 64 GiB that the firmware places above 4 GiB.
#: parts big-bar
#: modules fakeid
. /lab/lib.sh
insmod /lab/fakeid.ko map=1af4:1110=10de:2330:030200
gpu=$(find_device 10de:2330)
doctor_looks
same "the window is there" 64 "$(set -- $(sed -n 3p $pci/$gpu/resource); echo $((($2 - $1 + 1) >> 30)))"
same "we say so" ok "$(verdict pci.bar-assigned)"
same "and that the firmware allows windows above 4 GiB" ok "$(verdict pci.above-4g)"
