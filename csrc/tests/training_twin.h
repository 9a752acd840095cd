// The launches of a training step on the CPU, for twins of CUDA ops: each phase runs for all threads of a block in turn, and memory begins
// full of NaN. What is left to a GPU: the barriers themselves, speed.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "autoregressive_training_ops.h"
#include "cpu/tensor.h"
#include "tests/twin.h"

namespace flowkernels {
namespace {

struct TrainingLayout {
  int processors;
  bool backwards;
  int64_t together;

  explicit TrainingLayout(const std::vector<int64_t>& numbers) {
    STD_TORCH_CHECK(numbers.size() == 3, "a layout has 3 numbers");
    processors = static_cast<int>(numbers[0]), backwards = numbers[1] != 0, together = numbers[2];
  }
};

struct ScalarSearch {
  int operator()(const int32_t* list, int n, int k) const { return static_cast<int>(std::upper_bound(list, list + n, k) - list); }
};

// One block of a product: what run_product of the kernel does
template <class Tile, class Shape>
void run_product(const typename Tile::Args& args, int64_t block, int share, bool backwards) {
  using T = typename Shape::T;
  const auto memory = std::make_unique<ProductMemory<Shape>>();
  std::memset(static_cast<void*>(memory.get()), 0xff, sizeof *memory);
  const Tile tile(args, block, share, ScalarSearch{});
  const int chunks = tile.chunks();
  std::vector<LateCopies> copies(Shape::threads);
  std::vector<ThreadTile<Shape>> own(Shape::threads);
  std::vector<T> beside(Shape::threads, T(0));
  const auto all = [&](auto&& f) { all_threads(Shape::threads, backwards, f); };
  all([&](int t) {
    copies[t].early = backwards;
    own[t].clear();
    for (int i = 0; i < kProductSlots - 1; ++i) {
      if (i < chunks) tile.bring_chunk(i, memory->slots[i], t, copies[t]);
      copies[t].commit();
    }
  });
  for (int i = 0; i < chunks; ++i) {
    all([&](int t) { copies[t].template wait<kProductSlots - 2>(); });
    all([&](int t) {
      const int ahead = i + kProductSlots - 1;
      if (ahead < chunks) tile.bring_chunk(ahead, memory->slots[ahead % kProductSlots], t, copies[t]);
      copies[t].commit();
      tile.multiply(i, memory->slots[i % kProductSlots], t, own[t]);
      tile.beside(memory->slots[i % kProductSlots], t, beside[t]);
    });
  }
  for (int piece = 0; piece < Shape::rows / Shape::finish_rows; ++piece) {
    all([&](int t) { own[t].put(*memory, piece, t); });
    all([&](int t) { tile.finish(*memory, piece, t, beside[t]); });
  }
}

// Launches that run at once
template <class T>
class TwinLaunch {
 public:
  TwinLaunch(const torch::stable::Tensor& like, const TrainingLayout& layout) : like_(like), layout_(layout) {}

  torch::stable::Tensor empty(const std::vector<int64_t>& sizes) const {
    torch::stable::Tensor t = flowkernels::empty(like_, sizes);
    std::fill_n(static_cast<T*>(t.mutable_data_ptr()), t.numel(), std::numeric_limits<T>::quiet_NaN());
    return t;
  }

  void up(const UpArgs<T>& args) const { product<UpTile>(args, args.outputs); }
  void down(const DownArgs<T>& args) const { product<DownTile>(args, args.inputs); }

  void across(AcrossArgs<T>& args) const {
    using Shape = SmallTile<T>;
    const int64_t blocks = place_blocks(args, [](const WeightGradient<T>& of) { return AcrossTile<Shape>::blocks(of); });
    const int64_t shares = shares_of(args, blocks, layout_.processors);
    torch::stable::Tensor parts = empty({shares, args.parts_size});
    if (shares > 1) args.parts = static_cast<T*>(parts.mutable_data_ptr());
    for (int64_t block = 0; block < blocks; ++block)
      for (int share = 0; share < shares; ++share) run_product<AcrossTile<Shape>, Shape>(args, block, share, layout_.backwards);
    if (shares == 1) return;
    constexpr int kThreads = 256;
    const int64_t adding = place_blocks(args, [](const WeightGradient<T>& of) { return of.size() / of.outputs * tiles_of(of.outputs, kThreads); });
    for (int64_t block = 0; block < adding; ++block) {
      const int i = gradient_of(args, block);
      const int64_t side = tiles_of(args.of[i].outputs, kThreads), own = block - args.of[i].first_block;
      for (int t = 0; t < kThreads; ++t) add_parts(args, static_cast<int>(shares), i, own / side, static_cast<int>(own % side * kThreads + t));
    }
  }

  void to_order(int64_t batch, const ToOrder<T>& args) const {
    rows(batch, [&](int64_t row) { lanes([&](int lane) { args.take(row, lane); }); });
  }
  void map(const MapArgs<T>& args) const {
    rows(args.batch, [&](int64_t row) {
      T logs[32];
      lanes([&](int lane) { args.map(row, lane, logs); });
      for (int half = 16; half > 0; half /= 2) lanes([&](int lane) { args.halve(logs, lane, half); });
      lanes([&](int lane) { args.hand_on(row, lane, logs); });
    });
  }
  void map_backward(const MapBackwardArgs<T>& args) const {
    rows(args.batch, [&](int64_t row) {
      lanes([&](int lane) { args.from_above(row, lane); });
      lanes([&](int lane) { args.map(row, lane); });
    });
  }
  void unitwise_up(const UnitwiseUpArgs<T>& args) const {
    for (int64_t i = 0; i < args.count(); ++i) args.take(i);
  }
  void settle(const SettleArgs<T>& args) const {
    for (int64_t i = 0; i < args.count(); ++i) args.take(i);
  }
  void column_sum(const ColumnSumArgs<T>& args) const {
    typename ColumnSumArgs<T>::Sums sums;
    constexpr int kThreads = ColumnSumArgs<T>::kColumns * ColumnSumArgs<T>::kLanes;
    for (int block = 0; block < tiles_of(args.columns, args.kColumns); ++block) {
      all_threads(kThreads, layout_.backwards, [&](int t) { args.add(block, t, sums); });
      all_threads(kThreads, layout_.backwards, [&](int t) { args.finish(block, t, sums); });
    }
  }

 private:
  const torch::stable::Tensor& like_;
  TrainingLayout layout_;

  template <template <class> class Tile, class Args>
  void product(const Args& args, int columns) const {
    with_tile<T>(args.batch, columns, layout_.processors, [&](auto shape) {
      using Shape = decltype(shape);
      for (int64_t block = 0; block < Tile<Shape>::blocks(args); ++block) run_product<Tile<Shape>, Shape>(args, block, 0, layout_.backwards);
    });
  }

  template <class F>
  static void rows(int64_t batch, const F& f) {
    for (int64_t row = 0; row < batch; ++row) f(row);
  }
  template <class F>
  void lanes(const F& f) const {
    all_threads(32, layout_.backwards, f);
  }
};

}  // namespace
}  // namespace flowkernels
