// Choice of the instruction set at run time.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

#if defined(TETRIS_X86) && defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace tetris {
namespace {

#if defined(TETRIS_X86)
#if defined(_MSC_VER)
bool cpu_bit(int leaf, int reg, int bit, int subleaf = 0) {
  int regs[4];
  __cpuidex(regs, leaf, subleaf);
  return (regs[reg] >> bit & 1) != 0;
}
// The operating system saves these registers at a task switch.
bool os_saves(unsigned long long mask) { return cpu_bit(1, 2, 27) && (_xgetbv(0) & mask) == mask; }
bool has_avx2() { return os_saves(0x6) && cpu_bit(1, 2, 12) && cpu_bit(7, 1, 5); }
bool has_avx512() {
  return has_avx2() && os_saves(0xe6) && cpu_bit(7, 1, 16) && cpu_bit(7, 1, 17) && cpu_bit(7, 1, 30) &&
         cpu_bit(7, 1, 31);
}
bool has_avx512_vnni() { return has_avx512() && cpu_bit(7, 2, 11); }
bool has_avx512_bf16() { return has_avx512() && cpu_bit(7, 0, 5, 1); }
#else
bool has_avx2() { return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0; }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
         __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512vl") != 0;
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni") != 0; }
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16") != 0; }
#endif
#endif

// From the oldest processors' to the newest ones'; in a precision, the slowest first.
std::vector<const KernelSet*> supported_kernels() {
  std::vector<const KernelSet*> sets{&scalar_kernels()};
#if defined(TETRIS_X86)
  if (has_avx2()) sets.push_back(&avx2_kernels());
  if (has_avx512()) sets.push_back(&avx512_kernels());
  if (has_avx512_vnni()) sets.push_back(&avx512_vnni_kernels());
  if (has_avx512_bf16()) sets.push_back(&avx512_bf16_kernels());
#endif
#if defined(TETRIS_NEON)
  sets.push_back(&neon_kernels());
#endif
  return sets;
}

}  // namespace

const KernelSet& select_kernels(Precision precision) {
  std::vector<const KernelSet*> sets = supported_kernels();
  if (const char* forced = std::getenv("TETRIS_ONNX_ISA"); forced != nullptr && *forced != '\0') {
    std::string names;
    size_t known = 0;
    for (size_t i = 0; i < sets.size(); ++i) {
      if (std::string(forced) == sets[i]->name) known = i + 1;
      names += names.empty() ? sets[i]->name : std::string(", ") + sets[i]->name;
    }
    if (known == 0) {
      throw std::invalid_argument("environment variable TETRIS_ONNX_ISA is '" + std::string(forced) +
                                  "', but this build and processor support: " + names);
    }
    sets.resize(known);
  }
  const KernelSet* best = nullptr;
  for (const Precision wanted : {Precision::kFloat32, precision}) {
    for (const KernelSet* set : sets) {
      if (set->precision == wanted) best = set;
    }
  }
  return *best;
}

ConvAlgorithm select_conv_algorithm() {
  const char* value = std::getenv("TETRIS_ONNX_CONV");
  const std::string name = value == nullptr ? "" : value;
  if (name.empty() || name == "auto") return ConvAlgorithm::kAuto;
  if (name == "direct") return ConvAlgorithm::kDirect;
  if (name == "winograd2") return ConvAlgorithm::kWinograd2;
  if (name == "winograd4") return ConvAlgorithm::kWinograd4;
  throw std::invalid_argument("environment variable TETRIS_ONNX_CONV is '" + name +
                              "', expected auto, direct, winograd2 or winograd4");
}

}  // namespace tetris
