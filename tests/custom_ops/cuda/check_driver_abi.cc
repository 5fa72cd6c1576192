// The hand-written declarations of custom_ops/cuda/driver.h against NVIDIA's cuda.h: compiles if they agree in the number
// of arguments, the size of each and which are pointers, and in the constants.
#include <cuda.h>

#include <type_traits>

#include "driver.h"

namespace cuda = tetris::cuda;

static_assert(int{CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR} == int{cuda::kAttributeMajor});
static_assert(int{CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR} == int{cuda::kAttributeMinor});
static_assert(int{CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN} == int{cuda::kAttributeSharedMemory});
static_assert(int{CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT} == int{cuda::kAttributeMultiprocessors});
static_assert(int{CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES} == int{cuda::kFunctionSharedMemory});
static_assert(int{CU_JIT_ERROR_LOG_BUFFER} == int{cuda::kJitErrorLog});
static_assert(int{CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES} == int{cuda::kJitErrorLogBytes});

template <class A, class B>
constexpr bool kSame = sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>;
template <class F, class G>
struct Agree : std::false_type {};
template <class R, class... A, class S, class... B>
struct Agree<R (*)(A...), S (*)(B...)> {
  static constexpr bool check() {
    if constexpr (sizeof...(A) != sizeof...(B)) return false;
    else return sizeof(R) == sizeof(S) && (kSame<A, B> && ...);
  }
  static constexpr bool value = check();
};

#define CHECK(name) static_assert(Agree<decltype(&::cu##name), decltype(cuda::Driver::name)>::value, #name)
CHECK(Init);
CHECK(GetErrorString);
CHECK(DriverGetVersion);
CHECK(DeviceGet);
CHECK(DeviceGetAttribute);
CHECK(DevicePrimaryCtxRetain);
CHECK(CtxPushCurrent);
CHECK(CtxPopCurrent);
CHECK(CtxSynchronize);
CHECK(MemAlloc);
CHECK(MemFree);
CHECK(MemcpyHtoD);
CHECK(ModuleLoadDataEx);
CHECK(ModuleGetFunction);
CHECK(FuncSetAttribute);
CHECK(FuncGetParamInfo);
CHECK(LaunchKernel);
