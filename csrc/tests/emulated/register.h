// Before a source of CUDA kernels: its ops are flowkernels_emulated's, for a CPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, device, m) _STABLE_TORCH_LIBRARY_IMPL(flowkernels_emulated, CPU, m, C10_UID)
