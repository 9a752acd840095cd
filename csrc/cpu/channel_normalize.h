// Sums over each channel of tensors without gaps, for every instruction set.
#pragma once

#include <cstdint>

namespace flowkernels {

// x is [batch, channels, sites], or with `rows` [batch, sites, channels]. Samples are taken `samples` at a time; the sums of each such part
// go to parts, [parts, channels]. They run in 16 lanes, over a sample's sites or, where it has one, over samples, whatever the layout.
template <class T>
struct ChannelSums {
  const T* x;
  const T* mean;  // null: sums of x; else of (x - mean)^2
  double* parts;
  int64_t batch, channels, sites, samples;
  bool rows;

  int64_t n_parts() const { return (batch + samples - 1) / samples; }
  int64_t units() const { return n_parts() * (rows ? 1 : channels); }
};

// dx += (x - mean) * slope + offset; x and dx are [outer, channels, run]
template <class T>
struct StatisticsGradient {
  const T* x;
  T* dx;
  const T *mean, *slope, *offset;
  int64_t channels, run;
};

}  // namespace flowkernels
