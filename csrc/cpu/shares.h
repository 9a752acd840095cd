// Tasks of unequal size spread over threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace flowkernels {

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
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t task : shares[i]) run(task);
  };
  if (shares.size() > 1)
    torch::stable::parallel_for(0, static_cast<int64_t>(shares.size()), 1, some);
  else
    some(0, 1);
}

}  // namespace flowkernels
