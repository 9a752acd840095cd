// Matrix products of a training step, a block of threads to a tile of the result: what their tiles share. Device code, and its twin's
// (tests/autoregressive_training_twin.cpp).
//
// With c counting what is summed over, a tile of the result is C[i, j] = sum_c left[i, c] right[c, j]. A chunk of c at a time lies in a slot
// of shared memory as left[c][i] and right[c][j]; copies of single elements bring it there, so that no layout or alignment needs a case of
// its own. Every element is one chain of multiply-adds over c in ascending order, whatever the
// shape of the tile: a row has the same bits in every batch.
//
// Floor, in float32: a multiprocessor of an H100 does 128 multiply-adds a cycle, one of an A100 64. A warp's fragments are 2, 3 or 4 reads of 16
// bytes for 16, 32 or 64 multiply-adds (narrow, small and large tiles), and a chunk's copies take each thread some 3 instructions for each of
// 12, 16 or 8 elements: by count of the compiled code, multiply-adds are two thirds, three quarters and five sixths of what a warp does. Whether
// the few warps of a small batch hide each other's waits, no count tells.
#pragma once

#include "cuda/device_math.h"
#include "cuda/pack.h"

namespace flowkernels {

constexpr int kProductSlots = 3;  // chunks in shared memory: one is used, one has landed or is landing, one is asked for

template <class T_, int ROWS, int COLUMNS, int DEPTH, int THREAD_ROWS, int THREAD_COLUMNS>
struct TileShape {
  using T = T_;
  static constexpr int rows = ROWS, columns = COLUMNS, depth = DEPTH;
  static constexpr int thread_rows = THREAD_ROWS, thread_columns = THREAD_COLUMNS;
  static constexpr int across = COLUMNS / THREAD_COLUMNS;  // threads side by side
  static constexpr int threads = ROWS / THREAD_ROWS * across;
  static constexpr int group = COLUMNS / (THREAD_COLUMNS / 4);  // a thread's columns are fours so far apart: its neighbour reads the next bank
  static constexpr int pad = 16 / static_cast<int>(sizeof(T));
  static constexpr int whole = 16384 / (COLUMNS * static_cast<int>(sizeof(T)));
  static constexpr int finish_rows = whole < ROWS ? whole : ROWS;  // of the result, in shared memory at a time
  static_assert(THREAD_ROWS % 4 == 0 && THREAD_COLUMNS % 4 == 0 && ROWS % finish_rows == 0 && finish_rows % THREAD_ROWS == 0);
  static_assert(threads % DEPTH == 0 && threads % COLUMNS == 0 && threads % ROWS == 0 && threads >= DEPTH);
};

template <class T>
using NarrowTile = TileShape<T, 32, 64, sizeof(T) == 4 ? 16 : 8, 4, 4>;
template <class T>
using SmallTile = TileShape<T, 64, 64, sizeof(T) == 4 ? 16 : 8, 8, 4>;
using LargeTile = TileShape<float, 128, 128, 8, 8, 8>;  // in float64 its sums would not fit the registers

template <class Shape>
struct ProductSlot {
  using T = typename Shape::T;
  alignas(16) T left[Shape::depth][Shape::rows + Shape::pad];
  alignas(16) T right[Shape::depth][Shape::columns + Shape::pad];
  int32_t visible[Shape::depth];  // of what is summed over, where that is outputs
};

template <class Shape>
union ProductMemory {
  ProductSlot<Shape> slots[kProductSlots];
  typename Shape::T finished[Shape::finish_rows][Shape::columns];
};
static_assert(sizeof(ProductMemory<NarrowTile<double>>) <= 48 << 10 && sizeof(ProductMemory<SmallTile<float>>) <= 48 << 10 && sizeof(ProductMemory<SmallTile<double>>) <= 48 << 10 &&
              sizeof(ProductMemory<LargeTile>) <= 48 << 10);

// A matrix whose rows lie side by side
template <class T>
struct Matrix {
  const T* data;
  int64_t ld;
};

// A rectangle of a matrix: rows from `row` up to row_end, columns from `column` up to column_end
template <class T>
struct Rectangle {
  Matrix<T> of;
  int64_t row, row_end, column, column_end;
};

// to(r, c) = the rectangle's element (r, c), 0 outside of it, for ROWS x COLUMNS of them by THREADS threads; the columns lie side by side
template <int ROWS, int COLUMNS, int THREADS, class T, class To, class Copies>
FK_INLINE void bring(const Rectangle<T>& from, int thread, Copies& copies, const To& to) {
  constexpr int kStep = THREADS / COLUMNS;
  static_assert(THREADS % COLUMNS == 0 && ROWS % kStep == 0);
  const int c = thread % COLUMNS, r = thread / COLUMNS;
  const T* at = from.of.data + (from.row + r) * from.of.ld + from.column + c;
  if (from.row + ROWS <= from.row_end && from.column + COLUMNS <= from.column_end) {
    FK_UNROLL
    for (int i = 0; i < ROWS / kStep; ++i) copies.copy(to(r + i * kStep, c), at + i * kStep * from.of.ld);
  } else {
    const bool has_column = from.column + c < from.column_end;
    FK_UNROLL
    for (int i = 0; i < ROWS / kStep; ++i) {
      const bool inside = has_column && from.row + r + i * kStep < from.row_end;
      copies.copy(to(r + i * kStep, c), inside ? at + i * kStep * from.of.ld : from.of.data, inside);
    }
  }
}

// What is summed over counts the rows of the rectangle, or, turned, its columns
template <class Shape, class Copies>
FK_INLINE void bring_left(ProductSlot<Shape>& slot, const Rectangle<typename Shape::T>& from, int thread, Copies& copies) {
  bring<Shape::depth, Shape::rows, Shape::threads>(from, thread, copies, [&](int r, int c) { return &slot.left[r][c]; });
}
template <class Shape, class Copies>
FK_INLINE void bring_left_turned(ProductSlot<Shape>& slot, const Rectangle<typename Shape::T>& from, int thread, Copies& copies) {
  bring<Shape::rows, Shape::depth, Shape::threads>(from, thread, copies, [&](int r, int c) { return &slot.left[c][r]; });
}
template <class Shape, class Copies>
FK_INLINE void bring_right(ProductSlot<Shape>& slot, const Rectangle<typename Shape::T>& from, int thread, Copies& copies) {
  bring<Shape::depth, Shape::columns, Shape::threads>(from, thread, copies, [&](int r, int c) { return &slot.right[r][c]; });
}
template <class Shape, class Copies>
FK_INLINE void bring_right_turned(ProductSlot<Shape>& slot, const Rectangle<typename Shape::T>& from, int thread, Copies& copies) {
  bring<Shape::columns, Shape::depth, Shape::threads>(from, thread, copies, [&](int r, int c) { return &slot.right[c][r]; });
}

// What a thread has of a tile
template <class Shape>
struct ThreadTile {
  using T = typename Shape::T;
  T sums[Shape::thread_rows][Shape::thread_columns];

