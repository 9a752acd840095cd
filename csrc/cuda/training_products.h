// The three products of a training step under the staircase: up through a layer, down through it, and across the batch to the gradient of
// its weight. Each class is a tile of one: which chunks it has, how one is brought and multiplied, and what becomes of the sums.
//
// Device code, and its twin's. `Search` counts the entries at the beginning of an ascending list that are at most k: by a warp on a GPU.
#pragma once

#include "cuda/tile_product.h"
#include "training_columns.h"

namespace flowkernels {

FK_INLINE int64_t tiles_of(int64_t n, int size) { return (n + size - 1) / size; }

// What becomes of a layer's sums in the forward pass
template <class T>
struct Rise {
  T* values;
  int64_t ld;
  LayerColumns<T> to;
  const T *bias, *context_bias;  // or null

  template <Activation A>
  FK_INLINE void take(int64_t row, int64_t unit, T s) const {
    T* own = values + row * ld + unit;
    if (bias) s += bias[unit];
    if (context_bias) s += context_bias[unit];
    if (to.gate) own[to.sum] = s;
    if (to.term >= 0) s = to.gate ? s * own[to.term] : s + own[to.term];
    if (to.residual >= 0) s += own[to.residual];
    if (to.pre >= 0) own[to.pre] = s;
    own[to.value] = scalar::activate<A>(s);
  }
};

// How gradients by a layer's values arrive on their way down, and go on to its sums when all have
template <class T>
struct Fall {
  const T* values;
  T* deltas;
  int64_t values_ld, deltas_ld;
  LayerColumns<T> to;
  bool adds;           // to what has arrived before
  bool goes_on;        // nothing more will arrive
  bool residual_adds;  // to what has arrived at the values that the layer adds

  template <Activation A>
  FK_INLINE T take(int64_t row, int64_t unit, T d) const {
    T* own = deltas + row * deltas_ld + unit;
    if (adds) d += own[to.value];
    if (goes_on) {
      const T* known = values + row * values_ld + unit;
      if constexpr (A != Activation::identity) d *= scalar::derivative_at<A>(known[to.pre >= 0 ? to.pre : to.value]);
      if (to.residual >= 0) own[to.residual] = residual_adds ? own[to.residual] + d : d;
      if (to.term >= 0) {
        const T term = known[to.term], by_term = to.gate ? d * known[to.sum] : d;
        own[to.term_delta] = by_term * scalar::derivative_at(to.context_activation, known[to.term_pre >= 0 ? to.term_pre : to.term]);
        if (to.gate) d *= term;
      }
    }
    own[to.value] = d;
    return d;
  }
};

// C[m, n] = sum_k input[m, k] weight[k, n] over k < visible[n]; before it over the context's features
template <class T>
struct UpArgs {
  Matrix<T> input, weight, context, context_weight;
  const int32_t* visible;  // null: all is seen
  int64_t batch;
  int inputs, outputs, contexts;
  Rise<T> rise;
};

template <class Shape>
class UpTile {
  using T = typename Shape::T;

 public:
  using Args = UpArgs<T>;
  FK_INLINE static int64_t blocks(const Args& args) { return tiles_of(args.batch, Shape::rows) * tiles_of(args.outputs, Shape::columns); }

  template <class Search>
  FK_INLINE UpTile(const Args& args, int64_t block, int, const Search&) : args_(args) {
    const int64_t down = tiles_of(args.batch, Shape::rows);
    row_ = block % down * Shape::rows;
    column_ = static_cast<int>((tiles_of(args.outputs, Shape::columns) - 1 - block / down) * Shape::columns);  // the longest sums first
    context_chunks_ = static_cast<int>(tiles_of(args.contexts, Shape::depth));
    end_ = args.visible ? seen_by(args.visible[(column_ + Shape::columns < args.outputs ? column_ + Shape::columns : args.outputs) - 1]) : args.inputs;
    all_see_ = args.visible ? seen_by(args.visible[column_]) : args.inputs;
  }

  FK_INLINE int chunks() const { return context_chunks_ + static_cast<int>(tiles_of(end_, Shape::depth)); }

  template <class Copies>
  FK_INLINE void bring_chunk(int i, ProductSlot<Shape>& slot, int thread, Copies& copies) const {
    const bool context = i < context_chunks_;
    const Matrix<T> &input = context ? args_.context : args_.input, &weight = context ? args_.context_weight : args_.weight;
    const int first = first_of(i), end = context ? args_.contexts : end_;
    bring_left_turned<Shape>(slot, {input, row_, args_.batch, first, end}, thread, copies);
    bring_right<Shape>(slot, {weight, first, end, column_, args_.outputs}, thread, copies);
  }

