// Every lane-level operation once, with results that a test can state: fragment layouts, shuffles, votes, 16-bit
// floats, atomics. test_emulator.py runs this file on the emulator and on a device against the same expectations.
#include "cp_async.cuh"
#include "mma.cuh"

template <class T>
__device__ unsigned pack(T low, T high) {
  const unsigned short low_bits = *reinterpret_cast<unsigned short *>(&low);
  const unsigned short high_bits = *reinterpret_cast<unsigned short *>(&high);
  return low_bits | static_cast<unsigned>(high_bits) << 16;
}

__device__ void load_accumulators(float (&fragment)[4], const float *c, int group, int pair) {
  for (int i = 0; i < 4; i++) fragment[i] = c[(group + (i >> 1) * 8) * 8 + pair + (i & 1)];
}

__device__ void store_accumulators(float *d, const float (&fragment)[4], int group, int pair) {
  for (int i = 0; i < 4; i++) d[(group + (i >> 1) * 8) * 8 + pair + (i & 1)] = fragment[i];
}

// d (16, 8) = a (16, 16) b (16, 8) + c (16, 8), row-major; fragments loaded by hand after the PTX manual's tables.
template <class T>
__global__ void multiply_by_hand(const T *a, const T *b, const float *c, float *d) {
  const int group = threadIdx.x >> 2, pair = (threadIdx.x & 3) * 2;
  unsigned a_fragment[4], b_fragment[2];
  float c_fragment[4], d_fragment[4];
  for (int i = 0; i < 4; i++) {
    const int row = group + (i & 1) * 8, k = pair + (i >> 1) * 8;
    a_fragment[i] = pack(a[row * 16 + k], a[row * 16 + k + 1]);
  }
  for (int i = 0; i < 2; i++) {
    const int k = pair + i * 8;
    b_fragment[i] = pack(b[k * 8 + group], b[(k + 1) * 8 + group]);
  }
  load_accumulators(c_fragment, c, group, pair);
  mma_m16n8k16<T>(d_fragment, a_fragment, b_fragment, c_fragment);
  store_accumulators(d, d_fragment, group, pair);
}

