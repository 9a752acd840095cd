// What the training passes of a masked autoregressive map work on, for every instruction set.
#pragma once

#include <cstdint>

#include "cpu/autoregressive.h"
#include "cpu/masked_linear.h"
#include "training_columns.h"

namespace flowkernels {

// Orders that most networks have, and that need no look at each number: of MADEs, and of couplings by halves (rotated: one after the other) and
// by even and odd features
enum class OrderKind { any, ascending, descending, rotated, evens_first, odds_first };

inline OrderKind kind_of(const int64_t* order, int64_t features) {
  const auto is = [&](auto&& feature) {
    for (int64_t p = 0; p < features; ++p)
      if (order[p] != feature(p)) return false;
    return true;
  };
  const int64_t evens = (features + 1) / 2, odds = features / 2;
  if (is([](int64_t p) { return p; })) return OrderKind::ascending;
  if (is([&](int64_t p) { return features - 1 - p; })) return OrderKind::descending;
  if (is([&](int64_t p) { return (order[0] + p) % features; })) return OrderKind::rotated;
  if (is([&](int64_t p) { return p < evens ? 2 * p : 2 * (p - evens) + 1; })) return OrderKind::evens_first;
  if (is([&](int64_t p) { return p < odds ? 2 * p + 1 : 2 * (p - odds); })) return OrderKind::odds_first;
  return OrderKind::any;
}

template <class T>
struct TrainingArgs {
  const MaskedLinearArgs<T>* layers;    // forward products in turn, or those of dx from the last layer to the first
  const MaskedLinearArgs<T>* contexts;  // the same for context terms, or null
  const LayerColumns<T>* columns;       // of the layers in turn
  bool wired;                           // whether some layer is assembled(), or reads another than the one before it
  int n_layers;
  int64_t batch, features;
  const int64_t* order;  // feature generated k-th; null for 0, 1, 2, ...
  OrderKind order_kind;
  ScaleMapParams scale;
  Form form;
  T *values, *deltas;
  int64_t values_ld, deltas_ld;
  T* remade;        // values of the first layer that are not kept with the others (TrainingNetwork), or null
  int64_t outputs;  // first column of the outputs' deltas
  int64_t made;     // and of their values
  OutputColumns output_columns;
  int64_t by_bound;  // column of deltas for the gradient by the scale map's bound; -1 where nobody asks for it
  const T *x, *dy, *dlogabsdet;
  int64_t x_row, x_column, dy_row, dy_column, dlogabsdet_step;
  T *y, *logabsdet, *dx;  // contiguous
  bool adds_log;          // to what logabsdet holds already

  // y = x + shift, whose log-determinant is 0
  bool only_adds() const { return scale.kind == static_cast<int>(ScaleKind::unit) && form == Form::scale_shift && output_columns.each == 1; }

  void set_x(const T* data, int64_t row, int64_t column) { x = data, x_row = row, x_column = column; }
  void set_cotangents(const T* of_y, int64_t row, int64_t column, const T* of_logabsdet, int64_t step) {
    dy = of_y, dy_row = row, dy_column = column, dlogabsdet = of_logabsdet, dlogabsdet_step = step;
  }

  // the same for some rows alone, whose values and deltas lie at the beginning of theirs
  TrainingArgs span(int64_t first, int64_t rows) const {
    TrainingArgs some = *this;
    some.batch = rows;
    if (x) some.x += first * x_row;
    some.dy += first * dy_row;
    some.dlogabsdet += first * dlogabsdet_step;
    if (dx) some.dx += first * features;
    if (y) some.y += first * features, some.logabsdet += first;
    return some;
  }
};

}  // namespace flowkernels