  FK_INLINE void multiply(int i, const ProductSlot<Shape>& slot, int thread, ThreadTile<Shape>& own) const {
    const int first = first_of(i);
    if (i < context_chunks_ || first + Shape::depth <= all_see_) return own.multiply(slot, thread);
    int seen[Shape::thread_columns];
    FK_UNROLL
    for (int n = 0; n < Shape::thread_columns; ++n) {
      const int j = column_ + ThreadTile<Shape>::column(thread, n);
      seen[n] = !args_.visible ? args_.inputs : j < args_.outputs ? args_.visible[j] : 0;
    }
    own.multiply(slot, thread, [&](int c, int n) { return first + c < seen[n]; });
  }

  FK_INLINE void beside(const ProductSlot<Shape>&, int, T&) const {}

  FK_INLINE void finish(const ProductMemory<Shape>& memory, int piece, int thread, T) const {
    scalar::with_activation(args_.rise.to.activation, [&](auto code) {
      each_finished(memory, piece, args_.batch - row_, args_.outputs - column_, thread,
                    [&](int i, int j, T s) { args_.rise.template take<decltype(code)::value>(row_ + i, column_ + j, s); });
    });
  }

 private:
  const Args& args_;
  int64_t row_;
  int column_, context_chunks_;
  int end_, all_see_;  // inputs that some column sees, and that all do

  FK_INLINE int first_of(int i) const { return (i < context_chunks_ ? i : i - context_chunks_) * Shape::depth; }
  FK_INLINE int seen_by(int32_t visible) const { return visible < 0 ? 0 : visible < args_.inputs ? visible : args_.inputs; }
};

// C[m, k] = sum_n delta[m, n] weight[k, n] over n with visible[n] > k
template <class T>
struct DownArgs {
  Matrix<T> delta, weight;
  const int32_t* visible;  // null: all is seen
  int64_t batch;
  int inputs, outputs;
  Fall<T> fall;
};

template <class Shape>
class DownTile {
  using T = typename Shape::T;

 public:
  using Args = DownArgs<T>;
  FK_INLINE static int64_t blocks(const Args& args) { return tiles_of(args.batch, Shape::rows) * tiles_of(args.inputs, Shape::columns); }

  template <class Search>
  FK_INLINE DownTile(const Args& args, int64_t block, int, const Search& search) : args_(args) {
    const int64_t down = tiles_of(args.batch, Shape::rows);
    row_ = block % down * Shape::rows;
    column_ = static_cast<int>(block / down * Shape::columns);  // the longest sums first
    const int last = (column_ + Shape::columns < args.inputs ? column_ + Shape::columns : args.inputs) - 1;
    begin_ = args.visible ? search(args.visible, args.outputs, column_) : 0;
    all_see_ = args.visible ? search(args.visible, args.outputs, last) : 0;
  }

  FK_INLINE int chunks() const { return static_cast<int>(tiles_of(args_.outputs - begin_, Shape::depth)); }

  template <class Copies>
  FK_INLINE void bring_chunk(int i, ProductSlot<Shape>& slot, int thread, Copies& copies) const {
    const int first = begin_ + i * Shape::depth;
    bring_left_turned<Shape>(slot, {args_.delta, row_, args_.batch, first, args_.outputs}, thread, copies);
    bring_right_turned<Shape>(slot, {args_.weight, column_, args_.inputs, first, args_.outputs}, thread, copies);
    if (thread < Shape::depth && first < all_see_) {
      const bool inside = first + thread < args_.outputs;
      copies.copy(&slot.visible[thread], args_.visible + (inside ? first + thread : 0), inside);
    }
  }

  FK_INLINE void multiply(int i, const ProductSlot<Shape>& slot, int thread, ThreadTile<Shape>& own) const {
    if (begin_ + i * Shape::depth >= all_see_) return own.multiply(slot, thread);
    own.multiply(slot, thread, [&](int c, int n) { return column_ + ThreadTile<Shape>::column(thread, n) < slot.visible[c]; });
  }

  FK_INLINE void beside(const ProductSlot<Shape>&, int, T&) const {}

  FK_INLINE void finish(const ProductMemory<Shape>& memory, int piece, int thread, T) const {
    scalar::with_activation(args_.fall.goes_on ? args_.fall.to.activation : Activation::identity, [&](auto code) {
      each_finished(memory, piece, args_.batch - row_, args_.inputs - column_, thread,
                    [&](int i, int j, T d) { args_.fall.template take<decltype(code)::value>(row_ + i, column_ + j, d); });
    });
  }

 private:
  const Args& args_;
  int64_t row_;
  int column_;
  int begin_, all_see_;  // outputs: the first that sees some column, and the first that sees all
};

// The gradients of a weight and its bias: C[k, n] = sum_m input[m, k] delta[m, n] where k < visible[n], 0 elsewhere, and sum_m delta[m, n]
template <class T>
struct WeightGradient {
  Matrix<T> input, delta;
  const int32_t* visible;  // null: all is seen
  int inputs, outputs;
  T *weight, *bias;     // bias: or null
  int first_block;      // of those of a launch
  int64_t part;         // where in a share's results its own begin: the weight's, then the bias's

