// AMX for tests on processors that have none: a handler of SIGILL executes its instructions, of the very machine code that a
// processor with AMX would run. For 64-bit Linux.
//
//   c++ -std=c++17 -O3 -march=native -shared -fPIC tests/custom_ops/amx_emulator.cc -o libamx_emulator.so
//   LD_PRELOAD=$PWD/libamx_emulator.so TETRIS_ONNX_ISA=amx ...
//
// The op library asks for it by the function tetris_onnx_emulate_amx, which installs the handler, and only if TETRIS_ONNX_ISA
// is `amx` (cpu/dispatch.cc): a process that has not loaded this file never executes an instruction that it lacks.
//
// Tiles belong to threads. What the processor answers with #UD or #GP ends the process here, too, by SIGILL or SIGSEGV,
// after a line that says why. Semantics: Intel, Instruction Set Reference, "Intel AMX Instruction Set Reference".
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64, "the operand of LDTILECFG");

struct Tiles {
  bool configured = false;
  Config config{};
  uint8_t data[kTiles][kRows][kRowBytes] = {};
};

thread_local Tiles tiles;
std::atomic<int64_t> executed{0};
std::atomic<int> configured_threads{0};
struct sigaction previous;

[[noreturn]] void fault(int signal_number, const char* what) {
  std::fprintf(stderr, "amx_emulator: %s: %s\n", signal_number == SIGILL ? "#UD" : "#GP", what);
  std::fflush(stderr);
  signal(signal_number, SIG_DFL);
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, signal_number);
  sigprocmask(SIG_UNBLOCK, &set, nullptr);
  raise(signal_number);
  _exit(1);
}
void undefined_unless(bool condition, const char* what) {
  if (!condition) fault(SIGILL, what);
}
void protection_unless(bool condition, const char* what) {
  if (!condition) fault(SIGSEGV, what);
}

void release() {
  if (tiles.configured) configured_threads.fetch_sub(1);
  tiles = Tiles();
}

void load_config(const Config& config) {
  protection_unless(config.palette <= 1, "palette");
  if (config.palette == 0) return release();
  for (const uint8_t byte : config.reserved) protection_unless(byte == 0, "reserved bytes of the configuration");
  for (int t = 0; t < 16; ++t) {
    const int rows = config.rows[t], bytes = config.row_bytes[t];
    protection_unless(rows <= (t < kTiles ? kRows : 0) && bytes <= (t < kTiles ? kRowBytes : 0), "size of a tile");
    protection_unless((rows == 0) == (bytes == 0), "a tile with rows or columns only");
  }
  if (!tiles.configured) configured_threads.fetch_add(1);
  tiles = Tiles();
  tiles.configured = true;
  tiles.config = config;
}

int rows_of(int t) { return tiles.config.rows[t]; }
int bytes_of(int t) { return tiles.config.row_bytes[t]; }

void check_tile(int t) {
  undefined_unless(tiles.configured, "tiles are not configured");
  undefined_unless(t < kTiles && rows_of(t) > 0, "a tile that is not configured");
}

// dest += left * right, which `multiply` does for one row: (sums of the row, the left row, the right tile).
template <class Multiply>
void multiply_tiles(int dest, int left, int right, Multiply multiply) {
  for (const int t : {dest, left, right}) {
    check_tile(t);
    undefined_unless(bytes_of(t) % 4 == 0, "a row that is not a multiple of 4 bytes");
  }
  undefined_unless(dest != left && dest != right && left != right, "the same tile twice");
  undefined_unless(rows_of(dest) == rows_of(left) && bytes_of(dest) == bytes_of(right) &&
                       bytes_of(left) / 4 == rows_of(right),
                   "sizes of the tiles of a product");
  for (int m = 0; m < rows_of(dest); ++m) multiply(tiles.data[dest][m], tiles.data[left][m], bytes_of(left) / 4);
  for (int m = rows_of(dest); m < kRows; ++m) std::memset(tiles.data[dest][m], 0, kRowBytes);
}

float flush(float x) { return std::fabs(x) < FLT_MIN ? 0.0F : x; }  // denormals count as zero; NaN stays

