// The CUDA driver, looked up when the first GPU kernel is made: the library loads and links without it.
//
// Its functions are declared by hand, so that building needs no CUDA toolkit. NVIDIA never changes a function of this
// interface once it is published; a new version gets a new name (_v2).
// tests/custom_ops/cuda/check_driver_abi.cc compares these declarations with cuda.h where there is one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace tetris::cuda {

using Result = int;
using DevicePointer = uint64_t;  // CUdeviceptr
using DeviceOrdinal = int;       // CUdevice
struct ContextHandle;
struct ModuleHandle;
struct FunctionHandle;
struct StreamHandle;

enum : int {
  kAttributeMultiprocessors = 16,
  kAttributeMajor = 75,
  kAttributeMinor = 76,
  kAttributeSharedMemory = 97,  // most that one block may ask for
  kFunctionSharedMemory = 8,    // how much dynamic shared memory a function may ask for
  kJitErrorLog = 5,
  kJitErrorLogBytes = 6,
};

struct Driver {
  Result (*Init)(unsigned flags);
  Result (*GetErrorString)(Result, const char** text);
  Result (*DriverGetVersion)(int* version);  // 1000 * major + 10 * minor
  Result (*DeviceGet)(DeviceOrdinal* device, int ordinal);
  Result (*DeviceGetAttribute)(int* value, int attribute, DeviceOrdinal device);
  Result (*DevicePrimaryCtxRetain)(ContextHandle** context, DeviceOrdinal device);
  Result (*CtxPushCurrent)(ContextHandle* context);
  Result (*CtxPopCurrent)(ContextHandle** context);
  Result (*CtxSynchronize)();
  Result (*MemAlloc)(DevicePointer* pointer, size_t bytes);
  Result (*MemFree)(DevicePointer pointer);
  Result (*MemcpyHtoD)(DevicePointer destination, const void* source, size_t bytes);
  Result (*ModuleLoadDataEx)(ModuleHandle** module, const void* image, unsigned options, int* option, void** value);
  Result (*ModuleGetFunction)(FunctionHandle** function, ModuleHandle* module, const char* name);
  Result (*FuncSetAttribute)(FunctionHandle* function, int attribute, int value);
  Result (*FuncGetParamInfo)(FunctionHandle* function, size_t index, size_t* offset, size_t* bytes);  // null before 12.4
  Result (*LaunchKernel)(FunctionHandle* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                         unsigned block_y, unsigned block_z, unsigned shared, StreamHandle* stream, void** parameters,
                         void** extra);

  // Throws std::runtime_error where there is no driver, or one older than CUDA 12.
  static const Driver& get();
  // Throws std::runtime_error with the driver's own words if `result` is an error.
  void check(Result result, const char* what) const;
};

}  // namespace tetris::cuda
