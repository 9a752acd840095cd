// How the CUDA kernel of the factorisation is launched and where it keeps things: arithmetic alone, so that a CPU can test it.
#pragma once

#include <cstdint>

namespace flowkernels {

// A block owns a matrix, [n][ld], as long as the block lives. It lies in shared memory where it fits, else in a workspace in global
// memory, of which each block has its own part: with the 227 KB of an sm_90 (163 KB of an sm_80) that is beyond n = 238 (201) in
// float32 and n = 167 (141) in float64.
struct LuPlan {
  int64_t ld;            // odd, so that a column's elements are in different banks
  int64_t shared_bytes;  // dynamic shared memory of a block
  int64_t workspace;     // elements of global memory of a block; 0 where the matrix is in shared memory
  int64_t blocks;        // each takes every blocks-th matrix
  int warps;
};

// elements beside the matrix: pivot row, replaced row, multipliers, pivots
constexpr int64_t lu_vectors(int64_t n) { return 4 * n; }

inline LuPlan lu_plan(int64_t n, int64_t batch, int64_t item_bytes, int64_t shared_limit) {
  LuPlan plan{};
  plan.ld = n | 1;
  const int64_t vectors = lu_vectors(n) * item_bytes + n * static_cast<int64_t>(sizeof(int32_t));
  const int64_t matrix = n * plan.ld * item_bytes;
  const bool fits = vectors + matrix <= shared_limit;
  plan.shared_bytes = fits ? vectors + matrix : vectors;
  plan.workspace = fits ? 0 : n * plan.ld;
  const int64_t most = fits ? INT32_MAX : 256;  // a workspace of 256 blocks keeps every multiprocessor busy, and is bounded
  plan.blocks = batch < most ? batch : most;
  plan.warps = n <= 16 ? 2 : n <= 32 ? 4 : n <= 64 ? 8 : 16;
  return plan;
}

}  // namespace flowkernels
