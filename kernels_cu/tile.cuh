// Matrix products of a block of threads: both factors lie in shared memory, a step of k at a time, whoever fills them.
//
// A step is 64 bytes of k in every type, so that one scheme serves all: a line of a tile is one row's 64 bytes and 16
// more, for which neighbouring lines lie in different banks. Tiles that have k first (TRANSPOSED) have DEPTH lines.
//
//   Product<T, ROWS, OUTS, TRANSPOSED, LONG>   sums of a (ROWS, k) times b (OUTS, k), in the block's registers:
//     .multiply(a, b, part)                32 bytes of k, half of a step: part = 0 or 1
//     .settle()                            after every run_of(steps) steps: ends a run of the sums
//     .each(row)                           row(r)(out, sum) of each of the thread's sums: row(r) is made once a row
//   pipeline(steps, blocks, ..)            the loop: while one step is multiplied, the next one's tiles are filled
//
// Half types go to the tensor cores (bfloat16 from sm_80 on), and float where the caller calls it Tf32; the others are
// summed by FMAs in their own type.
//
// float32 sums are made in runs, and of the runs: of n equal terms one running sum would lose up to n * 2**-25, they
// lose some sqrt(n) * 2**-24. Products of half types have registers for that where they are LONG, and 128 x 64; the
// caller of others keeps n so small that one running sum loses less than the types hold.
#pragma once
#include "bilinear.cuh"
#include "cp_async.cuh"
#include "mma.cuh"
#include "vector.cuh"

constexpr int THREADS = 256;
constexpr int PARTS = 2;  // of a step

// A float of which products take the upper 10 bits of the significand, to nearest, from sm_80 on.
struct Tf32 {
  float value;

  Tf32() = default;
  __device__ __forceinline__ explicit Tf32(float value) : value(value) {}
  __device__ __forceinline__ operator float() const { return value; }
};

template <typename T> constexpr int WIDE = 16 / int(sizeof(T));   // elements of one load
template <typename T> constexpr int DEPTH = 64 / int(sizeof(T));  // k of a step
template <typename T> constexpr int LINE = DEPTH<T> + WIDE<T>;    // elements from line to line

template <typename T> using Wide = Vector<T, WIDE<T>>;

// Steps of one run, a power of two: 4 at least, and then so many that a run has as many terms, 16 a step, as there are
// runs.
__device__ __forceinline__ int run_of(int steps) {
  int run = 4;
  while (16LL * run * run < steps) run *= 2;
  return run;
}

// The same number, but not to the compiler: it computes what follows anew, where it would keep that in registers.
__device__ __forceinline__ int anew(int number) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(number));
#endif
  return number;
}

// ---- 16 bytes as numbers to sum, and back

template <typename T, int V>
__device__ __forceinline__ Vector<T, V> narrowed(const arithmetic_t<T> (&sums)[V]) {
  Vector<T, V> vector;
#pragma unroll
  for (int v = 0; v < V; ++v) vector.set(v, T(sums[v]));
  return vector;
}

template <> __device__ __forceinline__ Vector<__half, 8> narrowed(const float (&sums)[8]) {
  const auto pair = [&](int v) {  // one instruction for two
    const __half2 both = __floats2half2_rn(sums[v], sums[v + 1]);
    return *reinterpret_cast<const unsigned *>(&both);
  };
  return {make_uint4(pair(0), pair(2), pair(4), pair(6))};
}

template <> __device__ __forceinline__ Vector<__nv_bfloat16, 8> narrowed(const float (&sums)[8]) {
  const auto pair = [&](int v) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(sums[v], sums[v + 1]);
    return *reinterpret_cast<const unsigned *>(&both);
  };
  return {make_uint4(pair(0), pair(2), pair(4), pair(6))};
}

// ---- products

