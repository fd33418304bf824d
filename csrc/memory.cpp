#ifdef __linux__
#include <sys/mman.h>
#endif

#include "ops.h"

namespace hswq {

void PreferHugePages(void* begin, size_t size) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096;
  const auto first = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const auto last = (reinterpret_cast<uintptr_t>(begin) + size) / kPage * kPage;
  // A hint: where the system declines, nothing changes.
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)size;
#endif
}

}  // namespace hswq
