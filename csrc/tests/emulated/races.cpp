#include "tests/emulated/races.h"

#include <link.h>

#include <cstdio>
#include <cstdlib>

// What is called at every access must not have its own told.
#define FK_UNTOLD __attribute__((no_sanitize_thread))
#define FK_UNTOLD_INLINE inline __attribute__((no_sanitize_thread, always_inline))
#define FK_HOOK extern "C" __attribute__((no_sanitize_thread, visibility("hidden")))

namespace flowkernels::emulated::races {
namespace {

constexpr int kGrain = 2;  // bytes that are remembered together: a bfloat16
constexpr int kPageBytes = 4096, kBuckets = 1 << 16;
constexpr int16_t kNobody = -1, kSeveral = -2;

// Barriers of a block are counted over all blocks and launches, those of a warp over all of them too.
struct Access {
  uint32_t period = 0, warp_period = 0;
  int16_t thread = kNobody, warp = kNobody;  // kSeveral: more than one, of `warp` or of several
};

struct Word {
  Access written, read;
  int16_t copied_by = kNobody;  // a copy to it has not landed
};

struct Page {
  uintptr_t number;
  Page* next;
  Word words[kPageBytes / kGrain];
};

struct State {
  bool running;
  int thread;
  uint32_t period, block_begin, launch_begin, warp_periods[32];
  const unsigned char *shared_begin, *shared_end, *stacks_begin, *stacks_end;
  uintptr_t statics_begin, statics_end, loaded_at, called_from;
  size_t margin;
  Page* pages[kBuckets];
  Page* last;
  char error[400];
} state;

FK_UNTOLD_INLINE Word& word_of(uintptr_t address) {
  const uintptr_t number = address / kPageBytes;
  if (!state.last || state.last->number != number) {
    Page** place = &state.pages[number * 0x9e3779b97f4a7c15u >> 48];
    while (*place && (*place)->number != number) place = &(*place)->next;
    if (!*place) {
      *place = static_cast<Page*>(calloc(1, sizeof(Page)));
      (*place)->number = number;
      for (Word& word : (*place)->words) word.written.thread = word.read.thread = word.copied_by = kNobody;
    }
    state.last = *place;
  }
  return state.last->words[address % kPageBytes / kGrain];
}

// what a block has for itself: the launch's shared memory, and that of static size, which lies among this library's variables
FK_UNTOLD_INLINE bool is_shared(uintptr_t address) {
  return (address >= reinterpret_cast<uintptr_t>(state.shared_begin) && address < reinterpret_cast<uintptr_t>(state.shared_end)) ||
         (address >= state.statics_begin && address < state.statics_end);
}

FK_UNTOLD void tell(uintptr_t address, const char* what, const Access* other) {
  if (state.error[0]) return;
  const bool in_launched = address >= reinterpret_cast<uintptr_t>(state.shared_begin) - state.margin &&
                           address < reinterpret_cast<uintptr_t>(state.shared_end) + state.margin;
  const long long place = in_launched ? static_cast<long long>(address - reinterpret_cast<uintptr_t>(state.shared_begin)) : 0;
  char where[64], who[64] = "";
  if (in_launched)
    snprintf(where, sizeof where, "byte %lld of shared memory", place);
  else
    snprintf(where, sizeof where, "%s memory", is_shared(address) ? "static shared" : "global");
  if (other && other->thread == kSeveral)
    snprintf(who, sizeof who, " several threads");
  else if (other)
    snprintf(who, sizeof who, " thread %d", other->thread);
  snprintf(state.error, sizeof state.error, "thread %d %s%s, at %s, by the code at 0x%llx", state.thread, what, who, where,
           static_cast<unsigned long long>(state.called_from - state.loaded_at));
}

// whether nothing orders an earlier access and one of this thread
FK_UNTOLD_INLINE bool races_with(const Access& earlier, bool shared) {
  if (earlier.thread == kNobody || earlier.period < state.launch_begin) return false;
  if (earlier.period < state.block_begin) return !shared;
  if (earlier.period < state.period || earlier.thread == state.thread) return false;
  const int warp = state.thread / 32;
  return earlier.warp != warp || earlier.warp_period == state.warp_periods[warp];
}

FK_UNTOLD_INLINE void remember(Access& access) {
  const int16_t warp = static_cast<int16_t>(state.thread / 32), thread = static_cast<int16_t>(state.thread);
  const bool same = access.period == state.period && access.thread != kNobody;
  if (!same) {
    access = {state.period, state.warp_periods[warp], thread, warp};
  } else if (access.warp != warp) {
    access.thread = access.warp = kSeveral;
  } else if (access.warp_period != state.warp_periods[warp]) {
    access.warp_period = state.warp_periods[warp];
    access.thread = thread;
  } else if (access.thread != thread) {
    access.thread = kSeveral;
  }
}

FK_UNTOLD_INLINE bool is_looked_at(uintptr_t address, size_t bytes) {
  if (address >= reinterpret_cast<uintptr_t>(state.stacks_begin) && address < reinterpret_cast<uintptr_t>(state.stacks_end)) return false;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(state.shared_begin), end = reinterpret_cast<uintptr_t>(state.shared_end);
  if (address + bytes > begin - state.margin && address < end + state.margin && (address < begin || address + bytes > end))
    tell(address < begin ? address : address + bytes - 1, "goes beyond the launch's shared memory", nullptr);
  return true;
}

FK_UNTOLD_INLINE void on_access(uintptr_t address, size_t bytes, bool writes, int16_t copied_by = kNobody) {
  if (!is_looked_at(address, bytes)) return;
  const bool shared = is_shared(address);
  for (uintptr_t at = address / kGrain * kGrain; at < address + bytes; at += kGrain) {
    Word& word = word_of(at);
    if (word.copied_by != kNobody && word.written.period >= state.launch_begin)
      tell(at, writes ? "writes where a copy that has not landed goes to" : "reads what a copy that has not landed goes to", nullptr);
    if (races_with(word.written, shared))
      tell(at, writes ? "writes what was written without a barrier since by" : "reads what was written without a barrier since by", &word.written);
    if (writes && races_with(word.read, shared)) tell(at, "writes what was read without a barrier since by", &word.read);
    remember(writes ? word.written : word.read);
    if (writes) word.copied_by = copied_by;
  }
}

// this library's variables
FK_UNTOLD int find_statics(dl_phdr_info* info, size_t, void*) {
  const uintptr_t own = reinterpret_cast<uintptr_t>(&state);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr, end = begin + info->dlpi_phdr[i].p_memsz;
    if (info->dlpi_phdr[i].p_type != PT_LOAD || own < begin || own >= end) continue;
    state.loaded_at = info->dlpi_addr;
    state.statics_begin = begin;
    state.statics_end = end;
    return 1;
  }
  return 0;
}

}  // namespace