// 16 x 16 threads, each with every 16th row and out, or, where k comes first, every 16th chunk of them.
template <typename T, int ROWS, int OUTS, bool TRANSPOSED> struct Fmas {
  using A = arithmetic_t<T>;
  static constexpr int CHUNK = sizeof(T) == 4 ? 4 : 2, M = ROWS / 16, N = OUTS / 16;
  static constexpr bool RUNS = sizeof(A) == 4 && M * N <= 32;  // double needs none
  A sums[M][N] = {}, totals[RUNS ? M : 1][RUNS ? N : 1] = {};

  static __device__ __forceinline__ int place(int i, int thread) {
    return TRANSPOSED ? (i / CHUNK * 16 + thread) * CHUNK + i % CHUNK : i * 16 + thread;
  }

  __device__ __forceinline__ void multiply(const T *a, const T *b, int part) {
    const int y = int(threadIdx.x) / 16, x = int(threadIdx.x) % 16;
    constexpr int K = DEPTH<T> / PARTS;
    using Few = Vector<T, CHUNK>;
    const auto few = [](const T *from) { return Few::load(reinterpret_cast<const Few *>(from), true); };
    if constexpr (TRANSPOSED) {
#pragma unroll 1
      for (int k = part * K; k < part * K + K; ++k) {
        A bs[N];
#pragma unroll
        for (int j = 0; j < N; j += CHUNK) {
          const Few chunk = few(b + k * (OUTS + WIDE<T>) + place(j, x));
#pragma unroll
          for (int e = 0; e < CHUNK; ++e) bs[j + e] = A(chunk[e]);
        }
#pragma unroll
        for (int i = 0; i < M; i += CHUNK) {
          const Few chunk = few(a + k * (ROWS + WIDE<T>) + place(i, y));
#pragma unroll
          for (int e = 0; e < CHUNK; ++e) {
#pragma unroll
            for (int j = 0; j < N; ++j) sums[i + e][j] += A(chunk[e]) * bs[j];
          }
        }
      }
    } else {
#pragma unroll 1
      for (int k = part * K; k < part * K + K; k += CHUNK) {
        Few bs[N];
#pragma unroll
        for (int j = 0; j < N; ++j) bs[j] = few(b + place(j, x) * LINE<T> + k);
#pragma unroll
        for (int i = 0; i < M; ++i) {
          const Few chunk = few(a + place(i, y) * LINE<T> + k);
#pragma unroll
          for (int e = 0; e < CHUNK; ++e) {
#pragma unroll
            for (int j = 0; j < N; ++j) sums[i][j] += A(chunk[e]) * A(bs[j][e]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void settle() {
    if constexpr (RUNS) {
#pragma unroll
      for (int i = 0; i < M; ++i) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          totals[i][j] += sums[i][j];
          sums[i][j] = 0;
        }
      }
    }
  }

  template <typename Row> __device__ __forceinline__ void each(Row row) const {
#pragma unroll
    for (int i = 0; i < M; ++i) {
      const auto put = row(place(i, int(threadIdx.x) / 16));
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const A total = RUNS ? totals[RUNS ? i : 0][RUNS ? j : 0] : A(0);
        put(place(j, int(threadIdx.x) % 16), total + sums[i][j]);
      }
    }
  }
};

#if __CUDA_ARCH__ >= 800 || !defined(__CUDACC__)
template <> struct HasTensorCores<Tf32> { static constexpr bool value = true; };
#endif

// One product of 16 x 8, 32 bytes of k deep; and what its factors need before it.
template <typename T>
__device__ __forceinline__ void multiply(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  mma_m16n8k16<T>(sums, a, b, sums);
}
template <typename T> __device__ __forceinline__ void prepare(unsigned (&)[4]) {}

#if __CUDA_ARCH__ >= 800 || !defined(__CUDACC__)
template <> __device__ __forceinline__ void multiply<Tf32>(float (&sums)[4], const unsigned (&a)[4],
                                                           const unsigned (&b)[2]) {
  mma_m16n8k8_tf32(sums, a, b, sums);
}
template <> __device__ __forceinline__ void prepare<Tf32>(unsigned (&registers)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) registers[i] = f32_to_tf32(__uint_as_float(registers[i]));
}
#endif

// Two by two fragments of a tile, 8 rows by 16 bytes of k each, rows fastest, or, K_FASTEST, k. The tile has k last,
// or, TRANSPOSED, first, in lines of `size` elements.
template <typename T, bool TRANSPOSED, bool K_FASTEST>
__device__ __forceinline__ void load_fragments(unsigned (&registers)[4], const T *tile, int size, int row, int k) {
  const int lane = int(threadIdx.x) % 32, low = lane % 8, fast = lane / 8 % 2, slow = lane / 16;
  const int rows = 8 * (K_FASTEST ? slow : fast), depth = WIDE<T> * (K_FASTEST ? fast : slow);
  if constexpr (!TRANSPOSED) {
    ldmatrix_x4(registers, tile + (row + rows + low) * LINE<T> + k + depth);
  } else if constexpr (sizeof(T) == 2) {
    ldmatrix_x4_trans(registers, tile + (k + depth + low) * (size + WIDE<T>) + row + rows);
  } else {  // ldmatrix turns pairs of bytes
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = row + 8 * (K_FASTEST ? i / 2 : i % 2), d = k + WIDE<T> * (K_FASTEST ? i % 2 : i / 2);
      registers[i] = __float_as_uint(float(tile[(d + lane % 4) * (size + WIDE<T>) + r + lane / 4]));
    }
  }
  prepare<T>(registers);
}

// 4 x 2 warps, each with ROWS / 4 neighbouring rows and OUTS / 2 outs.
template <typename T, int ROWS, int OUTS, bool TRANSPOSED, bool LONG> struct TensorCores {
  static constexpr int M = ROWS / 64, N = OUTS / 16;  // tiles of 16 x 8 of a warp
  static constexpr bool RUNS = LONG && M * N <= 8;
  float sums[M][N][4] = {}, totals[RUNS ? M : 1][RUNS ? N : 1][4] = {};

  __device__ __forceinline__ void multiply(const T *a, const T *b, int part) {
    const int warp = int(threadIdx.x) / 32, k = part * (DEPTH<T> / PARTS);
    const int row = warp / 2 * (ROWS / 4), out = warp % 2 * (OUTS / 2);
    unsigned as[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_fragments<T, TRANSPOSED, false>(as[m], a, ROWS, row + m * 16, k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      unsigned bs[4];
      load_fragments<T, TRANSPOSED, true>(bs, b, OUTS, out + n * 8, k);
      const unsigned left[2] = {bs[0], bs[1]}, right[2] = {bs[2], bs[3]};
#pragma unroll
      for (int m = 0; m < M; ++m) {
        ::multiply<T>(sums[m][n], as[m], left);
        ::multiply<T>(sums[m][n + 1], as[m], right);
      }
    }
  }

  __device__ __forceinline__ void settle() {
    if constexpr (RUNS) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            totals[m][n][i] += sums[m][n][i];
            sums[m][n][i] = 0;
          }
        }
      }
    }
  }

  template <typename Row> __device__ __forceinline__ void each(Row row) const {
    const auto sum = [&](int m, int n, int i) {
      return RUNS ? totals[RUNS ? m : 0][RUNS ? n : 0][i] + sums[m][n][i] : sums[m][n][i];
    };
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    const int first = warp / 2 * (ROWS / 4) + lane / 4, out = warp % 2 * (OUTS / 2) + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto put = row(first + m * 16 + half * 8);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          put(out + n * 8, sum(m, n, 2 * half));
          put(out + n * 8 + 1, sum(m, n, 2 * half + 1));
        }
      }
    }
  }
};

