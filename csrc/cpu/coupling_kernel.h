// The arithmetic of a coupling on packed elements: one function for each scale map and direction. No include guard:
// cpu/for_each_target.h includes this once per instruction set.

#include "cpu/tile_kernel.h"

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
// per_sample = dlogabsdet and terms = da, of the scale parameter a, where there is one. What each is told is an Affine.
template <class T>
using Tile = decltype(TileMap<T>::tile);

template <class T>
FK_CALL void add_tile(const void* told, const Streams<T>& streams) {
  const Affine& affine = *static_cast<const Affine*>(told);
  const Vec<T> sign = broadcast(divides(affine.form, affine.inverse) ? T(-1) : T(1));
  for_each_vector<2, 1>(streams, [&](const Vec<T>* in, Vec<T>* out, int64_t) FK_BODY { out[0] = fma(sign, in[1], in[0]); });
}

template <class Map, bool RECIPROCAL, class T>
FK_CALL void forward_tile(const void* told, const Streams<T>& streams) {
  using V = Vec<T>;
  const Affine& affine = *static_cast<const Affine*>(told);
  Map map(affine.scale);
  const Form form = affine.form;
  const bool inverse = divides(form, RECIPROCAL);  // which is affine.inverse, but so the compiler knows it where it knows the form
  const T* a = streams.parameters[0];
  T* terms = streams.terms[0];
  // An exponential and then a logarithm are a chain so long that the processor's window holds few of them: in two loops more overlap, and
  // 512 elements in the first-level cache take a quarter less time.
  T* exponentials = streams.terms[1];
  if constexpr (Map::by_exponential) for_each_vector_of(streams, 2, [&](V s, int64_t at) FK_BODY { store(exponentials + at, map.exponential(s)); });
  const auto scale_of = [&](V s, int64_t at) FK_BODY {
    if constexpr (Map::by_exponential) {
      const V e = load(exponentials + at);
      return RECIPROCAL ? map.reciprocal_and_log(s, e) : map.sigma_and_log(s, e);
    } else {
      return RECIPROCAL ? map.reciprocal_and_log(s) : map.sigma_and_log(s);
    }
  };
  for_each_vector<3, 1>(streams, [&](const V* in, V* out, int64_t at) FK_BODY {
    if constexpr (Map::learned) map.a = load(a + at);
    const ValueAndLog<V> scale = scale_of(in[2], at);
    const V complement = form == Form::gate ? map.complement(in[2]) : splat<V>(0);
    out[0] = transform_scale(form, inverse, {scale.value, scale.log, complement}, in[0], in[1]);
    store(terms + at, scale.log);
  });
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
FK_CALL void backward_tile(const void* told, const Streams<T>& streams) {
  const Affine& affine = *static_cast<const Affine*>(told);
  Map map(affine.scale);
  const Action action = action_of(affine);
  const bool output = affine.from_output;
  const T *a = streams.parameters[0], *c = streams.per_sample;
  T* terms = streams.terms[0];
  for_each_vector<4, 3>(streams, [&](const Vec<T>* in, Vec<T>* out, int64_t at) FK_BODY {
    if constexpr (Map::learned) map.a = load(a + at);
    const auto d = coupling_gradients<RECIPROCAL>(map, action, output, in[0], in[1], in[2], in[3], load(c + at));
    out[0] = d.dx, out[1] = d.dshift, out[2] = d.ds;
    if constexpr (Map::learned) store(terms + at, d.da);
  });
}

template <class Map, class T>
Tile<T> tile_of(bool reciprocal, bool backward) {
  if (backward) return reciprocal ? backward_tile<Map, true, T> : backward_tile<Map, false, T>;
  return reciprocal ? forward_tile<Map, true, T> : forward_tile<Map, false, T>;
}

template <class T>
FK_CALL Tile<T> choose_tile(const Affine& affine, bool additive, bool learned, bool backward) {
  if (additive) return add_tile<T>;
  const bool reciprocal = divides(affine.form, affine.inverse);
  if (learned) return tile_of<LearnedTanhMap<Vec<T>>, T>(reciprocal, backward);
  return with_scale_map<Vec<T>>(affine.scale, [&](const auto& map) { return tile_of<std::decay_t<decltype(map)>, T>(reciprocal, backward); });
}

}  // namespace FK_TARGET
}  // namespace flowkernels
