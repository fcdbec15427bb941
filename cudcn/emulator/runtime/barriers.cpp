// __syncthreads and warp collectives: who waits, and when all have come.
#include "runtime.h"

namespace emulator {

// ---- __syncthreads
static int barrier_result;

static void release_barrier() {
  if (launch_config->strict && block.live < block.thread_count) {
    fail("__syncthreads (%s:%d) after %d threads of the block have returned", base_name(block.barrier_site.file),
         block.barrier_site.line, block.thread_count - block.live);
  }
  for (int i = 0; i < block.warp_count; i++) {
    Warp &warp = block.warps[i];
    for_each_lane(warp.at_barrier, [i](unsigned lane) { block.threads[i * 32 + lane].state = ThreadState::runnable; });
    warp.runnable |= warp.at_barrier;
    warp.at_barrier = 0;
  }
  barrier_result = block.true_predicates;
  block.true_predicates = 0;
  block.waiting = 0;
  if (launch_config->order == RANDOM) shuffle_warps();
  checker_block_barrier();
}

int block_barrier(bool predicate, Site site) {
  counter_collective("__syncthreads", site);
  if (!block.waiting) {
    block.barrier_site = site;
  } else if (site.line != block.barrier_site.line || strcmp(site.file, block.barrier_site.file)) {
    fail("divergent barrier: this thread is at __syncthreads (%s:%d), others of its block wait at (%s:%d)",
         base_name(site.file), site.line, base_name(block.barrier_site.file), block.barrier_site.line);
  }
  Thread &self = block.threads[block.current];
  Warp &warp = block.warps[block.current / 32];
  const unsigned lane = 1u << block.current % 32;
  block.true_predicates += predicate;
  block.waiting++;
  self.state = ThreadState::at_barrier;
  self.barrier_site = site;
  warp.at_barrier |= lane;
  warp.runnable &= ~lane;
  if (block.waiting == block.live) {
    release_barrier();
    // The last to come goes on at once, except in random order, which favours nobody.
    if (launch_config->order != RANDOM) return barrier_result;
  }
  switch_from_current_thread();
  return barrier_result;
}

// ---- warp collectives
// Runs the collective of these lanes if all of them that have not returned have come.
static bool try_collective(int warp_index, unsigned mask) {
  Warp &warp = block.warps[warp_index];
  const unsigned participants = mask & warp.exists & ~warp.returned;
  if (!participants || (warp.in_collective & participants) != participants) return false;

  Collective *lanes[32];
  bool same_group = true;
  for_each_lane(participants, [&](unsigned lane) {
    lanes[lane] = block.threads[warp_index * 32 + lane].collective;
    same_group = same_group && lanes[lane]->mask == mask;
  });
  if (!same_group) return false;

  const Collective &first = *lanes[__builtin_ctz(participants)];
  if (first.execute) first.execute(lanes, participants);
  if (first.orders_memory) checker_warp_barrier(warp_index);
  warp.in_collective &= ~participants;
  warp.runnable |= participants;
  for_each_lane(participants, [&](unsigned lane) {
    block.threads[warp_index * 32 + lane].state = ThreadState::runnable;
  });
  return true;
}

static bool same_collective(const Collective &a, const Collective &b) {
  return a.mask == b.mask && a.execute == b.execute && a.name == b.name && a.site.line == b.site.line;
}

// One lane that waits for this one, but elsewhere, is enough; what this misses ends as a deadlock.
static void check_same_collective(const Collective &self, int warp_index, int lane) {
  const unsigned waiting = block.warps[warp_index].in_collective & self.mask;
  if (!waiting) return;
  const int other_lane = __builtin_ctz(waiting);
  const Collective &other = *block.threads[warp_index * 32 + other_lane].collective;
  if (!(other.mask >> lane & 1) || same_collective(self, other)) return;
  fail("divergent warp collective: lane %d is in %s (%s:%d) with mask %08x, lane %d in %s (%s:%d) with mask %08x", lane,
       self.name, base_name(self.site.file), self.site.line, self.mask, other_lane, other.name,
       base_name(other.site.file), other.site.line, other.mask);
}

void join_collective(Collective &self) {
  const int warp_index = block.current / 32, lane = block.current % 32;
  Warp &warp = block.warps[warp_index];
  counter_collective(self.name, self.site);
  if (!(self.mask >> lane & 1)) {
    fail("%s (%s:%d): the calling lane %d is not in its mask %08x", self.name, base_name(self.site.file),
         self.site.line, lane, self.mask);
  }
  check_same_collective(self, warp_index, lane);
  Thread &thread = block.threads[block.current];
  thread.collective = &self;
  thread.state = ThreadState::in_collective;
  warp.in_collective |= 1u << lane;
  warp.runnable &= ~(1u << lane);
  if (try_collective(warp_index, self.mask) && launch_config->order != RANDOM) return;
  switch_from_current_thread();
}

// ---- a thread has returned: others may have waited for nobody else
void thread_returned() {
  const int warp_index = block.current / 32;
  Warp &warp = block.warps[warp_index];
  const unsigned lane = 1u << block.current % 32;
  block.threads[block.current].state = ThreadState::returned;
  block.live--;
  warp.returned |= lane;
  warp.runnable &= ~lane;
  if (block.waiting && block.waiting == block.live) release_barrier();
  for_each_lane(warp.in_collective, [&](unsigned waiting) {
    if (!(warp.in_collective >> waiting & 1)) return;  // released by an earlier turn of this loop
    try_collective(warp_index, block.threads[warp_index * 32 + waiting].collective->mask);
  });
}

}  // namespace emulator
