#!/usr/bin/env bash
# Builds fuzz_ops.cc with the op library's own sources, libFuzzer and the address and undefined-behavior sanitizers, and
# runs it. Needs clang with its runtime libraries (Debian: clang and libclang-rt-dev); CXX names the compiler.
#   tests/fuzz/run_fuzz_ops.sh [libFuzzer arguments, e.g. -max_total_time=60 -seed=1 CORPUS_FOLDER]
# FUZZ_BUILD names a folder to build in and keep.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
compiler=${CXX:-clang++}
if [[ -n ${FUZZ_BUILD:-} ]]; then
  folder=$FUZZ_BUILD
  mkdir -p "$folder"
else
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
# The scalar kernels only (of no processor in particular): those of single instruction sets take minutes to compile, and are
# tested with the sanitizers by tests/custom_ops/run_sanitizers.sh.
cmake -S "$root/custom_ops" -B "$folder" -DCMAKE_CXX_COMPILER="$compiler" -DTETRIS_SANITIZE=ON -DTETRIS_CUDA=OFF \
  -DCMAKE_SYSTEM_NAME="$(uname -s)" -DCMAKE_SYSTEM_PROCESSOR=any -DTETRIS_FUZZ=ON >"$folder/cmake.log" || { cat "$folder/cmake.log"; exit 1; }
cmake --build "$folder" --target fuzz_ops --parallel 2 >"$folder/build.log" || { cat "$folder/build.log"; exit 1; }
UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1" "$folder/fuzz_ops" -rss_limit_mb=4096 -malloc_limit_mb=2048 -timeout=300 "$@"
