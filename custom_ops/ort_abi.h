// The part of onnxruntime's C interface that this library uses, declared by hand.
//
// onnxruntime's Python wheels ship no headers, so building against them would mean a download. Its C interface is an
// append-only table of function pointers (OrtApi): a function keeps its slot for ever. Below, each function is declared
// with the number of its slot, as read off the public header; all of them exist since interface version 18
// (onnxruntime 1.18). tests/custom_ops/ runs on every supported onnxruntime: a wrong slot crashes at once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tetris::ort {

constexpr uint32_t kApiVersion = 18;

// Opaque types of onnxruntime.
struct Status;
struct Value;
struct KernelInfo;
struct KernelContext;
struct TypeInfo;
struct TensorTypeAndShapeInfo;
struct SessionOptions;
struct CustomOpDomain;
struct ShapeInferContext;
struct OpAttr;
struct Allocator;
struct MemoryInfo;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kUndefined = 0, kFloat = 1, kInt64 = 7, kFloat16 = 10, kBFloat16 = 16 };
enum InputOutputCharacteristic : int { kRequired = 0, kOptional = 1 };
enum MemoryType : int { kDefaultMemory = 0, kCpuInput = -2 };
enum DeviceType : int { kCpuDevice = 0 };
enum OpAttrType : int { kAttrInt = 1, kAttrInts = 2, kAttrFloat = 3 };

struct ApiBase {
  const void* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// Typed access to the table of functions.
class Api {
 public:
  explicit Api(const void* table) : table_(static_cast<const void* const*>(table)) {}

