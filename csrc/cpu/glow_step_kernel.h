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
    const int64_t width = padded<T>(channels), rows = kRows + kSlack, half = kRows * channels / 2 + kPad;
    const int64_t vectors = (2 + channels + (backward ? channels + kSlack : 0)) * width + (backward ? 3 : 2) * rows * width;
    return static_cast<size_t>(vectors + (backward ? 7 : 5) * half) * sizeof(T) + 64 * 16;
  }

  GlowStep(const GlowStepArgs<T>& a, void* scratch, bool backward)
      : args(a), channels_(a.channels), half_(a.channels / 2), width_(padded<T>(a.channels)), next_(static_cast<char*>(scratch)), map_(glows_map()) {
    bias_ = take(width_);
    matrix_ = take(channels_ * width_);
    h_ = take((kRows + kSlack) * width_);
    g_ = take((kRows + kSlack) * width_);
    for (T** p : {&old_, &shift_, &s_, &new_, &terms_}) *p = take(kRows * half_ + kPad);
    zero_out(bias_, width_);
    for (int64_t c = 0; c < channels_; ++c) bias_[c] = args.bias[c];
    // products run over rows of a matrix: forward y = h W^T, backward dh = dy W
    zero_out(matrix_, channels_ * width_);
    for (int64_t o = 0; o < channels_; ++o) {
      for (int64_t c = 0; c < channels_; ++c) (backward ? matrix_[o * width_ + c] : matrix_[c * width_ + o]) = args.weight[o * channels_ + c];
    }
    zero_out(h_, (kRows + kSlack) * width_);
    zero_out(g_, (kRows + kSlack) * width_);
    if (!backward) return;
    dh_ = take((kRows + kSlack) * width_);
    dweight_ = take((channels_ + kSlack) * width_);
    dbias_ = take(width_);
    dshift_ = take(kRows * half_ + kPad);
    ds_ = take(kRows * half_ + kPad);
    zero_out(dh_, (kRows + kSlack) * width_);
  }

  void forward(int64_t tile) {
    at(tile);
    stage();
    const int64_t n = rows_ * half_;
    for (int64_t i = 0; i < n; i += lanes<T>) {
      const V s = load(s_ + i), old = load(old_ + i), shift = load(shift_ + i);
      const ValueAndLog<V> scale = args.inverse ? map_.reciprocal_and_log(s) : map_.sigma_and_log(s);
      store(new_ + i, args.inverse ? fma(old, scale.value, -shift) : (old + shift) * scale.value);
      store(terms_ + i, scale.log);
    }
    args.tile_logs[tile] = sum_16(terms_, n);
    assemble();
    small_matmul<T, false>(rows_, channels_, width_, h_, width_, 1, matrix_, width_, g_, width_);
    if (args.inverse) add_to_rows(g_, -1);
    copy_rows(g_, width_, args.y + first_ * channels_, channels_, rows_, channels_);
    copy_rows(g_, width_, args.passing + first_ * half_, half_, rows_, half_);
  }

  // the part's sums of the gradients of weight and bias
  void backward(int64_t part) {
    zero_out(dweight_, channels_ * width_);
    zero_out(dbias_, width_);
    const int64_t each = args.tiles_of_part(), end = (part + 1) * each;
    for (int64_t tile = part * each; tile < end && tile < args.tiles(); ++tile) backward_tile(tile);
    copy_rows(dweight_, width_, args.part_dweight + part * channels_ * channels_, channels_, channels_, channels_);
    copy_rows(dbias_, width_, args.part_dbias + part * channels_, channels_, 1, channels_);
  }

 private:
  static constexpr int64_t kPad = 64 / sizeof(T), kSlack = kMostMatmulRows;

  // sigmoid(s + 2), of the paper's code
  static ScaleMapParams glows_map() { return {static_cast<int>(ScaleKind::sigmoid), 2.0, 0.0}; }

  T* take(int64_t n) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return taken;
  }

  static void zero_out(T* p, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = T(0);
  }

  void at(int64_t tile) {
    const int64_t each = args.tiles_of_sample(), begin = tile % each * kRows;
    sample_ = tile / each;
    rows_ = begin + kRows < args.sites ? kRows : args.sites - begin;
    first_ = sample_ * args.sites + begin;
  }

  void stage() {
    copy_rows(args.x + first_ * channels_ + half_, channels_, old_, half_, rows_, half_);
    const T* raw = args.raw + first_ * channels_;
    gather_row(raw, 2, rows_ * half_, shift_);
    gather_row(raw + 1, 2, rows_ * half_, s_);
  }

  // h: what passes and what the coupling made, in the forward direction with the bias of the next actnorm
  void assemble() {
    copy_rows(args.x + first_ * channels_, channels_, h_, width_, rows_, half_);
    copy_rows(new_, half_, h_ + half_, width_, rows_, half_);
    if (!args.inverse) add_to_rows(h_, 1);
  }

  void add_to_rows(T* rows, T sign) {
    for (int64_t c = 0; c < width_; c += lanes<T>) {
      const V b = load(bias_ + c) * sign;
      for (int64_t r = 0; r < rows_; ++r) store(rows + r * width_ + c, load(rows + r * width_ + c) + b);
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
    stage();
    const int64_t n = rows_ * half_;
    copy_rows(args.dy + first_ * channels_, channels_, g_, width_, rows_, channels_);
    if (args.dpassing != nullptr) {
      const T* dpassing = args.dpassing + first_ * half_;
      for (int64_t r = 0; r < rows_; ++r) {
        for (int64_t c = 0; c < half_; ++c) g_[r * width_ + c] += dpassing[r * half_ + c];
      }
    }
    if (args.inverse) sum_columns(g_, -1);
    small_matmul<T, false>(rows_, channels_, width_, g_, width_, 1, matrix_, width_, dh_, width_);
    if (!args.inverse) sum_columns(dh_, 1);

    T* dnew = terms_;
    copy_rows(dh_ + half_, width_, dnew, half_, rows_, half_);
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
    assemble();
    small_matmul<T, true>(channels_, rows_, width_, g_, 1, width_, h_, width_, dweight_, width_);

    copy_rows(dh_, width_, args.dx + first_ * channels_, channels_, rows_, half_);
    copy_rows(old_, half_, args.dx + first_ * channels_ + half_, channels_, rows_, half_);
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
  T *bias_, *matrix_, *h_, *g_, *old_, *shift_, *s_, *new_, *terms_;
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
