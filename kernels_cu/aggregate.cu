// dcnv3, dcnv4 and ms_deform_attn, forward. Layouts, rows and warps: see aggregate.cuh.
//
// What bounds it, by estimate, for dcnv4 at 64 x 56 x 56 x 128, 4 groups, 9 taps, half types, on an H100 (132 SMs at
// 1.75 GHz, 3.0 TB/s):
//   compulsory bytes   input 51 MB, packed offsets and weights 45 MB, output 51 MB: 148 MB, 49 us
//   gathered bytes     9 samples x 4 corners x 51 MB = 1.85 GB out of L1: 62 us at 128 bytes a clock and SM, and up to
//                      as much again for what is held in shared memory
//   instructions       by SASS for sm_90, of a warp with 16 rows: 213 once, 5 x 67 to place 144 samples, 2 x 45 for 8
//                      rows at a time and 18 x 81 for a sample of each: 2,096, or 1,048 for 8 rows. 114 us at 4 a clock
// So issue slots bound it, then L1, then device memory. (Straight code counts once, each loop as often as it runs.)
//
// Of the 81, 32 widen 8 channels of 4 corners and 32 multiply and add them in float. Blending the corners in pairs of
// half types instead would leave 48 of the 81, some 780 for 8 rows; but then L1 bounds it, 100 us, and it rounds at
// every corner: rms errors of 0.7 to 1.0 units of the type's rounding, where now they are 0.4, that of the result's own
// rounding. Not worth an eighth of the time, since "sums are float32" is promised.
#include "aggregate.cuh"

// a - b between 0 and 1; 0 for NaN.
__device__ __forceinline__ float saturated_difference(float a, float b) {
#if defined(__CUDACC__)
  float difference;  // __saturatef(a - b) is two instructions
  asm("sub.sat.f32 %0, %1, %2;" : "=f"(difference) : "f"(a), "f"(b));
  return difference;
#else
  return __saturatef(a - b);
#endif
}
__device__ __forceinline__ double saturated_difference(double a, double b) { return min(max(a - b, 0.0), 1.0); }

// One axis of a sample's cell, in an image that goes on outside as its outermost pixels, but fades: with that no corner
// needs a test. Beyond the first or last pixel both are this one, and share its weight: each half, since 0 times an
// infinite pixel would be NaN.
template <typename A> struct Axis {
  A fade;      // what both weigh: 1 inside, and down to 0 one pixel outside; 0 for NaN
  A second;    // the second one's share of it
  int first;   // the first of the two pixels
  bool apart;  // whether the second is its neighbour

  __device__ __forceinline__ Axis(A at, A end, int last)
      : fade(saturated_difference(at, A(-1)) * saturated_difference(end, at)), first(floor_int(at)) {
    apart = unsigned(first) < unsigned(last);
    second = apart ? at - floor(at) : A(0.5);
    first = max(min(first, last), 0);
  }
};

// What a warp keeps in shared memory.
template <typename T, typename O> struct Memory {
  using A = arithmetic_t<T>;
  Four<int> corners[CAPACITY<A>];  // numbers of pixels; OUTSIDE for a sample that adds nothing
  Four<A> shares[CAPACITY<A>];     // what they weigh
  Row<T, O> rows[32];
};
constexpr int OUTSIDE = -1;