  Status* CreateStatus(ErrorCode code, const char* message) const { return call<0, Status*>(code, message); }
  const char* GetErrorMessage(const Status* status) const { return call<2, const char*>(status); }
  Status* CreateCustomOpDomain(const char* name, CustomOpDomain** out) const { return call<26, Status*>(name, out); }
  Status* CustomOpDomain_Add(CustomOpDomain* domain, const struct CustomOp* op) const {
    return call<27, Status*>(domain, op);
  }
  Status* AddCustomOpDomain(SessionOptions* options, CustomOpDomain* domain) const {
    return call<28, Status*>(options, domain);
  }
  Status* GetTensorMutableData(Value* value, void** out) const { return call<51, Status*>(value, out); }
  Status* CastTypeInfoToTensorInfo(const TypeInfo* info, const TensorTypeAndShapeInfo** out) const {
    return call<55, Status*>(info, out);
  }
  Status* CreateTensorTypeAndShapeInfo(TensorTypeAndShapeInfo** out) const { return call<57, Status*>(out); }
  Status* SetTensorElementType(TensorTypeAndShapeInfo* info, ElementType type) const {
    return call<58, Status*>(info, type);
  }
  Status* SetDimensions(TensorTypeAndShapeInfo* info, const int64_t* dims, size_t count) const {
    return call<59, Status*>(info, dims, count);
  }
  Status* GetTensorElementType(const TensorTypeAndShapeInfo* info, ElementType* out) const {
    return call<60, Status*>(info, out);
  }
  Status* GetDimensionsCount(const TensorTypeAndShapeInfo* info, size_t* out) const {
    return call<61, Status*>(info, out);
  }
  Status* GetDimensions(const TensorTypeAndShapeInfo* info, int64_t* dims, size_t count) const {
    return call<62, Status*>(info, dims, count);
  }
  Status* GetSymbolicDimensions(const TensorTypeAndShapeInfo* info, const char** names, size_t count) const {
    return call<63, Status*>(info, names, count);
  }
  Status* GetTensorTypeAndShape(const Value* value, TensorTypeAndShapeInfo** out) const {
    return call<65, Status*>(value, out);
  }
  Status* MemoryInfoGetId(const MemoryInfo* info, int* out) const { return call<72, Status*>(info, out); }
  Status* AllocatorGetInfo(const Allocator* allocator, const MemoryInfo** out) const {
    return call<77, Status*>(allocator, out);
  }
  Status* KernelInfoGetAttribute_float(const KernelInfo* info, const char* name, float* out) const {
    return call<85, Status*>(info, name, out);
  }
  Status* KernelInfoGetAttribute_int64(const KernelInfo* info, const char* name, int64_t* out) const {
    return call<86, Status*>(info, name, out);
  }
  Status* KernelInfoGetAttribute_string(const KernelInfo* info, const char* name, char* out, size_t* size) const {
    return call<87, Status*>(info, name, out, size);
  }
  Status* KernelContext_GetInput(const KernelContext* context, size_t index, const Value** out) const {
    return call<90, Status*>(context, index, out);
  }
  Status* KernelContext_GetOutput(KernelContext* context, size_t index, const int64_t* dims, size_t rank,
                                  Value** out) const {
    return call<91, Status*>(context, index, dims, rank, out);
  }
  void ReleaseStatus(Status* status) const { call<93, void>(status); }
  void ReleaseTypeInfo(TypeInfo* info) const { call<98, void>(info); }
  void ReleaseTensorTypeAndShapeInfo(TensorTypeAndShapeInfo* info) const { call<99, void>(info); }
  void ReleaseAllocator(Allocator* allocator) const { call<132, void>(allocator); }
  Status* KernelInfoGetAttributeArray_float(const KernelInfo* info, const char* name, float* out, size_t* size) const {
    return call<162, Status*>(info, name, out, size);
  }
  Status* KernelInfoGetAttributeArray_int64(const KernelInfo* info, const char* name, int64_t* out,
                                            size_t* size) const {
    return call<163, Status*>(info, name, out, size);
  }
  Status* KernelContext_GetGPUComputeStream(const KernelContext* context, void** out) const {
    return call<193, Status*>(context, out);
  }
  Status* GetTensorMemoryInfo(const Value* value, const MemoryInfo** out) const {
    return call<194, Status*>(value, out);
  }
  void MemoryInfoGetDeviceType(const MemoryInfo* info, DeviceType* out) const { call<225, void>(info, out); }
  Status* KernelInfo_GetInputCount(const KernelInfo* info, size_t* out) const { return call<230, Status*>(info, out); }
  Status* KernelInfo_GetInputName(const KernelInfo* info, size_t index, char* out, size_t* size) const {
    return call<232, Status*>(info, index, out, size);
  }
  Status* KernelInfo_GetOutputName(const KernelInfo* info, size_t index, char* out, size_t* size) const {
    return call<233, Status*>(info, index, out, size);
  }
  Status* KernelInfo_GetInputTypeInfo(const KernelInfo* info, size_t index, TypeInfo** out) const {
    return call<234, Status*>(info, index, out);
  }
  Status* KernelInfo_GetNodeName(const KernelInfo* info, char* out, size_t* size) const {
    return call<244, Status*>(info, out, size);
  }
  Status* KernelInfoGetConstantInput_tensor(const KernelInfo* info, size_t index, int* is_constant,
                                            const Value** out) const {
    return call<249, Status*>(info, index, is_constant, out);
  }
  Status* ShapeInferContext_GetInputTypeShape(const ShapeInferContext* context, size_t index,
                                              TensorTypeAndShapeInfo** out) const {
    return call<268, Status*>(context, index, out);
  }
  Status* ShapeInferContext_GetAttribute(const ShapeInferContext* context, const char* name,
                                         const OpAttr** out) const {
    return call<269, Status*>(context, name, out);
  }
  Status* ShapeInferContext_SetOutputTypeShape(const ShapeInferContext* context, size_t index,
                                               const TensorTypeAndShapeInfo* info) const {
    return call<270, Status*>(context, index, info);
  }
  Status* SetSymbolicDimensions(TensorTypeAndShapeInfo* info, const char** names, size_t count) const {
    return call<271, Status*>(info, names, count);
  }
  Status* ReadOpAttr(const OpAttr* attribute, OpAttrType type, void* data, size_t bytes, size_t* out) const {
    return call<272, Status*>(attribute, type, data, bytes, out);
  }
  Status* KernelContext_ParallelFor(const KernelContext* context, void (*function)(void* data, size_t index),
                                    size_t total, size_t batches, void* data) const {
    return call<274, Status*>(context, function, total, batches, data);
  }
  Status* KernelInfoGetAllocator(const KernelInfo* info, MemoryType type, Allocator** out) const {
    return call<278, Status*>(info, type, out);
  }

 private:
  template <int Slot, class Result, class... Args>
  Result call(Args... args) const {
    return reinterpret_cast<Result (*)(Args...)>(const_cast<void*>(table_[Slot]))(args...);
  }

  const void* const* table_;
};

// OrtCustomOp: what a library hands to onnxruntime to describe an op.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const void*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);
  void (*KernelDestroy)(void*);
  InputOutputCharacteristic (*GetInputCharacteristic)(const CustomOp*, size_t);
  InputOutputCharacteristic (*GetOutputCharacteristic)(const CustomOp*, size_t);
  MemoryType (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const void*, const KernelInfo*, void**);
  Status* (*KernelComputeV2)(void*, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeInferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};

}  // namespace tetris::ort
