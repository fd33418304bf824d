#include "kernels.inl"

namespace hswq {

constexpr Kernels kBaselineKernels = MakeKernels("baseline");

}  // namespace hswq
