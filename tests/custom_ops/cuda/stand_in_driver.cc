// A stand-in for the NVIDIA driver (libcuda.so.1) on machines without a GPU. Device memory is host memory, filled with
// 0xff (NaN in every float type, -1 in integers) and with guards around it; a launch is handed to the test. It shows what
// the op library asks the driver for, not that a driver would accept it.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace {

constexpr size_t kGuard = 4096;

struct Loaded {
  const void* image;
  std::string name;
};
using Launch = int (*)(const void* image, const char* name, const unsigned* grid, unsigned threads, unsigned shared,
                       void* stream, void** parameters);

struct State {
  std::mutex mutex;
  int capability = 90, multiprocessors = 132, shared = 232448, version = 12080, parameters = -1;
  std::map<std::string, int> failures;  // function: the error it returns
  std::map<void*, size_t> memory;
  std::string log;
  Launch launch = nullptr;
  int depth = 0;  // contexts pushed
  long broken_guards = 0, bytes_in_use = 0;
};
State& state() {
  static State* all = new State;
  return *all;
}

int enter(const char* function, const std::string& details = "") {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.log += function + (details.empty() ? "" : " " + details) + "\n";
  const auto failure = s.failures.find(function);
  return failure == s.failures.end() ? 0 : failure->second;
}
#define ENTER(...) \
  if (const int error = enter(__VA_ARGS__); error != 0) return error

}  // namespace

extern "C" {
void stand_in_device(int capability, int multiprocessors, int shared, int version) {
  state().capability = capability;
  state().multiprocessors = multiprocessors;
  state().shared = shared;
  state().version = version;
}
void stand_in_parameters(int count) { state().parameters = count; }
void stand_in_launch(Launch launch) { state().launch = launch; }
void stand_in_fail(const char* function, int error) {
  if (error == 0) state().failures.erase(function);
  else state().failures[function] = error;
}
const char* stand_in_log() { return state().log.c_str(); }
void stand_in_clear_log() { state().log.clear(); }
long stand_in_broken_guards() { return state().broken_guards; }
long stand_in_bytes_in_use() { return state().bytes_in_use; }
int stand_in_context_depth() { return state().depth; }

int cuInit(unsigned) {
  ENTER("cuInit");
  return 0;
}
int cuGetErrorString(int error, const char** text) {
  *text = error == 218 ? "a PTX JIT compilation failed" : "the stand-in was told to fail";
  return 0;
}
int cuDriverGetVersion(int* version) {
  *version = state().version;
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  ENTER("cuDeviceGet", std::to_string(ordinal));
  *device = ordinal;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  const State& s = state();
  *value = attribute == 75   ? s.capability / 10
           : attribute == 76 ? s.capability % 10
           : attribute == 97 ? s.shared
           : attribute == 16 ? s.multiprocessors
                             : -1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  ENTER("cuDevicePrimaryCtxRetain");
  *context = &state();
  return 0;
}
int cuCtxPushCurrent_v2(void* context) {
  if (context != &state()) return 201;
  ++state().depth;
  return 0;
}
int cuCtxPopCurrent_v2(void** context) {
  *context = &state();
  --state().depth;
  return 0;
}
int cuCtxSynchronize() {
  ENTER("cuCtxSynchronize");
  return 0;
}
int cuMemAlloc_v2(uint64_t* pointer, size_t bytes) {
  ENTER("cuMemAlloc", std::to_string(bytes));
  if (bytes == 0 || state().depth == 0) return 1;
  const size_t whole = (bytes + 255) / 256 * 256 + 2 * kGuard;
  void* block = std::aligned_alloc(4096, (whole + 4095) / 4096 * 4096);
  std::memset(block, 0xff, whole);
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  *pointer = reinterpret_cast<uint64_t>(block) + kGuard;
  s.memory[block] = bytes;
  s.bytes_in_use += static_cast<long>(bytes);
  return 0;
}
int cuMemFree_v2(uint64_t pointer) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  auto* block = reinterpret_cast<unsigned char*>(pointer - kGuard);
  const auto found = s.memory.find(block);
  if (found == s.memory.end()) return 1;
  for (size_t i = 0; i < kGuard; ++i) {
    if (block[i] != 0xff || block[kGuard + found->second + i] != 0xff) {
      ++s.broken_guards;
      break;
    }
  }
  s.bytes_in_use -= static_cast<long>(found->second);
  s.memory.erase(found);
  std::free(block);
  return 0;
}
int cuMemcpyHtoD_v2(uint64_t destination, const void* source, size_t bytes) {
  ENTER("cuMemcpyHtoD", std::to_string(bytes));
  std::memcpy(reinterpret_cast<void*>(destination), source, bytes);
  return 0;
}
int cuModuleLoadDataEx(void** module, const void* image, unsigned count, int* options, void** values) {
  const auto* bytes = static_cast<const unsigned char*>(image);
  std::string kind = "PTX";
  if (std::memcmp(bytes, "\x7f" "ELF", 4) == 0) {
    uint32_t flags;
    std::memcpy(&flags, bytes + 48, 4);
    kind = "cubin sm_" + std::to_string(bytes[8] >= 8 ? flags >> 8 & 0xff : flags & 0xff);  // by version of the format
  } else {
    const char* target = std::strstr(static_cast<const char*>(image), ".target ");
    kind += " " + std::string(target + 8, std::strcspn(target + 8, "\n"));
  }
  for (unsigned i = 0; i < count; ++i) {
    if (options[i] == 5 && state().failures.count("cuModuleLoadDataEx PTX") != 0) {
      std::snprintf(static_cast<char*>(values[i]), 64, "ptxas: the log");
    }
  }
  ENTER("cuModuleLoadDataEx", kind);
  const auto failure = state().failures.find("cuModuleLoadDataEx " + kind.substr(0, kind.find(' ')));
  if (failure != state().failures.end()) return failure->second;
  *module = new Loaded{image, ""};
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  ENTER("cuModuleGetFunction", name);
  *function = new Loaded{static_cast<Loaded*>(module)->image, name};
  return 0;
}
int cuFuncSetAttribute(void*, int attribute, int value) {
  ENTER("cuFuncSetAttribute", std::to_string(attribute) + " " + std::to_string(value));
  return 0;
}
int cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* bytes) {
  const std::string& name = static_cast<Loaded*>(function)->name;
  int count = name == "block_sparse_conv" ? 38 : name == "sum_splits" ? 15 : name == "max_pool" ? 16 : 9;
  if (state().parameters >= 0) count = state().parameters;
  *offset = *bytes = 0;
  return static_cast<int>(index) < count ? 0 : 1;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  const Loaded& loaded = *static_cast<Loaded*>(function);
  ENTER("cuLaunchKernel", loaded.name);
  if (extra != nullptr || state().depth == 0) return 1;
  const unsigned grid[3] = {x, y, z};
  return state().launch == nullptr
             ? 0
             : state().launch(loaded.image, loaded.name.c_str(), grid, threads, shared, stream, parameters);
}
}