  FK_INLINE bool sees(int k, int n) const { return !visible || k < visible[n]; }
  FK_INLINE int64_t size() const { return (int64_t(inputs) + (bias != nullptr)) * outputs; }
};

// Several weights in one launch, the batch in equal shares
template <class T>
struct AcrossArgs {
  static constexpr int kMost = 40;  // what a kernel may be given
  int64_t batch, share;             // rows
  T* parts;                         // [shares, parts_size]; null where one share has all rows
  int64_t parts_size;
  int n;
  WeightGradient<T> of[kMost];
};
static_assert(sizeof(AcrossArgs<float>) <= 4096);

// The gradient that a block of a launch belongs to
template <class T>
FK_INLINE int gradient_of(const AcrossArgs<T>& args, int64_t block) {
  int i = 0;
  while (i + 1 < args.n && args.of[i + 1].first_block <= block) ++i;
  return i;
}

template <class Shape>
class AcrossTile {
  using T = typename Shape::T;

 public:
  using Args = AcrossArgs<T>;
  FK_INLINE static int64_t blocks(const WeightGradient<T>& of) {
    const int64_t down = tiles_of(of.inputs, Shape::rows);
    return (down > 0 ? down : 1) * tiles_of(of.outputs, Shape::columns);
  }

  template <class Search>
  FK_INLINE AcrossTile(const Args& args, int64_t block, int share, const Search&) : args_(args), of_(args.of[gradient_of(args, block)]), share_(share) {
    const int64_t side = tiles_of(of_.outputs, Shape::columns), own = block - of_.first_block;
    row_ = static_cast<int>(own / side * Shape::rows);
    column_ = static_cast<int>(own % side * Shape::columns);
    const int last = (column_ + Shape::columns < of_.outputs ? column_ + Shape::columns : of_.outputs) - 1;
    first_ = share * args.share;
    end_ = first_ + args.share < args.batch ? first_ + args.share : args.batch;
    outside_ = row_ >= of_.inputs || !of_.sees(row_, last);
    if (outside_ && !sums_bias()) end_ = first_;
  }

  FK_INLINE int chunks() const { return end_ > first_ ? static_cast<int>(tiles_of(end_ - first_, Shape::depth)) : 0; }

  template <class Copies>
  FK_INLINE void bring_chunk(int i, ProductSlot<Shape>& slot, int thread, Copies& copies) const {
    const int64_t first = first_ + int64_t(i) * Shape::depth;
    bring_left<Shape>(slot, {of_.input, first, end_, row_, of_.inputs}, thread, copies);
    bring_right<Shape>(slot, {of_.delta, first, end_, column_, of_.outputs}, thread, copies);
  }

  FK_INLINE void multiply(int, const ProductSlot<Shape>& slot, int thread, ThreadTile<Shape>& own) const {
    if (!outside_) own.multiply(slot, thread);
  }

  // the bias's sums, a thread to a column
  FK_INLINE void beside(const ProductSlot<Shape>& slot, int thread, T& sum) const {
    if (!sums_bias() || thread >= Shape::columns) return;
    FK_UNROLL
    for (int c = 0; c < Shape::depth; ++c) sum += slot.right[c][thread];
  }

  FK_INLINE void finish(const ProductMemory<Shape>& memory, int piece, int thread, T sum) const {
    T* part = args_.parts ? args_.parts + share_ * args_.parts_size + of_.part : nullptr;
    T* weight = part ? part : of_.weight;
    each_finished(memory, piece, of_.inputs - row_, of_.outputs - column_, thread, [&](int i, int j, T s) {
      const int k = row_ + i, n = column_ + j;
      weight[int64_t(k) * of_.outputs + n] = of_.sees(k, n) ? s : T(0);
    });
    if (piece > 0 || !sums_bias() || thread >= Shape::columns || column_ + thread >= of_.outputs) return;
    (part ? part + int64_t(of_.inputs) * of_.outputs : of_.bias)[column_ + thread] = sum;
  }

 private:
  const Args& args_;
  const WeightGradient<T>& of_;
  int share_;
  int row_, column_;
  int64_t first_, end_;  // rows of the batch
  bool outside_;         // of the staircase

  FK_INLINE bool sums_bias() const { return row_ == 0 && of_.bias; }
};

// The gradients from their parts, in the order of the shares: a row of a weight, or its bias, by the threads of some blocks
template <class T>
FK_INLINE void add_parts(const AcrossArgs<T>& args, int shares, int i, int64_t row, int n) {
  const WeightGradient<T>& of = args.of[i];
  if (n >= of.outputs) return;
  const bool bias = row == of.inputs;
  T sum = T(0);
  if (bias || of.sees(static_cast<int>(row), n)) {
    const T* part = args.parts + of.part + row * of.outputs + n;
    for (int s = 0; s < shares; ++s) sum += part[s * args.parts_size];
  }
  (bias ? of.bias : of.weight + row * of.outputs)[n] = sum;
}

}  // namespace flowkernels
