// The arithmetic of a coupling on packed elements: one function for each scale map and direction. No include guard:
// cpu/for_each_target.h includes this once per instruction set.

#include "cpu/walk.h"

namespace flowkernels {
namespace FK_TARGET {

// n elements. Forward: in = {x, shift, s}, out = {y}, terms = log|dy/dx|.
// Backward: in = {dy, x or y, shift, s}, out = {dx, dshift, ds}; c = dlogabsdet, a = scale parameter and terms = da where there is one.
template <class T>
using Tile = void (*)(const Affine& affine, const T* const* in, const T* c, const T* a, T* const* out, T* terms, int64_t n);

template <class T>
FK_CALL void add_tile(const Affine& affine, const T* const* in, const T*, const T*, T* const* out, T*, int64_t n) {
  using V = Vec<T>;
  const V sign = broadcast(affine.inverse != (affine.form == Form::divide) ? T(-1) : T(1));
  int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>) store(out[0] + i, fma(sign, load(in[1] + i), load(in[0] + i)));
  if (const int k = static_cast<int>(n - i)) {
    store_partial(out[0] + i, fma(sign, load_partial(in[1] + i, k), load_partial(in[0] + i, k)), k);
  }
}

template <class Map, class T>
FK_CALL void forward_tile(const Affine& affine, const T* const* in, const T*, const T* a, T* const* out, T* terms, int64_t n) {
  using V = Vec<T>;
  Map map(affine.scale);
  const Form form = affine.form;
  const bool inverse = affine.inverse;
  const T *x = in[0], *shift = in[1], *s = in[2];
  auto step = [&](V x, V shift, V s) -> ValueAndLog<V> {
    const FormScale<V> scale = form_scale(map, form, inverse, s);
    const V y = with_form(form, [&](auto tag) {
      constexpr Form F = decltype(tag)::value;
      return inverse ? invert_scale<F>(scale, x, shift) : apply_scale<F>(scale, x, shift);
    });
    return {y, scale.log};
  };
  int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>) {
    if constexpr (Map::learned) map.a = load(a + i);
    const ValueAndLog<V> r = step(load(x + i), load(shift + i), load(s + i));
    store(out[0] + i, r.value);
    store(terms + i, r.log);
  }
  if (const int k = static_cast<int>(n - i)) {
    if constexpr (Map::learned) map.a = load_partial(a + i, k);
    const ValueAndLog<V> r = step(load_partial(x + i, k), load_partial(shift + i, k), load_partial(s + i, k));
    store_partial(out[0] + i, r.value, k);
    store_partial(terms + i, r.log, k);
  }
}

template <class V>
struct CouplingGradients {
  V dx, dshift, ds, da;
};

// The formulas of coupling_backward_reference. With v the factor, new = v old + sign shift or v (old + sign shift) or the gate.
template <class V, class Map>
FK_INLINE CouplingGradients<V> coupling_gradients(const Map& map, const Affine& affine, V dnew, V kept, V shift, V s, V c) {
  using T = scalar_t<V>;
  const bool reciprocal = divides(affine.form, affine.inverse), output = affine.from_output;
  const V v = reciprocal ? map.reciprocal(s) : map.sigma(s);
  const V dlog = reciprocal ? map.dlog_reciprocal(s) : map.dlog_sigma(s);
  const V dold = dnew * v;
  V dshift, along, extra = splat<V>(T(0));  // extra: what 1 - sigma adds in the gate's inverse, but for the derivative of log sigma
  if (affine.form == Form::gate) {
    const V complement = map.complement(s);
    if (affine.inverse) {
      along = dnew * (output ? kept : fma(-complement, shift, kept) * v);
      dshift = -(dold * complement);
      extra = dold * shift * map.sigma(s);
    } else {
      along = dnew * (output ? kept - shift : v * (kept - shift));
      dshift = dnew * complement;
    }
  } else {
    const bool shift_first = affine.form == Form::shift_scale ? !affine.inverse : reciprocal;
    const V signed_shift = reciprocal ? -shift : shift;
    if (shift_first) {
      along = dnew * (output ? kept : (kept + signed_shift) * v);
      dshift = dold;
    } else {
      along = dnew * (output ? kept - signed_shift : kept * v);
      dshift = dnew;
    }
    if (reciprocal) dshift = -dshift;
  }
  const V inner = along + c;
  V ds = dlog * inner, da = splat<V>(T(0));
  if (affine.form == Form::gate && affine.inverse) ds = fma(extra, map.dlog_sigma(s), ds);
  if constexpr (Map::learned) da = map.exponent(s) * (reciprocal ? extra - inner : inner);
  return {dold, dshift, ds, da};
}

template <class Map, class T>
FK_CALL void backward_tile(const Affine& affine, const T* const* in, const T* c, const T* a, T* const* out, T* terms, int64_t n) {
  Map map(affine.scale);
  const T *dy = in[0], *kept = in[1], *shift = in[2], *s = in[3];
  int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>) {
    if constexpr (Map::learned) map.a = load(a + i);
    const auto d = coupling_gradients(map, affine, load(dy + i), load(kept + i), load(shift + i), load(s + i), load(c + i));
    store(out[0] + i, d.dx);
    store(out[1] + i, d.dshift);
    store(out[2] + i, d.ds);
    if constexpr (Map::learned) store(terms + i, d.da);
  }
  if (const int k = static_cast<int>(n - i)) {
    if constexpr (Map::learned) map.a = load_partial(a + i, k);
    const auto d = coupling_gradients(map, affine, load_partial(dy + i, k), load_partial(kept + i, k), load_partial(shift + i, k),
                                      load_partial(s + i, k), load_partial(c + i, k));
    store_partial(out[0] + i, d.dx, k);
    store_partial(out[1] + i, d.dshift, k);
    store_partial(out[2] + i, d.ds, k);
    if constexpr (Map::learned) store_partial(terms + i, d.da, k);
  }
}

template <class T>
Tile<T> choose_tile(const ScaleMapParams& scale, bool additive, bool learned, bool backward) {
  if (additive) return add_tile<T>;
  if (learned) return backward ? backward_tile<LearnedTanhMap<Vec<T>>, T> : forward_tile<LearnedTanhMap<Vec<T>>, T>;
  return with_scale_map<Vec<T>>(scale, [&](const auto& map) -> Tile<T> {
    using Map = std::decay_t<decltype(map)>;
    return backward ? backward_tile<Map, T> : forward_tile<Map, T>;
  });
}

template <class T>
struct CouplingMap {
  Affine affine;
  Tile<T> tile;

  void operator()(const T* const* in, const T* c, const T* const* parameters, T* const* out, T* const* terms, int64_t n) const {
    tile(affine, in, c, parameters[0], out, terms[0], n);
  }
};

template <class E>
FK_CALL void run_coupling(const Elementwise<E>& args, const Affine& affine, bool additive, bool backward, compute_t<E>* columns,
                          int64_t first, int64_t last) {
  using T = compute_t<E>;
  const CouplingMap<T> map{affine, choose_tile<T>(affine.scale, additive, args.n_parameters > 0, backward)};
  Walk<E, CouplingMap<T>>(args, map, columns).run(first, last);
}

}  // namespace FK_TARGET
}  // namespace flowkernels
