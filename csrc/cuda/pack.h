// Some elements side by side, for device code and its twin on the host.
#pragma once

namespace flowkernels {

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {  // read and written by one instruction where it has at most 16 bytes
  T at[N];
};

}  // namespace flowkernels
