#include "kernels.inl"

namespace hswq {

constexpr Kernels kAvx2Kernels = MakeKernels("avx2");

}  // namespace hswq
