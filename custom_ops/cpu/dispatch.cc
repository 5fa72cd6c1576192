// Choice of the instruction set at run time.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

#if defined(TETRIS_X86) && defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#endif
#if defined(TETRIS_AMX)
#include <cpuid.h>
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>
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
bool has_avx512_bf16() { return has_avx512_vnni() && cpu_bit(7, 0, 5, 1); }
#else
bool has_avx2() { return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0; }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
         __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512vl") != 0;
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni") != 0; }
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16") != 0; }
#endif
#endif

#if defined(TETRIS_AMX)
// Whether the processor has AMX and Linux lets this process use it. It has to be asked, since the tiles are 8 KB of every
// thread's state; refused (an old kernel, a signal stack too small for them), there is no AMX.
bool may_use_amx() {
  static const bool granted = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const unsigned tile_bf16_int8 = 1U << 24 | 1U << 22 | 1U << 25;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & tile_bf16_int8) != tile_bf16_int8) return false;
    const unsigned os_xsave = 1U << 27;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & os_xsave) == 0) return false;
    unsigned saved = 0, upper = 0;
    __asm__("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
    constexpr unsigned kTileConfig = 1U << 17, kTileData = 1U << 18;
    if ((saved & kTileConfig) == 0 || (saved & kTileData) == 0) return false;
    constexpr long kRequestPermission = 0x1023, kTileDataFeature = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, kRequestPermission, kTileDataFeature) == 0;
  }();
  return granted;
}

// Tests bring an emulator of AMX's instructions into the process (tests/custom_ops/amx_emulator.cc). It is used only where
// a process both has its function, which no other program exports, and asks for AMX by name.
bool emulates_amx() {
  const char* forced = std::getenv("TETRIS_ONNX_ISA");
  if (forced == nullptr || std::strcmp(forced, "amx") != 0) return false;
  auto* emulate = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "tetris_onnx_emulate_amx"));
  return emulate != nullptr && emulate() == 1;
}

bool has_amx() { return has_avx512_vnni() && has_avx512_bf16() && (may_use_amx() || emulates_amx()); }
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
#if defined(TETRIS_AMX)
  if (has_amx()) sets.insert(sets.end(), {&amx_int8_kernels(), &amx_bf16_kernels()});
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
      if (i > 0 && std::strcmp(sets[i]->name, sets[i - 1]->name) == 0) continue;  // in another precision
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
