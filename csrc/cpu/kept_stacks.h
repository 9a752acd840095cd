// Stacks of maps whose lists stay in C++ between calls: handing the lists over takes longer than a small flow's loop.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace flowkernels {

// What a stack is made of, in the order of its op's schema. factors: one for each map, or none: a learned number that the first parameter
// of the map's scale is multiplied by, or an empty tensor.
struct StackLists {
  std::vector<torch::stable::Tensor> weights, biases, context_weights, context_biases, visible, orders, affines;
  std::vector<int64_t> activations, wiring, stages;
  std::vector<double> scales;
  std::vector<torch::stable::Tensor> factors;
};

// Numbered stacks. Their tensors are the ones that were given, not copies: what an optimiser or a load writes into them is seen.
class KeptStacks {
 public:
  int64_t keep(StackLists lists) {
    auto stack = std::make_shared<const StackLists>(std::move(lists));
    const std::lock_guard lock(mutex_);
    stacks_.emplace(++last_, std::move(stack));
    return last_;
  }

  // How many stacks are left. Calls that use the one released at this moment go on.
  int64_t release(int64_t number) {
    std::shared_ptr<const StackLists> stack;  // its tensors are freed outside of the lock
    const std::lock_guard lock(mutex_);
    if (const auto found = stacks_.find(number); found != stacks_.end()) {
      stack = std::move(found->second);
      stacks_.erase(found);
    }
    return static_cast<int64_t>(stacks_.size());
  }

  std::shared_ptr<const StackLists> at(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = stacks_.find(number);
    STD_TORCH_CHECK(found != stacks_.end(), "flowkernels::autoregressive_kept: no stack has the number ", number);
    return found->second;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const StackLists>> stacks_;
  int64_t last_ = 0;
};

}  // namespace flowkernels
