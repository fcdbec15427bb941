// Errors: those that the emulator finds, and those that the processor reports as a signal.
#include "runtime.h"

#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <ucontext.h>

namespace emulator {

// ---- messages
static void write_message(const std::string &where, const char *format, va_list values) {
  if (launch_failed) return;  // the first error is the one to tell
  launch_failed = true;
  char *error = launch_config->error;
  const int used = snprintf(error, launch_config->error_size, "%s", where.c_str());
  vsnprintf(error + used, launch_config->error_size - size_t(used), format, values);
}

static std::string current_thread() {
  char text[160];
  snprintf(text, sizeof text, "block (%u, %u, %u), thread (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z,
           threadIdx.x, threadIdx.y, threadIdx.z);
  return text;
}

void report(const char *format, ...) {
  va_list values;
  va_start(values, format);
  write_message(current_thread(), format, values);
  va_end(values);
}

void report_afterwards(const char *format, ...) {
  va_list values;
  va_start(values, format);
  write_message("", format, values);
  va_end(values);
}

const char *base_name(const char *file) {
  const char *slash = strrchr(file, '/');
  return slash ? slash + 1 : file;
}

std::string kernel_location(uintptr_t program_counter) {
  Dl_info here, kernel;
  if (!dladdr(reinterpret_cast<void *>(program_counter), &here)) return "";
  if (!dladdr(reinterpret_cast<void *>(kernel_body), &kernel) || here.dli_fbase != kernel.dli_fbase) return "";
  char text[32];
  snprintf(text, sizeof text, " @pc=%zx", size_t(program_counter - reinterpret_cast<uintptr_t>(here.dli_fbase)));
  return text;
}

// ---- signals
static const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
constexpr int SIGNAL_COUNT = 4;
static struct sigaction previous_actions[SIGNAL_COUNT];
static sigjmp_buf launcher;
static pthread_t launcher_thread;
enum Outcome : int { DONE, FAULT, FAILED };

// The fibers of the block are left where they are: the next block takes their stacks anew.
void fail(const char *format, ...) {
  va_list values;
  va_start(values, format);
  write_message(current_thread(), format, values);
  va_end(values);
  siglongjmp(launcher, FAILED);
}

struct Fault {
  int signal;
  bool has_address;  // a misaligned vector access reports none
  bool is_write;
  uintptr_t address, program_counter;
};
static Fault fault;

static void on_signal(int signal, siginfo_t *info, void *context) {
  if (!pthread_equal(pthread_self(), launcher_thread)) {
    // Another thread's fault is not ours: it happens again under the action that was there before.
    for (int i = 0; i < SIGNAL_COUNT; i++) {
      if (SIGNALS[i] == signal) sigaction(signal, &previous_actions[i], nullptr);
    }
    return;
  }
  const auto &registers = static_cast<ucontext_t *>(context)->uc_mcontext.gregs;
  constexpr int write_bit = 2;  // of the page fault's error code
  fault.signal = signal;
  fault.has_address = info->si_code != SI_KERNEL;
  fault.is_write = registers[REG_ERR] & write_bit;
  fault.address = reinterpret_cast<uintptr_t>(info->si_addr);
  fault.program_counter = uintptr_t(registers[REG_RIP]);
  siglongjmp(launcher, FAULT);
}

static void describe_bad_address(const std::string &location) {
  const char *access = fault.is_write ? "write" : "read";
  for (const Buffer &buffer : buffers) {
    if (!guards(buffer, fault.address)) continue;
    const long offset = long(fault.address - buffer.low());
    if (offset >= 0 && fault.address < buffer.high()) {
      return report("write to read-only %s at byte %ld%s", buffer.name.c_str(), offset, location.c_str());
    }
    return report("out-of-bounds %s of %s (%zu bytes) at byte %ld%s", access, buffer.name.c_str(), buffer.size, offset,
                  location.c_str());
  }
  if (is_on_stack(fault.address)) {
    return report("stack overflow%s", location.c_str());
  }
  if (fault.address < 65536) {
    const char *hint = dynamic_shared_memory ? "" : ", an argument's or DYN_SMEM's of a launch without";
    return report("%s through a null pointer%s%s", access, hint, location.c_str());
  }
  report("out-of-bounds %s at %p, outside every buffer%s", access, reinterpret_cast<void *>(fault.address),
         location.c_str());
}

static void describe_fault() {
  std::string location = kernel_location(fault.program_counter);
  if (async_copy_in_progress) {
    location = std::string(" by cp.async (") + base_name(async_copy_in_progress->file) + ":" +
               std::to_string(async_copy_in_progress->line) + ")";
  }
  if (fault.signal == SIGFPE) report("integer division by zero%s", location.c_str());
  else if (fault.signal == SIGILL) report("undefined behaviour that g++ turned into a trap%s", location.c_str());
  else if (!fault.has_address) report("misaligned vector access, or a wild pointer%s", location.c_str());
  else describe_bad_address(location);
}

void run_with_fault_handler(void (*run)()) {
  // A stack overflow leaves no room for the handler on the fiber's own stack.
  static char signal_stack[64 * 1024];
  static stack_t previous_stack;
  stack_t stack = {};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &previous_stack);

  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  launcher_thread = pthread_self();
  for (int i = 0; i < SIGNAL_COUNT; i++) sigaction(SIGNALS[i], &action, &previous_actions[i]);

  async_copy_in_progress = nullptr;
  const int outcome = sigsetjmp(launcher, /*save the signal mask=*/1);
  if (outcome == DONE) run();
  if (outcome == FAULT) describe_fault();

  for (int i = 0; i < SIGNAL_COUNT; i++) sigaction(SIGNALS[i], &previous_actions[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
}

}  // namespace emulator
