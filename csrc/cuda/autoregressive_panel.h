// A panel of the sequential loop: the steps that one warp runs for its 1 to 4 rows of a tile, with no barrier of the block, as rows never
// meet. Device code, and its twin's (autoregressive_phases.h).
//
// What counts is how many instructions lie between one value and the next, as a warp alone takes 4 to 5 cycles for each. So values are
// added to all sums of the panel that wait for them as soon as they are known, a lane to a unit, and what there is to do comes as a list
// of works. Where the panel's sums fit the registers of a warp they stay there: autoregressive_register_panel.h.
#pragma once

#include "autoregressive_plan.h"
#include "cuda/pack.h"

namespace flowkernels {

// The maps of features whose sums are whole, by the lanes of a warp
template <class T, class Tile>
class Features {
 public:
  FK_INLINE Features(const Tile& tile, int r0)
      : tile_(tile), r0_(r0), outputs_(tile.place_of_value(tile.args.n_layers, 0, 0)),
        is_quick_(tile.args.inverse && tile.args.form == static_cast<int>(Form::scale_shift) &&
                  tile.args.scale.kind == static_cast<int>(ScaleKind::softclip)),
        quick_(tile.args.scale) {}

  // The features of the last layer's sums [unit, unit + n), which are in the state of a tile from `values` on
  FK_INLINE void finish(int unit, int n, int values, int lane) const {
    constexpr int kRows = Tile::kPanelRows, kSums = Tile::kSums;
    const int all = kRows * n / kSums;
    FK_KEEP_LOOP
    for (int begin = 0; begin < all; begin += 32) {  // all lanes go through it, so that none waits where others have gone another way
      const bool is_own = begin + lane < all;
      const int i = is_own ? begin + lane : all - 1;
      const int p = unit / kSums + i / kRows, r = r0_ + i % kRows, first = values + i / kRows * kSums;
      if constexpr (kSums == 2) {
        if (is_quick_) {
          T& z = tile_.at(p, r);
          const T given = FK_READ_AHEAD(is_own, z), raw = FK_READ_AHEAD(is_own, tile_.at(first + 1, r));  // out takes their places
          const scalar::ValueAndLog<T> out = scalar::invert_form<Form::scale_shift>(quick_, given, tile_.at(first, r), raw);
          if (is_own) {
            z = out.value;
            outputs_[Tile::place_of(2 * p + 1, r)] = out.log;
          }
          continue;
        }
      }
      if (is_own) tile_.feature(p, r, [&](int which) { return tile_.at(first + which, r); });
    }
  }

 private:
  const Tile& tile_;
  const int r0_;
  T* const outputs_;     // where the last layer's values begin
  const bool is_quick_;  // the map is the usual one, which needs no call
  const scalar::SoftclipMap<T> quick_;
};

template <class T, class Tile>
class Panel {
 public:
  FK_INLINE Panel(const Tile& tile, const unsigned char* image, const Head& head, int r0)
      : tile_(tile), args_(tile.args), works_(reinterpret_cast<const PanelWork*>(image + sizeof(Head))),
        weights_(reinterpret_cast<const T*>(image + head.weights)), r0_(r0), outputs_(tile.place_of_value(args_.n_layers, 0, 0)),
        features_(tile, r0) {}

  // Lanes::each(f) calls f(lane) in every lane of a warp and then waits for all of them.
  template <class Lanes>
  FK_INLINE void run(int steps, Lanes& lanes) const {
    if constexpr (Tile::kApart) fetch(works_[args_.n_layers - 1], lanes);
    const int n = steps * args_.n_layers;
    PanelWork next = works_[0];
    FK_KEEP_LOOP
    for (int i = 0; i < n; ++i) {
      const PanelWork work = next;
      next = works_[i + 1];  // on its way while this is done
      if (work.inputs > 0 || work.activation >= 0) lanes.each([&](int lane) { add(work, lane); });
      if (work.activation < 0 && work.finished > 0) lanes.each([&](int lane) { finish(work, lane); });
    }
  }

 private:
  static constexpr int kRows = Tile::kPanelRows;
  using Rows = Pack<T, kRows>;

