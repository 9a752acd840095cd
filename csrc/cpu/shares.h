// Tasks spread over threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <vector>

namespace flowkernels {

constexpr double kParallelMultiplyAdds = 4e5;  // about 10 us of one thread, against 5 us to start the others

inline int64_t threads_for(double multiply_adds) {
  return multiply_adds > kParallelMultiplyAdds ? static_cast<int64_t>(torch::stable::get_num_threads()) : 1;
}

// f(first, last) for n tasks, of which `grain` are worth a thread
template <class F>
void in_grains(int64_t n, int64_t grain, const F& f) {
  if (n <= grain) return f(int64_t{0}, n);
  torch::stable::parallel_for(0, n, grain, f);
}

// How many tasks of so many multiply-adds are worth a second thread, which costs a few microseconds
inline int64_t worth_a_thread(int64_t multiply_adds) { return std::max<int64_t>(1, 50000 / multiply_adds); }

// f(first, last) over `units` units of work that touch `elements` elements together, on several threads where that pays
template <class F>
void in_parallel(int64_t units, int64_t elements, const F& f) {
  constexpr int64_t kWorthAThread = 16384;
  in_grains(units, elements < 2 * kWorthAThread ? units : std::max<int64_t>(1, units * kWorthAThread / elements), f);
}

// run(i) for i < n
template <class F>
void for_each_task(int64_t n, int64_t threads, const F& run) {
  in_grains(n, threads > 1 ? 1 : n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i);
  });
}

// The same where each thread takes the next task as it is done with one: a core that others use too, or a slower one, takes fewer
template <class F>
void for_each_task_in_turn(int64_t n, int64_t threads, const F& run) {
  std::atomic<int64_t> next{0};
  for_each_task(std::min(threads, n), threads, [&](int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) run(i);
  });
}

// run(first, last) for n tasks, a stretch of them on each thread
template <class F>
void in_shares(int64_t n, int64_t threads, const F& run) {
  const int64_t shares = std::min(n, threads);
  for_each_task(shares, threads, [&](int64_t i) { run(i * n / shares, (i + 1) * n / shares); });
}

// Of tasks of unequal size
using Shares = std::vector<std::vector<int64_t>>;  // the numbers of each thread's tasks

// Each task, that with most work first, goes to the thread that has least so far.
inline Shares share_out(const std::vector<double>& work, int64_t threads) {
  std::vector<int64_t> order(work.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return work[a] > work[b] || (work[a] == work[b] && a < b); });
  Shares shares(threads);
  std::vector<double> sums(threads, 0);
  for (int64_t task : order) {
    const auto least = std::min_element(sums.begin(), sums.end()) - sums.begin();
    shares[least].push_back(task);
    sums[least] += work[task];
  }
  return shares;
}

// run(task) for every task
template <class F>
void run_shares(const Shares& shares, const F& run) {
  const auto n = static_cast<int64_t>(shares.size());
  for_each_task(n, n, [&](int64_t i) {
    for (int64_t task : shares[i]) run(task);
  });
}

}  // namespace flowkernels
