// One block of an elementwise map: loads it from tensors of any strides, transforms it, stores it. No include guard.

#include "cpu/staging.h"

namespace flowkernels {
namespace FK_TARGET {

struct Place {
  int64_t b, c, site;
};

// `rows` rows of `n` elements, the rows row_step apart. A checkered block is made of whole rows, each of which gives every other
// element, in turn from the first and from the second on. A listed block's rows are samples, their elements those of the lists.
// Where rows are samples of several sites, a row goes through all channels.
struct Block {
  Place at;
  int row_axis;
  int64_t rows, row_step;
  int axis;
  int64_t n;
  bool checkered = false;
  int64_t phase = 0;
  bool listed = false;

  bool of_samples() const { return row_axis == batch_axis && axis == inner_axis; }

  int64_t phase_of(int64_t r) const { return (phase + r) & 1; }
  int64_t count(int64_t r) const { return checkered ? (n - phase_of(r) + 1) / 2 : n; }
  int64_t total() const { return checkered ? rows / 2 * n + (rows & 1) * count(0) : rows * n; }
};

template <class E>
class Blocks {
  using T = compute_t<E>;
  static constexpr int kPad = 64 / sizeof(T);

 public:
  const Elementwise<E>& args;

  Blocks(const Elementwise<E>& a, const TileMap<T>& map) : args(a), map_(map) {
    if (a.together != Together::lists) return;
    for (int i = 0; i < a.n_inputs; ++i) list_sites(a.in[i].stride, in_list_[i]);
    for (int i = 0; i < a.n_outputs; ++i) list_sites(a.out[i].stride, out_list_[i]);
  }

