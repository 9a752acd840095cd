// Which accesses of a kernel's threads nothing orders. What a compiler adds for its thread sanitizer calls functions of our own: each
// word of memory remembers who wrote and read it last, and since which barrier.
//
// An access of a type that must be aligned, of 2 to 16 bytes, must be: a GPU takes no other.
//
// Two accesses of which one writes are ordered if one thread makes both, if a barrier of the block lies between, or, within a warp, one of
// the warp. Blocks of a launch are ordered by nothing, launches by their order. A copy that has not landed may land at any time: nobody may
// touch its words between the call and the wait, and it counts as written at both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace flowkernels::emulated::races {

void begin_launch();
void begin_block();
void end_launch();
void at_block_barrier();
void at_warp_barrier(int warp);
void resume(int thread);  // accesses that the compiler tells of are this thread's from here on
void suspend();           // and are not looked at from here on

// [begin, end) belongs to a block; around it are bytes that nobody may touch
void set_shared(const unsigned char* begin, const unsigned char* end, size_t margin);
void set_stacks(const unsigned char* begin, const unsigned char* end);  // not looked at
void read_ahead(const void* at, size_t bytes);  // whoever writes there: but inside of what there is

void begin_copy(const void* to, const void* from, size_t bytes);  // from null: of zeros
void end_copy(const void* to, size_t bytes);

std::string take_error();  // the first of the launch; empty for none

}  // namespace flowkernels::emulated::races
