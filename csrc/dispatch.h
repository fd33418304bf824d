// The choice of an instruction set, made once at run time.
#ifndef HSWQ_DISPATCH_H_
#define HSWQ_DISPATCH_H_

#include <string>
#include <vector>

#include "kernels.h"

namespace hswq {

// Names of the instruction sets that this build holds and this CPU runs, the best last.
std::vector<std::string> SupportedIsas();

// Returns the kernels named by the environment's HSWQ_ISA, or the best of this CPU. Chosen once.
// Throws std::invalid_argument where HSWQ_ISA names none of SupportedIsas().
const Kernels& ActiveKernels();

}  // namespace hswq

#endif  // HSWQ_DISPATCH_H_
