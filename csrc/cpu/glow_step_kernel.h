// The end of one Glow step and the beginning of the next on tiles of sites: coupling, actnorm's bias, and the 1x1 convolution into which
// its scale went. No include guard: cpu/for_each_target.h includes this once per instruction set.
//
// Everything of a tile stays in the first-level cache. Sums over channels and over the sites of a tile run in ascending order, one
// multiply-add a term, so that neither the number of lanes nor the number of threads changes a bit.

#include "cpu/small_matmul.h"
#include "cpu/staging.h"

namespace flowkernels {
namespace FK_TARGET {

template <class T>
class GlowStep {
  using V = Vec<T>;
  static constexpr int64_t kRows = GlowStepArgs<T>::kRows;

 public:
  static size_t scratch_bytes(int64_t channels, bool backward) {
    const int64_t width = whole_vectors<T>(channels), rows = kRows + kSlack, half = kRows * channels / 2 + kPad;
    const int64_t vectors = (2 + channels + (backward ? channels + kSlack : 0)) * width + (backward ? 4 : 3) * rows * width;
    return static_cast<size_t>(vectors + (backward ? 8 : 6) * half) * sizeof(T) + 64 * 16;
  }

  GlowStep(const GlowStepArgs<T>& a, void* scratch, bool backward)
      : args(a), channels_(a.channels), half_(a.channels / 2), width_(whole_vectors<T>(a.channels)),
        next_(static_cast<char*>(scratch)), map_(glows_map()) {
    bias_ = take(width_);
    matrix_ = take(channels_ * width_);
    x_ = take((kRows + kSlack) * width_);
    h_ = take((kRows + kSlack) * width_);
    g_ = take((kRows + kSlack) * width_);
    for (T** p : {&old_, &shift_, &s_, &new_, &terms_, &exps_}) *p = take(kRows * half_ + kPad);
    fill(bias_, width_, T(0));
    for (int64_t c = 0; c < channels_ && args.bias; ++c) bias_[c] = args.bias[c];
    // products run over rows of a matrix: forward y = h W^T, backward dh = dy W
    fill(matrix_, channels_ * width_, T(0));
    for (int64_t o = 0; o < channels_ && args.weight; ++o) {
      for (int64_t c = 0; c < channels_; ++c) (backward ? matrix_[o * width_ + c] : matrix_[c * width_ + o]) = args.weight[o * channels_ + c];
    }
    fill(h_, (kRows + kSlack) * width_, T(0));
    fill(g_, (kRows + kSlack) * width_, T(0));
    if (!backward) return;
    dh_ = take((kRows + kSlack) * width_);
    dweight_ = take((channels_ + kSlack) * width_);
    dbias_ = take(width_);
    dshift_ = take(kRows * half_ + kPad);
    ds_ = take(kRows * half_ + kPad);
    fill(dh_, (kRows + kSlack) * width_, T(0));
  }

  void forward(int64_t tile) {
    at(tile);
    for (int64_t r = 0; r < rows_; r += kBlock) {
      const int64_t rows = r + kBlock < rows_ ? kBlock : rows_ - r;
      args.inverse ? forward_block<true>(r, rows) : forward_block<false>(r, rows);
    }
    args.tile_logs[tile] = args.raw ? sum_16(terms_, rows_ * half_) : T(0);
  }

  // the part's sums of the gradients of weight and bias
  void backward(int64_t part) {
    fill(dweight_, channels_ * width_, T(0));
    fill(dbias_, width_, T(0));
    const int64_t each = args.tiles_of_part(), end = (part + 1) * each;
    for (int64_t tile = part * each; tile < end && tile < args.tiles(); ++tile) backward_tile(tile);
    if (!args.weight) return;
    copy_rows(dweight_, width_, args.part_dweight + part * channels_ * channels_, channels_, channels_, channels_);
    copy_rows(dbias_, width_, args.part_dbias + part * channels_, channels_, 1, channels_);
  }

 private:
  static constexpr int64_t kPad = 64 / sizeof(T), kSlack = kMostMatmulRows, kBlock = 16;

  // sigmoid(s + 2), of the paper's code
  static ScaleMapParams glows_map() { return {static_cast<int>(ScaleKind::sigmoid), 2.0, 0.0}; }

