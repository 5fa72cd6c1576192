// The part of onnxruntime's C interface that this program uses, declared by hand, so that it builds against the library of
// an installed Python package, which brings no headers. Where you have onnxruntime_c_api.h, include that one and call
// the functions of the same names.
//
// The interface is an append-only table of function pointers (OrtApi): a function keeps its slot for ever. The slots
// are those of version 18 (onnxruntime 1.18) and of every later one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace ort {

struct Status;
struct Env;
struct Session;
struct SessionOptions;
struct RunOptions;
struct Value;
struct TypeInfo;
struct TensorInfo;
struct Allocator;
struct MemoryInfo;

enum LoggingLevel : int { kWarning = 2 };
enum ElementType : int { kFloat = 1 };
enum AllocatorType : int { kArenaAllocator = 1 };
enum MemoryType : int { kDefaultMemory = 0 };

struct ApiBase {
  const void* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};
extern "C" const ApiBase* OrtGetApiBase();

constexpr uint32_t kApiVersion = 18;

// Calls by slot; a status that says what went wrong becomes an exception.
class Api {
 public:
  Api() : table_(static_cast<const void* const*>(OrtGetApiBase()->GetApi(kApiVersion))) {
    if (table_ == nullptr) throw std::runtime_error("onnxruntime 1.18 or later is needed");
  }

  Env* CreateEnv() const { return make<3, Env>(kWarning, "deploy"); }
  SessionOptions* CreateSessionOptions() const { return make<10, SessionOptions>(); }
  void SetIntraOpNumThreads(SessionOptions* options, int threads) const { check(call<24, Status*>(options, threads)); }
  // The handle is the caller's to close once no session uses the operators any more; a program that ends need not.
  void RegisterCustomOpsLibrary(SessionOptions* options, const char* path) const {
    make<29, void>(options, path);
  }
  Session* CreateSession(const Env* env, const char* path, const SessionOptions* options) const {
    return make<7, Session>(env, path, options);
  }
  TypeInfo* SessionGetInputTypeInfo(const Session* session, size_t index) const {
    return make<33, TypeInfo>(session, index);
  }
  const TensorInfo* CastTypeInfoToTensorInfo(const TypeInfo* info) const { return make<55, const TensorInfo>(info); }
  ElementType GetTensorElementType(const TensorInfo* info) const { return get<60, ElementType>(info); }
  size_t GetDimensionsCount(const TensorInfo* info) const { return get<61, size_t>(info); }
  void GetDimensions(const TensorInfo* info, int64_t* sizes, size_t count) const {
    check(call<62, Status*>(info, sizes, count));
  }
  size_t GetTensorShapeElementCount(const TensorInfo* info) const { return get<64, size_t>(info); }
  TensorInfo* GetTensorTypeAndShape(const Value* value) const { return make<65, TensorInfo>(value); }
  Allocator* GetAllocatorWithDefaultOptions() const { return make<78, Allocator>(); }
  char* SessionGetInputName(const Session* session, size_t index, Allocator* allocator) const {
    return make<36, char>(session, index, allocator);
  }
  char* SessionGetOutputName(const Session* session, size_t index, Allocator* allocator) const {
    return make<37, char>(session, index, allocator);
  }
  MemoryInfo* CreateCpuMemoryInfo() const { return make<69, MemoryInfo>(kArenaAllocator, kDefaultMemory); }
  Value* CreateTensor(const MemoryInfo* memory, float* data, size_t bytes, const int64_t* shape, size_t rank) const {
    return make<49, Value>(memory, static_cast<void*>(data), bytes, shape, rank, kFloat);
  }
  Value* Run(Session* session, const char* input, const Value* value, const char* output) const {
    Value* result = nullptr;
    const RunOptions* options = nullptr;
    check(call<9, Status*>(session, options, &input, &value, size_t{1}, &output, size_t{1}, &result));
    return result;
  }
  float* GetTensorMutableData(Value* value) const { return static_cast<float*>(make<51, void>(value)); }
  void ReleaseValue(Value* value) const { call<96, void>(value); }

 private:
  template <int Slot, class Result, class... Args>
  Result call(Args... args) const {
    return reinterpret_cast<Result (*)(Args...)>(const_cast<void*>(table_[Slot]))(args...);
  }
  template <int Slot, class Result, class... Args>
  Result* make(Args... args) const {
    return get<Slot, Result*>(args...);
  }
  template <int Slot, class Result, class... Args>
  Result get(Args... args) const {
    Result result{};
    check(call<Slot, Status*>(args..., &result));
    return result;
  }
  void check(Status* status) const {
    if (status == nullptr) return;
    const std::string message = call<2, const char*>(static_cast<const Status*>(status));
    call<93, void>(status);
    throw std::runtime_error(message);
  }

  const void* const* table_;
};

}  // namespace ort
