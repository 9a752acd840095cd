// What a training step does beside its products, for device code and for its twin: the maps of a row by the lanes of a warp, layers whose
// units see one unit each, and sums over the batch for those.
#pragma once

#include "cuda/training_products.h"

namespace flowkernels {

constexpr int kRowWarps = 4;  // of a block, a row each

// Rows of features as they come, and their places in the order of generation
template <class T>
struct FeatureRows {
  const T* data;
  int64_t row, column;
};

// from -> to[k] = the feature generated k-th
template <class T>
struct ToOrder {
  FeatureRows<T> from;
  const int64_t* order;  // null for 0, 1, 2, ...
  T* to;
  int64_t to_ld;
  int features;

  FK_INLINE int64_t place(int k) const { return order ? order[k] : k; }
  FK_INLINE void take(int64_t row, int lane) const {
    for (int k = lane; k < features; k += 32) to[row * to_ld + k] = from.data[row * from.row + place(k) * from.column];
  }
};

// Phases of a warp, each for all lanes before the next. y = map(x), its log|det|, and, where another map follows, its features
template <class T>
struct MapArgs {
  int64_t batch;
  int features;
  const T* values;
  int64_t values_ld, outputs;  // first column of the outputs
  const int64_t* order;
  ScaleMapParams scale;
  Form form;
  T *y, *logabsdet;  // contiguous
  bool adds_log;     // to what logabsdet holds already
  ToOrder<T> next;   // from y; to null where no map follows

  FK_INLINE void map(int64_t row, int lane, T* logs) const {
    const T* own = values + row * values_ld;
    T sum = T(0);
    for (int p = lane; p < features; p += 32) {
      const scalar::ValueAndLog<T> out = scalar::apply_form(form, scale, own[p], own[outputs + 2 * p], own[outputs + 2 * p + 1]);
      y[row * features + (order ? order[p] : p)] = out.value;
      sum += out.log;
    }
    logs[lane] = sum;
  }
  FK_INLINE void halve(T* logs, int lane, int half) const {
    if (lane < half) logs[lane] += logs[lane + half];
  }
  FK_INLINE void hand_on(int64_t row, int lane, const T* logs) const {
    if (lane == 0) logabsdet[row] = adds_log ? logabsdet[row] + logs[0] : logs[0];
    if (next.to) next.take(row, lane);
  }
};

// The gradient by a map's outputs and, for itself, by its features, from dy; or from the gradient by the features of the map that followed
template <class T>
struct MapBackwardArgs {
  int64_t batch;
  int features;
  const T* values;  // null where no map is left, and dx alone is wanted
  int64_t values_ld, outputs;
  const int64_t* order;
  ScaleMapParams scale;
  Form form;
  FeatureRows<T> dy;
  const T* dlogabsdet;
  int64_t dlogabsdet_step;
  T* deltas;
  int64_t deltas_ld;
  const T* above;  // deltas of the map that followed, in its order; null for none
  int64_t above_ld;
  const int64_t* above_order;
  T* dx;  // [batch, features], the gradient by what that map was given: dy reads it

  FK_INLINE void from_above(int64_t row, int lane) const {
    if (!above) return;
    for (int k = lane; k < features; k += 32) dx[row * features + (above_order ? above_order[k] : k)] = above[row * above_ld + k];
  }
  FK_INLINE void map(int64_t row, int lane) const {
    if (!values) return;
    const T* own = values + row * values_ld;
    T* by = deltas + row * deltas_ld;
    const T c = dlogabsdet[row * dlogabsdet_step];
    for (int p = lane; p < features; p += 32) {
      const T g = dy.data[row * dy.row + (order ? order[p] : p) * dy.column];
      const scalar::FormGradient<T> gradient = scalar::form_gradient(form, scale, own[p], own[outputs + 2 * p], own[outputs + 2 * p + 1], g, c);
      by[p] = gradient.dvalue;
      by[outputs + 2 * p] = gradient.dshift;
      by[outputs + 2 * p + 1] = gradient.draw;
    }
  }
};

// A layer whose unit j sees unit j of its source alone
template <class T>
struct UnitwiseUpArgs {
  int64_t batch;
  Rise<T> rise;  // whose bias is null

  FK_INLINE int64_t count() const { return batch * rise.to.units; }
  FK_INLINE void take(int64_t i) const {
    const int64_t row = i / rise.to.units, unit = i % rise.to.units;
    T s = rise.values[row * rise.ld + rise.to.input + unit];
    if (rise.to.factor) s = scalar::fma(s, rise.to.factor[unit], rise.to.bias[unit]);
    scalar::with_activation(rise.to.activation, [&](auto code) { rise.template take<decltype(code)::value>(row, unit, s); });
  }
};

// A layer's gradients go on to its sums where no product's end did that, and those of a unitwise layer to its source
template <class T>
struct SettleArgs {
  int64_t batch;
  Fall<T> own;
  bool settles;    // own goes on; otherwise it has
  bool is_unread;  // nothing arrived
  bool goes_down;  // on to `source`
  Fall<T> source;

  FK_INLINE int64_t count() const { return batch * own.to.units; }
  FK_INLINE void take(int64_t i) const {
    const int64_t row = i / own.to.units, unit = i % own.to.units;
    T d = is_unread ? T(0) : own.deltas[row * own.deltas_ld + own.to.value + unit];
    if (settles) scalar::with_activation(own.to.activation, [&](auto code) { d = own.template take<decltype(code)::value>(row, unit, d); });
    if (!goes_down) return;
    if (own.to.factor) d *= own.to.factor[unit];
    scalar::with_activation(source.goes_on ? source.to.activation : Activation::identity,
                            [&](auto code) { source.template take<decltype(code)::value>(row, unit, d); });
  }
};

// The gradients of a unitwise layer: factor[j] = sum_m delta[m, j] value[m, j], bias[j] = sum_m delta[m, j]
template <class T>
struct ColumnSumArgs {
  static constexpr int kColumns = 32, kLanes = 32;  // of a block
  Matrix<T> value, delta;
  int64_t batch;
  int columns;
  T *factor, *bias;

  struct Sums {
    T factor[kLanes][kColumns], bias[kLanes][kColumns];
  };

  FK_INLINE void add(int block, int thread, Sums& sums) const {
    const int lane = thread / kColumns, j = block * kColumns + thread % kColumns;
    T of_factor = T(0), of_bias = T(0);
    if (j < columns)
      for (int64_t m = lane; m < batch; m += kLanes) {
        const T d = delta.data[m * delta.ld + j];
        of_factor = scalar::fma(d, value.data[m * value.ld + j], of_factor);
        of_bias += d;
      }
    sums.factor[lane][thread % kColumns] = of_factor;
    sums.bias[lane][thread % kColumns] = of_bias;
  }
  FK_INLINE void finish(int block, int thread, const Sums& sums) const {
    const int j = block * kColumns + thread % kColumns, which = thread / kColumns;  // a warp adds up the factors, another the biases
    if (which > 1 || j >= columns) return;
    const T* lane = (which ? &sums.bias[0][0] : &sums.factor[0][0]) + thread % kColumns;
    T sum = T(0);
    for (int i = 0; i < kLanes; ++i) sum += lane[i * kColumns];
    (which ? bias : factor)[j] = sum;
  }
};

}  // namespace flowkernels
