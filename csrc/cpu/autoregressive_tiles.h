// How a batch is cut into tiles of rows, and which form of the loop each tile runs. Included once per instruction set.

#include "cpu/columns.h"
#include "cpu/staircase_kernel.h"
#include "cpu/autoregressive_kernel.h"

namespace flowkernels {
namespace FK_TARGET {

constexpr int64_t kFewRows = 4;                      // up to here, lanes are units
constexpr int64_t kTileRows = 4 * kRowVectors;        // vectors of rows in a full tile
constexpr int64_t kScratchBytes = 7 * 512 * 1024;     // of one thread; larger networks take narrower tiles

template <class T>
int64_t padded_units(const AutoregressiveArgs<T>& args) {
  int64_t units = args.features;
  for (int l = 0; l < args.n_layers; ++l) units += args.layers[l].outputs;
  return (units + lanes<T> - 1) / lanes<T> * lanes<T>;
}

template <class T>
Tiling plan_tiles(const AutoregressiveArgs<T>& args, int64_t batch, int64_t threads) {
  const int64_t per_thread = (batch + threads - 1) / threads;
  if (per_thread <= kFewRows) return {true, 1, batch, per_thread, smaller(threads, batch), 1};
  const int64_t units = padded_units(args), all = (batch + lanes<T> - 1) / lanes<T>, shares = smaller(threads, all);
  int64_t full = kTileRows;
  while (full > 1 && RowLanes<T>::scratch(args, units, full * lanes<T>) * int64_t(sizeof(T)) > kScratchBytes) full = (full + 1) / 2;
  const int64_t most = (all + shares - 1) / shares;
  return {false, lanes<T>, all, smaller(full, most), shares, (most + full - 1) / full};
}

template <class T, int B>
void run_few(const AutoregressiveArgs<T>& args, int64_t first_row, const int64_t* offsets, int64_t units) {
  T* scratch = static_cast<T*>(thread_scratch(UnitLanes<T, B>::scratch(args, units) * sizeof(T)));
  UnitLanes<T, B> state(args, offsets, units, first_row, scratch);
  run_tile(state, args);
}

// One map on n rows from `row` on, where `most` rows are those of the largest tile: what is kept for it need not grow
template <class T>
FK_CALL void run_rows(const AutoregressiveArgs<T>& args, bool few, int64_t row, int64_t n, int64_t most) {
  const int64_t units = padded_units(args);
  int64_t* offsets = static_cast<int64_t*>(__builtin_alloca((args.n_layers + 1) * sizeof(int64_t)));
  offsets[0] = 0;
  for (int l = 0; l < args.n_layers; ++l) offsets[l + 1] = offsets[l] + (l ? args.layers[l - 1].outputs : args.features);
  if (few) {
    switch (n) {
      case 1: return run_few<T, 1>(args, row, offsets, units);
      case 2: return run_few<T, 2>(args, row, offsets, units);
      case 3: return run_few<T, 3>(args, row, offsets, units);
      default: return run_few<T, 4>(args, row, offsets, units);
    }
  }
  const int64_t padded = (n + lanes<T> - 1) / lanes<T> * lanes<T>;
  T* scratch = static_cast<T*>(thread_scratch(RowLanes<T>::scratch(args, units, most) * sizeof(T)));
  RowLanes<T> state(args, offsets, units, row, n, padded, scratch);
  run_tile(state, args);
}

// Each tile passes through the whole stack of maps before the next begins; a map after the first reads what the one before it wrote.
template <class T>
void run_tiles(const AutoregressiveArgs<T>* maps, int64_t n_maps, const Tiling& tiling, int64_t first, int64_t last) {
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t row = tiling.begin(tile), n = smaller(tiling.begin(tile + 1), maps[0].batch) - row;
    for (int64_t i = 0; i < n_maps && n > 0; ++i) run_rows(maps[i], tiling.few, row, n, tiling.rows());
  }
}

}  // namespace FK_TARGET
}  // namespace flowkernels
