#!/usr/bin/env bash
# Builds the op library with the address and undefined-behavior sanitizers in a temporary folder and runs the op tests
# against it: every kernel, instruction set and malformed case. Then the kernels, called from several threads at once,
# with the thread sanitizer. Any report fails the run.
#   tests/custom_ops/run_sanitizers.sh [pytest arguments]
# PYTHON names the interpreter (default: python3); cmake and a C++ compiler with the sanitizers must be installed.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cmake -S "$root/custom_ops" -B "$folder" -DTETRIS_SANITIZE=ON -DTETRIS_WERROR=ON >"$folder/cmake.log" ||
  { cat "$folder/cmake.log"; exit 1; }
cmake --build "$folder" --parallel 2 >"$folder/build.log" || { cat "$folder/build.log"; exit 1; }

compiler=${CXX:-c++}
asan=$("$compiler" -print-file-name=libasan.so)
# The C++ library too: loaded later, by onnxruntime, its exceptions would escape the sanitizer's interceptors.
stdcxx=$("$compiler" -print-file-name=libstdc++.so.6)
# What tests compile is compiled without the sanitizer inside the compiler, which it makes four times slower.
printf '#!/bin/sh\nexec env -u LD_PRELOAD "%s" "$@"\n' "$compiler" >"$folder/compiler"
chmod +x "$folder/compiler"
# Python itself and onnxruntime keep memory to the end (detect_leaks=0) and are not built with the sanitizers.
status=0
(
  cd "$root"
  TETRIS_ONNX_TEST_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" \
    CXX="$folder/compiler" PYTHONPATH="$root" TETRIS_ONNX_LIBRARY="$folder/libtetris_onnx_ops.so" LD_PRELOAD="$asan $stdcxx" \
    ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=1:log_path=$folder/report" \
    UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1:log_path=$folder/report" \
    "$python" -m pytest tests/custom_ops -q -p no:cacheprovider "$@"
) || status=$?
if compgen -G "$folder/report*" >/dev/null; then
  cat "$folder"/report*
  exit 1
fi
if ((status)); then exit $status; fi

# Without onnxruntime, which is not built with the sanitizer: it would not see how onnxruntime's threads are synchronized.
cmake -S "$root/custom_ops" -B "$folder/thread" -DTETRIS_SANITIZE=thread -DTETRIS_KERNEL_CHECK=ON -DTETRIS_CUDA=OFF \
  -DTETRIS_WERROR=ON >"$folder/cmake.log" || { cat "$folder/cmake.log"; exit 1; }
cmake --build "$folder/thread" --target kernel_check --parallel 2 >"$folder/build.log" ||
  { cat "$folder/build.log"; exit 1; }
"$folder/thread/kernel_check" 60
TETRIS_ONNX_ISA=scalar "$folder/thread/kernel_check" 30
if grep -q avx512_bf16 /proc/cpuinfo; then TETRIS_ONNX_ISA=amx "$folder/thread/kernel_check" 20; fi
