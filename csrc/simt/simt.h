// Runs csrc/cuda/*.cuh on the CPU, for tests: every thread of the grid is a fiber.
//
// A fiber runs until it has to wait; then any other that can run may follow, drawn from a seed. A
// seed also says how long the draws stay with one warp and one block, so that some schedules let a
// block race to its end while others haven't begun: there a missing barrier shows, as fresh shared
// memory is NaN. A wait that nothing can end, and a load or store that a GPU would fault on, are
// errors. Which bytes of which buffer were touched is recorded.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (simt::self->thread)
#define blockIdx (simt::self->block->index)
#define blockDim (simt::grid->block_dim)
#define gridDim (simt::grid->grid_dim)
// Named by their lines, so that a test can leave one of them out.
#define __syncthreads() simt::sync_threads(__LINE__)

namespace simt {

constexpr int STACK = 64 << 10;
constexpr uint64_t CANARY = 0x5ca1ab1e0ddba11;
constexpr int GRID_WAIT = -1, GRID_BARRIER = -2;  // as lines of barriers

struct Dim {
  unsigned x = 0, y = 0, z = 0;
};

struct Block;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  Dim thread;
  Block* block;
  char* stack;
  std::deque<std::vector<Copy>> copies = {{}};  // in groups, the last one still open
  bool started = false;
  jmp_buf context;
  void* fake_stack = nullptr;  // the address sanitizer's
};

// Lanes as bits. A lane that waits for others of its warp has told which, and what it gives them.
struct Warp {
  Block* block;
  uint32_t lanes = 0, runnable = 0, waiting = 0;
  uint32_t mask[32], source[32];
  uint64_t value[32];
};

struct Block {
  Dim index;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> shared;
  unsigned waiting = 0, finished = 0;
};

struct Options {
  uint64_t seed = 0;
  int left_out = 0;  // the barrier that isn't there: its line, or GRID_WAIT for half a grid's
};

// A buffer of the kernel's, and what was done to each of its bytes.
struct Buffer {
  char* data;
  int64_t bytes;
  std::vector<uint8_t> touched = std::vector<uint8_t>(bytes);  // bit 0: loaded, bit 1: stored
  int64_t loaded = 0, stored = 0;                              // bytes, repetitions included

  int64_t distinct(int how) const {
    int64_t count = 0;
    for (uint8_t bits : touched) count += (bits & how) != 0;
    return count;
  }
};

struct Grid {
  Dim grid_dim, block_dim;
  Options options;
  std::function<void()> kernel;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Warp*> warps;
  std::string error;
  unsigned arrived = 0;           // blocks, at the grid's barrier
  std::vector<Fiber*> at_barrier;  // who waits there
  uint64_t random;
  jmp_buf scheduler;
  ucontext_t start, before_start;
  void* fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
};

inline Grid* grid = nullptr;
inline Fiber* self = nullptr;
inline std::vector<Buffer> buffers;  // all that the kernel may touch; none: anything

inline uint64_t draw(uint64_t below) {  // splitmix64
  uint64_t z = grid->random += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return (z ^ (z >> 31)) % below;
}

// ---- fibers ----------------------------------------------------------------------------------

inline void before_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* stack,
                          [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, stack, size);
#endif
}

inline void after_switch([[maybe_unused]] void* saved, [[maybe_unused]] const void** stack,
                         [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, stack, size);
#endif
}

inline Warp& warp_of(const Fiber& fiber) { return fiber.block->warps[fiber.thread.x / 32]; }
inline unsigned own_lane() { return self->thread.x % 32; }

// Back to the scheduler; returns when it picks this fiber again.
inline void leave() {
  Fiber* fiber = self;
  if (_setjmp(fiber->context) == 0) {
    before_switch(&fiber->fake_stack, grid->scheduler_stack, grid->scheduler_stack_size);
    _longjmp(grid->scheduler, 1);
  }
  after_switch(self->fake_stack, nullptr, nullptr);
}

[[noreturn]] inline void fail(const std::string& what) {
  grid->error = "block " + std::to_string(self->block->index.x) + " thread " +
                std::to_string(self->thread.x) + ": " + what;
  while (true) leave();
}

inline void wait() {
  warp_of(*self).runnable &= ~(1u << own_lane());
  leave();
}

inline void fiber_main() {
  after_switch(nullptr, &grid->scheduler_stack, &grid->scheduler_stack_size);
  grid->kernel();
  self->block->finished++;
  while (true) wait();
}

