#!/usr/bin/env bash
# The one entry point: ./do demo, ./do test ... Each command installs what it needs (Debian packages, through apt).
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"

build_packages=(g++ cmake ninja-build ccache pkg-config libfmt-dev nlohmann-json3-dev libyaml-cpp-dev libsqlite3-dev
  libsystemd-dev libcli11-dev libgtest-dev libgmock-dev libboost1.81-dev libssl-dev libncurses-dev libre2-dev zlib1g-dev)
run_packages=(libsystemd0 tmux hwloc python3 strace sqlite3 libncurses6 libncursesw6 systemd podman runc busybox-static)
# The lab boots real kernels under QEMU; what it cannot get it skips with words. Kernels and a newer QEMU are unpacked
# below build/lab by tests/lab/lab/fetch.py.
lab_packages=(qemu-system-x86 qemu-system-data seabios ipxe-qemu busybox-static kmod xz-utils zstd e2fsprogs make ipmitool
  driverctl pciutils jq strace bash coreutils python3)
# A libvirtd of the test's own; without these packages it says so and is skipped.
libvirt_packages=(libvirt-clients libvirt-daemon libvirt-daemon-driver-qemu libxml2-utils qemu-system-x86)
lint_packages=(clang clang-format clang-tidy libclang-rt-14-dev gcovr)
# Real NVML clients and the vendor's header live in contrib and non-free. They are unpacked below build/deps, not
# installed: their dependencies would pull a driver onto this machine.
client_packages=(libnvidia-ml-dev nvidia-smi libnvidia-ml1 nvtop python3-pynvml libhwloc-contrib-plugins)

export CCACHE_SLOPPINESS=pch_defines,time_macros
jobs=$(nproc)

# A twin is sixteen thousand small files: half a second on tmpfs, up to half a minute on a busy disk. /dev/shm is used
# when it is roomy and may hold programs (containers often give 64 MB of it, or mount it noexec).
memory_tmp() {
  [ -z "${TMPDIR:-}" ] || return 0
  local probe=/dev/shm/bulkhead-probe.$$ room
  room=$(df --output=avail -k /dev/shm 2>/dev/null | tail -1)
  [ "${room:-0}" -gt 1500000 ] || return 0
  if printf '#!/bin/sh\n' >"$probe" 2>/dev/null && chmod +x "$probe" && "$probe" 2>/dev/null; then export TMPDIR=/dev/shm; fi
  rm -f "$probe"
}

