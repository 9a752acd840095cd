// What every product under a staircase checks and prepares.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace flowkernels {

// visible ascends from 0 to at most `inputs`
inline bool is_staircase(const int32_t* visible, int64_t outputs, int64_t inputs) {
  bool ascends = outputs == 0 || (visible[0] >= 0 && visible[outputs - 1] <= inputs);
  for (int64_t j = 1; j < outputs; ++j) ascends &= visible[j - 1] <= visible[j];
  return ascends;
}

// the first output that sees each input, `outputs` where none does
inline std::vector<int32_t> first_seen_by(const int32_t* visible, int64_t outputs, int64_t inputs) {
  std::vector<int32_t> first(inputs);
  int64_t j = 0;
  for (int64_t k = 0; k < inputs; ++k) {
    while (j < outputs && visible[j] <= k) ++j;
    first[k] = static_cast<int32_t>(j);
  }
  return first;
}

// how many of the inputs [k0, k1) the outputs see, added up
inline double seen_pairs(const int32_t* visible, int64_t outputs, int64_t k0, int64_t k1) {
  double seen = 0;
  for (int64_t j = 0; j < outputs; ++j) seen += static_cast<double>(std::clamp<int64_t>(visible[j] - k0, 0, k1 - k0));
  return seen;
}

inline double seen_pairs(const int32_t* visible, int64_t outputs) {
  double seen = 0;
  for (int64_t j = 0; j < outputs; ++j) seen += visible[j];
  return seen;
}

}  // namespace flowkernels
