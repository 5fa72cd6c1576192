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
    runs_.store(most < threads ? 1 : runs_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }
  // Whether a pair of threads shares the work, and no other is to be expected: then it need not be cut finer than in two. Two
  // threads are better off with what is theirs alone, twice where it has to be, than with what the other core has written;
  // what is better for more of them has not been measured.
  bool pair() const {
    constexpr int64_t kEnoughRuns = 16;
    return most_.load(std::memory_order_relaxed) == 2 &&
           (machine_threads() == 2 || runs_.load(std::memory_order_relaxed) >= kEnoughRuns);
  }

 private:
  std::atomic<int64_t> most_{0}, runs_{0};  // runs_: since the last one that had more threads than those before
};

constexpr int64_t kMaxGroups = 256;

// Floats that are worth bringing near: they should stay in a core's own cache.
constexpr int64_t kNearFloats = int64_t{1} << 17;

// Reads through memory that other threads wrote. What is scattered all over it is then near: single lines from another
// core's cache take several hundred cycles each, but in order the processor fetches many at a time.
inline void bring_near(const float* memory, int64_t floats) {
  if (floats > kNearFloats) return;
  constexpr int64_t kLine = 16;
  for (int64_t i = 0; i < floats; i += kLine) (void)*static_cast<const volatile float*>(memory + i);
}

// Where share t begins, if `count` things are parted evenly into `shares`.
inline int64_t first_of_share(int64_t count, int64_t t, int64_t shares) { return count * t / shares; }

// Where heap t begins, if `count` things of different weight are parted, in their order, into `heaps` of about the same.
template <class Weight>
int64_t first_of_heap(int64_t count, Weight weight, int64_t t, int64_t heaps) {
  if (t == 0 || t == heaps) return t == 0 ? 0 : count;
  int64_t total = 0, before = 0, first = 0;
  for (int64_t i = 0; i < count; ++i) total += weight(i);
  for (; first < count && (2 * before + weight(first)) * heaps < 2 * total * t; ++first) before += weight(first);
  return first;
}

constexpr int64_t kMostThreads = 64;  // that items are divided among

// Items [begin, end) that are left of a thread's share: the thread takes them from the front, others from the back.
class Share {
 public:
  void set(int64_t begin, int64_t end) {
    left_.store(static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end), std::memory_order_relaxed);
  }
  // An item, or -1 where none is left.
  int64_t take(bool front) {
    uint64_t left = left_.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t begin = left >> 32, end = left & 0xffffffffU;
      if (begin >= end) return -1;
      const uint64_t rest = front ? (begin + 1) << 32 | end : begin << 32 | (end - 1);
      if (left_.compare_exchange_weak(left, rest, std::memory_order_relaxed)) {
        return static_cast<int64_t>(front ? begin : end - 1);
      }
    }
  }

 private:
  alignas(64) std::atomic<uint64_t> left_{0};
};

// Runs `work` in three steps. First `survey(i)` for i < work.survey_items and, when all are done, `finish_survey()`. Then
// `prepare(group, i)` for i < work.prepare_items of each of work.groups groups, then
// `compute(i)` for i < work.compute_items, of which the ones with group_of(i) == g start after group g is prepared.
// One call of the pool for all of them: waking its threads may take as long as a step.
// Each of `expected` threads has a share of neighboring items, the same in every run, so that it finds in its own cache
// what it used before: the weights, and what it wrote in the layer before. Who is done takes over from the others, so
// nobody waits for a thread that has not yet started: a waiting thread waits only for items that others are working on.
// `Work` needs: survey_items, groups, prepare_items, compute_items, survey, finish_survey, prepare, enter (called by a thread
// before its first item of a group), compute, group_of, first_item(t, shares) (of share t, or of shares: compute_items); at most
// kMaxGroups groups, 2^31 items.
// `enter` and `compute` may throw std::bad_alloc, the others nothing. Returns how many threads took part.
template <class Work>
int64_t run_work(const ThreadPool& pool, Work& work, int64_t expected) {
  struct State {
    State(Work& all, int64_t total) : work(all), shares(total) {}

    Work& work;
    const int64_t shares;
    Share surveying[kMostThreads], preparing[kMostThreads], computing[kMostThreads];
    std::atomic<int64_t> surveyed{0};
    std::atomic<bool> survey_finished{false};
    std::atomic<int64_t> prepared[kMaxGroups] = {};
    std::atomic<int64_t> threads{0};
    std::atomic<bool> out_of_memory{false};

    // An item of thread `index`'s own share, or else of another's; -1 where none is left.
    int64_t take(Share* from, int64_t index) const {
      int64_t item = index < shares ? from[index].take(true) : -1;
      for (int64_t t = 1; item < 0 && t <= shares; ++t) item = from[(index + t) % shares].take(false);
      return item;
    }
  };
  const int64_t total_prepared = work.groups * work.prepare_items;
  const int64_t total = work.survey_items + total_prepared + work.compute_items;
  State state(work, expected < 1 ? 1 : expected < kMostThreads ? expected : kMostThreads);
  for (int64_t t = 0; t < state.shares; ++t) {
    const auto even = [&](Share& share, int64_t items) {
      share.set(first_of_share(items, t, state.shares), first_of_share(items, t + 1, state.shares));
    };
    even(state.surveying[t], work.survey_items);
    even(state.preparing[t], total_prepared);
    state.computing[t].set(work.first_item(t, state.shares), work.first_item(t + 1, state.shares));
  }
  auto drain = [](void* data, size_t index) {
    State& state = *static_cast<State*>(data);
    Work& work = state.work;
    const int64_t own = static_cast<int64_t>(index);
    bool counted = false;
    auto next = [&](Share* shares) {
      const int64_t item = state.take(shares, own);
      if (item >= 0 && !counted) state.threads.fetch_add(1, std::memory_order_relaxed);
      counted = counted || item >= 0;
      return item;
    };
    for (int64_t item; (item = next(state.surveying)) >= 0;) {
      work.survey(item);
      if (state.surveyed.fetch_add(1, std::memory_order_acq_rel) + 1 == work.survey_items) {
        work.finish_survey();
        state.survey_finished.store(true, std::memory_order_release);
      }
    }
    while (work.survey_items > 0 && !state.survey_finished.load(std::memory_order_acquire)) std::this_thread::yield();
    for (int64_t item; (item = next(state.preparing)) >= 0;) {
      const int64_t group = item / work.prepare_items;
      work.prepare(group, item % work.prepare_items);
      state.prepared[group].fetch_add(1, std::memory_order_release);
    }
    int64_t entered = -1;  // group
    for (int64_t item; (item = next(state.computing)) >= 0;) {
      const int64_t group = work.group_of(item);
      if (work.prepare_items > 0) {
        const std::atomic<int64_t>& prepared = state.prepared[group];
        while (prepared.load(std::memory_order_acquire) < work.prepare_items) std::this_thread::yield();
      }
      try {
        if (group != entered) work.enter(group);
        entered = group;
        work.compute(item);
      } catch (const std::bad_alloc&) {  // no exception may cross the pool, which is not ours
        state.out_of_memory.store(true, std::memory_order_relaxed);
      }
    }
  };
  const int64_t threads = machine_threads();
  pool.run(drain, static_cast<size_t>(total < threads ? total : threads), &state);
  if (state.out_of_memory.load()) throw std::bad_alloc();
  return state.threads.load();
}

}  // namespace tetris