  FK_INLINE static int row(int thread) { return thread / Shape::across * Shape::thread_rows; }
  FK_INLINE static int column(int thread, int n) { return n / 4 * Shape::group + thread % Shape::across * 4 + n % 4; }

  FK_INLINE void clear() {
    FK_UNROLL
    for (int m = 0; m < Shape::thread_rows; ++m) {
      FK_UNROLL
      for (int n = 0; n < Shape::thread_columns; ++n) sums[m][n] = T(0);
    }
  }

  // sees(c, n): whether the thread's column n takes part in c of this chunk. What does not is left out, not multiplied by 0, which an
  // infinity would survive
  template <class Sees>
  FK_INLINE void multiply(const ProductSlot<Shape>& slot, int thread, const Sees& sees) {
    FK_UNROLL
    for (int c = 0; c < Shape::depth; ++c) {
      Pack<T, 4> left[Shape::thread_rows / 4], right[Shape::thread_columns / 4];
      FK_UNROLL
      for (int i = 0; i < Shape::thread_rows / 4; ++i) left[i] = *reinterpret_cast<const Pack<T, 4>*>(&slot.left[c][row(thread) + 4 * i]);
      FK_UNROLL
      for (int i = 0; i < Shape::thread_columns / 4; ++i)
        right[i] = *reinterpret_cast<const Pack<T, 4>*>(&slot.right[c][column(thread, 4 * i)]);
      FK_UNROLL
      for (int n = 0; n < Shape::thread_columns; ++n) {
        if (!sees(c, n)) continue;
        FK_UNROLL
        for (int m = 0; m < Shape::thread_rows; ++m) sums[m][n] = scalar::fma(left[m / 4].at[m % 4], right[n / 4].at[n % 4], sums[m][n]);
      }
    }
  }

  FK_INLINE void multiply(const ProductSlot<Shape>& slot, int thread) {
    multiply(slot, thread, [](int, int) { return true; });
  }

  // its rows among those of one piece of the tile
  FK_INLINE void put(ProductMemory<Shape>& memory, int piece, int thread) const {
    const int first = row(thread) - piece * Shape::finish_rows;
    if (first < 0 || first >= Shape::finish_rows) return;
    FK_UNROLL
    for (int m = 0; m < Shape::thread_rows; ++m) {
      FK_UNROLL
      for (int n = 0; n < Shape::thread_columns; n += 4)
        *reinterpret_cast<Pack<T, 4>*>(&memory.finished[first + m][column(thread, n)]) = {sums[m][n], sums[m][n + 1], sums[m][n + 2], sums[m][n + 3]};
    }
  }
};

// take(row of the tile, column of the tile, sum) for the thread's share of a piece of rows x columns
template <class Shape, class Take>
FK_INLINE void each_finished(const ProductMemory<Shape>& memory, int piece, int64_t rows, int64_t columns, int thread, const Take& take) {
  const int j = thread % Shape::columns, first = piece * Shape::finish_rows;
  if (j >= columns) return;
  FK_KEEP_LOOP
  for (int i = thread / Shape::columns; i < Shape::finish_rows && first + i < rows; i += Shape::threads / Shape::columns)
    take(first + i, j, memory.finished[i][j]);
}

}  // namespace flowkernels