template <bool TENSOR_CORES> struct Choice {
  template <typename T, int ROWS, int OUTS, bool TRANSPOSED, bool LONG>
  using type = Fmas<T, ROWS, OUTS, TRANSPOSED>;
};
template <> struct Choice<true> {
  template <typename T, int ROWS, int OUTS, bool TRANSPOSED, bool LONG>
  using type = TensorCores<T, ROWS, OUTS, TRANSPOSED, LONG>;
};
template <typename T, int ROWS, int OUTS, bool TRANSPOSED = false, bool LONG = false>
using Product = typename Choice<HasTensorCores<T>::value>::template type<T, ROWS, OUTS, TRANSPOSED, LONG>;

// Whether there are registers for loads that are on their way during products.
#if __CUDA_ARCH__ >= 800 || !defined(__CUDACC__)
template <typename T> constexpr bool EARLY = sizeof(T) < 8;
#else
template <typename T> constexpr bool EARLY = sizeof(T) == 4;
#endif

// ---- the loop

// Steps come in sets of `blocks`, such as a tap's channels.
struct Step {
  int index = 0, set = 0, block = 0;

  __device__ __forceinline__ void advance(int blocks) {
    ++index;
    if (++block == blocks) {
      block = 0;
      ++set;
    }
  }
};

// locate(set)            what a set's samples have in common goes to shared memory, to one of two places
// fetch(step)            starts the asynchronous copies of a step's tiles, to one of two places (step.index % 2)
// load(step, part)       starts the loads of half of a step's samples; what it returns goes, later, to
// store(step, part, ..)  which leaves them in shared memory, in one of two places
// multiply(index, part)  half of the products of a step that is complete
//
// Positions are two steps ahead of the products, so that no step waits for them with a barrier of its own. Loads go on
// while a part is multiplied if they are EARLY.
template <bool EARLY, typename Locate, typename Fetch, typename Load, typename Store, typename Multiply>
__device__ __forceinline__ void pipeline(int steps, int blocks, Locate locate, Fetch fetch, Load load, Store store,
                                         Multiply multiply) {
  Step next;
  const auto locate_after = [&](Step step) {
    step.advance(blocks);
    if (step.index < steps && step.block == 0) locate(step.set);
  };
  if (steps > 0) locate(0);
  locate_after(next);
  __syncthreads();
  if (steps > 0) {
    fetch(next);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) store(next, part, load(next, part));
  }
  cp_async_commit();
#pragma unroll 1
  while (next.index < steps) {
    const int index = next.index;
    next.advance(blocks);
    cp_async_wait<0>();
    __syncthreads();  // this step's tiles are there, and the last one's are done with
    const bool more = next.index < steps;
    if (more) fetch(next);
    cp_async_commit();
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      decltype(load(next, part)) loaded;
      if (EARLY && more) loaded = load(next, part);
      multiply(index, part);
      if (!EARLY && more) loaded = load(next, part);
      if (more) store(next, part, loaded);
    }
    locate_after(next);
  }
}
