// One block of an elementwise map: loads it from tensors of any strides, transforms it, stores it. No include guard.

#include "cpu/staging.h"

namespace flowkernels {
namespace FK_TARGET {

struct Place {
  int64_t b, c, site;
};

// `rows` rows of `n` elements, the rows row_step apart. A checkered block is made of whole rows, each of which gives every other
// element, in turn from the first and from the second on.
struct Block {
  Place at;
  int row_axis;
  int64_t rows, row_step;
  int axis;
  int64_t n;
  bool checkered = false;
  int64_t phase = 0;

  int64_t phase_of(int64_t r) const { return (phase + r) & 1; }
  int64_t count(int64_t r) const { return checkered ? (n - phase_of(r) + 1) / 2 : n; }
  int64_t total() const { return checkered ? rows / 2 * n + (rows & 1) * count(0) : rows * n; }
};

FK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
FK_INLINE void fill(T* to, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) to[i] = value;
}

// Map: map(in, per_sample, parameters, out, terms, n, rest) transforms n packed elements and copies as many of the rest; each argument
// but n and rest is an array of pointers to packed elements, per_sample one such pointer.
template <class T>
struct Rest {
  const T* from = nullptr;  // null where there is nothing to copy
  T* to = nullptr;

  FK_INLINE void copy(int64_t i) const {
    if (from != nullptr) store(to + i, load(from + i));
  }
  FK_INLINE void copy_partial(int64_t i, int n) const {
    if (from != nullptr) store_partial(to + i, load_partial(from + i, n), n);
  }
};

template <class E, class Map>
class Blocks {
  using T = compute_t<E>;
  static constexpr int kPad = 64 / sizeof(T);

 public:
  const Elementwise<E>& args;

  Blocks(const Elementwise<E>& a, const Map& map) : args(a), map_(map) {}

  // Transforms a block of at most kTile elements; `terms` get what is to be summed, packed. with_rest: copies the block of the same
  // place and size of the channels that pass, too, which costs little more than the arithmetic where both lie packed.
  void transform(const Block& k, T* const* terms, bool with_rest = false) {
    const bool between = args.along == Along::alternate_channels && k.axis == channel_axis;
    const T* in[4];
    T* out[3];
    bool direct[3];
    for (int i = 0; i < args.n_inputs; ++i) in[i] = loaded(args.in[i], k, in_[i]);
    for (int i = 0; i < args.n_outputs; ++i) {
      direct[i] = lies_packed(args.out[i], k) && !(between && i == 0);
      out[i] = direct[i] ? reinterpret_cast<T*>(args.out[i].data + offset(args.out[i].stride, k.at)) : out_[i];
    }
    const T* parameters[3] = {};
    for (int i = 0; i < args.n_parameters; ++i) parameters[i] = parameter_[i];
    if (args.n_parameters > 0) load_parameters(k);
    if (args.per_sample != nullptr) load_per_sample(k);
    Rest<T> rest;
    if (with_rest) {
      const bool rows_of_channels = k.row_axis == channel_axis;
      Block passing = k;
      passing.rows = smaller(k.rows, rows_of_channels ? args.channels - args.transformed - k.at.c : k.rows);
      if (passing.rows == k.rows && lies_packed(args.rest_in, k) && lies_packed(args.rest_out, k)) {
        rest.from = reinterpret_cast<const T*>(args.rest_in.data + offset(args.rest_in.stride, k.at));
        rest.to = reinterpret_cast<T*>(args.rest_out.data + offset(args.rest_out.stride, k.at));
      } else {
        pass(&args.rest_in, args.rest_out, passing);
      }
    }
    map_(in, per_sample_, parameters, out, terms, k.total(), rest);
    for (int i = 0; i < args.n_outputs; ++i) {
      if (direct[i]) continue;
      if (between && i == 0) {
        store_between_channels(out[i], k);
      } else if (k.checkered) {
        store_checkered(out[i], args.out[i], k, i == 0 ? &args.in[0] : nullptr);
      } else {
        const View<E>& to = args.out[i];
        unpack(narrowed(out[i], k), to.data + offset(to.stride, k.at), to.stride[k.row_axis] * k.row_step, to.stride[k.axis], k.rows, k.n);
      }
    }
  }

  // Copies a block; zeros without a view to copy from.
  void pass(const View<const E>* from, const View<E>& to, const Block& k) {
    if (k.rows <= 0 || k.n <= 0) return;
    E* q = to.data + offset(to.stride, k.at);
    const int64_t to_row = to.stride[k.row_axis] * k.row_step, to_stride = to.stride[k.axis];
    if (from == nullptr) {
      for (int64_t r = 0; r < k.rows; ++r) {
        for (int64_t i = 0; i < k.n; ++i) q[r * to_row + i * to_stride] = E{};
      }
      return;
    }
    const E* p = from->data + offset(from->stride, k.at);
    const int64_t row = from->stride[k.row_axis] * k.row_step, stride = from->stride[k.axis];
    if (stride == 1 && to_stride == 1) return copy_rows(p, row, q, to_row, k.rows, k.n);
    for (int64_t r = 0; r < k.rows; ++r) {
      for (int64_t i = 0; i < k.n; ++i) q[r * to_row + i * to_stride] = p[r * row + i * stride];
    }
  }

  // Whether n sites of neighbouring channels follow each other without a gap in every tensor
  bool channels_lie_packed(int64_t n) const {
    const Block k{{0, 0, 0}, channel_axis, 2, 1, inner_axis, n};
    for (int i = 0; i < args.n_inputs; ++i) {
      if (!lies_packed(args.in[i], k)) return false;
    }
    for (int i = 0; i < args.n_outputs; ++i) {
      if (!lies_packed(args.out[i], k)) return false;
    }
    return true;
  }

