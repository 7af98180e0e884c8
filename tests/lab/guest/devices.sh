# A node file of devices, and where they are: for scenarios that kill bulkhead, or the machine, in the middle of it
# ("#: files tests/lab/guest/devices.sh", parts gpu and nvme). A GPU of three functions, and two virtual functions.
node=/tmp/node.yaml
devices_ready() {
  load snd-hda-intel xhci-pci nvme virtio_blk
  gpu=$(gpu) pf=$(nvme)
  functions="$gpu ${gpu%.0}.1 ${gpu%.0}.2"
  until_true 5 test -e $pci/$pf/driver
  printf 'apiVersion: bulkhead/v1\nkind: Node\nhost:\n  vfio: {owner: "1000", mode: "0660"}\ndevices:\n' >$node
  printf '  - {pci: "%s", mode: passthrough}\n  - {pci: "%s", mode: passthrough, sriov: {vfs: 2}}\n' $gpu $pf >>$node
}
# By the shell's own means: each process that is started costs an emulated machine some 20 ms, and this is asked at every kill.
drivers_of() {
  local f driver override all=
  for f in "$@"; do
    driver=none override=
    if cd -P $pci/$f/driver 2>/dev/null; then driver=${PWD##*/}; cd /root; fi
    read -r override <$pci/$f/driver_override
    all="$all $driver/$override"
  done
  echo "${all# }"
}
# "host", "guest", or what it is instead; the kernel's word alone.
state() {
  local vfs seen a b rule=no
  read -r vfs <$pci/$pf/sriov_numvfs
  [ ! -e /etc/udev/rules.d/10-bulkhead-vfio.rules ] || rule=yes
  seen="$(drivers_of $functions $pf) vfs=$vfs rule=$rule"
  case $seen in
    "$at_host") echo host; return ;;
    "vfio-pci/vfio-pci vfio-pci/vfio-pci vfio-pci/vfio-pci nvme/(null) vfs=2 rule=yes") ;;
    *) echo "$seen"; return ;;
  esac
  a=$(basename "$(readlink $pci/$pf/virtfn0)") b=$(basename "$(readlink $pci/$pf/virtfn1)")
  for f in $gpu $a $b; do
    seen="$f $(driver_of $f) $(stat -c '%u %a' /dev/vfio/$(group_of $f)) $(lab_vfio status $(group_of $f))"
    [ "$seen" = "$f vfio-pci 1000 660 viable" ] || { echo "$seen"; return; }
  done
  echo guest
}
# What a boot makes of devices that are given away, before the next apply: udev's rule gives the GPU, all of it, and virtual functions
# are not made. (In 6.12 virtio-pci, which has its first function here, is part of the kernel and there before udev.)
is_as_booted() {
  case $1 in
    "vfio-pci/vfio-pci vfio-pci/vfio-pci vfio-pci/vfio-pci nvme/(null) vfs=0 rule=yes") ;;
    "virtio-pci/vfio-pci vfio-pci/vfio-pci vfio-pci/vfio-pci nvme/(null) vfs=0 rule=yes") case $(uname -r) in 6.12.*) ;; *) return 1 ;; esac ;;
    *) return 1 ;;
  esac
}
remember_host() { at_host="$(drivers_of $functions $pf) vfs=0 rule=no"; say "the host's: $at_host"; }
# What the journal says, asked once: its newest run into $newest; whether a step is begun and not ended into $flight; and into $undid
# whether the newest run ended by itself with nothing done: its worker alone was killed, and it took back what it had done.
ask_journal() {
  bulkhead history --json 2>/dev/null | jq -r '(.[0].run // 0), ([.[].steps[] | select(.state == "intended")] != []),
    (.[0].state == "failed" and ([.[0].steps[]? | select(.state == "done" and .undoes == null)] == []))' >/tmp/journal
  { read -r newest; read -r flight; read -r undid; } </tmp/journal
}
in_flight() { ask_journal; [ $flight = true ]; }

# What follows a run that was cut off: finish CASE COMMAND WANTED, with the journal's word of now. Trouble is appended to $trouble;
# the journal's word of then is left behind.
finish() {
  local said
  said=$($2 2>&1) || trouble="$trouble | $1: $2 ends with $?: $said"
  [ $flight = false ] || case $said in *"was cut off in"*) told=$((told + 1)) ;; *) trouble="$trouble | $1: $2 does not say what it settled: $said" ;; esac
  said=$(state)
  [ "$said" = "$3" ] || trouble="$trouble | $1, then $2: wanted $3, there is $said"
  ask_journal
  [ $flight = false ] || trouble="$trouble | $1, then $2: a step is still in flight"
}
give="bulkhead apply -f $node --yes"
take_back="bulkhead reclaim $(gpu) $(nvme) --yes"

