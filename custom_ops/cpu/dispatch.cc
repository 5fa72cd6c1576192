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
bool cpu_bit(int leaf, int reg, int bit) {
  int regs[4];
  __cpuidex(regs, leaf, 0);
  return (regs[reg] >> bit & 1) != 0;
}
// The operating system saves these registers at a task switch.
bool os_saves(unsigned long long mask) { return cpu_bit(1, 2, 27) && (_xgetbv(0) & mask) == mask; }
bool has_avx2() { return os_saves(0x6) && cpu_bit(1, 2, 12) && cpu_bit(7, 1, 5); }
bool has_avx512() {
  return has_avx2() && os_saves(0xe6) && cpu_bit(7, 1, 16) && cpu_bit(7, 1, 17) && cpu_bit(7, 1, 30) &&
         cpu_bit(7, 1, 31);
}
#else
bool has_avx2() { return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0; }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
         __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512vl") != 0;
}
#endif
#endif

// Slowest first.
std::vector<const KernelSet*> supported_kernels() {
  std::vector<const KernelSet*> sets{&scalar_kernels()};
#if defined(TETRIS_X86)
  if (has_avx2()) sets.push_back(&avx2_kernels());
  if (has_avx512()) sets.push_back(&avx512_kernels());
#endif
#if defined(TETRIS_NEON)
  sets.push_back(&neon_kernels());
#endif
  return sets;
}

}  // namespace

const KernelSet& select_kernels() {
  const std::vector<const KernelSet*> sets = supported_kernels();
  const char* forced = std::getenv("TETRIS_ONNX_ISA");
  if (forced == nullptr || *forced == '\0') return *sets.back();
  std::string names;
  for (const KernelSet* set : sets) {
    if (std::string(forced) == set->name) return *set;
    names += names.empty() ? set->name : std::string(", ") + set->name;
  }
  throw std::invalid_argument("environment variable TETRIS_ONNX_ISA is '" + std::string(forced) +
                              "', but this build and processor support: " + names);
}

}  // namespace tetris
