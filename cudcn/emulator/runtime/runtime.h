// What the parts of the runtime know of each other. Nothing here is visible to kernels.
#pragma once
#include "cuda_emulator.h"
#include "emulator_cp_async.h"

#include <string>
#include <vector>

namespace emulator {

constexpr int MAX_THREADS = 1024;
constexpr int MAX_WARPS = MAX_THREADS / 32;

// ---- the block being run (scheduler.cpp, barriers.cpp)
enum class ThreadState : uint8_t { not_started, runnable, at_barrier, in_collective, returned };

struct AsyncCopy {
  void *destination;
  const void *source;
  int size, source_size;
  Site site;
};

struct Thread {
  void *stack_pointer;  // while another fiber runs
  int stack;
  ThreadState state;
  uint3 index;
  Collective *collective;  // while in_collective
  Site barrier_site;       // while at_barrier
  std::vector<AsyncCopy> copies;
  std::vector<size_t> copy_groups;  // copies[0 .. copy_groups[i]) are groups 0 to i
};

struct Warp {  // one bit a lane
  uint32_t exists, returned;
  uint32_t runnable;  // not started, or ready to go on
  uint32_t at_barrier, in_collective;
};

struct Block {
  Thread threads[MAX_THREADS];
  Warp warps[MAX_WARPS];
  int thread_count, warp_count;
  int current;  // the running thread
  int live;     // threads that have not returned
  int waiting;  // of these, at the barrier
  int true_predicates;
  Site barrier_site;  // of the first thread that came
};
extern Block block;

// ---- the launch (launch.cpp)
enum Order : int { FORWARD, REVERSE, RANDOM };
extern const LaunchConfig *launch_config;
extern bool launch_failed;
extern void (*kernel_body)(void **arguments);
extern void **kernel_arguments;

// ---- fibers and who runs next (fibers.cpp, scheduler.cpp)
extern void *launcher_stack;
void switch_stack(void **save, void *to);
int take_stack();
void release_stack(int stack);
void release_all_stacks();
void *stack_top(int stack);
bool is_on_stack(uintptr_t address);
void seed_random(unsigned seed);
void start_block();       // all its threads, until they have returned or the launch has failed
void shuffle_warps();     // new priorities for the random order
int next_thread();        // -1 where all that have not returned wait
void switch_from_current_thread();
void thread_returned();

// ---- memory that ends at a guard page (memory.cpp)
struct Buffer {
  std::string name;
  unsigned char *pages;  // the first usable page
  size_t capacity;       // in whole pages
  unsigned char *begin;
  size_t size;
  bool shared, writable;
  SharedArray *array;  // for shared memory declared by SMEM()

  uintptr_t low() const { return reinterpret_cast<uintptr_t>(begin); }
  uintptr_t high() const { return low() + size; }
};
extern std::vector<Buffer> buffers;  // of the running launch
Buffer &add_buffer(std::string name, size_t size, uintptr_t alignment);
void make_read_only(Buffer &buffer);
void release_buffers();
bool guards(const Buffer &buffer, uintptr_t address);  // whether it is in the buffer or its guard zones
void check_canaries(bool shared);
void prepare_dynamic_shared_memory();
void start_block_memory();

// ---- errors (faults.cpp)
// Both fail the launch and return. The second is for what a block or a launch left behind: nobody knows which thread.
void report(const char *format, ...) __attribute__((format(printf, 1, 2)));
void report_afterwards(const char *format, ...) __attribute__((format(printf, 1, 2)));
void run_with_fault_handler(void (*run)());
extern const Site *async_copy_in_progress;  // for a fault inside the runtime
std::string kernel_location(uintptr_t program_counter);  // " @pc=12ab", which Python turns into a source line

// ---- the checking build (checker.cpp), and the counting build, which has these too
#ifdef EMULATOR_CHECK
void checker_start_launch();
void checker_start_block();
void checker_block_barrier();
void checker_warp_barrier(int warp);
void checker_end_launch();
#else
inline void checker_start_launch() {}
inline void checker_start_block() {}
inline void checker_block_barrier() {}
inline void checker_warp_barrier(int) {}
inline void checker_end_launch() {}
#endif

// ---- the counting build alone (counter.cpp)
#ifdef EMULATOR_COUNT
void counter_call(uintptr_t return_address);
void counter_return();
void counter_collective(const char *name, Site site);
void counter_copy(const void *source, size_t size, Site site);
void counter_end_block();
#else
inline void counter_call(uintptr_t) {}
inline void counter_return() {}
inline void counter_collective(const char *, Site) {}
inline void counter_copy(const void *, size_t, Site) {}
inline void counter_end_block() {}
#endif

}  // namespace emulator
