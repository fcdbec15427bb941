// The gradients of places and weights of dcnv3, dcnv4 and ms_deform_attn. Layouts, rows and warps: see aggregate.cuh.
//
// All that the channels have to say of a sample is four inner products, of grad_output with its corners' pixels:
// bilinear interpolation and its slopes are linear in them, and are done afterwards, once for all channels.
//
// Half types take them on tensor cores where a group has a multiple of 16 channels. Four lanes hold a pixel as they
// load it: lane (g, t) has the t-th V channels of row g's. With the channels in that order for both, this is A of
// m16n8k16, of two corners, and grad_output's is B. D[g][n] is row g's pixel times row n's gradient, of which the
// diagonal is wanted: products are exact, sums are float, and NaN of another row never enters. The sums over lanes are
// inside.
//
// By SASS for sm_90, a warp with 16 rows of 9 taps and 32 channels in half types: 282 once, 5 x 95 to place 144 samples,
// 2 x 54 for 8 rows at a time, 18 x 48 for a sample of each and 5 x 94 to finish them: 2,199, or 1,100 for 8 rows. With
// 0.8 M rows (aggregate.cu's example) that is 120 us on an H100, by estimate, and L1 as busy.
#include "aggregate.cuh"
#include "mma.cuh"

// One axis of a sample's cell, with the corners that are outside: their numbers are those of the nearest pixels, and
// what is read there does not count.
template <typename A> struct Axis {
  A after;             // distance from the first corner
  int first, second;   // pixels
  bool before, beyond; // which of them the image has
  bool inside, adds;   // whether there is a cell, and a value: as in bilinear.cuh, at exactly -1 there is but a slope

  __device__ __forceinline__ Axis(A at, A end, int last) {
    inside = at >= A(-1) && at < end;
    adds = inside && at > A(-1);
    const int floored = floor_int(at);
    after = at - floor(at);
    before = floored >= 0;
    beyond = floored < last;
    first = max(min(floored, last), 0);
    second = max(min(floored, last - 1) + 1, 0);
  }
};

// What is kept of a sample.
template <typename A> struct __align__(16) Kept {
  A down, right, weight;
  int flags;  // a bit for each corner that is inside, and ADDS
};
constexpr int ADDS = 16;

// The products, 0 for corners outside, as bilinear interpolation and slopes; the formulas are cudcn/cpu/sampling.py's.
template <typename A> struct Products {
  A value, slope_y, slope_x;

  __device__ __forceinline__ Products(const Kept<A> &kept, const Four<A> &products) {
    A v[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) v[c] = kept.flags >> c & 1 ? products.of[c] : A(0);
    const A top = v[1] - v[0], bottom = v[3] - v[2];
    slope_y = v[2] - v[0] + kept.right * (bottom - top);
    slope_x = top + kept.down * (bottom - top);
    value = kept.flags & ADDS ? v[0] + kept.right * top + kept.down * slope_y : A(0);
  }
};

// What a warp keeps in shared memory.
template <typename T, typename O> struct Memory {
  using A = arithmetic_t<T>;
  Four<int> corners[CAPACITY<A>];  // numbers of pixels
  Kept<A> kept[CAPACITY<A>];
  Four<A> products[CAPACITY<A>];
  Row<T, O> rows[32];
  A means[32];       // of the softmax: of the weights' gradients
  bool counted[32];  // whether any sample of the row adds something
};