last_run() { ask_journal; echo $newest; }
# cut_off "RUN" CALL N NEXT WANTED: RUN ($give or $take_back) killed at its N-th such call, then NEXT, which ends with WANTED. False when it
# was not killed. A rollback of a run that had not begun would take back the one before: there the run itself is next,
# as after one that took itself back.
cut_off() {
  local run=$1 call=$2 n=$3 next=$4 wanted=$5 before point at
  [ -n "$newest" ] || ask_journal
  before=$newest
  killed_at $call $n $run --json || { newest=; return 1; }
  kills=$((kills + 1)) point="${run%% /*} killed at $call $n"
  at=$(state)
  case $at in host | guest) ;; *) halfway=$((halfway + 1)) ;; esac
  ask_journal
  if [ $newest != $before ] && [ $undid = true ]; then
    undone=$((undone + 1))
    case "$run $at" in "$give host" | "$take_back guest") ;; *) trouble="$trouble | $point: it took itself back, and there is $at" ;; esac
    before=$newest
  fi
  if [ "$next" = "bulkhead rollback --yes" ] && [ $newest = $before ]; then
    next=$run
    case $run in "$give") wanted=guest ;; *) wanted=host ;; esac
  fi
  finish "$point" "$next" $wanted
}

# walk CALLS STRIDE LIMIT: from host to guest and back for as long as there are points to be killed at, each run killed at its next
# one; what follows is the same run again, its rollback, or its opposite, in turn. With "run.sh --part 2/3" every third of them, from
# the second on. Whenever all is the host's the journal begins anew: a point does not depend on runs that are over, and reading
# hundreds of them at every kill took ten times what the kills took.
# Each point is told to the host: where the emulator itself dies, the walk goes on from there ($FROM) in another machine.
walk() {
  local stride=$2 limit=$3 call n up down first=${PART%/*} parts=${PART#*/} from=$FROM
  stride=$((stride * ${parts:-1}))
  for call in $1; do
    n=0 up=${first:-1} down=${first:-1}
    if [ -n "$from" ]; then
      [ "${from%%,*}" = "$call" ] || continue
      IFS=, read -r from n up down kills halfway told undone <<-END
		$from
	END
      n=$((n - 1)) from=
      say "$call: goes on at $up of apply and $down of reclaim, after $kills kills"
    fi
    while [ $up != end ] || [ $down != end ]; do
      n=$((n + 1))
      [ $n -le $limit ] || break
      tell_trouble
      echo "LAB point $call,$n,$up,$down,$kills,$halfway,$told,${undone:-0}"
      [ $((n % 20)) != 0 ] || say "$call: at $up of apply and $down of reclaim, $kills kills, $(cut -d. -f1 /proc/uptime) s"
      case $(state) in
        host)
          rm -f /var/lib/bulkhead/*
          newest=0
          if [ $up = end ]; then newest=; $give >/dev/null 2>&1 || { trouble="$trouble | apply fails"; break; }; continue; fi
          set -- "bulkhead rollback --yes" host
          [ $((n % 2)) = 0 ] || set -- "$give" guest
          if cut_off "$give" $call $up "$1" $2; then up=$((up + stride)); else say "$call: apply makes less than $up"; up=end; fi
          ;;
        guest)
          if [ $down = end ]; then newest=; $take_back >/dev/null 2>&1 || { trouble="$trouble | reclaim fails"; break; }; continue; fi
          case $((n % 3)) in
            0) set -- "$take_back" host ;;
            1) set -- "$give" guest ;;
            2) set -- "bulkhead rollback --yes" guest ;;
          esac
          if cut_off "$take_back" $call $down "$1" $2; then down=$((down + stride)); else say "$call: reclaim makes less than $down"; down=end; fi
          ;;
        *)
          trouble="$trouble | neither: $(state)"
          return
          ;;
      esac
    done
    say "$call: $kills kills so far, $(cut -d' ' -f1 /proc/uptime) s"
  done
}
# At once: of a machine that dies later nothing else is left.
tell_trouble() {
  [ -n "$trouble" ] || return 0
  not_ok "the run after a kill ends with host or guest" "$(printf '%s\n' "$trouble" | sed 's/^ | //; s/ | /\n/g' | head -20)"
  troubles=$((troubles + 1)) trouble=
}
# What the kills came to.
verdict_of_kills() { # AT_LEAST
  tell_trouble
  say "$kills kills, $halfway of them with a device between host and guest; ${undone:-0} times the run took itself back, $told times a step in flight was settled with words"
  same "after each of them the next run ended with host or guest" "0 times not" "${troubles:-0} times not"
  [ $kills -ge $1 ] && ok "killed at $1 points or more" || not_ok "killed at $1 points or more" $kills
  [ $halfway -gt 0 ] && ok "with a device in between at some" || not_ok "with a device in between at some"
}

# ---- a boot as on a host ("#: tools /usr/bin/udevadm", "#: files /lib/udev/rules.d/80-drivers.rules"): udev loads modules and
# follows /etc/udev/rules.d
boot_with_udev() {
  mkdir -p /lib/udev/rules.d /run/udev
  cp /lab/*.rules /lib/udev/rules.d/
  ln -sf /usr/bin/udevadm /tmp/systemd-udevd
  /tmp/systemd-udevd --daemon >/tmp/udevd 2>&1
  udevadm trigger --type=devices --action=add
  udevadm settle --timeout=60
}

# ---- the same with power: stopped_at CALL N COMMAND...: true when the command came to its N-th such call; it stays there.
stopped_at() {
  local call=$1 n=$2 tracer
  shift 2
  : >/tmp/killed
  lab_cut stop $call $n "$@" >/tmp/killed 2>&1 &
  tracer=$!
  until grep -q '^cut$' /tmp/killed; do
    kill -0 $tracer 2>/dev/null || { wait $tracer; code=$?; return 1; }
    sleep 0.05
  done
}
note() { cat /disk/notes/$1 2>/dev/null || echo "$2"; }

# power_walk STRIDE BOOTS: at each boot first what follows the run that the power cut off, then the next run, to the next point.
# All that it knows is on the disk, so that it goes on as well when the emulator dies at a point that nobody chose; with another disk
# it begins at $FROM, the next sync of apply and of reclaim.
power_walk() {
  local stride=$1 boots=$2 up down verb n told=0 trouble= at
  if [ ! -e /disk/notes/up ] && [ -n "$FROM" ]; then
    echo ${FROM%,*} >/disk/notes/up
    echo ${FROM#*,} >/disk/notes/down
  fi
  echo "LAB point $(note up 1),$(note down 1)"
  boot_with_udev
  devices_ready
  if [ ! -e /disk/notes/host ]; then
    remember_host
    echo "$at_host" >/disk/notes/host
    sync
  fi
  at_host=$(note host)
  if [ -e /disk/notes/point ]; then
    at=$(state)
    if [ "$(note next)" = "bulkhead rollback --yes" ] && [ "$(last_run)" = "$(note before)" ]; then
      # The run had not begun: a rollback would take back the one before.
      note run >/disk/notes/next
      case $(note run) in "$give") echo guest ;; *) echo host ;; esac >/disk/notes/wanted
    fi
    ask_journal
    finish "$(note point)" "$(note next)" "$(note wanted)"
    same "boot $BOOT: $(note point), booted with the devices with the $at; then '$(note next)' ends with the $(note wanted)" "" "$trouble"
    case $at in host | guest) ;; *) is_as_booted "$at" || not_ok "boot $BOOT: booted with host or guest" "$at" ;; esac
    trouble=
    rm /disk/notes/point
    sync
  fi
  while [ $BOOT -lt $boots ]; do
    up=$(note up 1) down=$(note down 1)
    if [ $up = end ] && [ $down = end ]; then break; fi
    case $(state) in
      host) verb=up n=$up next="$give" wanted=guest ; [ $((BOOT % 2)) = 0 ] && next="bulkhead rollback --yes" wanted=host ; run=$give ;;
      guest) verb=down n=$down run=$take_back
        case $((BOOT % 3)) in
          0) next=$take_back wanted=host ;;
          1) next=$give wanted=guest ;;
          2) next="bulkhead rollback --yes" wanted=guest ;;
        esac ;;
      *) not_ok "boot $BOOT: neither host nor guest" "$(state)"; return ;;
    esac
    echo "$next" >/disk/notes/next
    echo $wanted >/disk/notes/wanted
    echo "$run" >/disk/notes/run
    last_run >/disk/notes/before
    [ $n = end ] || echo $((n + stride)) >/disk/notes/$verb
    echo "power lost at sync $n of ${run#bulkhead }" | sed 's/ -f.*yes//; s/ 0000.*yes//' >/disk/notes/point
    sync
    if [ $n = end ]; then
      $run >/tmp/killed 2>&1
    else
      if stopped_at fdatasync $n $run --json; then lose_power; fi
      say "${run%% -*} syncs less than $n times"
      echo end >/disk/notes/$verb
    fi
    rm /disk/notes/point
    sync
  done
  [ $BOOT = $boots ] || same "up and down to the end of the runs" "end end" "$(note up) $(note down)"
}
