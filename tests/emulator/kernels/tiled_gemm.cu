// c (m, n) = a (m, k) b (k, n) through shared-memory tiles, one thread an element, and the sum of c.
// BUG_* macros plant bugs for test_emulator.py.
#include "platform.cuh"

template <class T, int TILE>
__global__ void __launch_bounds__(TILE *TILE)
tiled_gemm(const T *__restrict__ a, const T *__restrict__ b, T *__restrict__ c, float *__restrict__ sum, int m, int n,
           int k) {
  constexpr int WARPS = TILE * TILE / 32;
  SMEM(float, a_tile, [TILE][TILE + 1]);
  SMEM(float, b_tile, [TILE][TILE + 1]);
  SMEM(float, warp_sums, [WARPS]);
  const int column_in_tile = threadIdx.x, row_in_tile = threadIdx.y;
  const int row = blockIdx.y * TILE + row_in_tile, column = blockIdx.x * TILE + column_in_tile;
#ifdef BUG_EARLY_RETURN
  if (row >= m) return;
#endif

  float total = 0.0f;
  for (int first = 0; first < k; first += TILE) {
    const int a_column = first + column_in_tile, b_row = first + row_in_tile;
    a_tile[row_in_tile][column_in_tile] = row < m && a_column < k ? static_cast<float>(a[row * k + a_column]) : 0.0f;
    b_tile[row_in_tile][column_in_tile] = b_row < k && column < n ? static_cast<float>(b[b_row * n + column]) : 0.0f;
#ifdef BUG_DIVERGENT_BARRIER
    if (row < m) __syncthreads();
    else
#endif
#ifndef BUG_NO_BARRIER_AFTER_WRITE
    __syncthreads();
#endif
    for (int i = 0; i < TILE; i++) total = __fmaf_rn(a_tile[row_in_tile][i], b_tile[i][column_in_tile], total);
#ifndef BUG_NO_BARRIER_AFTER_READ
    __syncthreads();
#endif
  }

  const bool inside = row < m && column < n;
  if (inside) c[row * n + column] = static_cast<T>(total);
  float partial = inside ? total : 0.0f;
  for (int distance = 16; distance; distance /= 2) partial += __shfl_xor_sync(0xffffffffu, partial, distance);
  const int thread = row_in_tile * TILE + column_in_tile;
#ifdef BUG_SHARED_OVERRUN
  if (thread % 32 == 0) warp_sums[thread / 32 + 1] = partial;
#else
  if (thread % 32 == 0) warp_sums[thread / 32] = partial;
#endif
  __syncthreads();
  if (thread >= 32) return;
  partial = thread < WARPS ? warp_sums[thread] : 0.0f;
  for (int distance = 16; distance; distance /= 2) partial += __shfl_down_sync(0xffffffffu, partial, distance);
  if (thread == 0) atomicAdd(sum, partial);
}