  FK_INLINE Rows& rows_at(int unit) const { return *reinterpret_cast<Rows*>(tile_.state + Tile::place_of(unit, r0_)); }

  // the last layer's sums, from global memory to where the works expect them; `first` is the first of those works
  template <class Lanes>
  FK_INLINE void fetch(const PanelWork& first, Lanes& lanes) const {
    lanes.each([&](int lane) {
      for (int u = lane; u < first.targets; u += 32)
        rows_at(first.values + u) = *reinterpret_cast<const Rows*>(outputs_ + Tile::place_of(first.unit + u, r0_));
    });
  }

  // the newest inputs to what waits for them, and the activation where that makes a value
  FK_INLINE void add(const PanelWork& work, int lane) const {
    const T* weights = weights_ + work.weights;
    FK_KEEP_LOOP
    for (int u = lane; u < work.targets; u += 32) {
      Rows& sums = rows_at(work.values + u);
      Rows sum = sums;
      add_products(sum, weights + u, work.ld, work.first, work.staircase ? seen_of(work, work.unit + u) : work.inputs);
      if (work.activation == static_cast<int>(Activation::relu)) {
        for (int r = 0; r < kRows; ++r) sum.at[r] = u < work.finished ? scalar::activate<Activation::relu>(sum.at[r]) : sum.at[r];
      } else if (work.activation > 0 && u < work.finished) {
        for (int r = 0; r < kRows; ++r) sum.at[r] = scalar::activate(static_cast<Activation>(work.activation), sum.at[r]);
      }
      sums = sum;
    }
  }

  // sum + the products of n inputs, units from `input` on; weights[k * ld]
  FK_INLINE void add_products(Rows& sum, const T* weights, int ld, int input, int n) const {
    auto x = [&](int k) -> const Rows& { return rows_at(input + k); };
    FK_KEEP_LOOP
    for (; n >= 4; n -= 4, weights += 4 * ld, input += 4) {  // all are read before the first is used
      const T w0 = weights[0], w1 = weights[ld], w2 = weights[2 * ld], w3 = weights[3 * ld];
      const Rows x0 = x(0), x1 = x(1), x2 = x(2), x3 = x(3);
      add_product(sum, w0, x0);
      add_product(sum, w1, x1);
      add_product(sum, w2, x2);
      add_product(sum, w3, x3);
    }
    if (n >= 2) {
      const T w0 = weights[0], w1 = weights[ld];
      const Rows x0 = x(0), x1 = x(1);
      add_product(sum, w0, x0);
      add_product(sum, w1, x1);
      weights += 2 * ld;
      input += 2;
    }
    if (n % 2 == 1) add_product(sum, weights[0], x(0));
  }
  FK_INLINE static void add_product(Rows& sum, T weight, const Rows& x) {
    for (int r = 0; r < kRows; ++r) sum.at[r] = scalar::fma(weight, x.at[r], sum.at[r]);
  }

  // of a work's inputs, what a unit sees that need not see all
  FK_INLINE int seen_of(const PanelWork& work, int j) const {
    const LoopLayer<T>& layer = args_.layer(work.layer);
    return larger(0, smaller(layer.visible[j] - (work.first - args_.first_unit(layer.source)), work.inputs));
  }

  // what takes more than an activation: features, and units with gates or residuals
  FK_INLINE void finish(const PanelWork& work, int lane) const {
    if (work.activation == kFeatures) return features_.finish(work.unit, work.finished, work.values, lane);
    FK_KEEP_LOOP
    for (int i = lane; i < kRows * work.finished; i += 32) {
      const int u = i / kRows, r = r0_ + i % kRows;
      T& sum = tile_.at(work.values + u, r);
      sum = tile_.hidden(work.layer, work.unit + u, r, sum);
    }
  }

  const Tile& tile_;
  const LoopArgs<T>& args_;
  const PanelWork* const works_;
  const T* const weights_;
  const int r0_;
  T* const outputs_;  // where the last layer's values begin
  const Features<T, Tile> features_;
};

}  // namespace flowkernels