// SIMPLE: without softmax, and a row's samples are held all at once.
template <typename T, typename O, template <typename> class Source, int V, bool SIMPLE>
__global__ void __launch_bounds__(THREADS, 8)
aggregate_forward(const T *__restrict__ value, const O *__restrict__ places, const O *__restrict__ weights,
                  const long long *__restrict__ shapes, const long long *__restrict__ starts, T *__restrict__ out,
                  const __grid_constant__ Source<arithmetic_t<T>> source, const __grid_constant__ Aggregate p) {
  using A = arithmetic_t<T>;
  using Wide = Vector<T, V>;
  using Of = Memory<T, O>;
  SMEM(typename Source<A>::Shared, table, [CAPACITY<A>]);
  SMEM(Of, memory, [WARPS]);
  const Warp warp(p);
  Of &m = memory[warp.number];
  if (warp.lane < p.rows) m.rows[warp.lane] = row_of(p, source, warp, value, places, weights);
  __syncwarp();
  if (!SIMPLE && p.softmax) normalise(p, warp, m.rows);

  const bool chunks = !SIMPLE && p.held < p.samples;
  const int vectors = p.channels / V;
  for (int slab = 0; slab < vectors; slab += p.lanes) {
    const int vector = slab + warp.part;
    Sum<A> sums[V];
    for (int begin = 0; begin < (SIMPLE ? 1 : p.samples); begin += SIMPLE ? 1 : p.held) {
      const int count = SIMPLE ? p.held : min(p.held, p.samples - begin);
      fill(table, source, begin, count, shapes, starts);
#pragma unroll 1
      for (int i = warp.lane; i < p.rows * p.held; i += 32) {
        const Held held(p, i);
        if (!SIMPLE && held.k >= count) continue;
        const Row<T, O> &row = m.rows[held.r];
        const A weight = weight_of(row, begin + held.k, !SIMPLE && p.softmax);
        const Position<A> position(source, table[held.k], row, begin + held.k);
        const Map<A> &map = position.map;
        const Axis<A> y(position.y, map.end_y, map.last_row), x(position.x, map.end_x, map.last_column);
        const A fade = y.fade * x.fade;
        const bool some = fade > A(0);
        const A all = some ? weight * fade : A(0);  // a weight may be NaN
        const A top = all * (A(1) - y.second), bottom = all * y.second, left = A(1) - x.second;
        const int at = map.first + y.first * map.columns + x.first;
        const int down = y.apart ? map.columns : 0, right = x.apart ? 1 : 0;
        m.corners[held.at] = {some ? at : OUTSIDE, at + right, at + down, at + down + right};
        m.shares[held.at] = {top * left, top * x.second, bottom * left, bottom * x.second};
      }
      __syncwarp();
      for (int r = vector < vectors ? warp.slot : p.rows; r < p.rows; r += p.slots) {
        if (begin == 0) {
#pragma unroll
          for (int v = 0; v < V; ++v) sums[v] = {};
        }
        if (m.rows[r].image == nullptr) continue;
        const T *pixels = opaque(m.rows[r].image + vector * V);
        const int first = Held::first(p, r);
        const Four<int> *corners = m.corners + first;
        const Four<A> *shares = m.shares + first;
#pragma unroll 1
        for (const Four<int> *end = corners + count; corners < end; ++corners, ++shares) {
          const Four<int> at = *corners;
          if (at.of[0] == OUTSIDE) continue;
          const Four<A> share = *shares;
          Wide loaded[4];
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const auto *pixel = reinterpret_cast<const Wide *>(step(pixels, unsigned(at.of[c]), p.pixel_bytes));
            loaded[c].word = __ldg(&pixel->word);
          }
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            A wide[V];
            widen(loaded[c], wide);
#pragma unroll
            for (int v = 0; v < V; ++v) sums[v].run += share.of[c] * wide[v];
          }
        }
        if (chunks && begin / RUN != (begin + count) / RUN) {  // every 16 samples: of fewer there would be many runs
#pragma unroll
          for (int v = 0; v < V; ++v) sums[v].end_run();
        }
        if (SIMPLE || begin + p.held >= p.samples) {
          Wide result;
#pragma unroll
          for (int v = 0; v < V; ++v) result.set(v, T(chunks ? sums[v].value() : sums[v].run));
          *reinterpret_cast<Wide *>(out + (m.rows[r].output + vector * V)) = result;
        }
      }
      __syncwarp();
    }
  }
}

// Where levels of these shapes begin, one after the other. One thread: they are few.
__global__ void aggregate_starts(const long long *__restrict__ shapes, long long *__restrict__ starts, int levels) {
  long long first = 0;
  for (int level = 0; level < levels; ++level) {
    starts[level] = first;
    first += shapes[2 * level] * shapes[2 * level + 1];
  }
}
