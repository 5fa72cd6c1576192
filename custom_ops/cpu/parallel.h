// Work items on the threads of whoever runs the kernel.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>
#include <thread>

namespace tetris {

// Runs function(data, index) for every index < total, on any threads, and returns when all are done.
class ThreadPool {
 public:
  virtual ~ThreadPool() = default;
  virtual void run(void (*function)(void* data, size_t index), size_t total, void* data) const = 0;
};

// How many threads the machine can run at once; a pool has at most that many worth feeding.
inline int64_t machine_threads() {
  static const int64_t threads = std::thread::hardware_concurrency();
  return threads < 1 ? 1 : threads;
}

// How many threads the runs of one kernel have to feed, for the division of its work. onnxruntime does not tell how many
// threads a session has, and the machine's number may be far more: then the work would be cut finer than is good for the
// caches, and more of it prepared at once. So it is learned: the most threads that took part in a run so far. Work is cut
// into several items for each of them, so that one more finds something to do and is counted.
class LearnedThreads {
 public:
  int64_t count() const {
    const int64_t most = most_.load(std::memory_order_relaxed);
    return most == 0 ? machine_threads() : most;
  }
  void saw(int64_t threads) {
    int64_t most = most_.load(std::memory_order_relaxed);
    while (most < threads && !most_.compare_exchange_weak(most, threads, std::memory_order_relaxed)) {
    }
  }

 private:
  std::atomic<int64_t> most_{0};
};

constexpr int64_t kMaxGroups = 256;

// Runs `work` in two steps. First `prepare(group, i)` for i < work.prepare_items of each of work.groups groups, then
// `compute(i)` for i < work.compute_items, of which the ones with group_of(i) == g start after group g is prepared.
// Threads take items from one counter, in order, so an early finisher takes over what is left, and nobody waits for a
// thread that has not yet started: a waiting thread waits only for items that others are working on.
// `Work` needs: groups, prepare_items, compute_items, prepare, compute, group_of; at most kMaxGroups groups. `compute`
// may throw std::bad_alloc, `prepare` nothing. Returns how many threads took part.
template <class Work>
int64_t run_work(const ThreadPool& pool, Work& work) {
  struct State {
    Work& work;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> prepared[kMaxGroups] = {};
    std::atomic<int64_t> threads{0};
    std::atomic<bool> out_of_memory{false};
  } state{work};
  const int64_t total = work.groups * work.prepare_items + work.compute_items;
  auto drain = [](void* data, size_t) {
    State& state = *static_cast<State*>(data);
    Work& work = state.work;
    const int64_t preparing = work.groups * work.prepare_items;
    const int64_t total = preparing + work.compute_items;
    bool counted = false;
    for (int64_t item; (item = state.next.fetch_add(1, std::memory_order_relaxed)) < total;) {
      if (!counted) state.threads.fetch_add(1, std::memory_order_relaxed);
      counted = true;
      if (item < preparing) {
        const int64_t group = item / work.prepare_items;
        work.prepare(group, item % work.prepare_items);
        state.prepared[group].fetch_add(1, std::memory_order_release);
      } else {
        const int64_t index = item - preparing;
        if (work.prepare_items > 0) {
          const std::atomic<int64_t>& prepared = state.prepared[work.group_of(index)];
          while (prepared.load(std::memory_order_acquire) < work.prepare_items) std::this_thread::yield();
        }
        try {
          work.compute(index);
        } catch (const std::bad_alloc&) {  // no exception may cross the pool, which is not ours
          state.out_of_memory.store(true, std::memory_order_relaxed);
        }
      }
    }
  };
  const int64_t threads = machine_threads();
  pool.run(drain, static_cast<size_t>(total < threads ? total : threads), &state);
  if (state.out_of_memory.load()) throw std::bad_alloc();
  return state.threads.load();
}

}  // namespace tetris
