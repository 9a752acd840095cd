// Sums over channels and the gradient through batch statistics. No include guard: cpu/for_each_target.h includes this once per instruction
// set.

namespace flowkernels {
namespace FK_TARGET {

// in double, in which the square of a float is exact
template <bool SQUARE, class T>
FK_INLINE double summand(T x, T mean) {
  const double d = x - mean;
  return SQUARE ? d * d : d;
}

// 16 sums, each of `width` numbers, to the first by a tree
FK_INLINE void add_lanes(double* lanes, int64_t width) {
  for (int64_t half = 8 * width; half >= width; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
}

template <bool SQUARE, class T>
FK_INLINE void sums_of_channel(const ChannelSums<T>& a, int64_t part, int64_t c) {
  const int64_t begin = part * a.samples, end = begin + a.samples < a.batch ? begin + a.samples : a.batch;
  const T mean = SQUARE ? a.mean[c] : T(0);
  double lanes[16] = {};
  for (int64_t b = begin; b < end; ++b) {
    const T* x = a.x + (b * a.channels + c) * a.sites;
    int64_t s = 0;
    for (; s + 16 <= a.sites; s += 16) {
      for (int j = 0; j < 16; ++j) lanes[j] += summand<SQUARE>(x[s + j], mean);
    }
    for (int j = 0; s + j < a.sites; ++j) lanes[j] += summand<SQUARE>(x[s + j], mean);
  }
  add_lanes(lanes, 1);
  a.parts[part * a.channels + c] = lanes[0];
}

template <bool SQUARE, class T>
FK_INLINE void sums_of_rows(const ChannelSums<T>& a, int64_t part, double* lanes) {
  const int64_t begin = part * a.samples, end = begin + a.samples < a.batch ? begin + a.samples : a.batch, n = a.channels;
  for (int64_t i = 0; i < 16 * n; ++i) lanes[i] = 0;
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t s = 0; s < a.sites; ++s) {
      const T* x = a.x + (b * a.sites + s) * n;
      double* to = lanes + ((a.sites == 1 ? b - begin : s) & 15) * n;
      for (int64_t c = 0; c < n; ++c) to[c] += summand<SQUARE>(x[c], SQUARE ? a.mean[c] : T(0));
    }
  }
  add_lanes(lanes, n);
  for (int64_t c = 0; c < n; ++c) a.parts[part * n + c] = lanes[c];
}

// lanes: room for 16 * channels where a.rows
template <class T>
FK_CALL void channel_sums(const ChannelSums<T>& a, double* lanes, int64_t first, int64_t last) {
  for (int64_t u = first; u < last; ++u) {
    if (a.rows) {
      a.mean != nullptr ? sums_of_rows<true>(a, u, lanes) : sums_of_rows<false>(a, u, lanes);
    } else {
      const int64_t part = u / a.channels, c = u % a.channels;
      a.mean != nullptr ? sums_of_channel<true>(a, part, c) : sums_of_channel<false>(a, part, c);
    }
  }
}

template <class T>
FK_CALL void add_statistics_gradient(const StatisticsGradient<T>& a, int64_t first, int64_t last) {
  for (int64_t o = first; o < last; ++o) {
    const T* x = a.x + o * a.channels * a.run;
    T* dx = a.dx + o * a.channels * a.run;
    if (a.run == 1) {
      for (int64_t c = 0; c < a.channels; ++c) dx[c] += fma(x[c] - a.mean[c], a.slope[c], a.offset[c]);
      continue;
    }
    for (int64_t c = 0; c < a.channels; ++c, x += a.run, dx += a.run) {
      const T mean = a.mean[c], slope = a.slope[c], offset = a.offset[c];
      for (int64_t i = 0; i < a.run; ++i) dx[i] += fma(x[i] - mean, slope, offset);
    }
  }
}

}  // namespace FK_TARGET
}  // namespace flowkernels
