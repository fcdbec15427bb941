// Planted bugs, each beside what would be right: BUG(wrong, right) is `right` when FIXED is defined.
// test_emulator.py has the table of which build finds which. `in` and `out` hold `count` = 64 floats, in[i] = i.
#include "cp_async.cuh"
#include "mma.cuh"

#ifdef FIXED
#define BUG(wrong, right) right
#else
#define BUG(wrong, right) wrong
#endif

#define PLANTED __device__ __attribute__((noinline)) void

// ---- global memory
PLANTED read_past_end(const float *in, float *out, int count) {
  const int i = threadIdx.x;
  if (i < count - BUG(0, 1)) out[i] = in[i + 1];
}

PLANTED read_far_past_end(const float *in, float *out, int count) {
  const int i = threadIdx.x;
  if (i < count) out[i] = in[i BUG(+ 40000, )];
}

PLANTED read_before_start(const float *in, float *out, int count) {
  const int i = threadIdx.x;
  out[i] = in[BUG(i - 1100, i % count)];
}

PLANTED write_past_end(float *out, int count) {
  const int i = threadIdx.x;
  if (i BUG(<=, <) count) out[i] = 1.0f;
}

PLANTED write_just_before_start(float *out) {  // no guard page there: the canary tells
  if (threadIdx.x == 0) out[BUG(-1, 0)] = 1.0f;
}

PLANTED write_to_const(const float *in, float *out) {
  const int i = threadIdx.x;
  BUG(const_cast<float *>(in), out)[i] = 1.0f;
}

PLANTED load_misaligned_vector(const float *in, float *out) {
  const int i = threadIdx.x * 4;
  if (i < 64) *reinterpret_cast<float4 *>(out + i) = *reinterpret_cast<const float4 *>(in + i BUG(+ 1, ));
}

// ---- shared memory
PLANTED write_past_shared(float *out) {
  SMEM(float, tile, [64]);
  float *row = tile;
  const int i = threadIdx.x;
  row[i BUG(+ 1, )] = 1.0f;
  __syncthreads();
  out[i] = row[BUG(i ? i : 1, i)];
}

PLANTED read_past_dynamic_shared(float *out) {
  DYN_SMEM(float, tile);
  const int i = threadIdx.x;
  tile[i] = 1.0f;
  __syncthreads();
  out[i] = tile[BUG(i + 1, i)];
}

PLANTED write_before_shared(float *out) {
  SMEM(float, tile, [64]);
  float *row = tile;
  const int i = threadIdx.x;
  row[i BUG(- 1, )] = 1.0f;
  __syncthreads();
  out[i] = 1.0f;
}

PLANTED overrun_inner_dimension(float *out) {
  SMEM(float, tile, [8][8]);
  const int i = threadIdx.x;
  tile[i / 8][i % 8 BUG(+ i / 63, )] = 1.0f;
  __syncthreads();
  out[i] = tile[i / 8][i % 8];
}

PLANTED read_uninitialised_shared(float *out) {
  SMEM(float, tile, [64]);
  const int i = threadIdx.x;
  if (i < BUG(32, 64)) tile[i] = 1.0f;
  __syncthreads();
  out[i] = tile[i];
}

PLANTED overrun_local_array(float *out, int count) {
  float values[4];
  for (int i = 0; i < count / 16 BUG(+ 1, ); i++) values[i] = 1.0f;
  out[threadIdx.x] = values[count / 16 - 1];
}

// ---- races
PLANTED read_neighbour(const float *in, float *out) {  // reads what an earlier thread wrote: right in forward order
  SMEM(float, tile, [64]);
  const int i = threadIdx.x;
  tile[i] = in[i];
  BUG(, __syncthreads());
  out[i] = i ? tile[i - 1] : 0.0f;
}

PLANTED overwrite_neighbour(const float *in, float *out) {  // right in forward order: read, then overwritten
  SMEM(float, tile, [64]);
  const int i = threadIdx.x;
  tile[i] = in[i];
  __syncthreads();
  const float neighbour = i == 1 ? tile[2] : in[i];
  BUG(, __syncthreads());
  tile[i] = -1.0f;
  out[i] = neighbour;
}

PLANTED read_lane(const float *in, float *out) {
  SMEM(float, tile, [64]);
  const int i = threadIdx.x;
  tile[i] = -1.0f;
  __syncthreads();
  tile[i] = in[i];
  BUG(, __syncwarp());
  out[i] = tile[i ^ 1];
}

PLANTED overwrite_after_shuffle(const float *in, float *out) {  // a shuffle lets lanes meet, but orders no memory
  SMEM(float, tile, [64]);
  const int i = threadIdx.x;
  tile[i] = in[i];
  __syncwarp();
  float sum = tile[i];
  sum += __shfl_sync(0xffffffffu, sum, 0);
  sum += tile[i ^ 1];
  sum += __shfl_sync(0xffffffffu, sum, 0);
  BUG(, __syncwarp());
  tile[i] = -1.0f;
  out[i] = sum;
}

PLANTED write_same_value(const float *in, float *out) {
  SMEM(float, flag, [1]);
  if (BUG(true, threadIdx.x == 0)) flag[0] = in[1];
  __syncthreads();
  out[threadIdx.x] = flag[0];
}

PLANTED add_without_atomic(float *out) {
  float *sum = out + threadIdx.x % 8;
  BUG(*sum += 1.0f, atomicAdd(sum, 1.0f));
}

