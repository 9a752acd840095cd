// Runs CUDA kernels on a CPU, to show what neither a compiler nor their arithmetic can: that barriers are where they must be. A block of
// threads at a time, each thread on a stack of its own, which another takes over where it waits. Every access to memory is told to races.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
namespace flowkernels {

struct Device;

namespace emulated {

Device device();  // as the tests want it, and so
int64_t most_delta_bytes();
const std::vector<int64_t>& layout();
void allow_shared(const void* kernel, int64_t bytes);

// Raises std::runtime_error with what was wrong first: a race, an access beyond the launch's shared memory, threads that wait for
// different things, a launch that no GPU would take.
void run(const char* name, const void* kernel, dim3 blocks, int threads, int64_t shared_bytes, const std::function<void()>& thread);

// ---- of the thread that runs

unsigned char* launched_shared();
void block_barrier();
bool all_of_block(bool mine);
void warp_barrier();
uint64_t exchange(unsigned lanes, uint64_t mine, int lane);  // what `lane` brought; orders no memory
void copy_later(void* to, const void* from, int bytes, bool inside);
void commit_copies();
void wait_for_copies(int groups_left);

void look_away(const void* at, int bytes);  // accesses are not looked at; these bytes must be there
void look_again();
template <class T>
__attribute__((noinline)) T read_ahead(bool is_used, const T& value) {
  if (!is_used) look_away(&value, sizeof value);
  const T copy = value;
  if (!is_used) look_again();
  return copy;
}

template <class T>
T from_lane(unsigned lanes, T mine, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &mine, sizeof mine);
  bits = exchange(lanes, bits, lane);
  std::memcpy(&mine, &bits, sizeof mine);
  return mine;
}

}  // namespace emulated
}  // namespace flowkernels
