// The arithmetic of a coupling on packed elements: one function for each scale map and direction. No include guard:
// cpu/for_each_target.h includes this once per instruction set.

#include "cpu/walk.h"

namespace flowkernels {
namespace FK_TARGET {

// What is done with v = sigma or 1 / sigma, and with the shift, whose sign is reversed where v = 1 / sigma:
// v x + shift, v (x + shift), v x + (1 - sigma) shift, v (x - (1 - sigma) shift).
enum class Action { scale_first, shift_first, gate, gate_inverse };

inline Action action_of(const Affine& affine) {
  if (affine.form == Form::gate) return affine.inverse ? Action::gate_inverse : Action::gate;
  const bool shift_first = affine.form == Form::shift_scale ? !affine.inverse : divides(affine.form, affine.inverse);
  return shift_first ? Action::shift_first : Action::scale_first;
}

// Forward: in = {x, shift, s}, out = {y}, terms = log|dy/dx|. Backward: in = {dy, x or y, shift, s}, out = {dx, dshift, ds},
// per_sample = dlogabsdet and terms = da, of the scale parameter a, where there is one.
template <class T>
using Tile = void (*)(const Affine& affine, const Streams<T>& streams);

template <class T>
FK_CALL void add_tile(const Affine& affine, const Streams<T>& streams) {
  const Vec<T> sign = broadcast(divides(affine.form, affine.inverse) ? T(-1) : T(1));
  for (int64_t r = 0; r < streams.rows; ++r) {
    const T *x = streams.in[0] + r * streams.in_row[0], *shift = streams.in[1] + r * streams.in_row[1];
    T* y = streams.out[0] + r * streams.out_row[0];
    int64_t i = 0;
    for (; i + lanes<T> <= streams.n; i += lanes<T>) {
      store(y + i, fma(sign, load(shift + i), load(x + i)));
      streams.copy_rest(i);
    }
    if (const int k = static_cast<int>(streams.n - i)) {
      store_partial(y + i, fma(sign, load_partial(shift + i, k), load_partial(x + i, k)), k);
      streams.copy_rest(i, k);
    }
  }
}

template <bool RECIPROCAL, class Map, class V>
FK_INLINE ValueAndLog<V> coupled(const Map& map, Action action, V x, V shift, V s) {
  const ValueAndLog<V> scale = RECIPROCAL ? map.reciprocal_and_log(s) : map.sigma_and_log(s);
  const V v = scale.value, signed_shift = RECIPROCAL ? -shift : shift;
  switch (action) {
    case Action::shift_first: return {(x + signed_shift) * v, scale.log};
    case Action::gate: return {fma(v, x, map.complement(s) * shift), scale.log};
    case Action::gate_inverse: return {fma(map.complement(s), signed_shift, x) * v, scale.log};
    default: return {fma(x, v, signed_shift), scale.log};
  }
}

template <class Map, bool RECIPROCAL, class T>
FK_CALL void forward_tile(const Affine& affine, const Streams<T>& streams) {
  Map map(affine.scale);
  const Action action = action_of(affine);
  const int64_t n = streams.n;
  for (int64_t r = 0; r < streams.rows; ++r) {
    const T *x = streams.in[0] + r * streams.in_row[0], *shift = streams.in[1] + r * streams.in_row[1];
    const T *s = streams.in[2] + r * streams.in_row[2], *a = streams.parameters[0] + r * n;
    T *y = streams.out[0] + r * streams.out_row[0], *terms = streams.terms[0] + r * n;
    int64_t i = 0;
    for (; i + lanes<T> <= n; i += lanes<T>) {
      streams.fetch_ahead(i, x, shift, s, y, streams.rest_from, streams.rest_to);
      if constexpr (Map::learned) map.a = load(a + i);
      const auto result = coupled<RECIPROCAL>(map, action, load(x + i), load(shift + i), load(s + i));
      store(y + i, result.value);
      store(terms + i, result.log);
      streams.copy_rest(i);
    }
    if (const int k = static_cast<int>(n - i)) {
      if constexpr (Map::learned) map.a = load(a + i);
      const auto result = coupled<RECIPROCAL>(map, action, load_partial(x + i, k), load_partial(shift + i, k), load_partial(s + i, k));
      store_partial(y + i, result.value, k);
      store(terms + i, result.log);
      streams.copy_rest(i, k);
    }
  }
}

template <class V>
struct CouplingGradients {
  V dx, dshift, ds, da;
};

// the formulas of coupling_backward_reference
template <bool RECIPROCAL, class Map, class V>
FK_INLINE CouplingGradients<V> coupling_gradients(const Map& map, Action action, bool output, V dnew, V kept, V shift, V s, V c) {
  const ValueAndLog<V> scale = RECIPROCAL ? map.reciprocal_and_dlog(s) : map.sigma_and_dlog(s);
  const V v = scale.value, dlog = scale.log, dold = dnew * v, signed_shift = RECIPROCAL ? -shift : shift;
  V dshift, along, da = splat<V>(0);
  switch (action) {
    case Action::shift_first:
      along = dnew * (output ? kept : (kept + signed_shift) * v);
      dshift = RECIPROCAL ? -dold : dold;
      break;
    case Action::gate:
      along = dnew * (output ? kept - shift : v * (kept - shift));
      dshift = dnew * map.complement(s);
      break;
    case Action::gate_inverse: {
      const V complement = map.complement(s), by_complement = dold * shift * map.sigma(s);  // 1 - sigma varies too
      along = dnew * (output ? kept : fma(complement, signed_shift, kept) * v) + c;
      if constexpr (Map::learned) da = map.exponent(s) * (by_complement - along);
      return {dold, -(dold * complement), fma(by_complement, map.dlog_sigma(s), dlog * along), da};
    }
    default:
      along = dnew * (output ? kept - signed_shift : kept * v);
      dshift = RECIPROCAL ? -dnew : dnew;
  }
  along += c;
  if constexpr (Map::learned) da = map.exponent(s) * (RECIPROCAL ? -along : along);
  return {dold, dshift, dlog * along, da};
}

template <class Map, bool RECIPROCAL, class T>
FK_CALL void backward_tile(const Affine& affine, const Streams<T>& streams) {
  Map map(affine.scale);
  const Action action = action_of(affine);
  const bool output = affine.from_output;
  const int64_t n = streams.n;
  for (int64_t r = 0; r < streams.rows; ++r) {
    const T *dy = streams.in[0] + r * streams.in_row[0], *kept = streams.in[1] + r * streams.in_row[1];
    const T *shift = streams.in[2] + r * streams.in_row[2], *s = streams.in[3] + r * streams.in_row[3];
    const T *c = streams.per_sample + r * n, *a = streams.parameters[0] + r * n;
    T *dx = streams.out[0] + r * streams.out_row[0], *dshift = streams.out[1] + r * streams.out_row[1];
    T *ds = streams.out[2] + r * streams.out_row[2], *terms = streams.terms[0] + r * n;
    int64_t i = 0;
    for (; i + lanes<T> <= n; i += lanes<T>) {
      streams.fetch_ahead(i, dy, kept, shift, s, dx, dshift, ds, streams.rest_from, streams.rest_to);
      if constexpr (Map::learned) map.a = load(a + i);
      const auto d = coupling_gradients<RECIPROCAL>(map, action, output, load(dy + i), load(kept + i), load(shift + i), load(s + i), load(c + i));
      store(dx + i, d.dx);
      store(dshift + i, d.dshift);
      store(ds + i, d.ds);
      if constexpr (Map::learned) store(terms + i, d.da);
      streams.copy_rest(i);
    }
    if (const int k = static_cast<int>(n - i)) {
      if constexpr (Map::learned) map.a = load(a + i);
      const auto d = coupling_gradients<RECIPROCAL>(map, action, output, load_partial(dy + i, k), load_partial(kept + i, k),
                                                    load_partial(shift + i, k), load_partial(s + i, k), load(c + i));
      store_partial(dx + i, d.dx, k);
      store_partial(dshift + i, d.dshift, k);
      store_partial(ds + i, d.ds, k);
      if constexpr (Map::learned) store(terms + i, d.da);
      streams.copy_rest(i, k);
    }
  }
}

template <class Map, class T>
Tile<T> tile_of(bool reciprocal, bool backward) {
  if (backward) return reciprocal ? backward_tile<Map, true, T> : backward_tile<Map, false, T>;
  return reciprocal ? forward_tile<Map, true, T> : forward_tile<Map, false, T>;
}

template <class T>
Tile<T> choose_tile(const Affine& affine, bool additive, bool learned, bool backward) {
  if (additive) return add_tile<T>;
  const bool reciprocal = divides(affine.form, affine.inverse);
  if (learned) return tile_of<LearnedTanhMap<Vec<T>>, T>(reciprocal, backward);
  return with_scale_map<Vec<T>>(
      affine.scale, [&](const auto& map) -> Tile<T> { return tile_of<std::decay_t<decltype(map)>, T>(reciprocal, backward); });
}

template <class T>
struct CouplingMap {
  Affine affine;
  Tile<T> tile;

  void operator()(const Streams<T>& streams) const { tile(affine, streams); }
};

template <class E>
FK_CALL void run_coupling(const Elementwise<E>& args, const Affine& affine, bool additive, bool backward, compute_t<E>* columns,
                          int64_t first, int64_t last) {
  using T = compute_t<E>;
  const CouplingMap<T> map{affine, choose_tile<T>(affine, additive, args.n_parameters > 0, backward)};
  Walk<E, CouplingMap<T>>(args, map, columns).run(first, last);
}

}  // namespace FK_TARGET
}  // namespace flowkernels
