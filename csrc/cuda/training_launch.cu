// The kernels of a training step, and their launches. What their threads do is in training_products.h and training_rows.h; here: the
// barriers, and the copies ahead of use.

#include "cuda/training_launch.h"

#include <algorithm>

#include "autoregressive_training_ops.h"
#include "cuda/launch.h"

namespace flowkernels {
namespace {

using torch::stable::Tensor;

// How many of the first entries of an ascending list are at most k. All lanes of a warp ask alike.
struct WarpSearch {
  __device__ __forceinline__ int operator()(const int32_t* list, int n, int k) const {
    const int lane = threadIdx.x % 32;
    int low = 0;  // the entries before it are at most k, those from low + size on are not
    for (int size = n; size > 0;) {
      const int step = (size + 31) / 32, at = low + lane * step;
      const int found = __popc(__ballot_sync(0xffffffffu, at < low + size && list[at] <= k));
      if (found == 0) break;
      const int last = low + (found - 1) * step, end = low + size;  // known to be at most k
      low = last + 1;
      size = (last + step < end ? last + step : end) - low;
    }
    return low;
  }
};

template <class Tile, class Shape>
__device__ __forceinline__ void run_product(const typename Tile::Args& args, int64_t block, int share) {
  __shared__ ProductMemory<Shape> memory;
  const int thread = threadIdx.x;
  const AsyncCopies copies;
  const Tile tile(args, block, share, WarpSearch{});
  const int chunks = tile.chunks();
  ThreadTile<Shape> own;
  own.clear();
  typename Shape::T beside = 0;
  for (int i = 0; i < kProductSlots - 1; ++i) {
    if (i < chunks) tile.bring_chunk(i, memory.slots[i], thread, copies);
    copies.commit();
  }
  for (int i = 0, slot = 0; i < chunks; ++i, slot = slot == kProductSlots - 1 ? 0 : slot + 1) {
    copies.wait<kProductSlots - 2>();
    __syncthreads();  // this chunk has landed, for all; the slot before is not read any more
    const int ahead = i + kProductSlots - 1;
    if (ahead < chunks) tile.bring_chunk(ahead, memory.slots[slot == 0 ? kProductSlots - 1 : slot - 1], thread, copies);
    copies.commit();
    tile.multiply(i, memory.slots[slot], thread, own);
    tile.beside(memory.slots[slot], thread, beside);
  }  // no copy is on its way: the last groups are empty
  for (int piece = 0; piece < Shape::rows / Shape::finish_rows; ++piece) {
    __syncthreads();  // nobody reads what was here
    own.put(memory, piece, thread);
    __syncthreads();
    tile.finish(memory, piece, thread, beside);
  }
}

template <class Shape>
__global__ void __launch_bounds__(Shape::threads, 2) training_up(const __grid_constant__ UpArgs<typename Shape::T> args) {
  run_product<UpTile<Shape>, Shape>(args, blockIdx.x, 0);
}
template <class Shape>
__global__ void __launch_bounds__(Shape::threads, 2) training_down(const __grid_constant__ DownArgs<typename Shape::T> args) {
  run_product<DownTile<Shape>, Shape>(args, blockIdx.x, 0);
}
template <class Shape>
__global__ void __launch_bounds__(Shape::threads, 2) training_across(const __grid_constant__ AcrossArgs<typename Shape::T> args) {
  run_product<AcrossTile<Shape>, Shape>(args, blockIdx.x, blockIdx.y);
}

constexpr int kThreads = 256;  // of kernels without a tile

template <class T>
__global__ void training_add_parts(const __grid_constant__ AcrossArgs<T> args, int shares) {
  const int i = gradient_of(args, blockIdx.x);
  const int64_t side = tiles_of(args.of[i].outputs, kThreads), own = blockIdx.x - args.of[i].first_block;
  add_parts(args, shares, i, own / side, static_cast<int>(own % side * kThreads + threadIdx.x));
}

// the row of a warp; false where there is none
__device__ __forceinline__ bool row_of_warp(int64_t batch, int64_t& row) {
  row = blockIdx.x * static_cast<int64_t>(kRowWarps) + threadIdx.x / 32;
  return row < batch;
}

template <class T>
__global__ void training_to_order(const __grid_constant__ ToOrder<T> args, int64_t batch) {
  int64_t row;
  if (row_of_warp(batch, row)) args.take(row, threadIdx.x % 32);
}

template <class T>
__global__ void training_map(const __grid_constant__ MapArgs<T> args) {
  __shared__ T all_logs[kRowWarps][32];
  int64_t row;
  if (!row_of_warp(args.batch, row)) return;
  const int lane = threadIdx.x % 32;
  T* logs = all_logs[threadIdx.x / 32];
  args.map(row, lane, logs);
  for (int half = 16; half > 0; half /= 2) {
    __syncwarp();
    args.halve(logs, lane, half);
  }  // lane 0 has the sum, and y was written before the first barrier
  args.hand_on(row, lane, logs);
}

template <class T>
__global__ void training_map_backward(const __grid_constant__ MapBackwardArgs<T> args) {
  int64_t row;
  if (!row_of_warp(args.batch, row)) return;
  args.from_above(row, threadIdx.x % 32);
  __syncwarp();
  args.map(row, threadIdx.x % 32);
}

// UnitwiseUpArgs or SettleArgs
template <class Args>
__global__ void training_each_unit(const __grid_constant__ Args args) {
  const int64_t count = args.count(), step = gridDim.x * static_cast<int64_t>(kThreads);
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < count; i += step) args.take(i);
}

template <class T>
__global__ void __launch_bounds__(ColumnSumArgs<T>::kColumns * ColumnSumArgs<T>::kLanes, 1) training_column_sum(const __grid_constant__ ColumnSumArgs<T> args) {
  __shared__ typename ColumnSumArgs<T>::Sums sums;
  args.add(blockIdx.x, threadIdx.x, sums);
  __syncthreads();
  args.finish(blockIdx.x, threadIdx.x, sums);
}

}  // namespace