  T* take(int64_t n) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return taken;
  }

  void at(int64_t tile) {
    const int64_t each = args.tiles_of_sample(), begin = tile % each * kRows;
    sample_ = tile / each;
    rows_ = begin + kRows < args.sites ? kRows : args.sites - begin;
    first_ = sample_ * args.sites + begin;
    if (args.channels_first) turn();
  }

  // Rows of the tile from row `begin` on; what a block leaves is still in the first-level cache where it is used next. Short loops overlap
  // in the processor, which one long chain of exp, log and what follows does not.
  template <bool INVERSE>
  void forward_block(int64_t begin, int64_t rows) {
    const int64_t first = first_ + begin;
    const Rows x = rows_of_x(begin);
    if (args.raw) take_apart<INVERSE>(args.raw + first * channels_, rows * half_);
    assemble<INVERSE>(x, rows, terms_ + begin * half_);
    if (args.weight) small_matmul<T, false>(rows, channels_, width_, h_, width_, 1, matrix_, width_, g_, width_);
    give<INVERSE>(args.weight ? g_ : h_, rows, args.y + first * channels_, args.passing + first * half_);
  }

  struct Rows {
    const T* data;
    int64_t step;
  };

  Rows rows_of_x(int64_t begin) const {
    if (args.channels_first) return {x_ + begin * width_, width_};
    return {args.x + (first_ + begin) * channels_, channels_};
  }

  // the tile's x, channels last
  void turn() {
    constexpr int64_t L = lanes<T>;
    const int64_t sites = args.sites;
    const T* from = args.x + sample_ * sites * channels_ + (first_ - sample_ * sites);
    for (int64_t c = 0; c < channels_; c += L) {
      for (int64_t r = 0; r < rows_; r += L) {
        const T* corner = from + c * sites + r;
        T* to = x_ + r * width_ + c;
        if (c + L <= channels_ && r + L <= rows_) {
          V block[L];
          for (int64_t i = 0; i < L; ++i) block[i] = load(corner + i * sites);
          transpose(block);
          for (int64_t i = 0; i < L; ++i) store(to + i * width_, block[i]);
          continue;
        }
        for (int64_t i = 0; i < L && c + i < channels_; ++i) {
          for (int64_t j = 0; j < L && r + j < rows_; ++j) to[j * width_ + i] = corner[i * sites + j];
        }
      }
    }
  }

  // shift, s + 2 and its exponentials
  template <bool INVERSE>
  FK_INLINE void take_apart(const T* raw, int64_t n) {
    T *to_shift = shift_, *to_s = s_, *exps = exps_, *reciprocals = new_;
    for (int64_t i = 0; i < n; i += lanes<T>) {
      const Pair pair = i + lanes<T> <= n ? pair_at(raw + 2 * i) : last_pair(raw + 2 * i, n - i);
      const V s = pair.s + T(2);
      store(to_shift + i, pair.shift);
      store(to_s + i, s);
      store(exps + i, exp_of_nonpositive(-abs(s)));
      if constexpr (INVERSE) store(reciprocals + i, exp(-s));
    }
  }

  // h: what passes of x and what the coupling makes of the rest, or all of x, in the forward direction with the bias of the next actnorm.
  // Except at the end of a block, vectors go beyond their row into what is written next: to store a part of one takes many times as long.
  template <bool INVERSE>
  FK_INLINE void assemble(Rows x, int64_t rows, T* terms) {
    const T *from_shift = shift_, *from_s = s_, *exps = exps_, *reciprocals = new_, *bias = bias_, *from = x.data;
    T* h = h_;
    const int64_t half = half_, passing = args.raw ? half_ : channels_;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t left = (rows - r) * channels_;
      for (int64_t c = 0; c < passing; c += lanes<T>) {
        const V v = load_some(from + c, passing - c, left - c);
        store(h + c, INVERSE ? v : v + load(bias + c));
      }
      for (int64_t c = 0; passing == half && c < half; c += lanes<T>) {
        const V old = load_some(from + half + c, half - c, left - half - c);
        const V shift = load(from_shift + c), s = load(from_s + c), e = load(exps + c);
        const V softplus = softplus_of(-s, e);
        store(terms + c, INVERSE ? softplus : -softplus);
        const V coupled = INVERSE ? fma(old, T(1) + load(reciprocals + c), -shift) : (old + shift) * sigmoid_of(s, e);
        store(h + half + c, INVERSE ? coupled : coupled + load(bias + half + c));
      }
      from += x.step, h += width_, terms += half, from_shift += half, from_s += half, exps += half, reciprocals += half;
    }
  }

