#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>

namespace tetris::cuda {
namespace {

constexpr int kOldestDriver = 12000;  // the PTX images are of version 8.0

Driver load() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw std::runtime_error("no NVIDIA driver (libcuda.so.1): install it, or run on the CPU provider");
  }
  Driver driver{};
  auto find = [&](auto& function, const char* name, bool optional = false) {
    void* symbol = dlsym(library, name);
    if (symbol == nullptr && !optional) {
      throw std::runtime_error(std::string("the NVIDIA driver has no ") + name + ": update it (CUDA 12 or newer)");
    }
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
  };
  find(driver.Init, "cuInit");
  find(driver.GetErrorString, "cuGetErrorString");
  find(driver.DriverGetVersion, "cuDriverGetVersion");
  find(driver.DeviceGet, "cuDeviceGet");
  find(driver.DeviceGetAttribute, "cuDeviceGetAttribute");
  find(driver.DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
  find(driver.CtxPushCurrent, "cuCtxPushCurrent_v2");
  find(driver.CtxPopCurrent, "cuCtxPopCurrent_v2");
  find(driver.CtxSynchronize, "cuCtxSynchronize");
  find(driver.MemAlloc, "cuMemAlloc_v2");
  find(driver.MemFree, "cuMemFree_v2");
  find(driver.MemcpyHtoD, "cuMemcpyHtoD_v2");
  find(driver.ModuleLoadDataEx, "cuModuleLoadDataEx");
  find(driver.ModuleGetFunction, "cuModuleGetFunction");
  find(driver.FuncSetAttribute, "cuFuncSetAttribute");
  find(driver.FuncGetParamInfo, "cuFuncGetParamInfo", true);
  find(driver.LaunchKernel, "cuLaunchKernel");
  int version = 0;
  driver.check(driver.DriverGetVersion(&version), "cuDriverGetVersion");
  if (version < kOldestDriver) {
    throw std::runtime_error("the NVIDIA driver is for CUDA " + std::to_string(version / 1000) + "." +
                             std::to_string(version % 1000 / 10) + ": update it (CUDA 12 or newer)");
  }
  driver.check(driver.Init(0), "cuInit");
  return driver;
}

}  // namespace

const Driver& Driver::get() {
  static const Driver driver = load();
  return driver;
}

void Driver::check(Result result, const char* what) const {
  if (result == 0) return;
  const char* text = nullptr;
  GetErrorString(result, &text);
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + (text == nullptr ? "unknown error" : text) + " (" +
                           std::to_string(result) + ")");
}

}  // namespace tetris::cuda
