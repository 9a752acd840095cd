// The arithmetic of the per-channel affine map on packed elements. No include guard: cpu/for_each_target.h includes this once per
// instruction set.

#include "cpu/walk.h"

namespace flowkernels {
namespace FK_TARGET {

// y = (x + before) * scale + after. parameters = {before, scale, after}; in = {x}, out = {y}.
template <class T>
struct ChannelAffineMap {
  void operator()(const T* const* in, const T*, const T* const* parameters, T* const* out, T* const*, int64_t n, const Rest<T>&) const {
    const T *x = in[0], *before = parameters[0], *scale = parameters[1], *after = parameters[2];
    T* y = out[0];
    int64_t i = 0;
    for (; i + lanes<T> <= n; i += lanes<T>) store(y + i, fma(load(x + i) + load(before + i), load(scale + i), load(after + i)));
    if (const int k = static_cast<int>(n - i)) {
      store_partial(y + i, fma(load_partial(x + i, k) + load(before + i), load(scale + i), load(after + i)), k);
    }
  }
};

// in = {dy, x or y}, out = {dx}; terms = {dy, dy * (x + before) * scale}
template <class T>
struct ChannelAffineGradient {
  bool from_output;

  void operator()(const T* const* in, const T*, const T* const* parameters, T* const* out, T* const* terms, int64_t n, const Rest<T>&) const {
    const T *dy = in[0], *kept = in[1], *before = parameters[0], *scale = parameters[1], *after = parameters[2];
    T *dx = out[0], *constant = terms[0], *linear = terms[1];
    auto along = [&](Vec<T> g, Vec<T> dold, Vec<T> v, int64_t i) __attribute__((always_inline)) {
      return from_output ? g * (v - load(after + i)) : dold * (v + load(before + i));
    };
    int64_t i = 0;
    for (; i + lanes<T> <= n; i += lanes<T>) {
      const Vec<T> g = load(dy + i), dold = g * load(scale + i);
      store(dx + i, dold);
      store(constant + i, g);
      store(linear + i, along(g, dold, load(kept + i), i));
    }
    if (const int k = static_cast<int>(n - i)) {
      const Vec<T> g = load_partial(dy + i, k), dold = g * load(scale + i);
      store_partial(dx + i, dold, k);
      store_partial(constant + i, g, k);
      store_partial(linear + i, along(g, dold, load_partial(kept + i, k), i), k);
    }
  }
};

template <class E>
FK_CALL void run_channel_affine(const Elementwise<E>& args, bool backward, bool from_output, compute_t<E>* columns, int64_t first,
                                int64_t last) {
  using T = compute_t<E>;
  if (backward) {
    Walk<E, ChannelAffineGradient<T>>(args, {from_output}, columns).run(first, last);
  } else {
    Walk<E, ChannelAffineMap<T>>(args, {}, columns).run(first, last);
  }
}

// n values: to[i] = exp(sign * from[stride * i])
template <class T>
FK_CALL void exp_of(const T* from, int64_t stride, T sign, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = exp(broadcast(sign * from[i * stride]))[0];
}

}  // namespace FK_TARGET
}  // namespace flowkernels
