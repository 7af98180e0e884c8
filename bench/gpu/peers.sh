#!/usr/bin/env bash
# Builds the peers that `./do bench-gpu` measures beside bulkhead, into .peers/lib. Their sources are for measuring only: they stay in
# .peers, which git must not see. What is already in .peers/src is built as it is; the rest is cloned.
#   CUDA_HOME      headers and stubs (default /usr/local/cuda)
#   NVML_INCLUDE   where nvml.h is (default build/deps/usr/include, which ./do test unpacks)
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/../.."
root=$PWD cuda=${CUDA_HOME:-/usr/local/cuda} nvml=${NVML_INCLUDE:-$PWD/build/deps/usr/include}
git check-ignore -q .peers/x || echo /.peers/ >>"$(git rev-parse --git-path info/exclude)"
mkdir -p .peers/src .peers/lib/{hami,vgpu-manager,xsched}
jobs=$(nproc)

source_of() {  # source_of FOLDER URL
  [ -e ".peers/src/$1/CMakeLists.txt" ] || [ -e ".peers/src/$1/library/CMakeLists.txt" ] || git clone --depth 1 --recursive "$2" ".peers/src/$1"
}
attempt() {  # attempt NAME FUNCTION: a peer that does not build is said so, the others go on
  local log=$root/.peers/$1.log status=0
  set +e  # in an `if` the function's own set -e would not hold
  (set -e; cd "$root"; "$2") >"$log" 2>&1
  status=$?
  set -e
  if [ $status = 0 ]; then echo "$1: built"; else echo "$1: does not build, see $log"; fi
}

hami() {
  source_of hami https://github.com/Project-HAMi/HAMi-core
  # It links against two libraries it only ever opens at run time: empty ones do.
  mkdir -p .peers/stubs
  [ -e .peers/stubs/libnvidia-ml.so ] || gcc -shared -o .peers/stubs/libnvidia-ml.so -x c /dev/null
  [ -e .peers/stubs/libcuda.so ] || gcc -shared -o .peers/stubs/libcuda.so -x c /dev/null
  # Its own build.sh builds without optimisation; this is its best.
  cmake -S .peers/src/hami -B .peers/src/hami/build -DDLSYM_HOOK_ENABLE=1 -DMULTIPROCESS_LIMIT_ENABLE=1 -DHOOK_MEMINFO_ENABLE=1 \
    -DHOOK_NVML_ENABLE=1 -DCMAKE_BUILD_TYPE=Debug -DTEST_DEVICE_ID=0 -DCMAKE_C_FLAGS="-O2 -I$nvml -I$cuda/include" \
    -DCMAKE_SHARED_LINKER_FLAGS="-L$root/.peers/stubs"
  make -C .peers/src/hami/build -j"$jobs" vgpu
  cp .peers/src/hami/build/libvgpu.so .peers/lib/hami/
}

vgpu_manager() {
  source_of vgpu https://github.com/coldzerofear/vgpu-manager
  cmake -S .peers/src/vgpu/library -B .peers/src/vgpu/library/build -DVGPU_RUN_HOOK_CHECKS=OFF
  make -C .peers/src/vgpu/library/build -j"$jobs" vgpu-control
  cp .peers/src/vgpu/library/build/libvgpu-control.so .peers/lib/vgpu-manager/
}

xsched() {
  source_of xsched https://github.com/XpuOS/xsched
  local build=.peers/src/xsched/build service=ON
  # Where its submodules cannot be had, .peers/standin holds an ipc library and a server without HTTP, and ABOUT says so.
  if [ -z "$(ls -A .peers/src/xsched/3rdparty/ipc)" ]; then cp -r .peers/standin/ipc/. .peers/src/xsched/3rdparty/ipc/; fi
  if [ -e .peers/standin/xserver.cpp ]; then service=OFF; fi
  cmake -S .peers/src/xsched -B $build -DPLATFORM_CUDA=ON -DBUILD_SERVICE=$service -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS="-w -g0"
  make -C $build -j"$jobs"
  if [ $service = OFF ]; then
    local s=.peers/src/xsched
    # shellcheck disable=SC2046
    g++ -std=c++20 -O2 -w -o .peers/lib/xsched/xserver .peers/standin/xserver.cpp -I$s/include -I$s/utils/include -I$s/protocol/include \
      -I$s/sched/include -I.peers/standin/ipc/include -Wl,--start-group $(find $build -name libsched.a -o -name libutils.a -o -name libprotocol.a) \
      -Wl,--end-group -lpthread -ldl -static-libstdc++ -static-libgcc
    echo "with a stand-in for its IPC library and a server without HTTP" >.peers/lib/xsched/ABOUT
  else
    cp "$(find $build -name xserver -type f)" .peers/lib/xsched/
    rm -f .peers/lib/xsched/ABOUT
  fi
  cp $build/platforms/cuda/*.so $build/preempt/*.so .peers/lib/xsched/
  rm -f .peers/lib/xsched/libcuda.so .peers/lib/xsched/libcuda.so.1  # copies: links do not survive every way of carrying
  cp .peers/lib/xsched/libshimcuda.so .peers/lib/xsched/libcuda.so.1
  cp .peers/lib/xsched/libshimcuda.so .peers/lib/xsched/libcuda.so
}

attempt hami hami
attempt vgpu-manager vgpu_manager
attempt xsched xsched
for library in .peers/lib/*/*.so; do strip --strip-debug "$library"; done