inline void enter(Fiber& fiber) {
  self = &fiber;
  if (_setjmp(grid->scheduler) == 0) {
    before_switch(&grid->fake_stack, fiber.stack, STACK);
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    getcontext(&grid->start);
    grid->start.uc_stack.ss_sp = fiber.stack;
    grid->start.uc_stack.ss_size = STACK;
    makecontext(&grid->start, fiber_main, 0);
    swapcontext(&grid->before_start, &grid->start);
  }
  after_switch(grid->fake_stack, nullptr, nullptr);
  uint64_t canary;
  std::memcpy(&canary, self->stack, sizeof canary);
  if (canary != CANARY) grid->error = "a fiber's stack is too small";
}

// ---- the schedule ----------------------------------------------------------------------------

// Where the draws are: of 1024, how many stay with the warp and with the block they are at.
struct Schedule {
  uint64_t stay_warp, stay_block;
  Warp* warp = nullptr;

  explicit Schedule(uint64_t seed)
      : stay_warp(seed % 3 == 0 ? 0 : seed % 3 == 1 ? 960 : 1024),
        stay_block(seed / 3 % 3 == 0 ? 0 : seed / 3 % 3 == 1 ? 1008 : 1024) {}

  // The first warp that can run, of one block or of all, from a random one on.
  bool find(const Block* block) {
    const size_t count = grid->warps.size(), first = draw(count);
    for (size_t i = 0; i < count; i++) {
      Warp* candidate = grid->warps[(first + i) % count];
      if (candidate->runnable && (!block || candidate->block == block)) {
        warp = candidate;
        return true;
      }
    }
    return false;
  }

  Fiber* next() {
    const bool stays = warp && warp->runnable && draw(1024) < stay_warp;
    const bool found = stays || (warp && draw(1024) < stay_block && find(warp->block)) ||
                       find(nullptr);
    if (!found) return nullptr;
    uint32_t lanes = warp->runnable;
    for (uint64_t skip = draw(std::popcount(lanes)); skip; skip--) lanes &= lanes - 1;
    const size_t first = (warp - warp->block->warps.data()) * 32;
    const size_t block = warp->block - grid->blocks.data();
    return &grid->fibers[block * grid->block_dim.x + first + std::countr_zero(lanes)];
  }
};

inline std::string deadlock() {
  std::string text = "deadlock:";
  for (const Block& block : grid->blocks) {
    unsigned in_warps = 0;
    for (const Warp& warp : block.warps) in_warps += std::popcount(warp.waiting);
    text += " block " + std::to_string(block.index.x) + ": " + std::to_string(block.waiting) +
            " threads at __syncthreads, " + std::to_string(in_warps) + " at a warp's, " +
            std::to_string(block.finished) + " returned;";
  }
  return text + " " + std::to_string(grid->at_barrier.size()) + " blocks at the grid's barrier";
}

// Runs kernel() as every thread of a one-dimensional grid. Throws std::runtime_error.
inline void launch(unsigned blocks, unsigned threads, int64_t shared_bytes, Options options,
                   std::function<void()> kernel) {
  Grid own{{blocks, 1, 1}, {threads, 1, 1}, options, std::move(kernel)};
  own.random = options.seed;
  own.blocks = std::vector<Block>(blocks);
  own.fibers = std::vector<Fiber>(size_t(blocks) * threads);
  const std::unique_ptr<char[]> stacks(new char[own.fibers.size() * STACK]);
  for (unsigned b = 0; b < blocks; b++) {
    Block& block = own.blocks[b];
    block.index.x = b;
    block.warps = std::vector<Warp>((threads + 31) / 32);
    block.shared.reset(new char[shared_bytes]);
    std::memset(block.shared.get(), 0xff, shared_bytes);  // NaN in every format
    for (Warp& warp : block.warps) warp.block = &block, own.warps.push_back(&warp);
    for (unsigned t = 0; t < threads; t++) {
      const size_t index = size_t(b) * threads + t;
      char* stack = stacks.get() + index * STACK;
      own.fibers[index] = {{t, 0, 0}, &block, stack};
      std::memcpy(stack, &CANARY, sizeof CANARY);
      block.warps[t / 32].runnable = block.warps[t / 32].lanes |= 1u << t % 32;
    }
  }
  grid = &own;
  Schedule schedule(options.seed);
  while (Fiber* fiber = own.error.empty() ? schedule.next() : nullptr) enter(*fiber);
  for (const Block& block : own.blocks)
    if (own.error.empty() && block.finished != threads) own.error = deadlock();
  grid = nullptr, self = nullptr;
  if (!own.error.empty()) throw std::runtime_error(own.error);
}

