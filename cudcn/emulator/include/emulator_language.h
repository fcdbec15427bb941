// CUDA's keywords and shared-memory declarations. __noinline__ is not among them: libstdc++ uses the word as an
// attribute's name.
#pragma once

// `inline` lets g++ skip the kernels of a file that nobody asked for.
#define __global__ inline
#define __device__
#define __host__
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __builtin_assume(condition) ((void)0)

// A plain static array would have no guard pages, would keep its values from block to block, and in a template would
// be one array for every loaded library.
#define __shared__ static_assert(false, "declare shared memory with SMEM() or DYN_SMEM(), not with __shared__");

// SMEM(float, tile, [16][17]) declares `tile`, one array per block. The typedef takes the bracketed dimensions.
#define SMEM(T, name, ...)                                  \
  typedef T name##_smem_type __VA_ARGS__;                   \
  static ::emulator::SharedArray name##_smem_array;         \
  name##_smem_type &name = *reinterpret_cast<name##_smem_type *>( \
      ::emulator::shared_memory(name##_smem_array, #name, sizeof(name##_smem_type)))

// DYN_SMEM(float, buffer) points `buffer` at the launch's dynamic shared memory.
#define DYN_SMEM(T, name) T *name = reinterpret_cast<T *>(::emulator::dynamic_shared_memory)

// Functions of the emulator itself that touch the kernel's memory must not be instrumented by the checking build:
// they tell the checker themselves, with the kernel's source line.
#ifdef EMULATOR_CHECK
#define EMULATOR_UNCHECKED __attribute__((no_sanitize("thread"), noinline)) inline
#else
#define EMULATOR_UNCHECKED inline
#endif

// Symbols that cross from a kernel's library to the runtime's; everything else is hidden.
#define EMULATOR_API __attribute__((visibility("default")))
