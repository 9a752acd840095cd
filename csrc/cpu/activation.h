// Activations on vectors: flowkernels/ops/activation.py for kernels. No include guard: cpu/for_each_target.h includes this once
// per instruction set.

#ifndef FK_ACTIVATION_DECLARED
#define FK_ACTIVATION_DECLARED
namespace flowkernels {

// the codes of Activation in flowkernels/ops/activation.py
enum class Activation : int { identity, relu, tanh, elu, gelu, silu, leaky_relu, softplus, sigmoid };

// whether the derivative is known from the activation's value
constexpr bool derivative_from_value(Activation a) { return a != Activation::gelu && a != Activation::silu; }

template <Activation A>
struct ActivationTag {
  static constexpr Activation value = A;
};

}  // namespace flowkernels
#endif

namespace flowkernels {
namespace FK_TARGET {

template <Activation A, class V>
FK_INLINE V activate(V x) {
  using T = scalar_t<V>;
  if constexpr (A == Activation::relu) return at_least(x, T(0));  // keeps NaN, as torch.relu does
  if constexpr (A == Activation::tanh) return tanh(x);
  if constexpr (A == Activation::elu) return select(x > T(0), x, expm1_bounded(at_most(x, T(0))));
  if constexpr (A == Activation::gelu) return x * T(0.5) * (erf(x * T(0.70710678118654752440)) + T(1));
  if constexpr (A == Activation::silu) return x * sigmoid(x);
  if constexpr (A == Activation::leaky_relu) return select(x > T(0), x, x * T(0.01));
  if constexpr (A == Activation::softplus) return softplus(x);
  if constexpr (A == Activation::sigmoid) return sigmoid(x);
  return x;
}

// d activate(x) / dx; at a kink, torch's choice
template <Activation A, class V>
FK_INLINE V activate_derivative(V x) {
  using T = scalar_t<V>;
  const V one = splat<V>(T(1));
  if constexpr (A == Activation::relu) return select(x > T(0), one, splat<V>(T(0)));
  if constexpr (A == Activation::tanh) {
    const V t = tanh(x);
    return fma(-t, t, T(1));
  }
  if constexpr (A == Activation::elu) return select(x > T(0), one, exp(x));
  if constexpr (A == Activation::gelu) {
    const V phi = exp(x * x * T(-0.5)) * T(0.39894228040143267794);
    return fma(x, phi, (erf(x * T(0.70710678118654752440)) + T(1)) * T(0.5));
  }
  if constexpr (A == Activation::silu) {
    const V p = sigmoid(x);
    return fma(x * p, sigmoid(-x), p);
  }
  if constexpr (A == Activation::leaky_relu) return select(x > T(0), one, splat<V>(T(0.01)));
  if constexpr (A == Activation::softplus) return sigmoid(x);
  if constexpr (A == Activation::sigmoid) return sigmoid(x) * sigmoid(-x);
  return one;
}

// The same derivative from h = activate(x), or from x itself where h does not tell
template <Activation A, class V>
FK_INLINE V derivative_at(V h) {
  using T = scalar_t<V>;
  const V one = splat<V>(T(1));
  if constexpr (A == Activation::relu) return select(h > T(0), one, splat<V>(T(0)));
  if constexpr (A == Activation::tanh) return fma(-h, h, T(1));
  if constexpr (A == Activation::elu) return select(h > T(0), one, h + T(1));
  if constexpr (A == Activation::leaky_relu) return select(h > T(0), one, splat<V>(T(0.01)));
  if constexpr (A == Activation::softplus) return -expm1(-h);
  if constexpr (A == Activation::sigmoid) return h * (T(1) - h);
  return activate_derivative<A>(h);
}

// f(tag), the activation being decltype(tag)::value
template <class F>
FK_INLINE auto with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::relu: return f(ActivationTag<Activation::relu>{});
    case Activation::tanh: return f(ActivationTag<Activation::tanh>{});
    case Activation::elu: return f(ActivationTag<Activation::elu>{});
    case Activation::gelu: return f(ActivationTag<Activation::gelu>{});
    case Activation::silu: return f(ActivationTag<Activation::silu>{});
    case Activation::leaky_relu: return f(ActivationTag<Activation::leaky_relu>{});
    case Activation::softplus: return f(ActivationTag<Activation::softplus>{});
    case Activation::sigmoid: return f(ActivationTag<Activation::sigmoid>{});
    default: return f(ActivationTag<Activation::identity>{});
  }
}

// The same chosen at run time, as one call per vector.
template <class V>
FK_CALL V activate(Activation activation, V x) {
  return with_activation(activation, [&](auto tag) { return activate<decltype(tag)::value>(x); });
}

template <class V>
FK_CALL V derivative_at(Activation activation, V h) {
  return with_activation(activation, [&](auto tag) { return derivative_at<decltype(tag)::value>(h); });
}

}  // namespace FK_TARGET
}  // namespace flowkernels
