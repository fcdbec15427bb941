// Samples sorted by the cell that they lie in, once for all channels: each pixel of an image gathers its gradient from
// the lists of the four cells around it. No float is added by an atomic, so that the bits are the same in every run.
//
//   count     each sample's cell, and how many each cell has                    count_samples, in a kernel of a family
//   scan      where the cells' lists begin                                      sort.cu
//   fill      the samples' numbers, each list's in any order                    sort.cu
//   order     lists of more than COUNTED samples, a block a list                sort.cu
//   records   what the gather reads of each sample, in the samples' order       write_records, in a kernel of a family
//
// A thread a sample, but for the scan and the long lists; all is linear in samples and cells, also where all samples
// lie in one cell. Samples and cells are numbered through segments, images that are sorted apart: number i of segment s
// is s * segment_samples + i, and cell c is s * segment_cells + c. The cells of an image have their top left corner
// from (-1, -1) on, (H + 1) x (W + 1) of them, row by row. `starts` has one more number than there are cells: cell c has
// the records from starts[c] to starts[c + 1].
#pragma once
#include "platform.cuh"

constexpr int SORTERS = 256;  // threads of a block
constexpr int COUNTED = 256;  // samples of a list whose order each of them finds for itself

// A sample's record. `row` is that of grad_output, its number in all images; `factor` is what the sample's value is multiplied by there.
template <typename A> struct alignas(16) Record {
  int row;
  A down, right, factor;
};

// In row-major images with the `pitch` that cells have, a position's cell (y0, x0) is number y0 * pitch + x0 + this.
__device__ __forceinline__ int first_cell(int pitch) { return pitch + 1; }

// The sum of the values of all earlier threads of the block; `total` of all.
__device__ __forceinline__ int sum_before(int value, int &total) {
  SMEM(int, warps, [SORTERS / 32]);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int sum = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < SORTERS / 32; ++w) {
    if (w == warp) before = total;
    total += warps[w];
  }
  __syncthreads();
  return before + sum - value;
}

// Counts each cell's samples in starts[cell + 1], which are zeros before. samples.cell(i) is sample i's, -1 for one that
// adds nothing.
template <typename Samples>
__device__ __forceinline__ void count_samples(const Samples &samples, int count, int *cells, int *starts) {
  const unsigned sample = blockIdx.x * SORTERS + threadIdx.x;
  if (sample >= unsigned(count)) return;
  const int cell = samples.cell(int(sample));
  cells[sample] = cell;
  if (cell >= 0) atomicAdd(starts + cell + 1, 1);  // whole numbers: their order does not matter
}

// `count` is that of the cells; samples.record(i) is sample i's.
template <typename R, typename Samples>
__device__ __forceinline__ void write_records(const Samples &samples, int count, const int *cells, const int *starts,
                                              const int *order, R *records) {
  const unsigned at = blockIdx.x * SORTERS + threadIdx.x;
  if (at >= unsigned(starts[count])) return;
  const int sample = order[at], begin = starts[cells[sample]], end = starts[cells[sample] + 1];
  int place = int(at);  // in a long list, which has its order
  if (end - begin <= COUNTED) {
    place = begin;
    for (int i = begin; i < end; ++i) place += order[i] < sample;
  }
  records[place] = samples.record(sample);
}

// The lists of the cells around a pixel, whose bottom right corner it is in the first, and whose top left in the last:
// they are two runs, of two neighbouring cells each. `starts` are those from the first cell on.
struct alignas(16) Lists {
  int begin[2], middle[2], end[2];

  Lists() = default;

  __device__ __forceinline__ Lists(const int *starts, int pitch) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      begin[below] = starts[below * pitch];
      middle[below] = starts[below * pitch + 1];
      end[below] = starts[below * pitch + 2];
    }
  }

  __device__ __forceinline__ int count() const { return end[0] - begin[0] + end[1] - begin[1]; }

  // What the pixel gets of a record's row, of number `at` in the run above it or below.
  template <typename A> __device__ __forceinline__ A weight(const Record<A> &record, int at, int below) const {
    const bool right = at >= middle[below];
    return (below ? A(1) - record.down : record.down) * (right ? A(1) - record.right : record.right) * record.factor;
  }
};
