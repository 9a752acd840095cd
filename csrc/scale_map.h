// Scale maps, sigma(s) of a raw scale s, and the affine forms: flowkernels/ops/scale_map.py for kernels, and its derivatives.
//
// V is a vector (CPU) or a float or double (device code). Whoever includes this has defined FK_TARGET, FK_INLINE and, in the
// namespace flowkernels::FK_TARGET, scalar_t, splat, select, at_most, at_least, abs, fma and the functions of cpu/simd_math.h for V.
// Except for the part that declares the codes, there is no include guard: one copy per instruction set.

#ifndef FK_SCALE_MAP_DECLARED
#define FK_SCALE_MAP_DECLARED
namespace flowkernels {

// the codes of ScaleKind and Form in flowkernels/ops/scale_map.py
enum class ScaleKind : int { exp, exp_half, exp_clamped, exp_tanh, exp_atan, softclip, sigmoid, softplus, unit };
enum class Form : int { scale_shift, shift_scale, divide, gate };

struct ScaleMapParams {
  int kind;
  double p0, p1;  // ScaleMap.packed
  // of use to some maps, and too dear to take once per vector
  double log_p0 = ::log(p0), log_p1 = ::log(p1), inverse_p1 = 1 / p1, ratio = p0 / p1, inverse_log_p0 = 1 / log_p0;
};

template <Form F>
struct FormTag {
  static constexpr Form value = F;
};

}  // namespace flowkernels
#endif

