// Which thread of the block runs next.
//
// A thread keeps running until it waits or returns. When it returns, its fiber goes on with a thread that has not
// started yet, so a kernel without barriers is one plain loop over its threads.
#include "runtime.h"

EMULATOR_API uint3 threadIdx, blockIdx;
EMULATOR_API dim3 blockDim, gridDim;

namespace emulator {

Block block;

static uint64_t random_state;

void seed_random(unsigned seed) { random_state = (seed + 1) * 0x9E3779B97F4A7C15ull | 1; }

static unsigned random_below(int bound) {  // xorshift
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return unsigned(random_state % unsigned(bound));
}

// ---- the order
// Random order gives each warp a priority, new at every barrier, and takes lanes at random within the warp. Choosing
// among all threads alike would keep the warps in step, and a missing barrier between them would never show.
static int warp_priority[MAX_WARPS];

void shuffle_warps() {
  for (int i = 0; i < block.warp_count; i++) warp_priority[i] = i;
  for (int i = block.warp_count - 1; i > 0; i--) std::swap(warp_priority[i], warp_priority[random_below(i + 1)]);
}

static int next_random() {
  for (int i = 0; i < block.warp_count; i++) {
    const int warp = warp_priority[i];
    unsigned lanes = block.warps[warp].runnable;
    if (!lanes) continue;
    for (unsigned skip = random_below(__builtin_popcount(lanes)); skip; skip--) lanes &= lanes - 1;
    return warp * 32 + __builtin_ctz(lanes);
  }
  return -1;
}

// The later lanes of this warp first, then its earlier ones, then the next warps.
static int next_forward() {
  const int warp = block.current / 32, lane = block.current % 32;
  const unsigned later = block.warps[warp].runnable & ~((2u << lane) - 1);
  if (later) return warp * 32 + __builtin_ctz(later);
  for (int i = 0; i < block.warp_count; i++) {
    const int candidate = (warp + i) % block.warp_count;
    const unsigned lanes = block.warps[candidate].runnable;
    if (lanes) return candidate * 32 + __builtin_ctz(lanes);
  }
  return -1;
}

static int next_reverse() {
  const int warp = block.current / 32, lane = block.current % 32;
  const unsigned earlier = block.warps[warp].runnable & ((1u << lane) - 1);
  if (earlier) return warp * 32 + 31 - __builtin_clz(earlier);
  for (int i = 0; i < block.warp_count; i++) {
    const int candidate = (warp - i + block.warp_count) % block.warp_count;
    const unsigned lanes = block.warps[candidate].runnable;
    if (lanes) return candidate * 32 + 31 - __builtin_clz(lanes);
  }
  return -1;
}

int next_thread() {
  switch (launch_config->order) {
    case FORWARD: return next_forward();
    case REVERSE: return next_reverse();
    default: return next_random();
  }
}

// ---- running
static void set_current(int thread) {
  block.current = thread;
  threadIdx = block.threads[thread].index;
}

// The deadlock itself is reported by the caller that finds no thread to run.
[[noreturn]] static void fail_deadlock() {
  std::string waits;
  int described = 0;
  Site last = {"", 0};
  for (int i = 0; i < block.thread_count && described < 4; i++) {
    const Thread &thread = block.threads[i];
    const bool at_barrier = thread.state == ThreadState::at_barrier;
    if (!at_barrier && thread.state != ThreadState::in_collective) continue;
    const Site site = at_barrier ? thread.barrier_site : thread.collective->site;
    if (site.line == last.line && !strcmp(site.file, last.file)) continue;
    last = site;
    described++;
    char line[256];
    snprintf(line, sizeof line, "%s thread %d waits in %s (%s:%d)", described > 1 ? "," : "", i,
             at_barrier ? "__syncthreads" : thread.collective->name, base_name(site.file), site.line);
    waits += line;
  }
  fail("deadlock, by a divergent barrier or warp collective:%s", waits.c_str());
}

// What every fiber runs.
static void run_threads() {
  for (;;) {
    Thread &self = block.threads[block.current];
    const int stack = self.stack;
    self.state = ThreadState::runnable;
    kernel_body(kernel_arguments);
    thread_returned();

    void *unused;
    if (!block.live) switch_stack(&unused, launcher_stack);
    const int next = next_thread();
    if (next < 0) fail_deadlock();
    set_current(next);
    if (block.threads[next].state == ThreadState::not_started) {
      block.threads[next].stack = stack;
    } else {
      release_stack(stack);
      switch_stack(&unused, block.threads[next].stack_pointer);
    }
  }
}

static void start_fiber(Thread &thread) {
  thread.stack = take_stack();
  void **top = static_cast<void **>(stack_top(thread.stack));
  *--top = nullptr;  // the return address of run_threads, which never returns
  *--top = reinterpret_cast<void *>(run_threads);
  for (int saved_register = 0; saved_register < 6; saved_register++) *--top = nullptr;
  thread.stack_pointer = top;
}

void switch_from_current_thread() {
  const int previous = block.current;
  const int next = next_thread();
  if (next < 0) fail_deadlock();
  if (block.threads[next].state == ThreadState::not_started) start_fiber(block.threads[next]);
  set_current(next);
  if (next != previous) switch_stack(&block.threads[previous].stack_pointer, block.threads[next].stack_pointer);
}

void start_block() {
  block.live = block.thread_count;
  block.waiting = 0;
  block.true_predicates = 0;
  release_all_stacks();
  for (int i = 0; i < block.warp_count; i++) {
    const int lanes = block.thread_count - i * 32;
    const unsigned exists = lanes >= 32 ? ~0u : (1u << lanes) - 1;
    block.warps[i] = {exists, 0, exists, 0, 0};
  }
  for (int i = 0; i < block.thread_count; i++) {
    Thread &thread = block.threads[i];
    thread.state = ThreadState::not_started;
    if (!thread.copies.empty()) thread.copies.clear();
    if (!thread.copy_groups.empty()) thread.copy_groups.clear();
  }
  block.current = launch_config->order == FORWARD ? 0 : block.thread_count - 1;
  if (launch_config->order == RANDOM) {
    shuffle_warps();
    block.current = next_random();
  }
  set_current(block.current);
  start_fiber(block.threads[block.current]);
  switch_stack(&launcher_stack, block.threads[block.current].stack_pointer);
}

}  // namespace emulator
