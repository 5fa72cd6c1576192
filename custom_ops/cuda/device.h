// One GPU: its kernel images, loaded on first use, and memory.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "driver.h"

namespace tetris::cuda {

// What the elements are, and how a product of them is computed: tf32 and f32 are both float32 tensors.
enum class Type { f16, bf16, tf32, f32 };
// How a kernel writes its output; split: partial sums for sum_splits.
enum class Layout { nchw, nhwc, split };

inline int item_size(Type type) { return type == Type::f16 || type == Type::bf16 ? 2 : 4; }

// One compiled form of the convolution kernel.
struct Tile {
  const char* variant;
  Type type;
  Layout layout;
  int taps, bm, bn, bk;
};
const std::vector<Tile>& tiles();

// A loaded kernel. Launches from several threads at once are fine.
class Kernel {
 public:
  // Enqueues the kernel. Arguments are DevicePointer, int32_t and float, as `Signature` says: the one that the kernel was
  // compiled with.
  template <const auto& Signature, class... Args>
  void launch(int64_t grid_x, int64_t grid_y, int64_t grid_z, StreamHandle* stream, Args... args) const {
    static_assert(matches<Args...>(Signature), "the arguments are not those that build.py compiled the kernel with");
    DevicePointer unused = 0;  // Triton's scratch and profiling memory
    void* parameters[] = {&args..., &unused, &unused};
    enqueue(grid_x, grid_y, grid_z, stream, parameters);
  }

 private:
  friend class Device;

  static constexpr char kind(DevicePointer) { return 'p'; }
  static constexpr char kind(int32_t) { return 'i'; }
  static constexpr char kind(float) { return 'f'; }
  template <class... Args>
  static constexpr bool matches(const char* signature) {
    const char kinds[] = {kind(Args{})..., '\0'};
    for (size_t i = 0; i < sizeof(kinds); ++i) {
      if (kinds[i] != signature[i]) return false;
    }
    return true;
  }
  void enqueue(int64_t grid_x, int64_t grid_y, int64_t grid_z, StreamHandle* stream, void** parameters) const;

  std::string variant_;
  FunctionHandle* function_ = nullptr;
  unsigned threads_ = 0, shared_ = 0;
};

class Device {
 public:
  // The device with this number, made on first use and kept. Throws std::runtime_error where it cannot be used.
  static Device& get(int ordinal);

  int capability() const { return capability_; }  // 10 * major + minor
  int multiprocessors() const { return multiprocessors_; }
  const Kernel& kernel(const std::string& variant);

  // Makes the device's context, the one that onnxruntime uses, the thread's own while it lives.
  class Scope {
   public:
    explicit Scope(const Device& device);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    const Driver& driver_;
  };

  // Device memory for as long as it lives.
  class Memory {
   public:
    Memory(const Device& device, size_t bytes);
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    DevicePointer pointer() const { return pointer_; }
    size_t bytes() const { return bytes_; }

   private:
    const Device& device_;
    DevicePointer pointer_ = 0;
    size_t bytes_;
  };
  // Copies to the device and waits until it is there.
  std::unique_ptr<Memory> upload(const std::vector<unsigned char>& data) const;

  // Memory for the intermediate results of one op. All work on a stream runs in order, so its ops share one buffer; while
  // this lives, no other op of the stream enqueues work that uses it.
  struct Workspace {
    std::unique_lock<std::mutex> lock;
    DevicePointer pointer;
  };
  // The buffer grows when more is asked for than ever before. What was handed out once stays: a captured graph may go on
  // using it.
  Workspace workspace(StreamHandle* stream, size_t bytes);
  // Every kernel object holds one of these; the workspaces go with the last one.
  std::shared_ptr<void> user();

 private:
  explicit Device(int ordinal);
  void load(Kernel& kernel, const std::string& variant);

  const Driver& driver_;
  int ordinal_;
  int capability_ = 0;
  int multiprocessors_ = 0, shared_memory_ = 0;
  ContextHandle* context_ = nullptr;
  std::mutex mutex_;
  std::map<std::string, std::unique_ptr<Kernel>> kernels_;
  std::mutex workspaces_mutex_;
  struct Buffers {
    std::mutex mutex;
    std::vector<std::unique_ptr<Memory>> all;
  };
  std::map<StreamHandle*, Buffers> workspaces_;
  std::weak_ptr<void> user_;
};

}  // namespace tetris::cuda
