#!/usr/bin/env bash
# The map of ARCHITECTURE.md is held by the build: what breaks it does not compile.
cd "$(dirname "$0")/../.." && . tests/lib.sh
top=$PWD

# holds MODULE "DEPENDS" SOURCE-LINE...: the include check over one module that holds these lines.
holds() {
  local module=$1 depends=$2
  shift 2
  rm -rf "$work/tree"
  mkdir -p "$work/tree/$module"
  printf '%s\n' "$@" >"$work/tree/$module/some.cpp"
  cmake -DROOT="$work/tree" -DMODULE="$module" "-DDEPENDS=$depends" -DSTAMP="$work/stamp" -P "$top/cmake/check_includes.cmake"
}
refuses() {  # refuses "sentence" PATTERN MODULE DEPENDS LINE...
  local sentence=$1 pattern=$2
  shift 2
  if out=$(holds "$@" 2>&1); then not_ok "$sentence" "it was let through"; else says "$sentence" "$pattern" "$(tr -s ' \n' ' ' <<<"$out")"; fi
}

check "a declared include of a front header passes" holds core/plan "base;core/mig" '#include "core/mig/mig.hpp"' '#include "base/result.hpp"'
refuses "an undeclared include is refused" "add core/mig to DEPENDS" core/plan "base" '#include "core/mig/mig.hpp"'
refuses "core may not reach for edge, declared or not" "core may include only" core/plan "base;edge/nvml" '#include "edge/nvml/nvml.hpp"'
refuses "an edge may not include another edge" "never includes another edge" edge/store "base;edge/nvml" '#include "edge/nvml/nvml.hpp"'
refuses "engine may not include cli" "engine may include only" engine/observe "base;cli" '#include "cli/cli.hpp"'
refuses "the twin may not include core" "twin may include only" twin/mig "base;core/mig" '#include "core/mig/mig.hpp"'
refuses "only the front header is visible from outside" "only core/spec/spec.hpp is visible" core/plan "base;core/spec" '#include "core/spec/tree.hpp"'
refuses "core does not print" "core is pure" core/plan "base" 'void f() { std::cout << 1; }'
refuses "core reads no clock" "core is pure" core/plan "base" 'auto now() { return std::chrono::system_clock::now(); }'
check "an edge may" holds edge/store "base" 'auto now() { return std::chrono::system_clock::now(); }'

mkdir -p "$work/project/core/a" "$work/project/core/b"
touch "$work/project/core/a/a.hpp" "$work/project/core/b/b.hpp"
cat >"$work/project/CMakeLists.txt" <<CMAKE
cmake_minimum_required(VERSION 3.25)
project(cycle LANGUAGES NONE)
include($top/cmake/modules.cmake)
bulkhead_module(core/a DEPENDS core/b)
bulkhead_module(core/b DEPENDS core/a)
CMAKE
exits "a cycle cannot be declared" 1 cmake -S "$work/project" -B "$work/project/build"
says "and the message says why" "no such module yet" "$out"
done_testing
