// What the sequential loop works on, for every instruction set: plain views and the schedule of steps.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/for_each_target.h"  // declares the codes of maps, forms and activations

namespace flowkernels {

// One layer of the conditioner (flowkernels/ops/autoregressive/conditioner.py). Values are counted from 0, the features; layer l
// writes values l + 1, and reads those of its source.
template <class T>
struct MaskedLayer {
  const T* weight;  // [inputs, outputs], row stride ld; of a unitwise layer [outputs], or null for ones
  int64_t ld;
  const T* bias;            // [outputs]; null for zeros, in a unitwise layer alone
  const T* context_weight;  // [context features, outputs], row stride context_ld; null without context
  int64_t context_ld;
  const T* context_bias;   // [outputs]; null for zeros
  const int32_t* visible;  // [outputs], ascending
  int64_t inputs, outputs;
  int activation, context_activation;
  int source, residual;  // numbers of values; residual -1 for none
  bool unitwise;         // unit j sees unit j of its source alone
  bool gate;             // the context term multiplies the sum instead of joining it
  bool takes_context;    // also where there are no units, whose weights have no data

  // whether more than a sum meets the activation
  bool joins() const { return unitwise || gate || residual >= 0; }
  // whether the context term is more than weights: it is finished before it meets the sum
  bool own_context_term() const { return gate || context_bias || context_activation != static_cast<int>(Activation::identity); }
};

// Which columns of the last layer belong to which feature, features being counted in the order of generation. The first ones may pass
// unchanged, as those of a coupling do that its network reads; each other has its shift and its raw scale, or, in an additive map, its
// shift alone.
struct OutputColumns {
  int64_t passing;  // features
  int each;         // columns of a feature

  OutputColumns(int64_t outputs, int64_t features, int scale_kind)
      : each(scale_kind == static_cast<int>(ScaleKind::unit) ? 1 : 2) {
    passing = features - outputs / each;
  }
  OutputColumns() : passing(0), each(2) {}
  bool fit(int64_t outputs, int64_t features) const { return passing >= 0 && passing * each + outputs == features * each; }
  int64_t of(int64_t feature) const { return (feature - passing) * each; }
  int64_t features_in(int64_t columns) const { return passing + columns / each; }
};

template <class T>
struct Strided {  // a matrix [rows, columns] read through its strides
  const T* data;
  int64_t row, column;
};

template <class T>
struct AutoregressiveArgs {
  const MaskedLayer<T>* layers;
  int n_layers;
  Strided<T> x, context;
  const T* affine;  // [3, features]: a loop begins with (x + affine[0]) * affine[1] + affine[2]; null for x
  int64_t batch, features, context_features;
  OutputColumns output_columns;
  const int64_t* order;     // feature generated k-th; null for 0, 1, 2, ...
  const int64_t* position;  // its inverse: when each feature is generated
  ScaleMapParams scale;
  int form;
  bool inverse;
  bool gated;           // whether any layer is
  const int64_t* ends;  // ends[s * (n_layers + 1) + l]: units of layer l known after step s; of layer 0, features known before it
  int64_t n_steps;
  T* y;  // [rows, features], contiguous
  T* logabsdet;
  bool adds_log;  // to what logabsdet holds already
};

// A batch in shares of even size, one for each thread, and each share in tiles: as many full ones as it has, then what is left, with a
// part of the last full one where little would be.
struct Tiling {
  bool few;              // lanes are units rather than rows
  int64_t step, steps;   // tiles begin at multiples of `step` rows, of which the batch has `steps`
  int64_t full;          // steps of a full tile
  int64_t shares, each;  // tiles of a share

  int64_t tiles() const { return shares * each; }
  int64_t rows() const { return full * step; }  // of the largest
  int64_t begin(int64_t tile) const {
    const int64_t share = tile / each, i = tile % each, first = share * steps / shares, n = (share + 1) * steps / shares - first;
    const bool little = i > 0 && i == each - 1 && n - i * full < full / 3;
    return (first + i * full - (little ? full / 4 : 0)) * step;
  }
};

// The steps of the inverse, one per distinct degree, after the features that pass: step s computes the hidden units that see only the features known before it,
// then the features whose outputs those complete. The forward direction is one step that knows every feature.
// Returns an empty vector where the staircases are not autoregressive.
template <class T>
std::vector<int64_t> make_schedule(const MaskedLayer<T>* layers, int n_layers, int64_t features, OutputColumns outputs, bool inverse) {
  std::vector<int64_t> ready(n_layers + 1, 0), ends;
  if (!inverse) {
    ready[0] = features;
    for (int l = 0; l < n_layers; ++l) ready[l + 1] = layers[l].outputs;
    return ready;
  }
  ready[0] = outputs.passing;
  while (ready[0] < features) {
    const int64_t known = ready[0];
    for (int l = 1; l <= n_layers; ++l) {
      const MaskedLayer<T>& layer = layers[l - 1];
      const int64_t seen = ready[layer.source], most = layer.residual < 0 ? layer.outputs : ready[layer.residual];
      int64_t end = ready[l];
      while (end < most && layer.visible[end] <= seen) ++end;
      ready[l] = end;
    }
    ready[n_layers] -= ready[n_layers] % outputs.each;  // a feature is known when both its shift and its raw scale are
    if (outputs.features_in(ready[n_layers]) == known) return {};
    ends.insert(ends.end(), ready.begin(), ready.end());
    ready[0] = outputs.features_in(ready[n_layers]);
  }
  return ends;
}

}  // namespace flowkernels
