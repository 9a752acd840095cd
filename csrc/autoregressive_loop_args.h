// The arguments of the sequential loop in CUDA: a conditioner's layers, the state of a tile, and the sizes that the schedule, the launch and
// the kernel share.
#pragma once

#include <cstdint>

#include "cuda/device_math.h"

namespace flowkernels {

constexpr int kMaxLayers = 32;  // beyond them Python runs the reference: all layers are one kernel argument
constexpr int kRun = 32;        // inputs in one chain of multiply-adds
constexpr int kRowsApart = 16;  // of a tile whose last layer's sums are in a workspace
constexpr int kSlots = 3;       // stages in shared memory: one is used, one has landed or is landing, one is asked for
constexpr int kBlockUnits = 224;  // units of one block of weights: one each for the consumers, at 8 rows
constexpr int kNearUnits = 64;    // of the last layer in a panel, at most
constexpr int kPanelUnits = 64;   // of any layer in a panel whose sums are in registers,
constexpr int kRegisterLayers = 3;  // and its layers, at most
template <class T>
constexpr int kMostRows = sizeof(T) == 8 ? 4 : 32;  // of a tile; and of each whose state is not in shared memory

// Elements from one unit to the next in the state of a tile: lanes read the same 4 rows of units side by side, and 32 rows are all banks.
FK_INLINE constexpr int unit_stride(int rows) { return rows == 32 ? 36 : rows; }

// of a tile, the rows of a panel that one warp takes: as few as eight warps leave
FK_INLINE constexpr int panel_rows(int rows) { return rows <= 8 ? 1 : rows / 8; }

FK_INLINE int smaller(int a, int b) { return a < b ? a : b; }
FK_INLINE int larger(int a, int b) { return a > b ? a : b; }
FK_INLINE int up_to_multiple(int n, int of) { return (n + of - 1) / of * of; }

// One layer of the conditioner, as in cpu/autoregressive.h, and where its values are: values 0 are the features.
template <class T>
struct LoopLayer {
  const T* weight;  // [inputs, outputs], row stride ld; of a unitwise layer [outputs], or null for ones
  int64_t ld;
  const T* bias;            // [outputs]; null for zeros
  const T* context_weight;  // [context features, outputs], row stride context_ld; null without context
  int64_t context_ld;
  const T* context_bias;
  const int32_t* visible;  // [outputs], ascending
  int inputs, outputs;
  int activation, context_activation;
  int source, residual;  // residual -1 for none
  int first, gates;      // first unit of its values, and of its gates, in the state of a tile; gates -1 for none
  int column, known;     // mirrored: first column of its deltas, -1 for none, and in args.made of what its gate is made of, likewise
  bool unitwise, gate;
  bool takes_context;  // also where there are no units, whose weights have no data
  bool gate_as_is;     // mirrored: otherwise it is the derivative of context_activation; times `bias`, where there is one

  // whether the context term is finished before it meets the sum
  FK_INLINE bool own_context_term() const { return gate || context_bias || context_activation != static_cast<int>(Activation::identity); }
};

template <class T>
struct LoopArgs {
  int n_layers, features, context_features;
  int context;      // first unit of the context in the state of a tile
  int units;        // of the state
  int panel_steps, panel_capacity;  // steps of a panel, and how many elements its weights may have to be one stage
  int capacity;                     // elements of weights that a block may have
  int slot_chunks;                  // 16 bytes each
  int rows, consumers;              // of a tile; threads that compute
  int most_stages, most_chunks;     // that this can take
  bool is_too_large;                // to count them: 34 GB of images
  bool apart;                       // the last layer's sums are in a workspace; those of a panel come near, to where they would begin
  bool inverse;
  bool in_registers;  // panels that fit are run with their sums in registers
  bool bfloat16_weights;  // matrices are rounded: blocks hold them as Bfloat16, panels widened again
  const T *x, *context_rows;
  int64_t x_row, x_column, context_row, context_column, batch;
  const int64_t* order;  // feature generated k-th; null for 0, 1, 2, ...
  int form;
  ScaleMapParams scale;
  T *y, *logabsdet;   // contiguous
  const T* affine;    // null, or [3, features]: what is read of x is (x + affine[0]) * affine[1] + affine[2]
  bool accumulate;    // logabsdet holds that of the maps before
  // of a mirrored network alone: x is the gradient by x, the context is x itself with one more unit for dlogabsdet, y is dz
  bool mirrored;
  const T* made;  // row stride made_row: what the layers of the network itself gave
  int64_t made_row, dlogabsdet_step;
  const T* dlogabsdet;
  T* deltas;  // row stride deltas_row: the gradients by the sums of its layers
  int64_t deltas_row;
  int known_outputs, column_outputs;  // first columns of the outputs, in made and in deltas
  const int32_t* visible_above[kMaxLayers];  // the staircase that layer l is the mirror of

  int32_t* schedule;      // ScheduleSpace
  unsigned char* packed;  // the images of all stages, one after another, as they lie in a slot
  T* workspace;       // [blocks][units][rows]: what of the state is not in shared memory
  LoopLayer<T> layers[kMaxLayers];  // at the end: of a stack's maps, only the layers in use are given to a kernel

  FK_INLINE const LoopLayer<T>& layer(int l) const { return layers[l - 1]; }
  FK_INLINE int first_unit(int l) const { return l == 0 ? 0 : layer(l).first; }
  FK_INLINE int per_feature() const { return mirrored ? 2 : 1; }     // values 0
  FK_INLINE int sums_per_feature() const { return mirrored ? 1 : 2; }  // of the last layer
  FK_INLINE int width(int l) const { return l == 0 ? per_feature() * features : layer(l).outputs; }
  FK_INLINE int block_item() const { return bfloat16_weights ? 2 : static_cast<int>(sizeof(T)); }  // bytes of a weight in a block
  // what of the state is in shared memory; the last layer's sums are last
  FK_INLINE int units_in_shared(bool are_apart) const { return are_apart ? units - layer(n_layers).outputs + kNearUnits : units; }
  FK_INLINE int units_in_shared() const { return units_in_shared(apart); }
  FK_INLINE int units_in_workspace(bool state_in_shared) const { return !state_in_shared ? units : apart ? layer(n_layers).outputs : 0; }
  // steps of the inverse, at most; after the last feature, a mirrored network has units that only its deltas reach
  FK_INLINE int most_steps() const { return inverse ? features + (mirrored ? 1 : 0) : 1; }
  FK_INLINE int column(int l) const { return l == 0 ? column_outputs : layer(l).column; }
};

}  // namespace flowkernels
