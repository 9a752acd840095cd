#include <cuda_runtime.h>
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <ucontext.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#include <algorithm>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "autoregressive_plan.h"
#include "tests/emulated/races.h"

namespace flowkernels::emulated {
namespace {

constexpr int kMostThreads = 1024, kWarp = 32;
constexpr size_t kStackBytes = 256 << 10, kMargin = 4096;
constexpr int64_t kSharedWithoutLeave = 48 << 10, kMany = 1 << 16;

enum class Waits { no, block, vote, warp, exchange, for_ever };  // for_ever: it has returned

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool inside;
};

using Place = void* [5];  // to which __builtin_longjmp goes, without the system calls of swapcontext

struct Thread {
  ucontext_t context;  // of its beginning
  Place place;
  bool has_begun;
  Waits waits;
  bool vote;
  std::vector<Copy> copies;    // in the order of their calls
  std::vector<size_t> groups;  // how many of them each group that is open has
  size_t in_no_group;
};

enum class Order { forwards, backwards, shuffled };

struct Emulator {
  Device device{132, 232448, 233472};  // an H200's
  int64_t most_delta_bytes = 0;
  int64_t last_blocks = 0;  // of a launch with more than kMany, so many of the last alone run; 0: all
  std::vector<int64_t> layout;
  Order order = Order::forwards;
  std::map<const void*, int64_t> allowed;
  std::vector<Thread> threads;
  unsigned char* stacks = nullptr;
  std::vector<unsigned char> shared;
  Place scheduler;
  int count = 0, current = 0;
  bool all = false;  // of the last vote
  uint64_t brought[kMostThreads / kWarp][kWarp];
  std::mt19937 random{0};
  const std::function<void()>* kernel = nullptr;
  std::string error;
} emulator;

void fail(const std::string& error) {
  if (emulator.error.empty()) emulator.error = error;
}

// While the emulator acts for a thread
struct Unseen {
  Unseen() { races::suspend(); }
  ~Unseen() { races::resume(emulator.current); }
};

// ---- from thread to thread

#if defined(__SANITIZE_ADDRESS__)
void *scheduler_fake_stack, *thread_fake_stack[kMostThreads];
const void* scheduler_stack;
size_t scheduler_stack_bytes;
void before_thread(int i) { __sanitizer_start_switch_fiber(&scheduler_fake_stack, emulator.stacks + i * kStackBytes, kStackBytes); }
void after_thread() { __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr); }
void on_first_entry() { __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes); }
void before_scheduler(int i, bool returns) {
  __sanitizer_start_switch_fiber(returns ? nullptr : &thread_fake_stack[i], scheduler_stack, scheduler_stack_bytes);
}
void after_scheduler(int i) { __sanitizer_finish_switch_fiber(thread_fake_stack[i], &scheduler_stack, &scheduler_stack_bytes); }
#else
void before_thread(int) {}
void after_thread() {}
void on_first_entry() {}
void before_scheduler(int, bool) {}
void after_scheduler(int) {}
#endif

void enter() {
  on_first_entry();
  const int i = emulator.current;
  races::resume(i);
  (*emulator.kernel)();
  races::suspend();
  Thread& thread = emulator.threads[i];
  if (!thread.copies.empty()) fail("a thread returns before its copies have landed");
  thread.waits = Waits::for_ever;
  before_scheduler(i, true);
  __builtin_longjmp(emulator.scheduler, 1);
}

__attribute__((noinline)) void run_thread(int i) {
  Thread& thread = emulator.threads[i];
  emulator.current = i;
  threadIdx = dim3(static_cast<unsigned>(i), 0, 0);
  before_thread(i);
  if (__builtin_setjmp(emulator.scheduler) == 0) {
    if (thread.has_begun) __builtin_longjmp(thread.place, 1);
    thread.has_begun = true;
    setcontext(&thread.context);
  }
  after_thread();
}

__attribute__((noinline)) void go_to_scheduler() {
  if (__builtin_setjmp(emulator.threads[emulator.current].place) == 0) __builtin_longjmp(emulator.scheduler, 1);
}

void wait(Waits what) {
  const Unseen unseen;
  const int i = emulator.current;
  emulator.threads[i].waits = what;
  before_scheduler(i, false);
  go_to_scheduler();
  after_scheduler(i);
}

// ---- a block

// Lanes that wait for their warp go on when all do.
bool release_warp(int warp) {
  const Thread* lanes = &emulator.threads[warp * kWarp];
  const Waits first = lanes[0].waits;
  if (first != Waits::warp && first != Waits::exchange) return false;
  for (int lane = 0; lane < kWarp; ++lane)
    if (lanes[lane].waits != first) return false;
  if (first == Waits::warp) races::at_warp_barrier(warp);
  for (int lane = 0; lane < kWarp; ++lane) emulator.threads[warp * kWarp + lane].waits = Waits::no;
  return true;
}