namespace flowkernels {
namespace FK_TARGET {

template <class V>
struct ValueAndLog {
  V value, log;
};

// What all maps share. Each derives from this and has sigma_and_log(s), reciprocal_and_log(s) and dlog_sigma(s).
template <class V, class Map>
struct ScaleMapBase {
  static constexpr bool learned = false;         // whether a tensor is part of the map
  static constexpr bool by_exponential = false;  // whether `exponential` can be computed first, and given to the rest
  FK_INLINE const Map& self() const { return static_cast<const Map&>(*this); }
  FK_INLINE V sigma(V s) const { return self().sigma_and_log(s).value; }
  FK_INLINE V log_sigma(V s) const { return self().sigma_and_log(s).log; }
  FK_INLINE V reciprocal(V s) const { return self().reciprocal_and_log(s).value; }
  FK_INLINE V log_reciprocal(V s) const { return self().reciprocal_and_log(s).log; }
  FK_INLINE V complement(V s) const { return scalar_t<V>(1) - sigma(s); }
  FK_INLINE V dlog_reciprocal(V s) const { return -self().dlog_sigma(s); }
  // the derivative of the log in the place of the log
  FK_INLINE ValueAndLog<V> sigma_and_dlog(V s) const { return {self().sigma(s), self().dlog_sigma(s)}; }
  FK_INLINE ValueAndLog<V> reciprocal_and_dlog(V s) const { return {self().reciprocal(s), self().dlog_reciprocal(s)}; }
  FK_INLINE V dsigma(V s) const { return self().sigma(s) * self().dlog_sigma(s); }
};

// sigma = exp(log_sigma(s))
template <class V, class Map>
struct ExpOf : ScaleMapBase<V, Map> {
  FK_INLINE ValueAndLog<V> sigma_and_log(V s) const {
    const V log = this->self().log_sigma(s);
    return {exp(log), log};
  }
  FK_INLINE ValueAndLog<V> reciprocal_and_log(V s) const {
    const V log = this->self().log_reciprocal(s);
    return {exp(log), log};
  }
  FK_INLINE V log_reciprocal(V s) const { return -this->self().log_sigma(s); }
};

template <class V>
struct ExpMap : ExpOf<V, ExpMap<V>> {
  using T = scalar_t<V>;
  FK_INLINE explicit ExpMap(const ScaleMapParams&) {}
  FK_INLINE V log_sigma(V s) const { return s; }
  FK_INLINE V dlog_sigma(V) const { return splat<V>(T(1)); }
};

template <class V>
struct ExpHalfMap : ExpOf<V, ExpHalfMap<V>> {
  using T = scalar_t<V>;
  T limit;
  FK_INLINE explicit ExpHalfMap(const ScaleMapParams& p) : limit(T(p.p0)) {}
  FK_INLINE V log_sigma(V s) const { return s * T(0.5); }
  FK_INLINE V log_reciprocal(V s) const { return at_most(s * T(-0.5), limit); }
  FK_INLINE V dlog_sigma(V) const { return splat<V>(T(0.5)); }
  FK_INLINE V dlog_reciprocal(V s) const { return select(s * T(-0.5) <= limit, splat<V>(T(-0.5)), splat<V>(T(0))); }
};

template <class V>
struct ExpClampedMap : ExpOf<V, ExpClampedMap<V>> {
  using T = scalar_t<V>;
  T low, high;
  FK_INLINE explicit ExpClampedMap(const ScaleMapParams& p) : low(T(p.p0)), high(T(p.p1)) {}
  FK_INLINE V log_sigma(V s) const { return at_most(at_least(s, low), high); }
  FK_INLINE V dlog_sigma(V) const { return splat<V>(T(1)); }  // straight through
};

template <class V>
struct ExpTanhMap : ExpOf<V, ExpTanhMap<V>> {
  using T = scalar_t<V>;
  T bound, inverse_inner, slope;
  FK_INLINE explicit ExpTanhMap(const ScaleMapParams& p) : bound(T(p.p0)), inverse_inner(T(p.inverse_p1)), slope(T(p.ratio)) {}
  FK_INLINE V log_sigma(V s) const { return bound * tanh(s * inverse_inner); }
  FK_INLINE V dlog_sigma(V s) const {
    const V t = tanh(s * inverse_inner);
    return slope * fma(-t, t, T(1));
  }
};

// exp(a * exponent), exponent = bound * tanh(s / inner), with a learned a (RealNVP, Dinh et al. 2016)
template <class V>
struct LearnedTanhMap : ExpOf<V, LearnedTanhMap<V>> {
  static constexpr bool learned = true;
  ExpTanhMap<V> base;
  V a;
  FK_INLINE explicit LearnedTanhMap(const ScaleMapParams& p) : base(p), a{} {}
  FK_INLINE V exponent(V s) const { return base.log_sigma(s); }
  FK_INLINE V log_sigma(V s) const { return a * exponent(s); }
  FK_INLINE V dlog_sigma(V s) const { return a * base.dlog_sigma(s); }
};

template <class V>
struct ExpAtanMap : ExpOf<V, ExpAtanMap<V>> {
  using T = scalar_t<V>;
  T factor;
  FK_INLINE explicit ExpAtanMap(const ScaleMapParams& p) : factor(T(p.p0 * 0.636)) {}
  FK_INLINE V log_sigma(V s) const { return factor * atan(s); }
  FK_INLINE V dlog_sigma(V s) const { return factor / fma(s, s, T(1)); }
};

template <class V>
struct SoftclipMap : ExpOf<V, SoftclipMap<V>> {
  using T = scalar_t<V>;
  T inverse_bound;  // 1 / |log slope|
  FK_INLINE explicit SoftclipMap(const ScaleMapParams& p) : inverse_bound(T(-p.inverse_log_p0)) {}
  FK_INLINE V log_sigma(V s) const { return s / fma(abs(s), inverse_bound, T(1)); }
  FK_INLINE V dlog_sigma(V s) const {
    const V d = T(1) / fma(abs(s), inverse_bound, T(1));
    return d * d;
  }
};

// sigmoid(s + bias) + floor; without a floor log sigma and 1 / sigma have simpler forms.
// All that a caller asks for shares one e = exp(-|x|).
template <class V, bool FLOOR>
struct SigmoidMap : ScaleMapBase<V, SigmoidMap<V, FLOOR>> {
  using T = scalar_t<V>;
  static constexpr bool by_exponential = true;
  T bias, floor;
  FK_INLINE explicit SigmoidMap(const ScaleMapParams& p) : bias(T(p.p0)), floor(T(p.p1)) {}
  FK_INLINE V exponential(V s) const { return exp_of_nonpositive(-abs(s + bias)); }
  FK_INLINE ValueAndLog<V> sigma_and_log(V s) const { return sigma_and_log(s, exponential(s)); }
  FK_INLINE ValueAndLog<V> sigma_and_log(V s, V e) const {
    const V x = s + bias;
    if constexpr (!FLOOR) return {sigmoid_of(x, e), -softplus_of(-x, e)};
    const V sigmoid = sigmoid_of(x, e), sigma = sigmoid + floor;
    // sigma is near 1 for x > 0, and there sigmoid(-x) = e sigmoid(x)
    return {sigma, log_or_log1p(x > T(0), sigma, fma(-e, sigmoid, floor))};
  }
  FK_INLINE ValueAndLog<V> reciprocal_and_log(V s) const { return reciprocal_and_log(s, exponential(s)); }
  FK_INLINE ValueAndLog<V> reciprocal_and_log(V s, V e) const {
    const V x = s + bias;
    if constexpr (!FLOOR) return {T(1) + exp(-x), softplus_of(-x, e)};
    const ValueAndLog<V> sigma = sigma_and_log(s, e);
    return {T(1) / sigma.value, -sigma.log};
  }
  FK_INLINE ValueAndLog<V> sigma_and_dlog(V s) const {
    if constexpr (FLOOR) return {this->sigma(s), dlog_sigma(s)};
    const V x = s + bias, e = exponential(s), large = T(1) / (e + T(1)), small = e * large;  // one division
    return {select(x > T(0), large, small), select(x > T(0), small, large)};
  }
  FK_INLINE ValueAndLog<V> reciprocal_and_dlog(V s) const {
    if constexpr (FLOOR) return {this->reciprocal(s), -dlog_sigma(s)};
    const V u = exp(-(s + bias)), v = u + T(1);
    return {v, select(u < T(__builtin_inf()), -(u / v), splat<V>(-1))};  // their product is -u with hardly an error
  }
  FK_INLINE V complement(V s) const {
    const V x = s + bias;
    return sigmoid_of(-x, exponential(s)) - floor;
  }
  FK_INLINE V dsigma(V s) const {
    const V x = s + bias, e = exponential(s);
    return sigmoid_of(x, e) * sigmoid_of(-x, e);
  }
  FK_INLINE V dlog_sigma(V s) const {
    const V x = s + bias, e = exponential(s);
    if constexpr (!FLOOR) return sigmoid_of(-x, e);
    return sigmoid_of(x, e) * sigmoid_of(-x, e) / (sigmoid_of(x, e) + floor);
  }
};

// min(softplus(s) + floor, ceiling)
template <class V, bool FLOOR>
struct SoftplusMap : ScaleMapBase<V, SoftplusMap<V, FLOOR>> {
  using T = scalar_t<V>;
  T floor, ceiling, log_ceiling;
  FK_INLINE explicit SoftplusMap(const ScaleMapParams& p) : floor(T(p.p0)), ceiling(T(p.p1)), log_ceiling(T(p.log_p1)) {}
  FK_INLINE ValueAndLog<V> sigma_and_log(V s) const {
    const V e = exp_of_nonpositive(-abs(s)), sigma = softplus_of(s, e) + floor;
    const V log_value = FLOOR ? log(sigma) : log(factor(s, e)) + at_most(s, T(0));
    return {at_most(sigma, ceiling), at_most(log_value, log_ceiling)};
  }
  FK_INLINE ValueAndLog<V> reciprocal_and_log(V s) const {
    const ValueAndLog<V> sigma = sigma_and_log(s);
    return {T(1) / sigma.value, -sigma.log};
  }
  FK_INLINE V dsigma(V s) const {
    const V e = exp_of_nonpositive(-abs(s));
    return below_ceiling(s, e, sigmoid_of(s, e));
  }
  FK_INLINE V dlog_sigma(V s) const {
    const V e = exp_of_nonpositive(-abs(s));
    if constexpr (FLOOR) return below_ceiling(s, e, sigmoid_of(s, e) / (softplus_of(s, e) + floor));
    return below_ceiling(s, e, T(1) / ((e + T(1)) * factor(s, e)));
  }

