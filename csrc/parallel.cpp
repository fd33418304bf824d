#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

namespace hswq {
namespace {

// Threads that sleep between calls: starting one takes longer than most layers' work. They are
// never joined; the process takes them along when it ends.
class Pool {
 public:
  void Run(size_t workers, void (*function)(void*, size_t), void* context) {
    // One call at a time has the threads; others get along without.
    const std::unique_lock<std::mutex> call(call_mutex_, std::try_to_lock);
    if (!call.owns_lock()) {
      function(context, 0);
      return;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      AddThreads(workers - 1);
      function_ = function;
      context_ = context;
      next_worker_ = 1;
      workers_ = workers;
    }
    wake_.notify_all();
    function(context, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    // Who has not begun by now would find nothing left to do.
    workers_ = 0;
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void AddThreads(size_t count) {
    try {
      for (; threads_ < count; ++threads_) std::thread(&Pool::Serve, this).detach();
    } catch (const std::system_error&) {
      // The system gives no more threads: those there are take over all blocks.
    }
  }

  void Serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return next_worker_ < workers_; });
      const size_t worker = next_worker_++;
      ++running_;
      const auto function = function_;
      void* const context = context_;
      lock.unlock();
      function(context, worker);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex call_mutex_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  size_t threads_ = 0;
  size_t running_ = 0;
  size_t next_worker_ = 0;
  size_t workers_ = 0;
  void (*function_)(void*, size_t) = nullptr;
  void* context_ = nullptr;
};

std::atomic<Pool*> current_pool{nullptr};
std::atomic<bool> is_forked{false};

// A forked process has none of its parent's threads, and perhaps their locks.
void WatchForks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] {
    current_pool = nullptr;
    is_forked = true;
  });
  (void)registered;
}

Pool& CurrentPool() {
  Pool* pool = current_pool;
  if (pool == nullptr) {
    Pool* fresh = new Pool;
    if (current_pool.compare_exchange_strong(pool, fresh)) return *fresh;
    delete fresh;
  }
  return *pool;
}

// What a compiler calls for `#pragma omp parallel`: runs function(data) on a team of threads, the
// caller among them, and waits for all.
using OpenMpParallel = void (*)(void (*function)(void*), void* data, unsigned threads,
                                unsigned flags);

// Returns the OpenMP of this process, or null where it has none. torch brings one.
OpenMpParallel FindOpenMp() {
  static const auto parallel =
      reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return is_forked ? nullptr : parallel;
}

struct Team {
  void (*function)(void* context, size_t worker);
  void* context;
  std::atomic<size_t> next_worker{0};
};

}  // namespace

void RunOnWorkers(size_t workers, void (*function)(void* context, size_t worker), void* context) {
  if (workers == 1) {
    function(context, 0);
    return;
  }
  WatchForks();
  // OpenMP's threads stay awake for some milliseconds after each use. Threads of our own would have
  // to take the cores from them, in the midst of torch's work and before it.
  if (const OpenMpParallel parallel = FindOpenMp()) {
    Team team{function, context};
    parallel(
        [](void* data) {
          auto* const its = static_cast<Team*>(data);
          its->function(its->context, its->next_worker++);
        },
        &team, static_cast<unsigned>(workers), 0);
  } else {
    CurrentPool().Run(workers, function, context);
  }
}

}  // namespace hswq