bool release_block() {
  Waits what = Waits::for_ever;
  bool all = true;
  for (int i = 0; i < emulator.count; ++i) {
    const Thread& thread = emulator.threads[i];
    if (thread.waits == Waits::for_ever) continue;
    if (thread.waits != Waits::block && thread.waits != Waits::vote) return false;
    if (what != Waits::for_ever && thread.waits != what) return false;
    what = thread.waits;
    all = all && thread.vote;
  }
  if (what == Waits::for_ever) return false;
  emulator.all = all;
  races::at_block_barrier();
  for (int i = 0; i < emulator.count; ++i)
    if (emulator.threads[i].waits == what) emulator.threads[i].waits = Waits::no;
  return true;
}

std::string what_threads_wait_for() {
  static const char* const names[] = {"nothing", "the block", "the block's vote", "their warp", "what their warp exchanges", "nothing more, they returned"};
  std::string text = "threads wait for different things:";
  for (int begin = 0; begin < emulator.count;) {
    int end = begin + 1;
    const Waits waits = emulator.threads[begin].waits;
    while (end < emulator.count && emulator.threads[end].waits == waits) ++end;
    text += " " + std::to_string(begin) + " to " + std::to_string(end - 1) + " for " + names[static_cast<int>(waits)] + ";";
    begin = end;
  }
  text.back() = '.';
  return text;
}

int in_order(int i, int n) {
  if (emulator.order == Order::forwards) return i;
  if (emulator.order == Order::backwards) return n - 1 - i;
  return static_cast<int>(emulator.random() % static_cast<unsigned>(n));  // not all of them in a pass: the others have their turn in the next
}

void make_thread(Thread& thread, unsigned char* stack) {
  thread.has_begun = false;
  thread.waits = Waits::no;
  thread.copies.clear();
  thread.groups.clear();
  thread.in_no_group = 0;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = stack;
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, enter, 0);
}

void run_block() {
  std::memset(emulator.shared.data() + kMargin, 0xff, emulator.shared.size() - 2 * kMargin);  // NaN
  for (int i = 0; i < emulator.count; ++i) make_thread(emulator.threads[i], emulator.stacks + i * kStackBytes);
  races::begin_block();
  for (;;) {
    bool runs = false;
    const int warps = emulator.count / kWarp;
    for (int w = 0; w < warps; ++w) {
      const int warp = in_order(w, warps);
      do {
        for (int l = 0; l < kWarp; ++l) {
          const int i = warp * kWarp + in_order(l, kWarp);
          if (emulator.threads[i].waits != Waits::no) continue;
          run_thread(i);
          runs = true;
        }
      } while (release_warp(warp));
    }
    if (runs || release_block()) continue;
    bool left = false;
    for (int i = 0; i < emulator.count; ++i) {
      if (emulator.threads[i].waits == Waits::no) runs = true;  // not drawn in this pass
      left = left || emulator.threads[i].waits != Waits::for_ever;
    }
    if (runs) continue;
    if (left) fail(what_threads_wait_for());
    return;
  }
}

}  // namespace

Device device() { return emulator.device; }
int64_t most_delta_bytes() { return emulator.most_delta_bytes; }
const std::vector<int64_t>& layout() { return emulator.layout; }

void allow_shared(const void* kernel, int64_t bytes) {
  if (bytes > emulator.device.shared_per_block) throw std::runtime_error("more shared memory is asked for than a block may have");
  emulator.allowed[kernel] = bytes;
}

void run(const char* name, const void* kernel, dim3 blocks, int threads, int64_t shared_bytes, const std::function<void()>& thread) {
  const auto found = emulator.allowed.find(kernel);
  const int64_t allowed = found == emulator.allowed.end() ? kSharedWithoutLeave : std::max(found->second, kSharedWithoutLeave);
  if (threads < 1 || threads > kMostThreads || threads % kWarp) throw std::runtime_error(std::string(name) + ": no whole warps, or more than a block may have");
  if (shared_bytes < 0 || shared_bytes > allowed) {
    const std::string bytes = std::to_string(shared_bytes) + " bytes of shared memory, of which " + std::to_string(allowed) + " are allowed, in ";
    throw std::runtime_error(bytes + name);
  }
  if (blocks.x < 1 || blocks.x > 0x7fffffffu || blocks.y < 1 || blocks.y > 65535 || blocks.z != 1)
    throw std::runtime_error(std::string(name) + ": a grid that no GPU takes");
  if (!emulator.stacks) {
    void* stacks = mmap(nullptr, kMostThreads * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) throw std::runtime_error("no memory for the threads' stacks");
    emulator.stacks = static_cast<unsigned char*>(stacks);
    emulator.threads.resize(kMostThreads);
    races::set_stacks(emulator.stacks, emulator.stacks + kMostThreads * kStackBytes);
  }
  emulator.shared.assign(static_cast<size_t>(shared_bytes) + 2 * kMargin, 0);
  races::set_shared(launched_shared(), launched_shared() + shared_bytes, kMargin);
  emulator.kernel = &thread;
  emulator.count = threads;
  emulator.error.clear();
  blockDim = dim3(static_cast<unsigned>(threads));
  gridDim = blocks;
  races::begin_launch();
  const int64_t n = int64_t(blocks.x) * blocks.y;
  const int64_t left_out = emulator.last_blocks > 0 && n > kMany ? n - emulator.last_blocks : 0;
  for (int64_t i = left_out; i < n && emulator.error.empty(); ++i) {
    const int64_t block = emulator.order == Order::backwards ? left_out + n - 1 - i : i;
    blockIdx = dim3(static_cast<unsigned>(block % blocks.x), static_cast<unsigned>(block / blocks.x), 0);
    run_block();
    if (std::string race = races::take_error(); !race.empty()) fail(race);
    if (!emulator.error.empty()) emulator.error += " (block " + std::to_string(block) + " of " + std::to_string(n) + ")";
  }
  races::end_launch();
  if (!emulator.error.empty()) throw std::runtime_error(emulator.error + ", in " + name);
}

