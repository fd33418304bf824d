// Threads over fixed blocks: the blocks and what each one writes do not depend on how many threads
// share them, so neither does any result.
#ifndef HSWQ_PARALLEL_H_
#define HSWQ_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cstddef>

namespace hswq {

// Rounds to nearest and keeps subnormals on this thread, whatever its owner had set, until the end
// of the scope.
class ScopedFloatEnvironment {
 public:
  ScopedFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~ScopedFloatEnvironment() { std::fesetenv(&saved_); }
  ScopedFloatEnvironment(const ScopedFloatEnvironment&) = delete;
  ScopedFloatEnvironment& operator=(const ScopedFloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

// Number of threads ParallelFor will use: no more than there are blocks, at least one.
inline size_t WorkerCount(size_t blocks, size_t threads) {
  return std::max<size_t>(1, std::min(blocks, threads));
}

// Calls function(context, worker) on this thread and on up to `workers` - 1 others, each with a
// worker of its own below `workers`: on the threads of the process's OpenMP where it has one, which
// are torch's, else on threads that are kept for the next call. Where those are busy or cannot be
// had, fewer or none run: the call on this thread has to finish the work alone. function must not
// throw.
void RunOnWorkers(size_t workers, void (*function)(void* context, size_t worker), void* context);

// Calls body(block, worker) once for every block below `blocks`, worker < WorkerCount(blocks,
// threads). body must not throw.
template <typename Body>
void ParallelFor(size_t blocks, size_t threads, const Body& body) {
  std::atomic<size_t> next{0};
  auto work = [&](size_t worker) noexcept {
    const ScopedFloatEnvironment environment;
    for (size_t block = next++; block < blocks; block = next++) body(block, worker);
  };
  using Work = decltype(work);
  RunOnWorkers(
      WorkerCount(blocks, threads),
      [](void* context, size_t worker) { (*static_cast<Work*>(context))(worker); }, &work);
}

}  // namespace hswq

#endif  // HSWQ_PARALLEL_H_