PLANTED add_from_blocks(float *out) {
  if (threadIdx.x) return;
  BUG(*out += 1.0f, atomicAdd(out, 1.0f));
}

PLANTED forget_async_wait(const float *in, float *out) {
  SMEM(float, tile, [64]);
  const int i = threadIdx.x;
  cp_async<4>(&tile[i], in + i);
  cp_async_commit();
  BUG(, cp_async_wait<0>());
  __syncthreads();
  out[i] = tile[63 - i];
}

PLANTED copy_misaligned(const float *in, float *out) {
  SMEM(float4, tile, [64]);
  const int i = threadIdx.x;
  cp_async<16>(&tile[i], in + BUG(i, i / 4 * 4));
  cp_async_commit();
  cp_async_wait<0>();
  out[i] = tile[i].x;
}

PLANTED copy_past_end(const float *in, float *out, int count) {
  SMEM(float4, tile, [64]);
  const int i = threadIdx.x;
  const bool inside = i * 4 < count BUG(+ 4, );
  cp_async<16>(&tile[i], inside ? in + i * 4 : in, inside);
  cp_async_commit();
  cp_async_wait<0>();
  out[i] = tile[i].x;
}

// ---- barriers and collectives
PLANTED wait_in_both_branches(float *out) {
  const int i = threadIdx.x;
  if (BUG(i < 40, blockDim.x < 40)) {
    __syncthreads();
    out[i] = 1.0f;
  } else {
    out[i] = 1.0f;
    __syncthreads();
  }
}

PLANTED wait_after_return(float *out) {
  if (BUG(threadIdx.x, 0) >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 1.0f;
}

PLANTED wait_against_shuffle(float *out) {
  const int turns = BUG(threadIdx.x < 40, true) ? 2 : 1;
  for (int i = 0; i < turns; i++) __syncthreads();
  out[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
}

PLANTED shuffle_in_both_branches(float *out) {
  const int i = threadIdx.x;
  float value = 1.0f;
  if (i BUG(% 2, < 32)) value = __shfl_xor_sync(0xffffffffu, value, 1);
  else value = __shfl_down_sync(0xffffffffu, value, 1);
  out[i] = value;
}

PLANTED shuffle_outside_mask(float *out) {
  const int i = threadIdx.x;
  out[i] = __shfl_xor_sync(BUG(0x0000ffffu, 0xffffffffu), 1.0f, 1);
}

PLANTED shuffle_from_returned_lane(float *out) {
  const int i = threadIdx.x;
  if (i >= BUG(50, 64)) return;
  out[i] = __shfl_sync(0xffffffffu, 1.0f, 31);
}

PLANTED multiply_with_half_warp(float *out) {
  const int i = threadIdx.x;
  const unsigned a[4] = {}, b[2] = {};
  float c[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  if (i % 32 < BUG(16, 32)) mma_m16n8k16<__half>(c, a, b, c);
  out[i] = c[0];
}

PLANTED load_misaligned_matrix(float *out) {
  SMEM(__half, tile, [64][8]);
  const int i = threadIdx.x;
  unsigned fragment[4];
  for (int j = 0; j < 8; j++) tile[i][j] = __half(1.0f);
  __syncthreads();
  ldmatrix_x4(fragment, &tile[i % 32][BUG(i % 2, 0)]);
  out[i] = fragment[0] == 0x3c003c00 ? 1.0f : 0.0f;
}

// ---- arithmetic
PLANTED convert_nan(const float *in, float *out) {
  const float ratio = in[0] / BUG(in[0], 1.0f);
  out[threadIdx.x] = static_cast<float>(static_cast<int>(ratio));
}

PLANTED divide_by_zero(const float *in, float *out, int count) {
  const int divisor = static_cast<int>(in[BUG(0, 1)]);
  out[threadIdx.x] = static_cast<float>(count / divisor);
}

// ---- one kernel for all, since each kernel takes g++ a while
__global__ void planted_bug(int bug, const float *in, float *out, int count) {
  switch (bug) {
    case 0: return read_past_end(in, out, count);
    case 1: return read_far_past_end(in, out, count);
    case 2: return read_before_start(in, out, count);
    case 3: return write_past_end(out, count);
    case 4: return write_just_before_start(out);
    case 5: return write_to_const(in, out);
    case 6: return load_misaligned_vector(in, out);
    case 7: return write_past_shared(out);
    case 8: return read_past_dynamic_shared(out);
    case 9: return write_before_shared(out);
    case 10: return overrun_inner_dimension(out);
    case 11: return read_uninitialised_shared(out);
    case 12: return overrun_local_array(out, count);
    case 13: return read_neighbour(in, out);
    case 14: return overwrite_neighbour(in, out);
    case 15: return read_lane(in, out);
    case 16: return overwrite_after_shuffle(in, out);
    case 17: return write_same_value(in, out);
    case 18: return add_without_atomic(out);
    case 19: return add_from_blocks(out);
    case 20: return forget_async_wait(in, out);
    case 21: return copy_misaligned(in, out);
    case 22: return copy_past_end(in, out, count);
    case 23: return wait_in_both_branches(out);
    case 24: return wait_after_return(out);
    case 25: return wait_against_shuffle(out);
    case 26: return shuffle_in_both_branches(out);
    case 27: return shuffle_outside_mask(out);
    case 28: return shuffle_from_returned_lane(out);
    case 29: return multiply_with_half_warp(out);
    case 30: return load_misaligned_matrix(out);
    case 31: return convert_nan(in, out);
    case 32: return divide_by_zero(in, out, count);
  }
}
