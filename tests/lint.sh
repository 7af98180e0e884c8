#!/usr/bin/env bash
# clang-format and the lean clang-tidy of .clang-tidy over every source file.
set -uo pipefail
cd "$(dirname "$0")/.."
passed=0 failed=0
check() { if [ "$2" = 0 ]; then passed=$((passed + 1)); printf 'ok - %s\n' "$1"; else failed=$((failed + 1)); printf 'not ok - %s\n' "$1"; fi; }
status=0
git ls-files '*.cpp' '*.hpp' | xargs clang-format --dry-run -Werror || status=1
check 'every file is as clang-format leaves it' $status
# clang cannot read g++'s precompiled header and does not know all of its warnings: the same flags without.
mkdir -p build/lint
sed -E 's/-include [^ ]*cmake_pch\.hxx//g; s/-Winvalid-pch//g; s/-ffile-prefix-map=[^ ]*//g; s/-Wno-(restrict|stringop-[a-z]*)//g' build/release/compile_commands.json >build/lint/compile_commands.json
status=0
git ls-files 'base/*.cpp' 'core/*.cpp' 'edge/*.cpp' 'engine/*.cpp' 'cli/*.cpp' 'twin/*.cpp' | grep -vE '_(test|fuzz|bench)\.cpp$' |
  xargs -P "$(nproc)" -n 2 clang-tidy -quiet -p build/lint 2>/dev/null || status=1
check 'clang-tidy finds nothing' $status
printf '%s passed, %s failed\n' "$passed" "$failed"
[ "$failed" = 0 ]