  template <bool INVERSE>
  FK_INLINE void give(const T* g, int64_t rows, T* y, T* passing) {
    const T* bias = bias_;
    const int64_t half = half_, channels = channels_, width = width_;
    for (int64_t r = 0; r < rows; ++r, y += channels, passing += half, g += width) {
      const int64_t left = (rows - r) * channels, left_passing = (rows - r) * half;
      for (int64_t c = 0; c < channels; c += lanes<T>) {
        const V sum = load(g + c), out = INVERSE ? sum - load(bias + c) : sum;
        store_some(y + c, out, channels - c, left - c);
        if (c < half) store_some(passing + c, out, half - c, left_passing - c);
      }
    }
  }

  // the first n elements of a row, and others where there are `left` in all
  static FK_INLINE V load_some(const T* p, int64_t n, int64_t left) {
    return left >= lanes<T> ? load(p) : load_partial(p, static_cast<int>(n));
  }
  static FK_INLINE void store_some(T* p, V v, int64_t n, int64_t left) {
    left >= lanes<T> ? store(p, v) : store_partial(p, v, static_cast<int>(n));
  }

  struct Pair {
    V shift, s;
  };

  static FK_INLINE Pair pair_at(const T* raw) {
#if defined(FK_TARGET_AVX2)  // 3 percent of a step quicker than shuffles across the whole register
    const V a = load(raw), b = load(raw + lanes<T>);
    if constexpr (sizeof(T) == 4) {
      const V low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
      return {_mm256_shuffle_ps(low, high, 0x88), _mm256_shuffle_ps(low, high, 0xdd)};
    } else {
      const V low = _mm256_permute2f128_pd(a, b, 0x20), high = _mm256_permute2f128_pd(a, b, 0x31);
      return {_mm256_unpacklo_pd(low, high), _mm256_unpackhi_pd(low, high)};
    }
#else
    const auto alternate = [](const T* a, const T* b) {
      return (V)AllLanes<T>::every_other_then_odd(load_words<Words<T>>(a), load_words<Words<T>>(b));
    };
    return {alternate(raw, raw + lanes<T> - 1), alternate(raw + 1, raw + lanes<T>)};
#endif
  }

  static Pair last_pair(const T* raw, int64_t n) {
    T padded[2 * lanes<T>] = {};
    for (int64_t i = 0; i < 2 * n; ++i) padded[i] = raw[i];
    return pair_at(padded);
  }

  // h: what passes of x and what the coupling made, in the forward direction with the bias of the next actnorm
  void assemble_again(Rows x) {
    copy_rows(x.data, x.step, h_, width_, rows_, args.raw ? half_ : channels_);
    if (args.raw) copy_rows(new_, half_, h_ + half_, width_, rows_, half_);
    if (!args.inverse) add_to_rows(h_, rows_, 1);
  }

  void add_to_rows(T* to, int64_t rows, T sign) {
    for (int64_t c = 0; c < width_; c += lanes<T>) {
      const V b = load(bias_ + c) * sign;
      for (int64_t r = 0; r < rows; ++r) store(to + r * width_ + c, load(to + r * width_ + c) + b);
    }
  }

  void sum_columns(const T* rows, T sign) {
    for (int64_t c = 0; c < width_; c += lanes<T>) {
      V sum{};
      for (int64_t r = 0; r < rows_; ++r) sum += load(rows + r * width_ + c);
      store(dbias_ + c, fma(sum, sign, load(dbias_ + c)));
    }
  }

