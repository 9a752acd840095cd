// A panel of the sequential loop: the steps that one warp runs for its 1 to 4 rows of a tile, with no barrier of the block, as rows never
// meet. Device code, and its twin's (autoregressive_phases.h).
//
// What counts is how many instructions lie between one value and the next, as a warp alone takes 4 to 5 cycles for each. So values are
// added to all sums of the panel that wait for them as soon as they are known, a lane to a unit, and what there is to do comes as a list
// of works. Where the panel's sums fit the registers of a warp they stay there (RegisterPanel), and only values go through memory.
#pragma once

#include "autoregressive_plan.h"

namespace flowkernels {

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {  // read and written by one instruction where it has at most 16 bytes
  T at[N];
};

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
          const scalar::ValueAndLog<T> out = scalar::invert_form<Form::scale_shift>(quick_, z, tile_.at(first, r), tile_.at(first + 1, r));
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

// A panel of LAYERS layers with ReLU, or mirrored ones with their gates, of no more than 32 * UNITS units each: lane i holds the sums of units i, i + 32. A
// step of a layer is then the products with the newest values, and the values that became whole, which go to the state of the tile, where
// all lanes read them. The order of a sum is that of Panel.
template <class T, class Tile, int LAYERS, int UNITS>
class RegisterPanel {
 public:
  FK_INLINE RegisterPanel(const Tile& tile, const unsigned char* image, const Head& head, int r0)
      : tile_(tile), layers_(reinterpret_cast<const PanelLayer*>(image + sizeof(Head))), steps_(reinterpret_cast<const PanelStep*>(layers_ + LAYERS)),
        units_(reinterpret_cast<const SeesAndReady*>(steps_ + head.inputs + 1)), weights_(reinterpret_cast<const T*>(image + head.weights)), r0_(r0),
        features_(tile, r0) {}

  template <class Lanes>
  FK_INLINE void run(int steps, Lanes& lanes) const {
    typename Lanes::template PerLane<Own> own;
    Layer layers[LAYERS];
    FK_UNROLL
    for (int l = 0; l < LAYERS; ++l) layers[l] = {layers_[l].weights, layers_[l].ld, place_of(layers_[l].input), 0};
    const int near = layers_[LAYERS - 1].values - layers_[LAYERS - 1].unit;  // from a unit of the last layer to its place in the state
    lanes.each([&](int lane) { begin(own[lane], lane); });
    PanelStep next = steps_[0];
    FK_KEEP_LOOP
    for (int s = 0; s < steps; ++s) {
      const PanelStep step = next;
      next = steps_[s + 1];  // on its way while this is done
      FK_UNROLL
      for (int l = 0; l < LAYERS; ++l) {
        const int inputs = step.counts[l] & 0xffff;
        lanes.each([&](int lane) {
          add(own[lane].sums[l], own[lane].sees[l], layers[l], inputs, lane);
          put_whole(l, s, own[lane]);
        });
        layers[l].seen += inputs;
        layers[l].weights += inputs * layers[l].ld;
        layers[l].x += inputs * kUnit;
      }
      const int finished = step.counts[LAYERS - 1] >> 16;
      if (finished > 0) lanes.each([&](int lane) { features_.finish(step.unit, finished, step.unit + near, lane); });
    }
  }

 private:
  static constexpr int kRows = Tile::kPanelRows, kUnit = Tile::kUnit;
  using Rows = Pack<T, kRows>;

  struct Own {
    Rows sums[LAYERS][UNITS];
    int sees[LAYERS][UNITS], ready[LAYERS][UNITS];  // how many of the panel's inputs; in which step
    int place[LAYERS], gates[LAYERS];               // of the first unit
  };
  struct Layer {
    int weights, ld, x;  // of the next input
    int seen;            // inputs so far
  };

  // where the rows of a unit are in the state
  FK_INLINE int place_of(int unit) const { return unit * kUnit + r0_; }
  FK_INLINE Rows& rows_at(int place) const { return *reinterpret_cast<Rows*>(tile_.state + place); }