template <class T>
CudaLaunch<T>::CudaLaunch(const Tensor& like)
    : like_(like), stream_(current_stream(like.get_device_index())), processors_(device_of(like.get_device_index()).multiprocessors) {}

// new_empty would look its operator up by name
template <class T>
Tensor CudaLaunch<T>::empty(const std::vector<int64_t>& sizes) const {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  int32_t dtype = 0, device = 0;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like_.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like_.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, device,
                                                  like_.get_device_index(), &handle));
  return Tensor(handle);
}

template <class T>
template <template <class> class Tile, class Args, class Kernel>
void CudaLaunch<T>::product(const Args& args, int columns, const Kernel& kernel_of) const {
  with_tile<T>(args.batch, columns, processors_, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t blocks = Tile<Shape>::blocks(args);
    if (blocks == 0) return;
    launch_kernel(kernel_of(shape), static_cast<unsigned>(blocks), Shape::threads, 0, stream_, args);
  });
}

template <class T>
template <class Kernel, class... Args>
void CudaLaunch<T>::rows(int64_t batch, Kernel kernel, const Args&... args) const {
  if (batch == 0) return;
  launch_kernel(kernel, static_cast<unsigned>(tiles_of(batch, kRowWarps)), 32 * kRowWarps, 0, stream_, args...);
}

template <class T>
template <class Args>
void CudaLaunch<T>::each_unit(const Args& args) const {
  if (args.count() == 0) return;
  const int64_t most = int64_t(processors_) * 8, blocks = tiles_of(args.count(), kThreads);
  launch_kernel(training_each_unit<Args>, static_cast<unsigned>(blocks < most ? blocks : most), kThreads, 0, stream_, args);
}

template <class T>
void CudaLaunch<T>::up(const UpArgs<T>& args) const {
  product<UpTile>(args, args.outputs, [](auto shape) { return &training_up<decltype(shape)>; });
}

template <class T>
void CudaLaunch<T>::down(const DownArgs<T>& args) const {
  product<DownTile>(args, args.inputs, [](auto shape) { return &training_down<decltype(shape)>; });
}

template <class T>
void CudaLaunch<T>::across(AcrossArgs<T>& args) const {
  using Shape = SmallTile<T>;
  const int64_t blocks = place_blocks(args, [](const WeightGradient<T>& of) { return AcrossTile<Shape>::blocks(of); });
  const int64_t shares = shares_of(args, blocks, processors_);
  if (blocks == 0) return;
  Tensor parts = empty({shares > 1 ? shares : 0, args.parts_size});
  if (shares > 1) args.parts = static_cast<T*>(parts.mutable_data_ptr());
  launch_kernel(training_across<Shape>, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(shares)), Shape::threads, 0, stream_, args);
  if (shares == 1) return;
  const int64_t adding = place_blocks(args, [](const WeightGradient<T>& of) { return of.size() / of.outputs * tiles_of(of.outputs, kThreads); });
  if (adding == 0) return;
  launch_kernel(training_add_parts<T>, static_cast<unsigned>(adding), kThreads, 0, stream_, args, static_cast<int>(shares));
}

template <class T>
void CudaLaunch<T>::to_order(int64_t batch, const ToOrder<T>& args) const {
  rows(batch, training_to_order<T>, args, batch);
}

template <class T>
void CudaLaunch<T>::map(const MapArgs<T>& args) const {
  rows(args.batch, training_map<T>, args);
}

template <class T>
void CudaLaunch<T>::map_backward(const MapBackwardArgs<T>& args) const {
  rows(args.batch, training_map_backward<T>, args);
}

template <class T>
void CudaLaunch<T>::unitwise_up(const UnitwiseUpArgs<T>& args) const {
  each_unit(args);
}

template <class T>
void CudaLaunch<T>::settle(const SettleArgs<T>& args) const {
  each_unit(args);
}

template <class T>
void CudaLaunch<T>::column_sum(const ColumnSumArgs<T>& args) const {
  if (args.columns == 0) return;
  launch_kernel(training_column_sum<T>, static_cast<unsigned>(tiles_of(args.columns, args.kColumns)), args.kColumns * args.kLanes, 0, stream_, args);
}

template class CudaLaunch<float>;
template class CudaLaunch<double>;

}  // namespace flowkernels
