#include "device.h"

#include <algorithm>
#include <stdexcept>

#include "images.h"

namespace tetris::cuda {
namespace {

constexpr int kOldestCapability = 80;
constexpr int64_t kMaxGrid[3] = {INT32_MAX, 65535, 65535};

std::string name_of(int ordinal, int capability) {
  return "GPU " + std::to_string(ordinal) + " (compute capability " + std::to_string(capability / 10) + "." +
         std::to_string(capability % 10) + ")";
}

// Whether machine code for `architecture` runs on a GPU. That of sm_80 runs on all 8.x; later images use instructions of
// exactly their own architecture (sm_90a, sm_100a, sm_120a).
bool runs_on(int architecture, int capability) {
  return architecture == 80 ? capability / 10 == 8 : architecture == capability;
}

}  // namespace

Device::Device(int ordinal) : driver_(Driver::get()), ordinal_(ordinal) {
  DeviceOrdinal device = 0;
  driver_.check(driver_.DeviceGet(&device, ordinal), "cuDeviceGet");
  auto attribute = [&](int which) {
    int value = 0;
    driver_.check(driver_.DeviceGetAttribute(&value, which, device), "cuDeviceGetAttribute");
    return value;
  };
  capability_ = 10 * attribute(kAttributeMajor) + attribute(kAttributeMinor);
  multiprocessors_ = attribute(kAttributeMultiprocessors);
  shared_memory_ = attribute(kAttributeSharedMemory);
  if (capability_ < kOldestCapability) {
    throw std::runtime_error(name_of(ordinal, capability_) +
                             " is too old for the block-sparse kernels, which need 8.0 or newer: run on the CPU provider");
  }
  driver_.check(driver_.DevicePrimaryCtxRetain(&context_, device), "cuDevicePrimaryCtxRetain");
}

Device& Device::get(int ordinal) {
  // Never destroyed: at the end of the process the driver may be gone before this.
  static std::mutex mutex;
  static auto* devices = new std::map<int, Device*>;
  const std::lock_guard<std::mutex> lock(mutex);
  Device*& device = (*devices)[ordinal];
  if (device == nullptr) device = new Device(ordinal);
  return *device;
}

const Kernel& Device::kernel(const std::string& variant) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::unique_ptr<Kernel>& kernel = kernels_[variant];
  if (kernel == nullptr) {
    auto loaded = std::make_unique<Kernel>();
    load(*loaded, variant);
    kernel = std::move(loaded);
  }
  return *kernel;
}

void Device::load(Kernel& kernel, const std::string& variant) {
  // Machine code first, then PTX: also where the driver is too old to take the machine code.
  const Image *exact = nullptr, *portable = nullptr;
  for (const Image& image : images()) {
    if (variant != image.variant) continue;
    if (image.architecture == 0) portable = &image;
    else if (runs_on(image.architecture, capability_)) exact = &image;
  }
  const Scope scope(*this);
  char log[2048] = "";
  ModuleHandle* module = nullptr;
  const Image* loaded = nullptr;
  Result result = 0;
  for (const Image* image : {exact, portable}) {
    if (image == nullptr || image->shared > shared_memory_) continue;
    int options[] = {kJitErrorLog, kJitErrorLogBytes};
    void* values[] = {log, reinterpret_cast<void*>(sizeof(log))};
    result = driver_.ModuleLoadDataEx(&module, image_data() + image->offset, 2, options, values);
    if (result == 0) {
      loaded = image;
      break;
    }
  }
  const std::string what = "kernel " + variant + " on " + name_of(ordinal_, capability_);
  if (loaded == nullptr) {
    if (result != 0) {
      log[sizeof(log) - 1] = '\0';
      driver_.check(result, (what + ": cuModuleLoadDataEx" + (log[0] == '\0' ? "" : ": ") + log).c_str());
    }
    throw std::runtime_error(what + ": the op library holds no image for this GPU");
  }
  driver_.check(driver_.ModuleGetFunction(&kernel.function_, module, loaded->function), "cuModuleGetFunction");
  if (driver_.FuncGetParamInfo != nullptr) {
    size_t offset = 0, bytes = 0, count = 0;
    while (driver_.FuncGetParamInfo(kernel.function_, count, &offset, &bytes) == 0) ++count;
    if (count != static_cast<size_t>(parameter_count(loaded->function))) {
      throw std::runtime_error(what + " has " + std::to_string(count) + " parameters, expected " +
                               std::to_string(parameter_count(loaded->function)) + ": rebuild the op library");
    }
  }
  if (loaded->shared > 48 * 1024) {
    driver_.check(driver_.FuncSetAttribute(kernel.function_, kFunctionSharedMemory, loaded->shared), "cuFuncSetAttribute");
  }
  kernel.variant_ = variant;
  kernel.threads_ = 32 * static_cast<unsigned>(loaded->warps);
  kernel.shared_ = static_cast<unsigned>(loaded->shared);
}

