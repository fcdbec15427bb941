// The one header that every kernel includes: CUDA under NVRTC and nvcc, the emulator under g++.
//
//   SMEM(float, tile, [16][17]);   shared memory, in place of `__shared__ float tile[16][17];`
//   DYN_SMEM(float, buffer);       `buffer` points at the launch's dynamic shared memory
//
// Both are 16-byte aligned, as vector loads, cp.async and ldmatrix want.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define SMEM(T, name, ...) __shared__ __align__(16) T name __VA_ARGS__
#define DYN_SMEM(T, name)                                          \
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[]; \
  T *name = reinterpret_cast<T *>(dynamic_shared_memory)
#else
#include "cuda_emulator.h"
#endif
