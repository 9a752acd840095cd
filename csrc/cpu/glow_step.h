// What the joined Glow step works on, for every instruction set.
#pragma once

#include <cstdint>

namespace flowkernels {

// Tensors [batch, sites, channels], contiguous, but for x where channels come first. Without raw nothing is coupled; without weight and
// bias nothing follows the coupling. A tile is `tile_rows` sites of one sample, fewer at its end, so that sums over a sample
// do not depend on the batch; a part is `tiles_of_part` tiles, over which gradients of the weight and the bias are summed.
template <class T>
struct GlowStepArgs {
  static constexpr int64_t kRows = 64;

  int64_t batch, sites, channels;
  bool inverse, channels_first;               // x is [batch, channels, sites]
  const T *x, *raw, *weight, *bias;           // x alone is never null
  T *y, *passing, *tile_logs;                 // forward
  const T *dy, *dpassing, *dlogabsdet;        // backward; dpassing may be null
  T *dx, *draw, *part_dweight, *part_dbias;   // [parts, channels, channels], [parts, channels]

  int64_t tiles_of_sample() const { return (sites + kRows - 1) / kRows; }
  int64_t tiles() const { return batch * tiles_of_sample(); }
  // about 128 sites or more, and at most 256 parts
  int64_t tiles_of_part() const {
    const int64_t rows = sites < 1 ? 1 : sites < kRows ? sites : kRows, least = (128 + rows - 1) / rows, most_parts = 256;
    const int64_t needed = (tiles() + most_parts - 1) / most_parts;
    return needed > least ? needed : least;
  }
  int64_t parts() const { return (tiles() + tiles_of_part() - 1) / tiles_of_part(); }
};

}  // namespace flowkernels
