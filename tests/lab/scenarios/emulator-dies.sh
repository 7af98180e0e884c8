#: what The emulator itself dies: that is no failure of what ran in it; the scenario goes on, once, from the point it told.
#: kernel 6.12
#: host die signal SIGKILL
. /lab/lib.sh
if [ -n "$FROM" ]; then
  same "it goes on from the point it told" row/write,7 "$FROM"
  exit 0
fi
ok "what was seen before the point counts"
echo "LAB point row/write,7"
echo "LAB mark die"
sleep 100
not_ok "the emulator is gone by now"
