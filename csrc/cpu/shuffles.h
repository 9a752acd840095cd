// Vectors of whole elements, and shuffles of their lanes. Included once per instruction set, after simd.h.

namespace flowkernels {
namespace FK_TARGET {

// whole elements as vectors of integers of their size
template <int SIZE>
struct WordOf;
template <>
struct WordOf<2> {
  typedef uint16_t type __attribute__((vector_size(FK_VECTOR_BYTES)));
};
template <>
struct WordOf<4> {
  typedef uint32_t type __attribute__((vector_size(FK_VECTOR_BYTES)));
};
template <>
struct WordOf<8> {
  typedef uint64_t type __attribute__((vector_size(FK_VECTOR_BYTES)));
};
template <class E>
using Words = typename WordOf<sizeof(E)>::type;
template <class E>
constexpr int words = FK_VECTOR_BYTES / static_cast<int>(sizeof(E));

// Lane numbers 0, 1, 2, ... as a parameter pack, for shuffles
template <int... I>
struct Lanes {
  template <class W>
  static FK_INLINE W every_other_then_odd(W a, W b) {  // a0 a2 ... b1 b3 ...
    return FK_SHUFFLE(a, b, (2 * I + (2 * I >= int(sizeof...(I))))...);
  }
  template <class W>
  static FK_INLINE W even(W a, W b) {  // a0 a2 ... b0 b2 ...
    return FK_SHUFFLE(a, b, (2 * I)...);
  }
  template <class W>
  static FK_INLINE W odd(W a, W b) {  // a1 a3 ... b1 b3 ...
    return FK_SHUFFLE(a, b, (2 * I + 1)...);
  }
  template <class W>
  static FK_INLINE W low_pairs(W a, W b) {  // a0 b0 a1 b1 ..., of the first halves
    return FK_SHUFFLE(a, b, (I / 2 + I % 2 * int(sizeof...(I)))...);
  }
  template <class W>
  static FK_INLINE W high_pairs(W a, W b) {  // the same of the second halves
    constexpr int n = sizeof...(I);
    return FK_SHUFFLE(a, b, (n / 2 + I / 2 + I % 2 * n)...);
  }
  template <class W>
  static FK_INLINE W doubled(W a) {  // a0 a0 a1 a1 ...
    return FK_SHUFFLE(a, a, (I / 2)...);
  }
  template <class W>
  static FK_INLINE W alternating(W even, W odd) {  // even0 odd1 even2 odd3 ...
    return FK_SHUFFLE(even, odd, (I % 2 ? int(sizeof...(I)) + I : I)...);
  }
};
template <int N, int... I>
struct FirstLanes : FirstLanes<N - 1, N - 1, I...> {};
template <int... I>
struct FirstLanes<0, I...> {
  using type = Lanes<I...>;
};
template <class E>
using AllLanes = typename FirstLanes<words<E>>::type;

}  // namespace FK_TARGET
}  // namespace flowkernels
