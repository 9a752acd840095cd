// A panel of the sequential loop whose sums stay in registers, and only values go through memory. Device code, and its twin's
// (autoregressive_phases.h).
#pragma once

#include "cuda/autoregressive_panel.h"

namespace flowkernels {

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

  FK_INLINE static bool is_seen(int k, const int (&until)[UNITS]) {
    bool seen = false;
    for (int u = 0; u < UNITS; ++u) seen = seen || k < until[u];
    return seen;
  }

  template <int N>
  FK_INLINE void products(Rows (&sums)[UNITS], const int (&until)[UNITS], int k, const Layer& layer, const T* weights) const {
    Rows x[N];
    T w[N][UNITS];
    FK_UNROLL
    for (int i = 0; i < N; ++i) {  // all are read before the first is used
      x[i] = FK_READ_AHEAD(is_seen(k + i, until), rows_at(layer.x + (k + i) * kUnit));
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