 private:
  int64_t offset(const int64_t* stride, const Place& at) const {
    int64_t result = at.b * stride[batch_axis] + at.c * stride[channel_axis], site = at.site;
    if (args.n_outer > 0) {
      int64_t rest = site / args.inner;
      site -= rest * args.inner;
      for (int i = 0; i < args.n_outer; ++i) {
        result += rest % args.outer[i] * stride[outer_axis + i];
        rest /= args.outer[i];
      }
    }
    return result + site * stride[inner_axis];
  }

  template <class AnyView>
  static bool lies_packed(const AnyView& view, const Block& k) {
    if (sizeof(E) != sizeof(T) || k.checkered || (k.n > 1 && view.stride[k.axis] != 1)) return false;
    return k.rows == 1 || view.stride[k.row_axis] * k.row_step == k.n;
  }

  const T* loaded(const View<const E>& view, const Block& k, T* buffer) {
    const E* p = view.data + offset(view.stride, k.at);
    if (lies_packed(view, k)) return reinterpret_cast<const T*>(p);
    const int64_t row = view.stride[k.row_axis] * k.row_step, stride = view.stride[k.axis];
    E* packed = sizeof(E) == sizeof(T) ? reinterpret_cast<E*>(buffer) : raw_;
    if (!k.checkered) {
      pack(p, row, stride, k.rows, k.n, packed);
    } else {
      for (int64_t r = 0, done = 0; r < k.rows; done += k.count(r), ++r) {
        gather_row(p + r * row + k.phase_of(r) * stride, 2 * stride, k.count(r), packed + done);
      }
    }
    if constexpr (sizeof(E) != sizeof(T)) widen(raw_, k.total(), buffer);
    return buffer;
  }

  // the block as elements of the tensors
  const E* narrowed(const T* buffer, const Block& k) {
    if constexpr (sizeof(E) == sizeof(T)) {
      return buffer;
    } else {
      narrow(buffer, k.total(), raw_);
      return raw_;
    }
  }

  // rest: what the other elements of the rows come from, zeros without one
  void store_checkered(const T* buffer, const View<E>& to, const Block& k, const View<const E>* rest) {
    const E* packed = narrowed(buffer, k);
    E* q = to.data + offset(to.stride, k.at);
    const E* p = rest == nullptr ? nullptr : rest->data + offset(rest->stride, k.at);
    for (int64_t r = 0; r < k.rows; packed += k.count(r), ++r) {
      const E* row = p == nullptr ? nullptr : p + r * rest->stride[k.row_axis];
      merge_row(packed, row, p == nullptr ? 0 : rest->stride[k.axis], q + r * to.stride[k.row_axis], to.stride[k.axis], k.n, k.phase_of(r));
    }
  }

  // rows of channels of which every other one is transformed: stores those with the ones between, which pass unchanged
  void store_between_channels(const T* buffer, const Block& k) {
    const int64_t begin = 2 * k.at.c, end = k.at.c + k.n == args.transformed ? args.channels : 2 * (k.at.c + k.n);
    const View<const E>& from = args.whole_in;
    const View<E>& to = args.whole_out;
    const E* packed = narrowed(buffer, k);
    const E* p = from.data + offset(from.stride, {k.at.b, begin, k.at.site});
    E* q = to.data + offset(to.stride, {k.at.b, begin, k.at.site});
    const int64_t row = from.stride[k.row_axis] * k.row_step, to_row = to.stride[k.row_axis] * k.row_step;
    for (int64_t r = 0; r < k.rows; ++r) {
      merge_row(packed + r * k.n, p + r * row, from.stride[channel_axis], q + r * to_row, to.stride[channel_axis], end - begin, args.phase);
    }
  }

  void load_parameters(const Block& k) {
    const bool constant = k.axis != channel_axis && k.row_axis != channel_axis;  // one channel
    if (constant && k.at.c == parameters_of_) return;
    parameters_of_ = constant ? k.at.c : -1;
    for (int i = 0; i < args.n_parameters; ++i) {
      const int64_t stride = args.parameter_stride[i];
      const T* p = args.parameter[i] + k.at.c * stride;
      T* to = parameter_[i];
      if (constant) {
        fill(to, kTile, *p);
      } else if (k.axis != channel_axis) {
        for (int64_t r = 0; r < k.rows; ++r) fill(to + r * k.n, k.n, p[r * stride]);
      } else {
        for (int64_t r = 0; r < k.rows; ++r) {
          for (int64_t j = 0; j < k.n; ++j) to[r * k.n + j] = p[j * stride];
        }
      }
    }
  }

  void load_per_sample(const Block& k) {
    const T* c = args.per_sample + k.at.b * args.per_sample_stride;
    if (k.row_axis == batch_axis) {
      for (int64_t r = 0; r < k.rows; ++r) fill(per_sample_ + r * k.n, k.n, c[r * args.per_sample_stride]);
    } else if (k.at.b != sample_) {
      fill(per_sample_, kTile, *c);
      sample_ = k.at.b;
    }
  }

  const Map map_;
  int64_t sample_ = -1, parameters_of_ = -1;  // what stands in the buffers
  alignas(64) T in_[4][kTile + kPad], out_[3][kTile + kPad], per_sample_[kTile + kPad], parameter_[3][kTile + kPad];
  alignas(64) E raw_[kTile + kPad];
};

}  // namespace FK_TARGET
}  // namespace flowkernels
