// Sums of many terms, which a plain float would lose: at 2**24 equal terms it stands still.
#pragma once
#include "platform.cuh"

constexpr int RUN = 16;  // terms of one running sum: in float they lose 5e-7 at the most

// A sum of any number of terms: runs of a few, and the rounding errors of the sum over the runs.
template <typename A> struct Sum {
  A run = 0, high = 0, low = 0;

  __device__ __forceinline__ void end_run() {
    const A total = high + run, added = total - high;
    low += (high - (total - added)) + (run - added);
    high = total;
    run = A(0);
  }

  __device__ __forceinline__ void add(A term) {  // a run of its own
    run += term;
    end_run();
  }

  __device__ __forceinline__ A value() const {
    const A exact = high + (low + run), rounded = high + run;
    return isfinite(exact) ? exact : rounded;  // where `high` is infinite, `low` is NaN
  }
};
