#include "kernels.inl"

namespace hswq {

constexpr Kernels kAvx512Kernels = MakeKernels("avx512");

}  // namespace hswq