  // Transforms a block of at most kTile elements; `terms` get what is to be summed, packed. with_rest: copies the block of the same
  // place and size of the channels that pass, too, which costs little beside the arithmetic where both lie packed.
  void transform(const Block& k, T* const* terms, bool with_rest = false) {
    const bool between = args.along == Along::alternate_channels && k.axis == channel_axis;
    const int64_t total = k.total();
    Streams<T> s{};
    bool flat = true, in_place[3];
    for (int i = 0; i < args.n_inputs; ++i) {
      const View<const E>& view = args.in[i];
      if (lies_in_rows(view, k)) {
        s.in[i] = reinterpret_cast<const T*>(view.data + offset(view.stride, k.at));
        s.in_row[i] = view.stride[k.row_axis] * k.row_step;
        flat = flat && (k.rows == 1 || s.in_row[i] == k.n);
      } else {
        s.in[i] = packed(i, k, in_[i]);
        s.in_row[i] = k.n;
      }
    }
    for (int i = 0; i < args.n_outputs; ++i) {
      const View<E>& view = args.out[i];
      in_place[i] = lies_in_rows(view, k) && !(between && i == 0);
      s.out[i] = in_place[i] ? reinterpret_cast<T*>(view.data + offset(view.stride, k.at)) : out_[i];
      s.out_row[i] = in_place[i] ? view.stride[k.row_axis] * k.row_step : k.n;
      flat = flat && (k.rows == 1 || s.out_row[i] == k.n);
    }
    s.rows = flat ? 1 : k.rows;
    s.n = flat ? total : k.n;
    for (int i = 0; i < 3; ++i) s.parameters[i] = parameter_[i];
    if (args.n_parameters > 0) load_parameters(k);
    if (args.per_sample != nullptr) load_per_sample(k);
    s.per_sample = per_sample_;
    for (int i = 0; i < 2; ++i) s.terms[i] = terms[i];
    if (with_rest) add_rest(k, flat, s);
    s.far = args.far;
    map_(s);
    for (int i = 0; i < args.n_outputs; ++i) {
      const View<E>& to = args.out[i];
      if (in_place[i]) continue;
      if (between && i == 0) {
        store_between_channels(out_[i], k);
      } else if (k.listed) {
        store_listed(i, k);
      } else if (k.checkered) {
        store_checkered(out_[i], to, k, i == 0 ? &args.in[0] : nullptr);
      } else {
        unpack(narrowed(out_[i], total), to.data + offset(to.stride, k.at), to.stride[k.row_axis] * k.row_step, to.stride[k.axis], k.rows, k.n);
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

  // whether rows can be worked on where they lie; short ones are packed first, so that vectors are full
  template <class AnyView>
  static bool lies_in_rows(const AnyView& view, const Block& k) {
    if (sizeof(E) != sizeof(T) || k.checkered || k.listed || (k.n > 1 && view.stride[k.axis] != 1)) return false;
    return k.rows == 1 || view.stride[k.row_axis] * k.row_step == k.n || k.n >= lanes<T>;
  }

  const T* packed(int input, const Block& k, T* buffer) {
    const View<const E>& view = args.in[input];
    const E* p = view.data + offset(view.stride, k.at);
    const int64_t row = view.stride[k.row_axis] * k.row_step, stride = view.stride[k.axis];
    E* to = sizeof(E) == sizeof(T) ? reinterpret_cast<E*>(buffer) : raw_;
    if (k.listed) {
      for (int64_t r = 0; r < k.rows; ++r) {
        for (int64_t i = 0; i < k.n; ++i) to[r * k.n + i] = p[r * row + in_list_[input].transformed[i]];
      }
    } else if (!k.checkered) {
      pack(p, row, stride, k.rows, k.n, to);
    } else {
      for (int64_t r = 0, done = 0; r < k.rows; done += k.count(r), ++r) {
        gather_row(p + r * row + k.phase_of(r) * stride, 2 * stride, k.count(r), to + done);
      }
    }
    if constexpr (sizeof(E) != sizeof(T)) widen(args.bfloat16, raw_, k.total(), buffer);
    return buffer;
  }

  void add_rest(const Block& k, bool flat, Streams<T>& s) {
    Block passing = k;
    if (k.row_axis == channel_axis) passing.rows = smaller(k.rows, args.channels - args.transformed - k.at.c);
    auto packed = [&](const int64_t* stride) { return stride[k.axis] == 1 && (k.rows == 1 || stride[k.row_axis] * k.row_step == k.n); };
    if (sizeof(E) == sizeof(T) && flat && passing.rows == k.rows && packed(args.rest_in.stride) && packed(args.rest_out.stride)) {
      s.rest_from = reinterpret_cast<const T*>(args.rest_in.data + offset(args.rest_in.stride, k.at));
      s.rest_to = reinterpret_cast<T*>(args.rest_out.data + offset(args.rest_out.stride, k.at));
    } else {
      pass(&args.rest_in, args.rest_out, passing);
    }
  }

  // the block as elements of the tensors
  const E* narrowed(const T* buffer, int64_t n) {
    if constexpr (sizeof(E) == sizeof(T)) {
      return buffer;
    } else {
      narrow(args.bfloat16, buffer, n, raw_);
      return raw_;
    }
  }

  // rest: what the other elements of the rows come from, zeros without one
  void store_checkered(const T* buffer, const View<E>& to, const Block& k, const View<const E>* rest) {
    const E* packed = narrowed(buffer, k.total());
    E* q = to.data + offset(to.stride, k.at);
    const E* p = rest == nullptr ? nullptr : rest->data + offset(rest->stride, k.at);
    for (int64_t r = 0; r < k.rows; packed += k.count(r), ++r) {
      const E* row = p == nullptr ? nullptr : p + r * rest->stride[k.row_axis];
      merge_row(packed, row, p == nullptr ? 0 : rest->stride[k.axis], q + r * to.stride[k.row_axis], to.stride[k.axis], k.n, k.phase_of(r));
    }
  }

  // as many other elements of the first output pass unchanged, of others they are 0
  void store_listed(int output, const Block& k) {
    const E* packed = narrowed(out_[output], k.total());
    const View<E>& to = args.out[output];
    const List &list = out_list_[output], &from_list = in_list_[0];
    for (int64_t r = 0; r < k.rows; ++r) {
      E* q = to.data + (k.at.b + r) * to.stride[batch_axis];
      const E* p = args.in[0].data + (k.at.b + r) * args.in[0].stride[batch_axis];
      for (int64_t i = 0; i < k.n; ++i) q[list.transformed[i]] = packed[r * k.n + i];
      for (int64_t i = 0; i < k.n; ++i) q[list.rest[i]] = output == 0 ? p[from_list.rest[i]] : E{};
    }
  }

  // offsets within a sample of a checkerboard's two colours, in the order of channels, heights and widths
  struct List {
    int64_t transformed[kTile / 2], rest[kTile / 2];
  };

  void list_sites(const int64_t* stride, List& list) const {
    int64_t n = 0;
    for (int64_t c = 0; c < args.transformed; ++c) {
      for (int64_t h = 0; h < args.outer[0]; ++h) {
        for (int64_t w = 0; w < args.inner; w += 2, ++n) {
          const int64_t first = c * stride[channel_axis] + h * stride[outer_axis] + w * stride[inner_axis];
          const bool second = ((h + args.phase) & 1) != 0;
          list.transformed[n] = first + (second ? stride[inner_axis] : 0);
          list.rest[n] = first + (second ? 0 : stride[inner_axis]);
        }
      }
    }
  }

  // rows of channels of which every other one is transformed: stores those with the ones between, which pass unchanged
  void store_between_channels(const T* buffer, const Block& k) {
    const int64_t begin = 2 * k.at.c, end = k.at.c + k.n == args.transformed ? args.channels : 2 * (k.at.c + k.n);
    const View<const E>& from = args.whole_in;
    const View<E>& to = args.whole_out;
    const E* packed = narrowed(buffer, k.total());
    const E* p = from.data + offset(from.stride, {k.at.b, begin, k.at.site});
    E* q = to.data + offset(to.stride, {k.at.b, begin, k.at.site});
    const int64_t row = from.stride[k.row_axis] * k.row_step, to_row = to.stride[k.row_axis] * k.row_step;
    for (int64_t r = 0; r < k.rows; ++r) {
      merge_row(packed + r * k.n, p + r * row, from.stride[channel_axis], q + r * to_row, to.stride[channel_axis], end - begin, args.phase);
    }
  }

  void load_parameters(const Block& k) {
    const bool constant = k.axis != channel_axis && k.row_axis != channel_axis && !k.of_samples();  // one channel
    const int64_t same = constant ? k.at.c : k.of_samples() ? kAllChannels : kNone;  // no later block has more samples than the first
    if (same != kNone && same == parameters_of_) return;
    parameters_of_ = same;
    for (int i = 0; i < args.n_parameters; ++i) {
      const int64_t stride = args.parameter_stride[i];
      const T* p = args.parameter[i] + k.at.c * stride;
      T* to = parameter_[i];
      if (constant) {
        fill(to, kTile, *p);
      } else if (k.of_samples()) {
        const int64_t each = k.n / args.transformed;
        for (int64_t c = 0; c < k.rows * args.transformed; ++c) fill(to + c * each, each, p[c % args.transformed * stride]);
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

  const TileMap<T> map_;
  static constexpr int64_t kNone = -1, kAllChannels = -2;
  int64_t sample_ = -1, parameters_of_ = kNone;  // what stands in the buffers
  List in_list_[4], out_list_[3];
  alignas(64) T in_[4][kTile + kPad], out_[3][kTile + kPad], per_sample_[kTile + kPad], parameter_[3][kTile + kPad];
  alignas(64) E raw_[kTile + kPad];
};

}  // namespace FK_TARGET
}  // namespace flowkernels