  FK_INLINE void begin(Own& own, int lane) const {
    FK_UNROLL
    for (int l = 0; l < LAYERS; ++l) {
      own.place[l] = place_of(layers_[l].values + lane);
      own.gates[l] = 0;
      if constexpr (Tile::kMirrored)
        if (l < LAYERS - 1) own.gates[l] = place_of(tile_.args.layers[l].gates + layers_[l].unit + lane);
      FK_UNROLL
      for (int u = 0; u < UNITS; ++u) {
        const SeesAndReady unit = units_[kPanelUnits * l + lane + 32 * u];
        own.sees[l][u] = unit.sees;
        own.ready[l][u] = unit.ready;
        own.sums[l][u] = {};
        if (unit.ready < 0) continue;
        const T* sums = tile_.state + own.place[l] + 32 * u * kUnit;
        if constexpr (Tile::kApart)
          if (l == LAYERS - 1) sums = tile_.place_of_value(LAYERS, layers_[l].unit + lane + 32 * u, r0_);
        own.sums[l][u] = *reinterpret_cast<const Rows*>(sums);
      }
    }
  }

  // The products of the next n inputs, those that a unit sees. The first two go without a branch, and are read whether they are known or not.
  FK_INLINE void add(Rows (&sums)[UNITS], const int (&sees)[UNITS], const Layer& layer, int n, int lane) const {
    int until[UNITS];  // from the first of them on
    FK_UNROLL
    for (int u = 0; u < UNITS; ++u) until[u] = smaller(sees[u] - layer.seen, n);
    const T* weights = weights_ + layer.weights + lane;
    products<2>(sums, until, 0, layer, weights);
    if (n <= 2) return;
    weights += 2 * layer.ld;
    int k = 2;
    FK_KEEP_LOOP
    for (; k + 4 <= n; k += 4, weights += 4 * layer.ld) products<4>(sums, until, k, layer, weights);
    if (k + 2 <= n) {
      products<2>(sums, until, k, layer, weights);
      k += 2;
      weights += 2 * layer.ld;
    }
    if (k < n) products<1>(sums, until, k, layer, weights);
  }

  template <int N>
  FK_INLINE void products(Rows (&sums)[UNITS], const int (&until)[UNITS], int k, const Layer& layer, const T* weights) const {
    Rows x[N];
    T w[N][UNITS];
    FK_UNROLL
    for (int i = 0; i < N; ++i) {  // all are read before the first is used
      x[i] = rows_at(layer.x + (k + i) * kUnit);
      FK_UNROLL
      for (int u = 0; u < UNITS; ++u) w[i][u] = weights[i * layer.ld + 32 * u];
    }
    FK_UNROLL
    for (int i = 0; i < N; ++i)
      FK_UNROLL
      for (int u = 0; u < UNITS; ++u)
        FK_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const T sum = scalar::fma(w[i][u], x[i].at[r], sums[u].at[r]);
          sums[u].at[r] = k + i < until[u] ? sum : sums[u].at[r];
        }
  }

  // the units that are whole after this step
  FK_INLINE void put_whole(int l, int step, const Own& own) const {
    FK_UNROLL
    for (int u = 0; u < UNITS; ++u) {
      Rows value = own.sums[l][u];
      if constexpr (!Tile::kMirrored)
        if (l < LAYERS - 1) {
          FK_UNROLL
          for (int r = 0; r < kRows; ++r) value.at[r] = scalar::activate<Activation::relu>(value.at[r]);
        }
      if (own.ready[l][u] != step) continue;
      if constexpr (Tile::kMirrored)
        if (l < LAYERS - 1) {
          const Rows& gates = rows_at(own.gates[l] + 32 * u * kUnit);
          FK_UNROLL
          for (int r = 0; r < kRows; ++r) value.at[r] = value.at[r] * gates.at[r];
        }
      rows_at(own.place[l] + 32 * u * kUnit) = value;
    }
  }

  const Tile& tile_;
  const PanelLayer* const layers_;
  const PanelStep* const steps_;
  const SeesAndReady* const units_;
  const T* const weights_;
  const int r0_;
  const Features<T, Tile> features_;
};

}  // namespace flowkernels