unsigned char* launched_shared() { return emulator.shared.data() + kMargin; }

void look_away(const void* at, int bytes) {
  races::read_ahead(at, static_cast<size_t>(bytes));
  races::suspend();
}
void look_again() { races::resume(emulator.current); }

void block_barrier() { wait(Waits::block); }

bool all_of_block(bool mine) {
  const Unseen unseen;
  emulator.threads[emulator.current].vote = mine;
  wait(Waits::vote);
  return emulator.all;
}

void warp_barrier() { wait(Waits::warp); }

uint64_t exchange(unsigned lanes, uint64_t mine, int lane) {
  const Unseen unseen;
  if (lanes != 0xffffffffu) fail("a part of a warp exchanges");
  const int warp = emulator.current / kWarp;
  emulator.brought[warp][emulator.current % kWarp] = mine;
  wait(Waits::exchange);
  const uint64_t theirs = emulator.brought[warp][lane];
  wait(Waits::exchange);  // or the next exchange would take its place
  return theirs;
}

void copy_later(void* to, const void* from, int bytes, bool inside) {
  const Unseen unseen;
  const bool aligned = reinterpret_cast<uintptr_t>(to) % bytes == 0 && reinterpret_cast<uintptr_t>(from) % bytes == 0;
  if (!aligned) fail("a copy of " + std::to_string(bytes) + " bytes from or to where it is not aligned");
  races::begin_copy(to, inside ? from : nullptr, static_cast<size_t>(bytes));
  Thread& thread = emulator.threads[emulator.current];
  thread.copies.push_back({to, from, bytes, inside});
  ++thread.in_no_group;
}

void commit_copies() {
  const Unseen unseen;
  Thread& thread = emulator.threads[emulator.current];
  thread.groups.push_back(thread.in_no_group);
  thread.in_no_group = 0;
}

void wait_for_copies(int groups_left) {
  const Unseen unseen;
  Thread& thread = emulator.threads[emulator.current];
  while (static_cast<int>(thread.groups.size()) > groups_left) {
    const size_t n = thread.groups.front();
    for (size_t i = 0; i < n; ++i) {
      const Copy& copy = thread.copies[i];
      races::end_copy(copy.to, static_cast<size_t>(copy.bytes));
      if (copy.inside)
        std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
      else
        std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
    }
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(n));
    thread.groups.erase(thread.groups.begin());
  }
}

}  // namespace flowkernels::emulated

namespace {

bool looks_for_races() {
#if defined(__SANITIZE_THREAD__)
  return true;
#else
  return false;  // the compiler tells of no access
#endif
}

void set(std::vector<int64_t> device, int64_t most_delta_bytes, std::vector<int64_t> layout, int64_t order, int64_t seed, int64_t last_blocks) {
  flowkernels::emulated::Emulator& emulator = flowkernels::emulated::emulator;
  emulator.device = {static_cast<int>(device.at(0)), device.at(1), device.at(2)};
  emulator.most_delta_bytes = most_delta_bytes;
  emulator.last_blocks = last_blocks;
  emulator.layout = std::move(layout);
  emulator.order = static_cast<flowkernels::emulated::Order>(order);
  emulator.random.seed(static_cast<unsigned>(seed));
  emulator.allowed.clear();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flowkernels_emulated, m) {
  m.def("set(int[] device, int most_delta_bytes, int[] layout, int order, int seed, int last_blocks) -> ()");
  m.def("looks_for_races() -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(flowkernels_emulated, CompositeExplicitAutograd, m) {
  m.impl("set", TORCH_BOX(&set));
  m.impl("looks_for_races", TORCH_BOX(&looks_for_races));
}
