#: what A GPU's window of 64 GiB finds no room in 36 address bits.
#: kernel 6.1 6.12
#: parts big-bar
#: cpu ,phys-bits=36
#: modules fakeid
. /lab/lib.sh
insmod /lab/fakeid.ko map=1af4:1110=10de:2330:030200
gpu=$(find_device 10de:2330)
doctor_looks
same "the kernel shows an empty line for it" "0x0000000000000000 0x0000000000000000 0x0000000000000000" "$(sed -n 3p $pci/$gpu/resource)"
same "we say so" fail "$(verdict pci.bar-assigned)"
says "and name the GPU" "$gpu" "$(words pci.bar-assigned)"
same "the kernel log is no proof: its words changed between versions" 0 "$(dmesg | grep -c 'failed to assign.*64')"