 private:
  // softplus(s) for s > 0, softplus(s) / exp(s) elsewhere: what neither underflows nor overflows
  FK_INLINE V factor(V s, V e) const {
    const V ratio = select(e < T(1e-30), splat<V>(T(1)), log1p_unit(e) / e);
    return select(s > T(0), softplus_of(s, e), ratio);
  }
  FK_INLINE V below_ceiling(V s, V e, V gradient) const {
    return select(softplus_of(s, e) + floor > ceiling, splat<V>(T(0)), gradient);
  }
};

// f(map) for the map that the parameters name
template <class V, class F>
FK_INLINE auto with_scale_map(const ScaleMapParams& p, F&& f) {
  switch (static_cast<ScaleKind>(p.kind)) {
    case ScaleKind::exp_half: return f(ExpHalfMap<V>(p));
    case ScaleKind::exp_clamped: return f(ExpClampedMap<V>(p));
    case ScaleKind::exp_tanh: return f(ExpTanhMap<V>(p));
    case ScaleKind::exp_atan: return f(ExpAtanMap<V>(p));
    case ScaleKind::softclip: return f(SoftclipMap<V>(p));
    case ScaleKind::sigmoid: return p.p1 == 0 ? f(SigmoidMap<V, false>(p)) : f(SigmoidMap<V, true>(p));
    case ScaleKind::softplus: return p.p0 == 0 ? f(SoftplusMap<V, false>(p)) : f(SoftplusMap<V, true>(p));
    default: return f(ExpMap<V>(p));  // unit too, whose raw scale is 0
  }
}

// f(tag), the form being decltype(tag)::value
template <class F>
FK_INLINE auto with_form(Form form, F&& f) {
  switch (form) {
    case Form::shift_scale: return f(FormTag<Form::shift_scale>{});
    case Form::divide: return f(FormTag<Form::divide>{});
    case Form::gate: return f(FormTag<Form::gate>{});
    default: return f(FormTag<Form::scale_shift>{});
  }
}

// What a form needs to know of sigma: sigma or 1 / sigma, its log, and, for the gate alone, 1 - sigma
template <class V>
struct FormScale {
  V value, log, complement;
};

constexpr FK_INLINE bool divides(Form form, bool inverse) { return (form == Form::divide) != inverse; }

template <class V, class Map>
FK_INLINE FormScale<V> form_scale(const Map& map, Form form, bool inverse, V s) {
  const ValueAndLog<V> scale = divides(form, inverse) ? map.reciprocal_and_log(s) : map.sigma_and_log(s);
  return {scale.value, scale.log, form == Form::gate ? map.complement(s) : splat<V>(0)};
}

// y
template <Form FORM, class V>
FK_INLINE V apply_scale(const FormScale<V>& scale, V x, V shift) {
  if constexpr (FORM == Form::shift_scale) return (x + shift) * scale.value;
  if constexpr (FORM == Form::divide) return (x - shift) * scale.value;
  if constexpr (FORM == Form::gate) return fma(scale.value, x, scale.complement * shift);
  return fma(x, scale.value, shift);
}

// x
template <Form FORM, class V>
FK_INLINE V invert_scale(const FormScale<V>& scale, V y, V shift) {
  if constexpr (FORM == Form::shift_scale) return fma(y, scale.value, -shift);
  if constexpr (FORM == Form::divide) return fma(y, scale.value, shift);
  if constexpr (FORM == Form::gate) return fma(-scale.complement, shift, y) * scale.value;
  return (y - shift) * scale.value;
}

// y, or x where `inverse`: the form chosen at run time
template <class V>
FK_INLINE V transform_scale(Form form, bool inverse, const FormScale<V>& scale, V x, V shift) {
  return with_form(form, [&](auto tag) {
    constexpr Form kForm = decltype(tag)::value;
    return inverse ? invert_scale<kForm>(scale, x, shift) : apply_scale<kForm>(scale, x, shift);
  });
}

// y and log|dy/dx|
template <Form FORM, class V, class Map>
FK_INLINE ValueAndLog<V> apply_form(const Map& map, V x, V shift, V s) {
  const FormScale<V> scale = form_scale(map, FORM, false, s);
  return {apply_scale<FORM>(scale, x, shift), scale.log};
}

// x and log|dx/dy|
template <Form FORM, class V, class Map>
FK_INLINE ValueAndLog<V> invert_form(const Map& map, V y, V shift, V s) {
  const FormScale<V> scale = form_scale(map, FORM, true, s);
  return {invert_scale<FORM>(scale, y, shift), scale.log};
}

// The same with everything chosen at run time, as one call per vector. The form is chosen after the map, so that a map's functions
// are compiled once, not once per form.
template <class V>
FK_CALL ValueAndLog<V> apply_form(Form form, const ScaleMapParams& p, V x, V shift, V s) {
  const FormScale<V> scale = with_scale_map<V>(p, [&](const auto& map) { return form_scale(map, form, false, s); });
  return {transform_scale(form, false, scale, x, shift), scale.log};
}
template <class V>
FK_CALL ValueAndLog<V> invert_form(Form form, const ScaleMapParams& p, V y, V shift, V s) {
  const FormScale<V> scale = with_scale_map<V>(p, [&](const auto& map) { return form_scale(map, form, true, s); });
  return {transform_scale(form, true, scale, y, shift), scale.log};
}

// The gradient by what a form takes
template <class V>
struct FormGradient {
  V dvalue, dshift, draw;
};

// The gradient of g * y + c * log|dy/dx| for y = form(x; shift, sigma(raw))
template <class V>
FK_CALL FormGradient<V> form_gradient(Form form, const ScaleMapParams& p, V x, V shift, V raw, V g, V c) {
  return with_scale_map<V>(p, [&](const auto& map) -> FormGradient<V> {
    if (form == Form::divide) {
      const ValueAndLog<V> scale = map.reciprocal_and_dlog(raw);
      const V dx = g * scale.value;
      return {dx, -dx, fma(dx, x - shift, c) * scale.log};
    }
    const V dx = g * map.sigma(raw);
    const V by_sigma = form == Form::scale_shift ? x : form == Form::gate ? x - shift : x + shift;
    const V dshift = form == Form::scale_shift ? g : form == Form::gate ? g * map.complement(raw) : dx;
    return {dx, dshift, fma(g * by_sigma, map.dsigma(raw), c * map.dlog_sigma(raw))};
  });
}

// The gradient of g * x + c * log|dx/dy| for the x that undoes y = form(x; shift, sigma(raw)), from x
template <class V>
FK_CALL FormGradient<V> inverse_gradient(Form form, const ScaleMapParams& p, V x, V shift, V raw, V g, V c) {
  return with_scale_map<V>(p, [&](const auto& map) -> FormGradient<V> {
    const ValueAndLog<V> scale = divides(form, true) ? map.reciprocal_and_dlog(raw) : map.sigma_and_dlog(raw);
    const V dy = g * scale.value;
    if (form == Form::divide) return {dy, g, fma(g, x - shift, c) * scale.log};
    if (form == Form::shift_scale) return {dy, -g, fma(g, x + shift, c) * scale.log};
    const V draw = fma(g, x, c) * scale.log;
    if (form == Form::gate) return {dy, -dy * map.complement(raw), fma(dy * shift, map.dsigma(raw), draw)};
    return {dy, -dy, draw};
  });
}

}  // namespace FK_TARGET
}  // namespace flowkernels