  void backward_tile(int64_t tile) {
    at(tile);
    const Rows x = rows_of_x(0);
    copy_rows(args.dy + first_ * channels_, channels_, g_, width_, rows_, channels_);
    if (args.dpassing != nullptr) {
      const T* dpassing = args.dpassing + first_ * half_;
      for (int64_t r = 0; r < rows_; ++r) {
        for (int64_t c = 0; c < half_; ++c) g_[r * width_ + c] += dpassing[r * half_ + c];
      }
    }
    const T* dh = args.weight ? dh_ : g_;
    if (args.inverse) sum_columns(g_, -1);
    if (args.weight) small_matmul<T, false>(rows_, channels_, width_, g_, width_, 1, matrix_, width_, dh_, width_);
    if (!args.inverse) sum_columns(dh, 1);

    T* dx = args.dx + first_ * channels_;
    copy_rows(dh, width_, dx, channels_, rows_, args.raw ? half_ : channels_);
    if (args.raw) uncouple(x, dh + half_, dx + half_);
    if (!args.weight) return;
    assemble_again(x);
    small_matmul<T, true>(channels_, rows_, width_, g_, 1, width_, h_, width_, dweight_, width_);
  }

  // gradients of what was coupled and of raw, and once more what the coupling made
  void uncouple(Rows x, const T* dh, T* dx) {
    const int64_t n = rows_ * half_;
    const T* raw = args.raw + first_ * channels_;
    copy_rows(x.data + half_, x.step, old_, half_, rows_, half_);
    gather_row(raw, 2, n, shift_);
    gather_row(raw + 1, 2, n, s_);
    T* dnew = terms_;
    copy_rows(dh, width_, dnew, half_, rows_, half_);
    const V c = broadcast(args.dlogabsdet[sample_]);
    for (int64_t i = 0; i < n; i += lanes<T>) {
      const V s = load(s_ + i), old = load(old_ + i), shift = load(shift_ + i), d = load(dnew + i);
      const ValueAndLog<V> scale = args.inverse ? map_.reciprocal_and_dlog(s) : map_.sigma_and_dlog(s);
      const V scaled = args.inverse ? old * scale.value : (old + shift) * scale.value, dold = d * scale.value;
      store(new_ + i, args.inverse ? scaled - shift : scaled);
      store(old_ + i, dold);
      store(dshift_ + i, args.inverse ? -d : dold);
      store(ds_ + i, scale.log * fma(d, scaled, c));
    }
    copy_rows(old_, half_, dx, channels_, rows_, half_);
    interleave(dshift_, ds_, n, args.draw + first_ * channels_);
  }

  static void interleave(const T* even, const T* odd, int64_t n, T* to) {
    int64_t i = 0;
    for (; i + lanes<T> <= n; i += lanes<T>) {
      for (int64_t j = 0; j < lanes<T>; j += lanes<T> / 2) {
        using W = Words<T>;
        const W spread = AllLanes<T>::doubled(load_words<W>(even + i + j)), other = AllLanes<T>::doubled(load_words<W>(odd + i + j));
        const W merged = AllLanes<T>::alternating(spread, other);
        __builtin_memcpy(to + 2 * (i + j), &merged, sizeof merged);
      }
    }
    for (; i < n; ++i) to[2 * i] = even[i], to[2 * i + 1] = odd[i];
  }

  const GlowStepArgs<T>& args;
  const int64_t channels_, half_, width_;
  char* next_;
  const SigmoidMap<V, false> map_;
  int64_t sample_ = 0, first_ = 0, rows_ = 0;  // of the tile
  T *bias_, *matrix_, *x_, *h_, *g_, *old_, *shift_, *s_, *new_, *terms_, *exps_;
  T *dh_ = nullptr, *dweight_ = nullptr, *dbias_ = nullptr, *dshift_ = nullptr, *ds_ = nullptr;
};

template <class T>
FK_CALL size_t glow_step_scratch(int64_t channels, bool backward) {
  return GlowStep<T>::scratch_bytes(channels, backward);
}

// the tiles, or backward the parts, [first, last)
template <class T>
FK_CALL void run_glow_step(const GlowStepArgs<T>& args, void* scratch, bool backward, int64_t first, int64_t last) {
  GlowStep<T> step(args, scratch, backward);
  for (int64_t i = first; i < last; ++i) backward ? step.backward(i) : step.forward(i);
}

}  // namespace FK_TARGET
}  // namespace flowkernels