void Kernel::enqueue(int64_t grid_x, int64_t grid_y, int64_t grid_z, StreamHandle* stream, void** parameters) const {
  const int64_t grid[3] = {grid_x, grid_y, grid_z};
  for (int d = 0; d < 3; ++d) {
    if (grid[d] == 0) return;
    if (grid[d] > kMaxGrid[d]) throw std::invalid_argument(variant_ + ": the tensor is too large for the GPU's grid");
  }
  const Driver& driver = Driver::get();
  driver.check(driver.LaunchKernel(function_, static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y),
                                   static_cast<unsigned>(grid_z), threads_, 1, 1, shared_, stream, parameters, nullptr),
               ("cuLaunchKernel " + variant_).c_str());
}

Device::Scope::Scope(const Device& device) : driver_(device.driver_) {
  driver_.check(driver_.CtxPushCurrent(device.context_), "cuCtxPushCurrent");
}

Device::Scope::~Scope() {
  ContextHandle* context = nullptr;
  driver_.CtxPopCurrent(&context);
}

Device::Memory::Memory(const Device& device, size_t bytes) : device_(device), bytes_(bytes) {
  const Scope scope(device);
  device.driver_.check(device.driver_.MemAlloc(&pointer_, bytes), ("cuMemAlloc of " + std::to_string(bytes) + " bytes").c_str());
}

Device::Memory::~Memory() {
  try {
    const Scope scope(device_);
    device_.driver_.MemFree(pointer_);
  } catch (const std::exception&) {  // the driver is already shut down, and the memory with it
  }
}

std::unique_ptr<Device::Memory> Device::upload(const std::vector<unsigned char>& data) const {
  auto memory = std::make_unique<Memory>(*this, std::max<size_t>(data.size(), 1));
  const Scope scope(*this);
  driver_.check(driver_.MemcpyHtoD(memory->pointer(), data.data(), data.size()), "cuMemcpyHtoD");
  // The copy runs on the default stream, which onnxruntime's streams do not wait for.
  driver_.check(driver_.CtxSynchronize(), "cuCtxSynchronize");
  return memory;
}

Device::Workspace Device::workspace(StreamHandle* stream, size_t bytes) {
  if (bytes == 0) return {};
  Buffers* buffers = nullptr;
  {
    const std::lock_guard<std::mutex> lock(workspaces_mutex_);
    buffers = &workspaces_[stream];
  }
  std::unique_lock<std::mutex> lock(buffers->mutex);
  std::vector<std::unique_ptr<Memory>>& all = buffers->all;
  if (all.empty() || all.back()->bytes() < bytes) {
    // Half as much again as before, so that slowly growing inputs leave few outgrown buffers behind.
    const size_t least = all.empty() ? 0 : all.back()->bytes() / 2 * 3;
    all.push_back(std::make_unique<Memory>(*this, std::max(bytes, least)));
  }
  return {std::move(lock), all.back()->pointer()};
}

std::shared_ptr<void> Device::user() {
  const std::lock_guard<std::mutex> lock(workspaces_mutex_);
  std::shared_ptr<void> user = user_.lock();
  if (user == nullptr) {
    user = std::shared_ptr<void>(this, [](void* self) {
      auto* device = static_cast<Device*>(self);
      const std::lock_guard<std::mutex> lock(device->workspaces_mutex_);
      if (device->user_.expired()) device->workspaces_.clear();
    });
    user_ = user;
  }
  return user;
}

}  // namespace tetris::cuda
