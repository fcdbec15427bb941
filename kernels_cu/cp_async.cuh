// Asynchronous copies from global to shared memory, each thread its own.
//
//   cp_async<N>(destination, source, predicate)   starts a copy of N = 4, 8 or 16 bytes; zeros where predicate is false
//   cp_async_commit()                             closes a group of copies
//   cp_async_wait<N>()                            waits until at most N groups are in flight
//
// Both addresses must be aligned to N. Another thread sees the bytes only after the wait and a __syncthreads().
// Before sm_80 the copies are plain loads and stores.
#pragma once
#include "platform.cuh"

#if !defined(__CUDACC__)
#include "emulator_cp_async.h"
#else

template <int N>
__device__ __forceinline__ void cp_async(void *destination, const void *source, bool predicate = true) {
  static_assert(N == 4 || N == 8 || N == 16, "cp.async copies 4, 8 or 16 bytes");
#if __CUDA_ARCH__ >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(destination));
  const int source_size = predicate ? N : 0;
  if constexpr (N == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"  // past L1: each byte is read once
                 ::"r"(address), "l"(source), "r"(source_size) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 ::"r"(address), "l"(source), "n"(N), "r"(source_size) : "memory");
  }
#else
  if constexpr (N == 16) {
    *static_cast<uint4 *>(destination) = predicate ? *static_cast<const uint4 *>(source) : make_uint4(0, 0, 0, 0);
  } else if constexpr (N == 8) {
    *static_cast<uint2 *>(destination) = predicate ? *static_cast<const uint2 *>(source) : make_uint2(0, 0);
  } else {
    *static_cast<unsigned *>(destination) = predicate ? *static_cast<const unsigned *>(source) : 0u;
  }
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

#endif
