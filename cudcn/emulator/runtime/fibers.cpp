// Stacks for fibers, and the switch between them.
#include "runtime.h"

#include <sys/mman.h>

// Saves the registers that a function must preserve, stores the stack pointer, and goes on where `to` left off.
// ucontext would do the same, with two system calls a switch.
asm(R"(
.text
.globl emulator_switch_stack
.hidden emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
extern "C" void emulator_switch_stack(void **save, void *to);

namespace emulator {

void *launcher_stack;

void switch_stack(void **save, void *to) { emulator_switch_stack(save, to); }

// One range of addresses for all stacks, so that the checker can tell them by two comparisons. Each has a guard zone.
static constexpr size_t STACK_GUARD = 64 * 1024;  // so that no frame steps over it
static constexpr size_t STACK_SIZE = 256 * 1024;
static constexpr size_t STRIDE = STACK_GUARD + STACK_SIZE;
static char *arena;
static int stacks_used;
static std::vector<int> free_stacks;

static void map_arena() {
  void *mapped = mmap(nullptr, MAX_THREADS * STRIDE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) fail("no memory for the stacks of %d threads", MAX_THREADS);
  arena = static_cast<char *>(mapped);
}

int take_stack() {
  if (!free_stacks.empty()) {
    const int stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  if (!arena) map_arena();
  const int stack = stacks_used++;
  mprotect(arena + stack * STRIDE + STACK_GUARD, STACK_SIZE, PROT_READ | PROT_WRITE);
  return stack;
}

void release_stack(int stack) { free_stacks.push_back(stack); }

void release_all_stacks() {
  free_stacks.clear();
  for (int stack = stacks_used - 1; stack >= 0; stack--) free_stacks.push_back(stack);
}

void *stack_top(int stack) { return arena + (stack + 1) * STRIDE - 64; }

bool is_on_stack(uintptr_t address) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(arena);
  return address >= begin && address < begin + MAX_THREADS * STRIDE;
}

}  // namespace emulator