say() { printf '\n== %s\n' "$*" >&2; }
die() { printf 'do: %s\n' "$*" >&2; exit 2; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

apt_updated=
apt_update() {
  [ -n "$apt_updated" ] && return
  as_root apt-get update -qq || die "apt-get update failed; is the network up?"
  apt_updated=1
}

ensure() {  # ensure PACKAGE...: installs those that are missing
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return
  say "installing: ${missing[*]}"
  apt_update
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
    die "apt-get install ${missing[*]} failed"
}

has_candidate() { [[ $(apt-cache policy "$1" 2>/dev/null) == *"Candidate: "[0-9]* ]]; }

# The archive this machine already uses for main, asked for contrib and non-free as well.
add_components() {
  has_candidate libnvidia-ml-dev && return
  apt_update
  has_candidate libnvidia-ml-dev && return
  local uri codename file=/etc/apt/sources.list.d/bulkhead-nvml-clients.sources
  read -r uri codename < <(apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' |
    awk '$3 == "main" && $2 !~ /-/ && /debian/ && !/security/ && !found { print $1, $2; found = 1 }') ||
    die "no Debian archive with component main is configured; add contrib and non-free by hand"
  say "adding contrib and non-free of the configured Debian archive (real NVML clients): $file"
  as_root tee "$file" >/dev/null <<EOF
Types: deb
URIs: $uri
Suites: $codename
Components: contrib non-free
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
EOF
  apt_updated=
  if ! as_root apt-get update -qq; then
    as_root rm -f "$file"
    die "apt-get update failed with $file, which was taken out again; add contrib and non-free by hand"
  fi
  has_candidate libnvidia-ml-dev || die "no libnvidia-ml-dev in $uri $codename non-free"
}

clients() {
  [ -e build/deps/.complete ] && return
  add_components
  say "unpacking real NVML clients into build/deps: ${client_packages[*]}"
  mkdir -p build/deps/archives
  (cd build/deps/archives && apt-get download -qq "${client_packages[@]}" 2>/dev/null) || die "apt-get download failed"
  local archive
  for archive in build/deps/archives/*.deb; do dpkg -x "$archive" build/deps; done
  rm -rf build/deps/archives
  touch build/deps/.complete
}

configure() {  # configure PRESET
  [ -e "build/$1/build.ninja" ] || cmake --preset "$1" >/dev/null || die "cmake --preset $1 failed"
}

build() {  # build PRESET TARGET...
  local preset=$1
  shift
  configure "$preset"
  NINJA_STATUS='[%f/%t %es] ' ninja -C "build/$preset" -j "$jobs" "$@"
}

# Not there is not wrong: the suite then says what it lacks. (The subshell keeps die() from ending the tests.)
prepare_libvirt() { (ensure "${libvirt_packages[@]}") || say "libvirt's packages cannot be installed; tests/libvirt is skipped"; }
prepare_lab() { (ensure "${lab_packages[@]}") || say "the lab's packages cannot be installed; its scenarios are skipped"; }

# Unpacked, not installed: the package would start a server of its own on this machine.
prepare_prometheus() {
  command -v prometheus >/dev/null || [ -x build/deps/usr/bin/prometheus ] && return
  (
    apt_update
    mkdir -p build/deps/archives && cd build/deps/archives && apt-get download -qq prometheus 2>/dev/null &&
      dpkg -x prometheus_*.deb .. && rm -f prometheus_*.deb
  ) || say "prometheus cannot be had; tests/telemetry does without it"
}
# It makes journals out of records; installed, it starts nothing.
prepare_journal() { (ensure systemd-journal-remote) || say "systemd-journal-remote cannot be installed; tests of the journal are skipped"; }
prepare_build() { ensure "${build_packages[@]}"; clients; }

bench_gpu() {  # where nothing can be installed or built (a GPU machine without a network), what was carried is measured
  case " $* " in
    *" --dry-run "* | *" --merge "* | *" --help "* | *" -h "*) ;;
    *)
      if [ ! -x build/bin/bulkhead ] || [ -e build/release/build.ninja ]; then
        prepare_build
        build release bulkhead guard_preload >&2
      fi
      ;;
  esac
  exec python3 bench/gpu/run.py "$@"
}

total_passed=0 total_failed=0 failed_suites=()
tally() {  # tally NAME LOG STATUS: adds up a suite's closing "N passed, M failed"
  local passed failed line
  line=$(grep -aE '^[0-9]+ passed, [0-9]+ failed$' "$2" | tail -1 || true)
  passed=$(sed -nE 's/^([0-9]+) passed.*/\1/p' <<<"$line")
  failed=$(sed -nE 's/.* ([0-9]+) failed$/\1/p' <<<"$line")
  if [ -z "$line" ]; then failed=1; passed=0; fi
  if [ "$3" != 0 ] && [ "$failed" = 0 ]; then failed=1; fi
  total_passed=$((total_passed + passed)); total_failed=$((total_failed + failed))
  if [ "$failed" != 0 ]; then failed_suites+=("$1"); fi
  printf '%-22s %5s passed %4s failed  %4ss\n' "$1" "$passed" "$failed" "$4"
}

suite() {  # suite NAME COMMAND...: runs it, shows failures, adds it up
  begin "$@"
  finish "$1"
}

declare -A under_way=() began=()
begin() {  # begin NAME COMMAND...: runs it beside the others until finish NAME
  local name=$1
  shift
  mkdir -p build/logs
  began[$name]=$SECONDS
  (
    status=0
    "$@" >"build/logs/$name.log" 2>&1 </dev/null || status=$?
    printf '%s\n' $SECONDS >"build/logs/$name.end"
    exit $status
  ) &
  under_way[$name]=$!
}

finish() {
  local name=$1 log=build/logs/$1.log status=0
  wait "${under_way[$name]}" || status=$?
  if [ $status != 0 ]; then
    grep -aE '^not ok|\[  FAILED  \]|ERROR: |runtime error|Failure$' -A6 "$log" | head -60 || true
    printf -- '-- last lines of %s:\n' "$log"; tail -15 "$log"
  fi
  tally "$name" "$log" $status $(($(cat "build/logs/$name.end" 2>/dev/null || echo $SECONDS) - began[$name]))
}

# Suites that mostly wait for what a twin's machine does in its own time: they run beside all others.
waiting=(protect telemetry heal)

unit_tests() {  # unit_tests PROGRAM: gtest's own summary becomes the closing line
  local out status=0
  out=$("$1" --gtest_brief=1 2>&1) || status=$?
  printf '%s\n' "$out"
  local passed failed
  passed=$(sed -nE 's/^\[  PASSED  \] ([0-9]+) tests?\.$/\1/p' <<<"$out" | tail -1)
  failed=$(sed -nE 's/^ *([0-9]+) FAILED TESTS?$/\1/p' <<<"$out" | tail -1)
  [ -n "$passed" ] || { passed=0; failed=${failed:-1}; }
  printf '%s passed, %s failed\n' "$passed" "${failed:-0}"
  return $status
}

demo_claims() {  # the demo ends at the first claim that is not true
  local status=0
  bash demo/demo.sh >build/logs/demo.story 2>&1 || status=$?
  grep -F 'NOT TRUE' -A40 build/logs/demo.story || true
  printf '%s passed, %s failed\n' "$(grep '^=> ' build/logs/demo.story | grep -vc 'NOT TRUE')" "$status"
  return $status
}

closing() {
  if [ ${#failed_suites[@]} != 0 ]; then printf 'failed: %s (logs in build/logs)\n' "${failed_suites[*]}"; fi
  printf '\n%s passed, %s failed\n' "$total_passed" "$total_failed"
  [ "$total_failed" = 0 ]
}

run_suites() {  # every script of tests/*/, in name order; BULKHEAD_QUICK=1 leaves the long enumerations out
  export BIN=$PWD/build/bin DEPS=$PWD/build/deps
  local script name
  for name in "${waiting[@]}"; do begin "$name" bash "tests/$name/run.sh"; done
  for script in tests/*/*.sh; do
    name=$(basename "$script" .sh)
    case $name in
      lib) continue ;;
      run) name=$(basename "$(dirname "$script")") ;;
    esac
    [ -n "${under_way[$name]:-}" ] || suite "$name" bash "$script"
  done
  for name in "${waiting[@]}"; do finish "$name"; done
}

memory_tmp
case "${1:-help}" in
  build)
    prepare_build
    build release all
    ;;
  demo)
    prepare_build
    ensure libsystemd0
    build release bulkhead twin_nvml twin_device twin_cuda cuda_spin >&2
    exec env BIN="$PWD/build/bin" DEPS="$PWD/build/deps" bash demo/demo.sh "${@:2}"
    ;;
  test)
    prepare_build
    ensure "${run_packages[@]}"
    prepare_lab
    prepare_libvirt
    prepare_prometheus
    prepare_journal
    say "building"
    build release all bulkhead_tests
    say "testing"
    begin unit unit_tests build/bin/bulkhead_tests
    BULKHEAD_QUICK=1 run_suites
    finish unit
    closing
    ;;
  test-all)
    prepare_build
    ensure "${run_packages[@]}" "${lint_packages[@]}"
    prepare_lab
    prepare_libvirt
    prepare_prometheus
    prepare_journal
    build release all bulkhead_tests
    build debug bulkhead_tests
    suite sanitizers unit_tests build/debug/bin/bulkhead_tests
    suite unit unit_tests build/bin/bulkhead_tests
    BULKHEAD_QUICK=0 run_suites
    suite demo demo_claims
    suite coverage bash tests/coverage.sh
    suite fuzz bash tests/fuzz.sh "${BULKHEAD_FUZZ_SECONDS:-60}"
    suite lint bash tests/lint.sh
    closing
    ;;
  lab)
    prepare_build
    prepare_lab
    build release all >&2
    exec env BIN="$PWD/build/bin" bash tests/lab/run.sh "${@:2}"
    ;;
  bench)
    prepare_build
    ensure "${run_packages[@]}"
    build release all bulkhead_benches >&2
    exec env BIN="$PWD/build/bin" DEPS="$PWD/build/deps" bash bench/run.sh "${@:2}"
    ;;
  bench-gpu)
    bench_gpu "${@:2}"
    ;;
  package)
    prepare_build
    build release all
    (cd build/release && cpack -G 'TGZ;DEB' >/dev/null)
    mkdir -p build/packages
    mv build/release/bulkhead*.tar.gz build/release/bulkhead*.deb build/packages/
    ls -l build/packages
    ;;
  fmt)
    ensure clang-format
    git ls-files '*.cpp' '*.hpp' | xargs clang-format -i
    git diff --stat
    ;;
  clean)
    rm -rf build
    ;;
  help | --help | -h)
    cat <<'EOF'
./do demo       the main job on a simulated eight-GPU machine, told as a story (under 5 minutes the first time)
./do test       build and test everything that fits in CI
./do test-all   the long enumerations, the unit tests under ASan and UBSan, coverage, fuzzing and clang-tidy as well
./do lab        real kernels in emulated machines: every scenario, or those named (--list shows them)
./do build      build/bin/bulkhead and the twin's libraries
./do bench      every benchmark, each a ratio against a peer or a floor of the same run
./do bench-gpu  software slices on a real NVIDIA GPU, beside their peers (--help: scenes and how long each takes)
./do package    build/packages: a tarball and a Debian package
./do fmt        clang-format over the tree
./do clean      remove build/

Each installs the Debian packages it needs (apt, with sudo when you are not root).
EOF
    ;;
  *) die "no command '$1'; ./do help lists them" ;;
esac
