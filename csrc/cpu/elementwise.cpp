// Elementwise maps for CPU tensors: threads and their memory. The loops are in walk.h, the maps in the ops' own kernels.

#include "cpu/elementwise.h"

#include "cpu/scratch.h"
#include "cpu/shares.h"
#include "cpu/tile_map.h"

#define FK_KERNEL "cpu/walk.h"
#include "cpu/for_each_target.h"

namespace flowkernels {

template <class E>
void run_elementwise(const Elementwise<E>& args, const TileMap<compute_t<E>>& map) {
  in_parallel(args.units, args.batch * args.channels * args.sites, [&](int64_t first, int64_t last) {
    const size_t scratch = args.sums_columns ? 16 * args.n_terms * args.transformed * sizeof(compute_t<E>) : 0;
    auto* columns = static_cast<compute_t<E>*>(scratch > 0 ? thread_scratch(scratch) : nullptr);
    FK_DISPATCH(walk(args, map, columns, first, last));
  });
}

template void run_elementwise(const Elementwise<float>& args, const TileMap<float>& map);
template void run_elementwise(const Elementwise<double>& args, const TileMap<double>& map);
template void run_elementwise(const Elementwise<Half>& args, const TileMap<float>& map);

}  // namespace flowkernels
