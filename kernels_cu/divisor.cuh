// Division by a number that the host knows, without a division. cudcn/cuda/divisor.py makes it.
#pragma once
#include "platform.cuh"

// n / d for 0 <= n < 2**31: with shift = ceil(log2(d)), multiplier = ceil(2**(31 + shift) / d).
struct Divisor {
  unsigned multiplier, shift;

  __device__ __forceinline__ unsigned operator()(unsigned n) const { return __umulhi(n + n, multiplier) >> shift; }
};