// The same product with ldmatrix: x4 for a; for b, x4_trans of b twice over, or x2 of b transposed.
template <class T, bool TRANSPOSED_B>
__global__ void multiply_by_ldmatrix(const T *a, const T *b, const float *c, float *d) {
  SMEM(T, a_tile, [16][16]);
  SMEM(T, b_tile, [16][16]);
  const int lane = threadIdx.x, group = lane >> 2, pair = (lane & 3) * 2;
  for (int i = lane; i < 256; i += 32) a_tile[i / 16][i % 16] = a[i];
  for (int i = lane; i < 256; i += 32) {
    const int row = i / 16, column = i % 16;
    b_tile[row][column] = TRANSPOSED_B ? b[column * 8 + row % 8] : b[row * 8 + column % 8];
  }
  __syncwarp();
  unsigned a_fragment[4], b_fragment[2];
  ldmatrix_x4(a_fragment, &a_tile[lane & 15][(lane >> 4) * 8]);
  if (TRANSPOSED_B) {
    ldmatrix_x2(b_fragment, &b_tile[lane & 7][(lane >> 3 & 1) * 8]);
  } else {
    unsigned both_halves[4];
    ldmatrix_x4_trans(both_halves, &b_tile[lane & 15][(lane >> 4) * 8]);
    b_fragment[0] = both_halves[2];  // the second half repeats the first
    b_fragment[1] = both_halves[3];
  }
  float c_fragment[4], d_fragment[4];
  load_accumulators(c_fragment, c, group, pair);
  mma_m16n8k16<T>(d_fragment, a_fragment, b_fragment, c_fragment);
  store_accumulators(d, d_fragment, group, pair);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
// d (16, 8) = a (16, 8) b (8, 8) + c (16, 8), and the tf32 bits of a.
__global__ void multiply_tf32(const float *a, const float *b, const float *c, float *d, unsigned *a_tf32) {
  const int group = threadIdx.x >> 2, k = threadIdx.x & 3;
  unsigned a_fragment[4], b_fragment[2];
  float c_fragment[4], d_fragment[4];
  for (int i = 0; i < 4; i++) {
    const int index = (group + (i & 1) * 8) * 8 + k + (i >> 1) * 4;
    a_fragment[i] = f32_to_tf32(a[index]);
    a_tf32[index] = a_fragment[i];
  }
  for (int i = 0; i < 2; i++) b_fragment[i] = f32_to_tf32(b[(k + i * 4) * 8 + group]);
  load_accumulators(c_fragment, c, group, k * 2);
  mma_m16n8k8_tf32(d_fragment, a_fragment, b_fragment, c_fragment);
  store_accumulators(d, d_fragment, group, k * 2);
}

// out (6, threads)
__global__ void reduce_warps(int *out) {
  const int thread = threadIdx.x, threads = blockDim.x, value = thread - 5;
  const unsigned bits = 1u << (thread & 31);
  out[0 * threads + thread] = __reduce_add_sync(0xffffffffu, value);
  out[1 * threads + thread] = __reduce_min_sync(0xffffffffu, value);
  out[2 * threads + thread] = __reduce_max_sync(0xffffffffu, value);
  out[3 * threads + thread] = static_cast<int>(__reduce_max_sync(0xffffffffu, static_cast<unsigned>(value)));
  out[4 * threads + thread] = static_cast<int>(__reduce_or_sync(0xffffffffu, bits));
  out[5 * threads + thread] = static_cast<int>(__reduce_and_sync(0xffffffffu, ~bits));
}
#endif

// out (11, threads)
__global__ void shuffle_and_vote(int *out) {
  const int thread = threadIdx.x, threads = blockDim.x, lane = thread & 31;
  const unsigned all = 0xffffffffu;
  out[0 * threads + thread] = __shfl_sync(all, thread, 3, 8);
  out[1 * threads + thread] = __shfl_up_sync(all, thread, 1);
  out[2 * threads + thread] = __shfl_down_sync(all, thread, 2, 16);
  out[3 * threads + thread] = __shfl_xor_sync(all, thread, 5);
  int half;
  if (lane < 16) half = __shfl_sync(0x0000ffffu, thread, 15);
  else half = __shfl_sync(0xffff0000u, thread, 16);
  out[4 * threads + thread] = half;
  out[5 * threads + thread] = static_cast<int>(__ballot_sync(all, lane % 3 == 0));
  out[6 * threads + thread] = __any_sync(all, thread == 33);
  out[7 * threads + thread] = __all_sync(all, thread < 32);
  out[8 * threads + thread] = __syncthreads_count(thread % 5 == 0);
  out[9 * threads + thread] = __syncthreads_or(thread == 7);
  out[10 * threads + thread] = __syncthreads_and(thread < 40);
}

__global__ void convert(const float *in, unsigned short *half_bits, unsigned short *bfloat16_bits, float *half_values,
                        float *bfloat16_values, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const __half half_value = __float2half_rn(in[i]);
    const __nv_bfloat16 bfloat16_value = __float2bfloat16_rn(in[i]);
    half_bits[i] = __half_as_ushort(half_value);
    bfloat16_bits[i] = __bfloat16_as_ushort(bfloat16_value);
    half_values[i] = __half2float(half_value);
    bfloat16_values[i] = __bfloat162float(bfloat16_value);
  }
}

// out (5, count): sum, difference, product, fused multiply-add, the larger one
template <class T>
__global__ void calculate(const T *a, const T *b, const T *c, T *out, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    out[0 * count + i] = __hadd(a[i], b[i]);
    out[1 * count + i] = __hsub(a[i], b[i]);
    out[2 * count + i] = __hmul(a[i], b[i]);
    out[3 * count + i] = __hfma(a[i], b[i], c[i]);
    out[4 * count + i] = a[i] > b[i] ? a[i] : b[i];
  }
}

// Each sum counts the threads of all blocks.
__global__ void count_atomically(float *sum, double *double_sum, int *int_sum, unsigned long long *long_sum,
                                 __half2 *half_sum, __nv_bfloat162 *bfloat16_sum, int *maximum) {
  atomicAdd(sum, 1.0f);
  atomicAdd(double_sum, 1.0);
  atomicAdd(int_sum, 1);
  atomicAdd(long_sum, 1ull << 33);
  atomicAdd(half_sum, __floats2half2_rn(1.0f, 0.5f));
  atomicAdd(bfloat16_sum, __floats2bfloat162_rn(1.0f, 0.5f));
  atomicMax(maximum, static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x));
}

// Reverses each block's part of `in` by way of asynchronous copies; zeros past `count`.
__global__ void reverse_asynchronously(const float *in, float *out, int count) {
  SMEM(float4, tile, [32]);
  const int first = (blockIdx.x * 32 + threadIdx.x) * 4;
  const bool inside = first < count;
  cp_async<16>(&tile[threadIdx.x], inside ? in + first : in, inside);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  const float4 value = tile[31 - threadIdx.x];
  *reinterpret_cast<float4 *>(out + first) = make_float4(value.w, value.z, value.y, value.x);
}
