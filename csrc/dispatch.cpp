#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace hswq {
namespace {

std::vector<const Kernels*> SupportedKernels() {
  std::vector<const Kernels*> kernels{&kBaselineKernels};
#ifdef HSWQ_X86
  if (__builtin_cpu_supports("avx2")) kernels.push_back(&kAvx2Kernels);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    kernels.push_back(&kAvx512Kernels);
  }
#endif
  return kernels;
}

const Kernels& ChooseKernels() {
  const std::vector<const Kernels*> supported = SupportedKernels();
  const char* forced = std::getenv("HSWQ_ISA");
  if (forced == nullptr || *forced == '\0') return *supported.back();
  std::string names;
  for (const Kernels* kernels : supported) {
    if (kernels->isa == std::string(forced)) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->isa);
  }
  throw std::invalid_argument("HSWQ_ISA is '" + std::string(forced) +
                              "', but this build and CPU offer only: " + names +
                              ". Set it to one of these, or unset it.");
}

}  // namespace

std::vector<std::string> SupportedIsas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : SupportedKernels()) names.emplace_back(kernels->isa);
  return names;
}

const Kernels& ActiveKernels() {
  static const Kernels& kernels = ChooseKernels();
  return kernels;
}

}  // namespace hswq