FK_UNTOLD void begin_launch() {
  if (!state.statics_end) dl_iterate_phdr(find_statics, nullptr);
  state.error[0] = 0;
  state.launch_begin = ++state.period;
}
FK_UNTOLD void begin_block() { state.block_begin = ++state.period; }
FK_UNTOLD void end_launch() { ++state.period; }
FK_UNTOLD void at_block_barrier() { ++state.period; }
FK_UNTOLD void at_warp_barrier(int warp) { ++state.warp_periods[warp]; }
FK_UNTOLD void resume(int thread) {
  state.thread = thread;
  state.running = true;
}
FK_UNTOLD void suspend() { state.running = false; }
FK_UNTOLD void set_shared(const unsigned char* begin, const unsigned char* end, size_t margin) {
  state.shared_begin = begin;
  state.shared_end = end;
  state.margin = margin;
}
FK_UNTOLD void set_stacks(const unsigned char* begin, const unsigned char* end) {
  state.stacks_begin = begin;
  state.stacks_end = end;
}
FK_UNTOLD void read_ahead(const void* at, size_t bytes) {
  if (!state.running) return;
  state.called_from = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  is_looked_at(reinterpret_cast<uintptr_t>(at), bytes);
}
FK_UNTOLD void begin_copy(const void* to, const void* from, size_t bytes) {
  if (from) on_access(reinterpret_cast<uintptr_t>(from), bytes, false);
  on_access(reinterpret_cast<uintptr_t>(to), bytes, true, static_cast<int16_t>(state.thread));
}
FK_UNTOLD void end_copy(const void* to, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(to);
  for (uintptr_t at = address / kGrain * kGrain; at < address + bytes; at += kGrain) word_of(at).copied_by = kNobody;
  on_access(address, bytes, true);
}
std::string take_error() {
  const std::string error = state.error;
  state.error[0] = 0;
  return error;
}

}  // namespace flowkernels::emulated::races

// ---- what the compiler calls

namespace flowkernels::emulated::races {

FK_UNTOLD_INLINE void told(const void* at, size_t bytes, bool writes, const void* called_from, size_t alignment = 1) {
  if (!state.running) return;
  state.called_from = reinterpret_cast<uintptr_t>(called_from);
  if (reinterpret_cast<uintptr_t>(at) % alignment) tell(reinterpret_cast<uintptr_t>(at), writes ? "writes what is not aligned" : "reads what is not aligned", nullptr);
  on_access(reinterpret_cast<uintptr_t>(at), bytes, writes);
}

}  // namespace flowkernels::emulated::races

#define FK_READ(bytes, alignment) flowkernels::emulated::races::told(at, bytes, false, __builtin_return_address(0), alignment)
#define FK_WRITE(bytes, alignment) flowkernels::emulated::races::told(at, bytes, true, __builtin_return_address(0), alignment)
FK_HOOK void __tsan_init() {}
FK_HOOK void __tsan_func_entry(void*) {}
FK_HOOK void __tsan_func_exit() {}
FK_HOOK void __tsan_vptr_update(void**, void*) {}
FK_HOOK void __tsan_vptr_read(void**) {}
FK_HOOK void __tsan_read_range(void* at, size_t bytes) { FK_READ(bytes, 1); }
FK_HOOK void __tsan_write_range(void* at, size_t bytes) { FK_WRITE(bytes, 1); }
#define FK_ACCESSES(bytes)                                                 \
  FK_HOOK void __tsan_read##bytes(void* at) { FK_READ(bytes, bytes); }     \
  FK_HOOK void __tsan_write##bytes(void* at) { FK_WRITE(bytes, bytes); }   \
  FK_HOOK void __tsan_unaligned_read##bytes(void* at) { FK_READ(bytes, 1); }  \
  FK_HOOK void __tsan_unaligned_write##bytes(void* at) { FK_WRITE(bytes, 1); }
FK_ACCESSES(1)
FK_ACCESSES(2)
FK_ACCESSES(4)
FK_ACCESSES(8)
FK_ACCESSES(16)

// of shared pointers on the host; no kernel has an atomic
#define FK_ATOMIC(bits, T)                                                                                              \
  FK_HOOK T __tsan_atomic##bits##_fetch_add(volatile T* at, T by, int) { return __atomic_fetch_add(at, by, __ATOMIC_SEQ_CST); } \
  FK_HOOK T __tsan_atomic##bits##_load(const volatile T* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }
FK_ATOMIC(8, uint8_t)
FK_ATOMIC(32, uint32_t)
FK_ATOMIC(64, uint64_t)
