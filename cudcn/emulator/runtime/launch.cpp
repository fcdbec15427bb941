// One launch: arguments into guarded memory, all blocks, results back.
#include "runtime.h"

#include <numeric>

namespace emulator {

const LaunchConfig *launch_config;
bool launch_failed;
void (*kernel_body)(void **arguments);
void **kernel_arguments;

// ---- arguments
static std::vector<void *> pointers;   // what the kernel's pointer parameters are
static std::vector<void *> arguments;  // where each parameter's value lies
static std::vector<unsigned char *> copies;

static void copy_arguments_in() {
  const int count = launch_config->argument_count;
  pointers.assign(size_t(count), nullptr);
  arguments.assign(size_t(count), nullptr);
  copies.assign(size_t(count), nullptr);
  for (int i = 0; i < count; i++) {
    const Argument &argument = launch_config->arguments[i];
    if (argument.kind == VALUE) {
      arguments[i] = argument.data;
      continue;
    }
    arguments[i] = &pointers[i];
    if (!argument.data) continue;
    const uintptr_t alignment = reinterpret_cast<uintptr_t>(argument.data);
    Buffer &buffer = add_buffer("argument " + std::to_string(i), argument.size, alignment);
    memcpy(buffer.begin, argument.data, argument.size);
    copies[i] = buffer.begin;
    pointers[i] = buffer.begin + argument.offset;
    if (argument.kind == CONST_POINTER) make_read_only(buffer);
  }
  kernel_arguments = arguments.data();
}

static void copy_results_out() {
  for (int i = 0; i < launch_config->argument_count; i++) {
    const Argument &argument = launch_config->arguments[i];
    if (argument.kind == POINTER && argument.data) memcpy(argument.data, copies[i], argument.size);
  }
}

// ---- blocks
static void set_dimensions() {
  const unsigned *grid = launch_config->grid, *threads = launch_config->block;
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {threads[0], threads[1], threads[2]};
  block.thread_count = int(blockDim.x * blockDim.y * blockDim.z);
  block.warp_count = (block.thread_count + 31) / 32;
  for (unsigned i = 0; i < unsigned(block.thread_count); i++) {
    block.threads[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  }
}

// Random order, and a sample, step through the blocks by a number that has no factor in common with theirs.
static uint64_t block_step(uint64_t count) {
  uint64_t step = 2654435761ull % count + 1;
  while (std::gcd(step, count) != 1) step++;
  return step;
}

static void run_all_blocks() {
  const uint64_t count = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
  const uint64_t step = block_step(count);
  const bool samples = launch_config->sample && launch_config->sample < count;
  const uint64_t runs = samples ? launch_config->sample : count;
  uint64_t random_block = launch_config->seed % count;
  for (uint64_t i = 0; i < runs && !launch_failed; i++) {
    uint64_t index = i;
    if (launch_config->order == REVERSE) index = count - 1 - i;
    if (launch_config->order == RANDOM || samples) index = random_block = (random_block + step) % count;
    const uint64_t rows = index / gridDim.x;
    blockIdx = {unsigned(index % gridDim.x), unsigned(rows % gridDim.y), unsigned(rows / gridDim.y)};
    start_block_memory();
    checker_start_block();
    start_block();
    counter_end_block();
    check_canaries(/*shared=*/true);
  }
  check_canaries(/*shared=*/false);
}

static void run_launch() {
  set_dimensions();
  copy_arguments_in();
  prepare_dynamic_shared_memory();
  checker_start_launch();
  run_all_blocks();
}

int launch(const LaunchConfig &config, void (*run_thread)(void **)) {
  launch_config = &config;
  launch_failed = false;
  kernel_body = run_thread;
  seed_random(config.seed);
  run_with_fault_handler(run_launch);
  checker_end_launch();
  if (!launch_failed) copy_results_out();
  release_buffers();
  return launch_failed;
}

}  // namespace emulator
