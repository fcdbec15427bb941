// The steps of the sort that are the same for every family: see sort.cuh. Blocks have SORTERS threads.
#include "sort.cuh"

constexpr int SCANNED = 4096;  // numbers of a block of the scan
constexpr int DIGIT = 4;       // bits of a sample's number that long lists are sorted by at a time

// totals[b] = the sum of counts b * SCANNED and following. Grid: a block for each.
__global__ void __launch_bounds__(SORTERS) sort_totals(const int *counts, int count, int *totals) {
  const long long first = (long long)blockIdx.x * SCANNED;
  int sum = 0, total;
  for (int i = int(threadIdx.x); i < SCANNED; i += SORTERS) sum += first + i < count ? counts[first + i] : 0;
  sum_before(sum, total);
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

// Every number becomes the sum of those before it. Grid: a block for each `run` of numbers; `totals` has the sums of
// those before each, null where there is one block. Numbers above COUNTED, those of long lists, are noted in
// long_lists[1] and following, in any order, and counted in long_lists[0].
__global__ void __launch_bounds__(SORTERS)
sort_scan(int *numbers, int count, int run, const int *totals, int *long_lists) {
  const long long first = (long long)blockIdx.x * run;
  int carry = totals ? totals[blockIdx.x] : 0;
  for (int i = int(threadIdx.x); i - int(threadIdx.x) < run; i += SORTERS) {
    const bool inside = i < run && first + i < count;
    const int number = inside ? numbers[first + i] : 0;
    int total;
    const int before = sum_before(number, total);
    if (inside) numbers[first + i] = carry + before;
    if (long_lists && number > COUNTED) long_lists[1 + atomicAdd(long_lists, 1)] = int(first + i);
    carry += total;
  }
}

// Moves starts[cell + 1] from where the list begins to where it ends. Grid: a thread a sample.
__global__ void __launch_bounds__(SORTERS) sort_fill(const int *cells, int count, int *starts, int *order) {
  const unsigned sample = blockIdx.x * SORTERS + threadIdx.x;
  if (sample >= unsigned(count)) return;
  const int cell = cells[sample];
  if (cell >= 0) order[atomicAdd(starts + cell + 1, 1)] = int(sample);  // in any order, which is set afterwards
}

// Sorts the long lists by their samples' numbers, a digit at a time from the last on: each thread counts the digits in
// a part of the list, and then moves the part's samples behind those with smaller digits and those of earlier parts.
// Grid: blocks that share the lists out.
__global__ void __launch_bounds__(SORTERS)
sort_long(const int *long_lists, const int *starts, int segment_cells, int segment_samples, int *order, int *spare) {
  constexpr int DIGITS = 1 << DIGIT;
  SMEM(int, counts, [DIGITS * SORTERS]);  // of each digit in each part
  const int thread = int(threadIdx.x);
  for (int list = int(blockIdx.x); list < long_lists[0]; list += int(gridDim.x)) {
    const int cell = long_lists[1 + list], size = starts[cell + 1] - starts[cell];
    const int first_sample = cell / segment_cells * segment_samples;
    const int part = (size + SORTERS - 1) / SORTERS, begin = min(thread * part, size), end = min(begin + part, size);
    int *from = order + starts[cell], *to = spare + starts[cell];
    for (int shift = 0; (segment_samples - 1LL) >> shift > 0; shift += DIGIT) {
      const auto digit = [&](int sample) { return ((sample - first_sample) >> shift) % DIGITS; };
      for (int d = 0; d < DIGITS; ++d) counts[d * SORTERS + thread] = 0;
      for (int i = begin; i < end; ++i) ++counts[digit(from[i]) * SORTERS + thread];
      __syncthreads();
      int *mine = counts + thread * DIGITS, sum = 0, total;  // DIGITS counts to scan
      for (int d = 0; d < DIGITS; ++d) sum += mine[d];
      sum = sum_before(sum, total);
      for (int d = 0; d < DIGITS; ++d) {
        const int number = mine[d];
        mine[d] = sum;
        sum += number;
      }
      __syncthreads();
      for (int i = begin; i < end; ++i) to[counts[digit(from[i]) * SORTERS + thread]++] = from[i];
      __syncthreads();
      int *moved = to;
      to = from;
      from = moved;
    }
    if (from == spare + starts[cell]) {
      for (int i = thread; i < size; i += SORTERS) to[i] = from[i];
    }
    __syncthreads();
  }
}
