// c (m, n) = a (m, k) b (k, n) on tensor cores: 64 x 64 tiles, 4 warps of 32 x 32, two stages of cp.async.
// k and n are multiples of 8. BUG_* macros plant bugs for test_emulator.py.
#include "cp_async.cuh"
#include "mma.cuh"

constexpr int TILE_M = 64, TILE_N = 64, TILE_K = 32, THREADS = 128;
constexpr int A_PITCH = TILE_K + 8, B_PITCH = TILE_N + 8;  // padded: ldmatrix without bank conflicts
constexpr int A_STAGE = TILE_M * A_PITCH, B_STAGE = TILE_K * B_PITCH;

template <class T>
__device__ __forceinline__ void load_stage(T *a_tile, T *b_tile, const T *a, const T *b, int first_k, int m, int n,
                                           int k) {
  const int first_row = blockIdx.y * TILE_M, first_column = blockIdx.x * TILE_N;
  for (int i = threadIdx.x; i < TILE_M * TILE_K / 8; i += THREADS) {
    const int row = i / (TILE_K / 8), column = i % (TILE_K / 8) * 8;
    const bool inside = first_row + row < m && first_k + column < k;
    const T *source = inside ? a + (size_t)(first_row + row) * k + first_k + column : a;
    cp_async<16>(a_tile + row * A_PITCH + column, source, inside);
  }
  for (int i = threadIdx.x; i < TILE_K * TILE_N / 8; i += THREADS) {
    const int row = i / (TILE_N / 8), column = i % (TILE_N / 8) * 8;
    const bool inside = first_k + row < k && first_column + column < n;
    const T *source = inside ? b + (size_t)(first_k + row) * n + first_column + column : b;
    cp_async<16>(b_tile + row * B_PITCH + column, source, inside);
  }
  cp_async_commit();
}

// One 16-deep step of a warp's 32 x 32 tile.
template <class T>
__device__ __forceinline__ void multiply_step(float (&total)[2][4][4], const T *a_tile, const T *b_tile) {
  const int lane = threadIdx.x & 31;
  unsigned a_fragment[2][4], b_fragment[2][4];
#pragma unroll
  for (int i = 0; i < 2; i++) ldmatrix_x4(a_fragment[i], a_tile + (i * 16 + (lane & 15)) * A_PITCH + (lane >> 4) * 8);
#pragma unroll
  for (int j = 0; j < 2; j++) {
    ldmatrix_x4_trans(b_fragment[j], b_tile + (lane & 15) * B_PITCH + j * 16 + (lane >> 4) * 8);
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const unsigned pair[2] = {b_fragment[j >> 1][(j & 1) * 2], b_fragment[j >> 1][(j & 1) * 2 + 1]};
      mma_m16n8k16<T>(total[i][j], a_fragment[i], pair, total[i][j]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
mma_gemm(const T *__restrict__ a, const T *__restrict__ b, float *__restrict__ c, int m, int n, int k) {
  DYN_SMEM(T, tiles);  // two stages of a, two of b
  T *a_tiles = tiles, *b_tiles = tiles + 2 * A_STAGE;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int warp_row = (warp >> 1) * 32, warp_column = (warp & 1) * 32;
  float total[2][4][4] = {};

  const int steps = (k + TILE_K - 1) / TILE_K;
  load_stage(a_tiles, b_tiles, a, b, 0, m, n, k);
  for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) {
      const int next = (step + 1) & 1;
      load_stage(a_tiles + next * A_STAGE, b_tiles + next * B_STAGE, a, b, (step + 1) * TILE_K, m, n, k);
#ifndef BUG_NO_WAIT
      cp_async_wait<1>();
#endif
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const T *a_stage = a_tiles + (step & 1) * A_STAGE + warp_row * A_PITCH;
    const T *b_stage = b_tiles + (step & 1) * B_STAGE + warp_column;
    for (int k_step = 0; k_step < TILE_K; k_step += 16) {
      multiply_step(total, a_stage + k_step, b_stage + k_step * B_PITCH);
    }
#ifndef BUG_NO_BARRIER_AFTER_STAGE
    __syncthreads();  // the next turn overwrites this stage
#endif
  }

#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = blockIdx.y * TILE_M + warp_row + i * 16 + half * 8 + (lane >> 2);
        const int column = blockIdx.x * TILE_N + warp_column + j * 8 + (lane & 3) * 2;
        const float2 pair = make_float2(total[i][j][half * 2], total[i][j][half * 2 + 1]);
        if (row < m && column < n) *reinterpret_cast<float2 *>(c + (size_t)row * n + column) = pair;
      }
    }
  }
}
