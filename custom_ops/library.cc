// The library's one entry point: hands the ops of domain ai.tetris to onnxruntime.
#include "block_sparse_conv.h"
#include "block_sparse_gemm.h"
#include "kernel_info.h"
#include "ort_abi.h"

#if defined(_WIN32)
#define TETRIS_EXPORT __declspec(dllexport)
#else
#define TETRIS_EXPORT __attribute__((visibility("default")))
#endif

namespace tetris {
namespace {

constexpr const char* kDomain = "ai.tetris";

// The description of `Op`, from which onnxruntime makes one kernel for each node.
template <class Op>
class OpDescription : public ort::CustomOp {
 public:
  explicit OpDescription(const ort::Api& api) : ort::CustomOp{}, api_(api) {
    version = ort::kApiVersion;
    GetName = [](const ort::CustomOp*) { return Op::kName; };
    GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return "CPUExecutionProvider"; };
    GetInputType = [](const ort::CustomOp*, size_t input) { return input_type(input); };
    GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return kInputCount; };
    GetOutputType = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
    GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
    GetInputCharacteristic = [](const ort::CustomOp*, size_t input) {
      return input == kBias ? ort::kOptional : ort::kRequired;
    };
    GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
    GetInputMemoryType = [](const ort::CustomOp*, size_t) { return ort::kDefaultMemory; };
    GetStartVersion = [](const ort::CustomOp*) { return 1; };
    GetEndVersion = [](const ort::CustomOp*) { return INT32_MAX; };
    CreateKernelV2 = [](const ort::CustomOp* op, const void*, const ort::KernelInfo* info, void** kernel) {
      const ort::Api& api = static_cast<const OpDescription*>(op)->api_;
      return guarded(api, [&] { *kernel = new Kernel{api, Op(api, info)}; });
    };
    KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
      const Kernel& self = *static_cast<const Kernel*>(kernel);
      return guarded(self.api, [&] { self.op.compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    InferOutputShapeFn = [](const ort::CustomOp* op, ort::ShapeInferContext* context) {
      const ort::Api& api = static_cast<const OpDescription*>(op)->api_;
      return guarded(api, [&] { Op::infer_shape(ShapeInference(api, context)); });
    };
  }

 private:
  struct Kernel {
    const ort::Api& api;
    Op op;
  };
  const ort::Api& api_;
};

// What onnxruntime keeps pointers to for as long as any session lives: made once, never destroyed.
struct Library {
  ort::Api api;
  OpDescription<BlockSparseConv> conv{api};
  OpDescription<BlockSparseGemm> gemm{api};
  ort::CustomOpDomain* domain = nullptr;

  explicit Library(const void* table) : api(table) {
    check(api, api.CreateCustomOpDomain(kDomain, &domain));
    check(api, api.CustomOpDomain_Add(domain, &conv));
    check(api, api.CustomOpDomain_Add(domain, &gemm));
  }
};

}  // namespace
}  // namespace tetris

extern "C" TETRIS_EXPORT tetris::ort::Status* RegisterCustomOps(tetris::ort::SessionOptions* options,
                                                                const tetris::ort::ApiBase* base) {
  const void* table = base->GetApi(tetris::ort::kApiVersion);
  if (table == nullptr) {
    // Too old for this interface version, but every version can make an error of it.
    const void* oldest = base->GetApi(1);
    return oldest == nullptr ? nullptr
                             : tetris::ort::Api(oldest).CreateStatus(
                                   tetris::ort::kFail, "ai.tetris op library: needs onnxruntime 1.18 or newer");
  }
  return tetris::guarded(tetris::ort::Api(table), [&] {
    static tetris::Library* const library = new tetris::Library(table);
    tetris::check(library->api, library->api.AddCustomOpDomain(options, library->domain));
  });
}
