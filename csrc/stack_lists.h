// The lists of a stack of maps, as its ops take them: what belongs to the maps stands one map after the other.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <span>

namespace flowkernels {

// The tensors of a conditioner, in the order of the schema.
struct NetworkParts {
  std::span<const torch::stable::Tensor> weights, biases, context_weights, context_biases, visible;
  std::span<const int64_t> activations, wiring;
};

// What of a list the maps so far have left; next(n) is the part of the next one.
template <class Item>
struct Rest {
  std::span<const Item> items;

  std::span<const Item> next(int64_t n) {
    STD_TORCH_CHECK(n >= 0 && n <= static_cast<int64_t>(items.size()), "flowkernels::autoregressive: a list of the stack is too short");
    const std::span<const Item> part = items.first(n);
    items = items.subspan(n);
    return part;
  }
};

// One map's numbers in the list `stages` of Lists (flowkernels/ops/autoregressive/loop.py)
struct MapNumbers {
  static constexpr size_t kNumbers = 8;
  int64_t layers, contexts, context_biases, wired, scale_kind, form;
  int64_t bfloat16_weights;  // whether a GPU rounds the matrices; a CPU does not
  int64_t inverse;

  MapNumbers(std::span<const int64_t> stages, size_t map) {
    const int64_t* n = &stages[kNumbers * map];
    layers = n[0], contexts = n[1], context_biases = n[2] ? contexts : 0, wired = n[3], scale_kind = n[4], form = n[5];
    bfloat16_weights = n[6], inverse = n[7];
  }
};

// How a layer is wired: four numbers of the list `wiring`. Where that is empty, the layers are a chain, and the context joins the sums of
// all layers or of the first ones.
struct Wiring {
  static constexpr size_t kNumbers = 4;
  int64_t source, residual, context, context_activation;  // context: 0 none, 1 is added, 2 gates

  Wiring(std::span<const int64_t> wiring, size_t contexts, size_t layer)
      : source(static_cast<int64_t>(layer)), residual(-1), context(layer < contexts), context_activation(0) {
    if (wiring.empty()) return;
    const int64_t* n = &wiring[kNumbers * layer];
    source = n[0], residual = n[1], context = n[2], context_activation = n[3];
    const auto last = static_cast<int64_t>(layer);
    STD_TORCH_CHECK(source >= 0 && source <= last && residual >= -1 && residual <= last,
                    "flowkernels::autoregressive: a layer must read the features or a layer before it");
  }
};

// Python has checked what users get wrong; here only what would corrupt memory.
inline void check_lengths(const NetworkParts& parts) {
  const size_t n = parts.weights.size(), contexts = parts.context_weights.size();
  const bool wired = parts.wiring.empty() ? contexts <= 1 || contexts == n : parts.wiring.size() == Wiring::kNumbers * n;
  STD_TORCH_CHECK(n >= 1 && parts.biases.size() == n && parts.visible.size() == n && parts.activations.size() == n && wired,
                  "flowkernels::autoregressive: weights, biases, visible, activations and wiring must have one entry per layer");
  STD_TORCH_CHECK(parts.context_biases.empty() || parts.context_biases.size() == contexts,
                  "flowkernels::autoregressive: context_biases must have one entry per context weight");
}

// The networks of a stack, whose lists stand one after the other.
struct Networks {
  Rest<torch::stable::Tensor> weights, biases, context_weights, context_biases, visible;
  Rest<int64_t> activations, wiring;

  explicit Networks(const NetworkParts& all)
      : weights{all.weights},
        biases{all.biases},
        context_weights{all.context_weights},
        context_biases{all.context_biases},
        visible{all.visible},
        activations{all.activations},
        wiring{all.wiring} {}

  NetworkParts next(const MapNumbers& numbers) {
    return {weights.next(numbers.layers),
            biases.next(numbers.layers),
            context_weights.next(numbers.contexts),
            context_biases.next(numbers.context_biases),
            visible.next(numbers.layers),
            activations.next(numbers.layers),
            wiring.next(numbers.wired ? static_cast<int64_t>(Wiring::kNumbers) * numbers.layers : 0)};
  }
};

}  // namespace flowkernels
