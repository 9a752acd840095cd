// How a batch is cut into tiles of rows, and which form of the loop each tile runs. Included once per instruction set.

#include "cpu/columns.h"
#include "cpu/staircase_kernel.h"
#include "cpu/autoregressive_kernel.h"

namespace flowkernels {
namespace FK_TARGET {

constexpr int64_t kTileVectors = 4 * kRowVectors;  // of rows, in a full tile
constexpr int64_t kScratchBytes = 7 * 512 * 1024;  // of one thread; larger networks take narrower tiles
// Small networks take wider ones: less of their time is spent between products. No more than what stays in the second-level cache.
constexpr int64_t kWideTileRows = 384, kWideScratchBytes = 512 * 1024;

// Units of all layers, the features first, each layer's beginning at a multiple of `step`; offsets: where, unless null.
template <class T>
int64_t place_units(const AutoregressiveArgs<T>& args, int64_t step, int64_t* offsets) {
  int64_t end = 0;
  for (int l = 0; l <= args.n_layers; ++l) {
    if (offsets) offsets[l] = end;
    end += ((l ? args.layers[l - 1].outputs : args.features) + step - 1) / step * step;
  }
  return end;
}

template <class T>
Tiling plan_tiles(const AutoregressiveArgs<T>& args, int64_t batch, int64_t threads) {
  const int64_t per_thread = (batch + threads - 1) / threads;
  if (per_thread <= UnitLanes<T>::kMostRows) return {true, 1, batch, per_thread, smaller(threads, batch), 1};
  const int64_t units = place_units(args, 1, nullptr), all = (batch + lanes<T> - 1) / lanes<T>, shares = smaller(threads, all);
  const auto bytes = [&](int64_t vectors) { return RowLanes<T>::scratch(args, units, vectors * lanes<T>) * int64_t(sizeof(T)); };
  int64_t full = kTileVectors;
  while (full > 1 && bytes(full) > kScratchBytes) full = (full + 1) / 2;
  while ((full + kRowVectors) * lanes<T> <= kWideTileRows && bytes(full + kRowVectors) <= kWideScratchBytes) full += kRowVectors;
  const int64_t most = (all + shares - 1) / shares;
  return {false, lanes<T>, all, smaller(full, most), shares, (most + full - 1) / full};
}

// Whether these rows have the same context, bit for bit: samples given one observation, or some observations in turn. All maps that take a
// context take the same.
template <class T>
bool have_one_context(const AutoregressiveArgs<T>* maps, int64_t n_maps, int64_t row, int64_t n) {
  for (int64_t i = 0; i < n_maps; ++i) {
    const int64_t columns = maps[i].context_features;
    if (columns == 0) continue;
    const Strided<T>& context = maps[i].context;
    const T* first = context.data + row * context.row;
    for (int64_t r = 1; r < n && context.row != 0; ++r) {
      const T* other = first + r * context.row;
      for (int64_t c = 0; c < columns; ++c)
        if (__builtin_memcmp(other + c * context.column, first + c * context.column, sizeof(T)) != 0) return false;
    }
    return true;
  }
  return false;
}

// One map on n rows from `row` on. handed: what the map before handed on, which is returned
template <class T>
FK_CALL const T* run_rows(const AutoregressiveArgs<T>& args, bool few, int64_t row, int64_t n, T* scratch, bool one_context, const T* handed,
                          bool hands_on) {
  int64_t* offsets = static_cast<int64_t*>(__builtin_alloca((args.n_layers + 1) * sizeof(int64_t)));
  const int64_t units = place_units(args, few ? lanes<T> : 1, offsets);
  if (few) {
    UnitLanes<T> state(args, offsets, units, row, n, static_cast<T*>(thread_scratch(UnitLanes<T>::scratch(args, units, n) * sizeof(T))));
    state.begin();
    run_all_steps(state, args);
    state.end();
    return nullptr;
  }
  RowLanes<T> state(args, offsets, units, row, n, whole_vectors<T>(n), scratch, one_context);
  state.begin(handed);
  run_all_steps(state, args);
  return state.end(hands_on);
}

// Each tile passes through the whole stack of maps before the next begins; a map after the first takes what the one before it made.
template <class T>
void run_tiles(const AutoregressiveArgs<T>* maps, int64_t n_maps, const Tiling& tiling, int64_t first, int64_t last) {
  int64_t most = 0;  // of the largest tile: scratch need not grow
  for (int64_t i = 0; i < n_maps && !tiling.few; ++i) {
    const int64_t own = RowLanes<T>::scratch(maps[i], place_units(maps[i], 1, nullptr), tiling.rows());
    if (own > most) most = own;
  }
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t row = tiling.begin(tile), n = smaller(tiling.begin(tile + 1), maps[0].batch) - row;
    T* scratch = most > 0 ? static_cast<T*>(thread_scratch(most * sizeof(T))) : nullptr;
    const bool one_context = !tiling.few && n > lanes<T> && have_one_context(maps, n_maps, row, n);
    const T* handed = nullptr;
    for (int64_t i = 0; i < n_maps && n > 0; ++i) {
      const bool hands_on = i + 1 < n_maps && maps[i + 1].y == maps[i].y;  // nobody else will see it
      handed = run_rows(maps[i], tiling.few, row, n, scratch, one_context, handed, hands_on);
    }
  }
}

}  // namespace FK_TARGET
}  // namespace flowkernels
