// The library's one entry point: hands the ops of domain ai.tetris to onnxruntime.
//
// An op is described once for each execution provider and element type that has kernels for it; onnxruntime picks by the
// node's provider and the types of its inputs.
#include "block_sparse_conv.h"
#include "block_sparse_gemm.h"
#include "channels_last_max_pool.h"
#include "kernel_info.h"
#include "ort_abi.h"
#if defined(TETRIS_CUDA)
#include "cuda/ops.h"
// The tests run the CUDA ops on onnxruntime's CPU provider, with a stand-in for the driver.
#if !defined(TETRIS_CUDA_PROVIDER)
#define TETRIS_CUDA_PROVIDER "CUDAExecutionProvider"
#endif
#endif

#if defined(_WIN32)
#define TETRIS_EXPORT __declspec(dllexport)
#else
#define TETRIS_EXPORT __attribute__((visibility("default")))
#endif

namespace tetris {
namespace {

constexpr const char* kDomain = "ai.tetris";

struct Cpu {
  static constexpr const char* kProvider = "CPUExecutionProvider";
  static constexpr ort::ElementType kElement = ort::kFloat;
  static constexpr ort::MemoryType kWeightMemory = ort::kDefaultMemory;
};

// The CPU's kernels are for float32, but the ops take float16 too: onnxruntime then puts Casts around the node. It has to be
// told of the type by a kernel, which is for no provider and thus never made.
struct CpuBetweenCasts {
  static constexpr const char* kProvider = "ai.tetris.NoExecutionProvider";
  static constexpr ort::ElementType kElement = ort::kFloat16;
  static constexpr ort::MemoryType kWeightMemory = ort::kDefaultMemory;
};

#if defined(TETRIS_CUDA)
template <ort::ElementType Element>
struct Cuda {
  static constexpr const char* kProvider = TETRIS_CUDA_PROVIDER;
  static constexpr ort::ElementType kElement = Element;
  // The kernel packs the weight and uploads that once. onnxruntime must not put a second copy on the GPU.
  static constexpr ort::MemoryType kWeightMemory = ort::kCpuInput;
};
#endif

// The description of `Op` on `Target`, from which onnxruntime makes one kernel for each node.
template <class Op, class Target>
class OpDescription : public ort::CustomOp {
 public:
  explicit OpDescription(const ort::Api& api) : ort::CustomOp{}, api_(api) {
    version = ort::kApiVersion;
    GetName = [](const ort::CustomOp*) { return Op::kName; };
    GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return Target::kProvider; };
    GetInputType = [](const ort::CustomOp*, size_t input) { return input_type(input, Target::kElement); };
    GetInputTypeCount = [](const ort::CustomOp*) -> size_t { return Op::kInputs; };
    GetOutputType = [](const ort::CustomOp*, size_t) { return Target::kElement; };
    GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
    GetInputCharacteristic = [](const ort::CustomOp*, size_t input) {
      return input == kBias && Op::kInputs == kBias + 1 ? ort::kOptional : ort::kRequired;
    };
    GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
    GetInputMemoryType = [](const ort::CustomOp*, size_t input) {
      return input == kX || input == kAddend ? ort::kDefaultMemory : Target::kWeightMemory;
    };
    if constexpr (Op::kInputs > kAddend) {
      // Y may take the addend's memory, where nothing else reads it afterwards.
      GetMayInplace = [](int** inputs, int** outputs) -> size_t {
        *inputs = new int{kAddend};
        *outputs = new int{0};
        return 1;
      };
      ReleaseMayInplace = [](int* inputs, int* outputs) {
        delete inputs;
        delete outputs;
      };
    }
    GetStartVersion = [](const ort::CustomOp*) { return 1; };
    GetEndVersion = [](const ort::CustomOp*) { return INT32_MAX; };
    CreateKernelV2 = [](const ort::CustomOp* op, const void*, const ort::KernelInfo* info, void** kernel) {
      const ort::Api& api = static_cast<const OpDescription*>(op)->api_;
      return guarded(api, [&] {
        if constexpr (std::is_constructible_v<Op, const ort::Api&, const ort::KernelInfo*, ort::ElementType>) {
          *kernel = new Kernel{api, Op(api, info, Target::kElement)};
        } else {
          *kernel = new Kernel{api, Op(api, info)};
        }
      });
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
  OpDescription<BlockSparseConv, Cpu> conv{api};
  OpDescription<BlockSparseConvAdd, Cpu> conv_add{api};
  OpDescription<BlockSparseConvMaxPool, Cpu> conv_max_pool{api};
  OpDescription<BlockSparseGemm, Cpu> gemm{api};
  OpDescription<ChannelsLastMaxPool, Cpu> max_pool{api};
  OpDescription<BlockSparseConv, CpuBetweenCasts> conv_f16{api};
  OpDescription<BlockSparseConvAdd, CpuBetweenCasts> conv_add_f16{api};
  OpDescription<BlockSparseConvMaxPool, CpuBetweenCasts> conv_max_pool_f16{api};
  OpDescription<BlockSparseGemm, CpuBetweenCasts> gemm_f16{api};
  OpDescription<ChannelsLastMaxPool, CpuBetweenCasts> max_pool_f16{api};
#if defined(TETRIS_CUDA)
  OpDescription<cuda::BlockSparseConv, Cuda<ort::kFloat>> cuda_conv{api};
  OpDescription<cuda::BlockSparseConv, Cuda<ort::kFloat16>> cuda_conv_f16{api};
  OpDescription<cuda::BlockSparseConv, Cuda<ort::kBFloat16>> cuda_conv_bf16{api};
  OpDescription<cuda::BlockSparseConvAdd, Cuda<ort::kFloat>> cuda_conv_add{api};
  OpDescription<cuda::BlockSparseConvAdd, Cuda<ort::kFloat16>> cuda_conv_add_f16{api};
  OpDescription<cuda::BlockSparseConvAdd, Cuda<ort::kBFloat16>> cuda_conv_add_bf16{api};
  OpDescription<cuda::BlockSparseGemm, Cuda<ort::kFloat>> cuda_gemm{api};
  OpDescription<cuda::BlockSparseGemm, Cuda<ort::kFloat16>> cuda_gemm_f16{api};
  OpDescription<cuda::BlockSparseGemm, Cuda<ort::kBFloat16>> cuda_gemm_bf16{api};
  OpDescription<cuda::ChannelsLastMaxPool, Cuda<ort::kFloat>> cuda_max_pool{api};
  OpDescription<cuda::ChannelsLastMaxPool, Cuda<ort::kFloat16>> cuda_max_pool_f16{api};
  OpDescription<cuda::ChannelsLastMaxPool, Cuda<ort::kBFloat16>> cuda_max_pool_bf16{api};
#endif
  ort::CustomOpDomain* domain = nullptr;

  explicit Library(const void* table) : api(table) {
    check(api, api.CreateCustomOpDomain(kDomain, &domain));
    const ort::CustomOp* const ops[] = {
#if defined(TETRIS_CUDA)
        &cuda_conv,     &cuda_conv_f16,     &cuda_conv_bf16,     &cuda_conv_add, &cuda_conv_add_f16, &cuda_conv_add_bf16,
        &cuda_gemm,     &cuda_gemm_f16,     &cuda_gemm_bf16,     &cuda_max_pool, &cuda_max_pool_f16, &cuda_max_pool_bf16,
#endif
#if !defined(TETRIS_WITHOUT_CPU)
        &conv, &conv_add, &conv_max_pool, &gemm, &max_pool,
        &conv_f16, &conv_add_f16, &conv_max_pool_f16, &gemm_f16, &max_pool_f16,
#endif
    };
    for (const ort::CustomOp* op : ops) check(api, api.CustomOpDomain_Add(domain, op));
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