// ---- barriers --------------------------------------------------------------------------------

inline void sync_threads(int line) {
  if (line == grid->options.left_out) return;
  Block& block = *self->block;
  if (++block.waiting < grid->block_dim.x) return wait();
  block.waiting = 0;
  for (Warp& warp : block.warps) warp.runnable = warp.lanes;
}

// The grid's barrier in two halves, each with the block's barrier that it has on a GPU.
inline unsigned grid_arrive() {
  sync_threads(GRID_BARRIER);
  if (self->thread.x) return 0;
  const unsigned round = grid->arrived++ / grid->grid_dim.x;
  if (grid->arrived % grid->grid_dim.x == 0) {
    for (Fiber* fiber : grid->at_barrier) warp_of(*fiber).runnable |= 1u << fiber->thread.x % 32;
    grid->at_barrier.clear();
  }
  return round;
}

inline void grid_wait(unsigned round) {
  if (grid->options.left_out == GRID_WAIT) return;
  if (self->thread.x == 0 && grid->arrived / grid->grid_dim.x <= round) {
    grid->at_barrier.push_back(self);
    wait();
  }
  sync_threads(GRID_BARRIER);
}

// ---- warps -----------------------------------------------------------------------------------

// Gives value to the lanes of mask once all of them are here; returns the source lane's.
inline uint64_t exchange(uint32_t mask, uint64_t value, uint32_t source) {
  Warp& warp = warp_of(*self);
  const unsigned lane = own_lane();
  if (!(mask >> lane & 1)) fail("a shuffle's mask lacks the lane itself");
  if (source > 31 || !(mask >> source & 1)) fail("a shuffle reads a lane outside its mask");
  warp.mask[lane] = mask, warp.source[lane] = source, warp.value[lane] = value;
  warp.waiting |= 1u << lane;
  if ((warp.waiting & mask) != mask) {
    wait();
    return warp.value[lane];
  }
  uint64_t given[32];
  std::memcpy(given, warp.value, sizeof given);
  for (unsigned other = 0; other < 32; other++) {
    if (!(mask >> other & 1)) continue;
    if (warp.mask[other] != mask) fail("lanes of one shuffle have different masks");
    warp.value[other] = given[warp.source[other]];
  }
  warp.waiting &= ~mask;
  warp.runnable |= mask;
  return warp.value[lane];
}

template <class T>
T shuffle(uint32_t mask, T value, uint32_t source) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// ---- memory ----------------------------------------------------------------------------------

// Copies are done as late as they may be: in the wait for them.
inline void finish_copies(size_t pending) {
  for (; self->copies.size() > pending + 1; self->copies.pop_front())
    for (const Copy& copy : self->copies.front()) std::memcpy(copy.to, copy.from, copy.bytes);
}

inline void touch(const void* pointer, int64_t bytes, int64_t alignment, int how) {
  if (draw(32) == 0) leave();
  const auto* address = static_cast<const char*>(pointer);
  if (reinterpret_cast<uintptr_t>(address) % alignment) fail("a misaligned load or store");
  for (Buffer& buffer : buffers) {
    const int64_t offset = address - buffer.data;
    if (offset < 0 || offset + bytes > buffer.bytes) continue;
    for (int64_t i = 0; i < bytes; i++) buffer.touched[offset + i] |= how;
    (how == 1 ? buffer.loaded : buffer.stored) += bytes;
    return;
  }
  if (!buffers.empty()) fail("a load or store outside every buffer");
}

}  // namespace simt

template <class T>
T __shfl_sync(uint32_t mask, T value, int source) {
  return simt::shuffle(mask, value, source);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return simt::shuffle(mask, value, simt::own_lane() ^ lanes);
}
// A lane without a source keeps its own value, as on a GPU.
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int lanes) {
  const unsigned source = simt::own_lane() + lanes;
  return simt::shuffle(mask, value, source > 31 ? simt::own_lane() : source);
}
inline void __syncwarp(uint32_t mask = 0xffffffff) {
  simt::exchange(mask, 0, simt::own_lane());
}