// Null gradients are not wanted. Each is written once, by the thread that finishes the sample.
template <typename T, typename O, template <typename> class Source, int V>
__global__ void __launch_bounds__(THREADS, 6)
aggregate_backward_places(const T *__restrict__ grad_output, const T *__restrict__ value,
                          const O *__restrict__ places, const O *__restrict__ weights,
                          const long long *__restrict__ shapes, const long long *__restrict__ starts,
                          O *__restrict__ grad_places, O *__restrict__ grad_weights,
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
  if (p.softmax) normalise(p, warp, m.rows);
  if (p.packed) grad_weights = grad_places;

  // The softmax's gradient needs the mean over all samples: known in time if they are held all at once, else a first
  // round is for it alone.
  const bool chunks = p.held < p.samples, means = p.softmax && grad_weights != nullptr;
  const int vectors = p.channels / V;
  Sum<A> mean;
  A counted = 0;
  for (int round = means && chunks ? 0 : 1; round < 2; ++round) {
    for (int begin = 0; begin < p.samples; begin += p.held) {
      const int count = min(p.held, p.samples - begin);
      fill(table, source, begin, count, shapes, starts);
#pragma unroll 1
      for (int i = warp.lane; i < p.rows * p.held; i += 32) {
        const Held held(p, i);
        if (held.k >= count) continue;
        const Row<T, O> &row = m.rows[held.r];
        const A weight = weight_of(row, begin + held.k, p.softmax);
        const Position<A> position(source, table[held.k], row, begin + held.k);
        const Map<A> &map = position.map;
        const Axis<A> y(position.y, map.end_y, map.last_row), x(position.x, map.end_x, map.last_column);
        const int columns = int(x.before) | int(x.beyond) << 1;
        const int corners = (y.before ? columns : 0) | (y.beyond ? columns << 2 : 0);
        const int upper = map.first + y.first * map.columns, lower = map.first + y.second * map.columns;
        m.corners[held.at] = {upper + x.first, upper + x.second, lower + x.first, lower + x.second};
        m.kept[held.at] = {y.after, x.after, weight,
                           y.inside && x.inside ? corners | (y.adds && x.adds ? ADDS : 0) : 0};
      }
      __syncwarp();
      for (int slab = 0; slab < vectors; slab += p.lanes) {
        const int vector = slab + warp.part;
        const bool mine = vector < vectors;
        for (int r = warp.slot; r < p.rows; r += p.slots) {
          const bool active = m.rows[r].image != nullptr;
          const T *pixels = opaque((active ? m.rows[r].image : value) + (mine ? vector * V : 0));
          const auto *output = reinterpret_cast<const Wide *>(grad_output + (m.rows[r].output + vector * V));
          const Wide gradient = Wide::load(output, mine);
          const Four<int> *corners = m.corners + Held::first(p, r);
          Four<A> *products = m.products + Held::first(p, r);
#pragma unroll 1
          for (const Four<int> *end = corners + count; corners < end; ++corners, ++products) {
            const Four<int> at = *corners;
            Wide loaded[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const auto *pixel = reinterpret_cast<const Wide *>(step(pixels, unsigned(at.of[c]), p.pixel_bytes));
              loaded[c].word = __ldg(&pixel->word);
            }
            Four<A> sums = {};
            bool writes;
            if constexpr (V >= 4 && HasTensorCores<T>::value) {
              const auto *b = reinterpret_cast<const unsigned *>(&gradient.word);
#pragma unroll
              for (int c = 0; c < 4; c += 2) {
                const auto *one = reinterpret_cast<const unsigned *>(&loaded[c].word);
                const auto *other = reinterpret_cast<const unsigned *>(&loaded[c + 1].word);
                float d[4] = {};
#pragma unroll
                for (int w = 0; w < V / 2; w += 2) {
                  mma_m16n8k16<T>(d, {one[w], other[w], one[w + 1], other[w + 1]}, {b[w], b[w + 1]}, d);
                }
                sums.of[c] = warp.slot & 1 ? d[1] : d[0];
                sums.of[c + 1] = warp.slot & 1 ? d[3] : d[2];
              }
              writes = warp.part == warp.slot >> 1;
            } else {
              A factors[V];
              widen(gradient, factors);
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                A wide[V];
                widen(loaded[c], wide);
#pragma unroll
                for (int v = 0; v < V; ++v) sums.of[c] += factors[v] * wide[v];
                if (!mine) sums.of[c] = 0;
              }
              for (int distance = p.lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
                for (int c = 0; c < 4; ++c) sums.of[c] += shuffled(sums.of[c], distance);
              }
              writes = warp.part == 0;
            }
            if (writes) {
              if (slab > 0) {
#pragma unroll
                for (int c = 0; c < 4; ++c) sums.of[c] += products->of[c];
              }
              *products = sums;
            }
          }
        }
      }
      __syncwarp();
      if (means && (round == 0 || !chunks)) {
        for (int r = warp.slot; r < p.rows; r += p.slots) {
          A part = 0, added = 0;
          for (int k = warp.part; k < count; k += p.lanes) {
            const int at = Held::first(p, r) + k;
            if (!(m.kept[at].flags & ADDS)) continue;
            part += m.kept[at].weight * Products<A>(m.kept[at], m.products[at]).value;
            added = 1;
          }
          for (int distance = p.lanes / 2; distance > 0; distance /= 2) {
            part += shuffled(part, distance);
            added += shuffled(added, distance);
          }
          if (begin == 0) {  // another row, unless they come in chunks
            mean = {};
            counted = 0;
          }
          mean.add(part);
          counted += added;
          if (warp.part == 0) {
            m.means[r] = mean.value();
            m.counted[r] = counted > A(0);
          }
        }
        __syncwarp();
      }
      if (round == 1) {
#pragma unroll 1
        for (int i = warp.lane; i < p.rows * p.held; i += 32) {
          const Held held(p, i);
          const Row<T, O> &row = m.rows[held.r];
          if (held.k >= count || row.image == nullptr) continue;
          const Kept<A> kept = m.kept[held.at];
          const Products<A> products(kept, m.products[held.at]);
          const int s = begin + held.k;
          if (grad_places != nullptr) {
            const Map<A> map = source.map(table[held.k], A(0), A(0));
            O *gradient = grad_places + (row.places - places) + 2 * s;
            gradient[0] = O(kept.flags ? products.slope_x * kept.weight * map.scale_x : A(0));
            gradient[1] = O(kept.flags ? products.slope_y * kept.weight * map.scale_y : A(0));
          }
          if (grad_weights != nullptr) {
            A gradient = products.value;
            // weights that are NaN, for one logit is, are so all together: they matter where any sample counts
            if (p.softmax) gradient = m.counted[held.r] ? kept.weight * (gradient - m.means[held.r]) : A(0);
            grad_weights[row.weights - weights + s] = O(gradient);
          }
        }
      }
      __syncwarp();
    }
  }
}

// Zeros for what dcnv4's tensor has behind the last group: in rows of `row` numbers all but `used`, `count` in all.
template <typename O>
__global__ void __launch_bounds__(THREADS)
aggregate_clear_unused(O *__restrict__ grad, long long count, int row, int used) {
  const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
  if (i < count) grad[i / (row - used) * row + used + i % (row - used)] = O(0.0f);
}
