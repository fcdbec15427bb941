// What a kernel's library and the runtime (runtime/*.cpp) know of each other.
#pragma once

EMULATOR_API extern uint3 threadIdx, blockIdx;
EMULATOR_API extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {

// ---- where in the kernel's source something happened
struct Site {
  const char *file;
  int line;
  // As a default argument this is the line of the call, the way std::source_location works.
  static constexpr Site here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

EMULATOR_API const char *base_name(const char *file);

// Abandons the launch; Python raises EmulatorError with this message.
[[noreturn]] EMULATOR_API void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

// ---- barriers and warp collectives
// Waits until all threads of the block that have not returned are here; the number of true predicates.
EMULATOR_API int block_barrier(bool predicate, Site site);

// One lane's part in a warp collective. It lives on that lane's stack while the lane waits for the others.
struct Collective {
  const char *name;
  Site site;
  unsigned mask;
  // Run once, by the last lane to arrive, for the lanes in `participants`; null where there is only waiting.
  void (*execute)(Collective *const *lanes, unsigned participants);
  bool orders_memory = false;
};
EMULATOR_API void join_collective(Collective &collective);

// ---- shared memory
struct SharedArray {
  void *data;
  uint64_t block;  // the block that `data` was prepared for
};
EMULATOR_API extern uint64_t current_block;  // counts the blocks of all launches
EMULATOR_API extern unsigned char *dynamic_shared_memory;
EMULATOR_API void *prepare_shared_array(SharedArray &array, const char *name, size_t size);
EMULATOR_API bool is_shared_memory(const void *address, size_t size);

EMULATOR_UNCHECKED void *shared_memory(SharedArray &array, const char *name, size_t size) {
  if (array.block == current_block) return array.data;
  return prepare_shared_array(array, name, size);
}

// 0xFF in every byte is NaN in all float types: what nobody has written shows in the result.
constexpr int POISON = 0xFF;
template <class T>
void poison(T &value) {
  memset(static_cast<void *>(&value), POISON, sizeof value);
}

// ---- the checking build's eyes
enum class AccessKind : uint8_t { read, write, atomic, async_copy };
#ifdef EMULATOR_CHECK
EMULATOR_API void check_access(int lane, const void *address, size_t size, AccessKind kind, Site site);
EMULATOR_API void check_access(const void *address, size_t size, AccessKind kind, Site site);
#else
inline void check_access(int, const void *, size_t, AccessKind, Site) {}
inline void check_access(const void *, size_t, AccessKind, Site) {}
#endif

// ---- launches, called from Python (launch.py has the same structures)
enum ParameterKind : int { VALUE, CONST_POINTER, POINTER };
struct Argument {
  unsigned char *data;  // a value, or the lowest byte of an array's span; null for a null pointer
  size_t size;          // of the value or the span, in bytes
  size_t offset;        // of the array's first element in the span
  int kind;             // ParameterKind
};
struct LaunchConfig {
  unsigned grid[3], block[3];
  size_t dynamic_shared;
  int order;  // 0 forward, 1 reverse, 2 random
  unsigned seed;
  int strict;  // a barrier after a thread of the block has returned is an error
  uint64_t sample;  // how many blocks to run, spread over the grid; 0 for all
  int argument_count;
  const Argument *arguments;
  char *error;
  size_t error_size;
};
EMULATOR_API int launch(const LaunchConfig &config, void (*run_thread)(void **arguments));

template <class T>
constexpr int parameter_kind() {
  if (!std::is_pointer_v<T>) return VALUE;
  return std::is_const_v<std::remove_pointer_t<T>> ? CONST_POINTER : POINTER;
}

template <auto kernel>
struct Export;

template <class... Parameters, void (*kernel)(Parameters...)>
struct Export<kernel> {
  template <size_t... index>
  static EMULATOR_UNCHECKED void call(void **arguments, std::index_sequence<index...>) {
    kernel(*static_cast<Parameters *>(arguments[index])...);
  }
  static EMULATOR_UNCHECKED void run_thread(void **arguments) {
    call(arguments, std::index_sequence_for<Parameters...>{});
  }
  // The number of parameters, then the kind of each, then the size of each.
  static const int *signature() {
    static const int values[] = {int(sizeof...(Parameters)), parameter_kind<Parameters>()...,
                                 int(sizeof(Parameters))...};
    return values;
  }
};

}  // namespace emulator

#define EMULATOR_EXPORT(...)                                                        \
  extern "C" EMULATOR_API int cudcn_launch(const emulator::LaunchConfig *config) {  \
    return emulator::launch(*config, emulator::Export<&__VA_ARGS__>::run_thread);   \
  }                                                                                 \
  extern "C" EMULATOR_API const int *cudcn_signature() { return emulator::Export<&__VA_ARGS__>::signature(); }
