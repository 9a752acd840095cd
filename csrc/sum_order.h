// Of how many terms the chains are that sums are made of. A sum's bits rest on them, so kernels that must give the same bits share them.
#pragma once

#include <cstdint>

namespace flowkernels {

constexpr int64_t kChunk = 256;  // inputs of a masked product on a CPU, and rows of the gradients by its parameters
constexpr int kLogChunk = 16;    // log-derivatives of a row

}  // namespace flowkernels