float from_bfloat16(const uint8_t* at) {
  uint16_t half;
  std::memcpy(&half, at, sizeof half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return flush(value);
}

void multiply_bfloat16(int dest, int left, int right) {
  float even[kRows][kRows], odd[kRows][kRows];
  for (int k = 0; k < rows_of(right); ++k) {
    for (int n = 0; n < kRows; ++n) {
      even[k][n] = from_bfloat16(&tiles.data[right][k][4 * n]);
      odd[k][n] = from_bfloat16(&tiles.data[right][k][4 * n + 2]);
    }
  }
  multiply_tiles(dest, left, right, [&](uint8_t* sums, const uint8_t* row, int count) {
    float first[kRows] = {}, second[kRows] = {}, total[kRows];
    for (int k = 0; k < count; ++k) {
      const float x = from_bfloat16(row + 4 * k), y = from_bfloat16(row + 4 * k + 2);
      for (int n = 0; n < kRows; ++n) {
        first[n] = flush(std::fma(x, even[k][n], first[n]));
        second[n] = flush(std::fma(y, odd[k][n], second[n]));
      }
    }
    std::memcpy(total, sums, kRowBytes);
    for (int n = 0; n < kRows; ++n) total[n] = flush(flush(total[n]) + flush(first[n] + second[n]));
    std::memcpy(sums, total, static_cast<size_t>(bytes_of(dest)));
  });
}

template <class Left, class Right>
void multiply_bytes(int dest, int left, int right) {
  multiply_tiles(dest, left, right, [&](uint8_t* sums, const uint8_t* row, int count) {
    uint32_t total[kRows];
    std::memcpy(total, sums, kRowBytes);
    for (int k = 0; k < count; ++k) {
      for (int n = 0; n < kRows; ++n) {
        int32_t sum = 0;
        for (int i = 0; i < 4; ++i) {
          sum += static_cast<Left>(row[4 * k + i]) * static_cast<Right>(tiles.data[right][k][4 * n + i]);
        }
        total[n] += static_cast<uint32_t>(sum);
      }
    }
    std::memcpy(sums, total, static_cast<size_t>(bytes_of(dest)));
  });
}

// A general register by its number in an instruction.
uint64_t general(const ucontext_t& context, int number) {
  static constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                     REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return static_cast<uint64_t>(context.uc_mcontext.gregs[kOrder[number]]);
}

// The memory operand of an instruction; `after_modrm` moves behind it.
struct Memory {
  uint64_t base = 0, stride = 0;  // stride: the index, scaled
  bool has_sib = false, relative = false;

  Memory(const ucontext_t& context, const uint8_t*& at, uint8_t vex1) {
    const uint8_t modrm = *at++;
    const int mod = modrm >> 6, rm = modrm & 7;
    const int index_high = (vex1 & 0x40) == 0 ? 8 : 0, base_high = (vex1 & 0x20) == 0 ? 8 : 0;
    int displacement = mod == 1 ? 1 : mod == 2 ? 4 : 0;
    if (rm == 4) {
      has_sib = true;
      const uint8_t sib = *at++;
      const int index = (sib >> 3 & 7) + index_high;
      if (index != 4) stride = general(context, index) << (sib >> 6);
      if (mod == 0 && (sib & 7) == 5) {
        displacement = 4;
      } else {
        base = general(context, (sib & 7) + base_high);
      }
    } else if (mod == 0 && rm == 5) {
      relative = true;
      displacement = 4;
    } else {
      base = general(context, rm + base_high);
    }
    if (displacement == 1) base += static_cast<uint64_t>(static_cast<int64_t>(static_cast<int8_t>(*at)));
    if (displacement == 4) {
      int32_t value;
      std::memcpy(&value, at, sizeof value);
      base += static_cast<uint64_t>(static_cast<int64_t>(value));
    }
    at += displacement;
    if (relative) base += reinterpret_cast<uint64_t>(at);
  }
};

void copy_rows(int t, const Memory& memory, bool to_memory) {
  check_tile(t);
  undefined_unless(memory.has_sib, "a tile in memory without a stride");
  undefined_unless(tiles.config.start_row == 0, "a start row");
  for (int r = 0; r < kRows; ++r) {
    auto* row = reinterpret_cast<uint8_t*>(memory.base + static_cast<uint64_t>(r) * memory.stride);
    if (r < rows_of(t)) {
      if (to_memory) {
        std::memcpy(row, tiles.data[t][r], static_cast<size_t>(bytes_of(t)));
      } else {
        std::memset(tiles.data[t][r], 0, kRowBytes);
        std::memcpy(tiles.data[t][r], row, static_cast<size_t>(bytes_of(t)));
      }
    } else if (!to_memory) {
      std::memset(tiles.data[t][r], 0, kRowBytes);
    }
  }
}

// Executes the instruction at `at`; its length, or 0 if it is none of AMX.
int execute(const ucontext_t& context, const uint8_t* at) {
  const uint8_t* const begin = at;
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2) return 0;  // VEX of three bytes, map 0F38
  const uint8_t vex1 = at[1], vex2 = at[2], opcode = at[3], modrm = at[4];
  enum Prefix { kNone, k66, kF3, kF2 };
  const int prefix = vex2 & 3, source = ~(vex2 >> 3) & 15;
  const bool in_memory = modrm >> 6 != 3;
  const int reg = (modrm >> 3 & 7) + ((vex1 & 0x80) == 0 ? 8 : 0), rm = (modrm & 7) + ((vex1 & 0x20) == 0 ? 8 : 0);
  if (opcode != 0x49 && opcode != 0x4b && opcode != 0x5c && opcode != 0x5e) return 0;
  undefined_unless((vex2 & 0x84) == 0, "VEX.W or VEX.L");
  at += 4;
  if (opcode == 0x49 && in_memory && (prefix == kNone || prefix == k66) && reg == 0) {
    undefined_unless(source == 0, "VEX.vvvv");
    const Memory memory(context, at, vex1);
    auto* config = reinterpret_cast<void*>(memory.base + memory.stride);
    if (prefix == kNone) {
      Config loaded;
      std::memcpy(&loaded, config, sizeof loaded);
      load_config(loaded);
    } else {
      std::memcpy(config, &tiles.config, sizeof tiles.config);
    }
  } else if (opcode == 0x49 && !in_memory && prefix == kNone && reg == 0 && rm == 0) {
    undefined_unless(source == 0, "VEX.vvvv");
    ++at;
    release();
  } else if (opcode == 0x49 && !in_memory && prefix == kF2) {
    undefined_unless(source == 0, "VEX.vvvv");
    ++at;
    check_tile(reg);
    std::memset(tiles.data[reg], 0, sizeof tiles.data[reg]);
  } else if (opcode == 0x4b && in_memory && prefix != kNone) {
    undefined_unless(source == 0, "VEX.vvvv");
    const Memory memory(context, at, vex1);
    copy_rows(reg, memory, prefix == kF3);  // F2: TILELOADD, 66: TILELOADDT1
  } else if (opcode == 0x5c && !in_memory && prefix == kF3) {
    ++at;
    multiply_bfloat16(reg, rm, source);
  } else if (opcode == 0x5e && !in_memory) {
    ++at;
    if (prefix == kF2) multiply_bytes<int8_t, int8_t>(reg, rm, source);
    if (prefix == kF3) multiply_bytes<int8_t, uint8_t>(reg, rm, source);
    if (prefix == k66) multiply_bytes<uint8_t, int8_t>(reg, rm, source);
    if (prefix == kNone) multiply_bytes<uint8_t, uint8_t>(reg, rm, source);
  } else {
    return 0;
  }
  executed.fetch_add(1, std::memory_order_relaxed);
  return static_cast<int>(at - begin);
}

void handle(int, siginfo_t*, void* data) {
  auto* context = static_cast<ucontext_t*>(data);
  auto& rip = context->uc_mcontext.gregs[REG_RIP];
  const int length = execute(*context, reinterpret_cast<const uint8_t*>(rip));
  rip += length;
  if (length == 0) sigaction(SIGILL, &previous, nullptr);  // whose it is
}

}  // namespace

#define TETRIS_EXPORT extern "C" __attribute__((visibility("default")))

// Makes AMX's instructions work in this process; 1.
TETRIS_EXPORT int tetris_onnx_emulate_amx() {
  struct sigaction current;
  sigaction(SIGILL, nullptr, &current);
  if ((current.sa_flags & SA_SIGINFO) != 0 && current.sa_sigaction == handle) return 1;
  struct sigaction ours = {};
  ours.sa_sigaction = handle;
  ours.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &ours, &previous);
  return 1;
}

// Instructions executed so far, and threads whose tiles are configured now.
TETRIS_EXPORT int64_t tetris_onnx_amx_executed() { return executed.load(); }
TETRIS_EXPORT int tetris_onnx_amx_configured() { return configured_threads.load(); }
