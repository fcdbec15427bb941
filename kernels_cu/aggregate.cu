// dcnv3, dcnv4 and ms_deform_attn: out[q, g, c] = sum over samples s of a[q, g, s] * x[position(q, g, s), g, c].
// T is the data's type, O that of places and weights, Source says how places become positions, and V is the number of
// channels that a thread carries: 16 bytes, or less where the channels of a group or an address ask for it.
//
// A row is one query of one group. Its `lanes` threads, a power of two inside one warp, first share out its samples,
// HELD to a thread: positions, weights and addresses of the four corners are computed once and left in shared memory.
// Then every thread goes over all of them for its own channels. Rows depend on their warp alone, so that __syncwarp is
// all they need. A block takes neighbouring queries of one group, numbered column by column in strips of STRIP rows:
// a rectangle of queries, whose samples share cache lines in L1 as far as the offsets allow.
//
// What bounds it, by estimate, for dcnv4 at 64 x 56 x 56 x 128, 4 groups, 9 taps, half precision, on an H100 (132 SMs
// at 1.75 GHz, 3.0 TB/s). A row has 4 lanes, and each of them 36 loads of 16 bytes:
//   compulsory bytes   input 51 MB, packed offsets and weights 45 MB, output 51 MB: 148 MB, 49 us
//   gathered bytes     9 samples x 4 corners x 51 MB = 1.85 GB out of L1: 62 us at 128 bytes a clock and SM
//   instructions       to a load belong 1 address, 1 test, 2 zeros for a corner outside, 8 conversions, 8 FMAs and half
//                      a load from shared memory; and of the some 90 that a sample takes once, shared by 4 lanes that
//                      have 9 between them, 7: 29 a load. 3.6 M loads of a warp: 113 us at 4 a clock and SM
// So issue slots bound it, then L1, then device memory. In float32 a thread carries 4 channels and converts nothing:
// twice the loads, with about 12 instructions each, and L1 (124 us) comes first.
// Backward each load has its FMAs for the inner product. The input's gradient is aggregate_backward_input.cu's.
#include "aggregate_places.cuh"
#include "bilinear.cuh"
#include "sum.cuh"
#include "vector.cuh"

constexpr int THREADS = 128, HELD = 4, STRIP = 8;
constexpr unsigned ALL = 0xffffffffu;

// A number for each corner of a cell.
template <typename A> struct __align__(16) Four {
  A of[4];

  __device__ __forceinline__ Four operator+(const Four &b) const {
    return {of[0] + b.of[0], of[1] + b.of[1], of[2] + b.of[2], of[3] + b.of[3]};
  }
};

__device__ __forceinline__ float shuffled(float value, int distance) { return __shfl_xor_sync(ALL, value, distance); }
__device__ __forceinline__ double shuffled(double value, int distance) { return __shfl_xor_sync(ALL, value, distance); }
template <typename A> __device__ __forceinline__ Four<A> shuffled(const Four<A> &v, int distance) {
  return {shuffled(v.of[0], distance), shuffled(v.of[1], distance), shuffled(v.of[2], distance),
          shuffled(v.of[3], distance)};
}

// The threads of a block are (lanes, THREADS / lanes).
struct Row {
  int lane, lanes, slot, slots;  // the row is number `slot` of its warp's `slots`
  int image, y, x, group;
  long long query;  // counted over all images
  bool active;      // false past the last query: such a row goes along with the last one and writes nothing

  __device__ __forceinline__ explicit Row(const Aggregate &p) {
    lane = int(threadIdx.x);
    lanes = int(blockDim.x);
    slots = 32 / lanes;
    slot = int(threadIdx.y) % slots;
    group = int(blockIdx.x % p.groups);
    const unsigned queries = unsigned(p.height) * p.width, all = queries * p.images;
    const unsigned number = blockIdx.x / p.groups * blockDim.y + threadIdx.y;
    active = number < all;
    image = int(min(number, all - 1) / queries);
    const int inside = int(min(number, all - 1) % queries);
    const int strip = inside / (min(STRIP, p.height) * p.width) * STRIP;
    const int in_strip = inside - strip * p.width, rows = min(STRIP, p.height - strip);
    y = strip + in_strip % rows;
    x = in_strip / rows;
    query = (long long)image * queries + y * p.width + x;
  }

  // How many samples are held at a time, and where: the rows' i-th ones side by side, so that no two share a bank.
  __device__ __forceinline__ int capacity() const { return lanes * HELD; }
  __device__ __forceinline__ int held(int i) const {
    return int(threadIdx.y) / slots * (32 * HELD) + i * slots + slot;
  }

  template <typename A> __device__ __forceinline__ A sum(A value) const {
    for (int distance = lanes / 2; distance > 0; distance /= 2) value = value + shuffled(value, distance);
    return value;
  }
  template <typename A> __device__ __forceinline__ A largest(A value) const {
    for (int distance = lanes / 2; distance > 0; distance /= 2) value = max(value, shuffled(value, distance));
    return value;
  }
};

// What one row samples.
template <typename A, typename O, typename Source> struct Samples {
  long long places_at, weights_at;  // the row's first element in each tensor
  const O *places, *weights;
  const long long *shapes, *starts;
  const Source &source;
  int y, x;
  bool softmax;
  A peak, total;  // of the softmax

  struct One {
    Cell<A> cell;
    Map<A> map;

    // The inner products with the corners, which are NaN where grad_output is, for a sample that is left out too.
    __device__ __forceinline__ A value(const A (&products)[4]) const { return cell.adds ? cell.value(products) : A(0); }
  };

  __device__ __forceinline__ Samples(const Row &row, const Aggregate &p, const Source &source, const O *all_places,
                                     const O *all_weights, const long long *shapes, const long long *starts)
      : places_at(row.query * p.places_query + row.group * p.places_group),
        weights_at(row.query * p.weights_query + row.group * p.weights_group + p.weights_first),
        places(all_places + places_at), weights(all_weights + weights_at), shapes(shapes), starts(starts),
        source(source), y(row.y), x(row.x), softmax(p.softmax), peak(0), total(1) {
    if (!softmax) return;
    peak = A(weights[0]);
    for (int s = row.lane; s < p.samples; s += row.lanes) peak = max(peak, A(weights[s]));
    peak = row.largest(peak);
    Sum<A> sum;
    for (int s = row.lane; s < p.samples; s += row.lanes) sum.add(exp(A(weights[s]) - peak));
    total = row.sum(sum.value());
  }

  __device__ __forceinline__ A weight(int s) const {
    const A weight = A(weights[s]);
    return softmax ? exp(weight - peak) / total : weight;
  }

  __device__ __forceinline__ One at(int s, bool slopes) const {
    const Map<A> map = source.map(y, x, s, shapes, starts);
    const A place_x = A(places[2 * s]), place_y = A(places[2 * s + 1]);
    return {Cell<A>(map.origin_y + map.scale_y * place_y, map.origin_x + map.scale_x * place_x, map.height, map.width,
                    map.width, 1, slopes), map};
  }
};

// The row's samples begin .. begin + count, for its threads to go over: where the corners are, NOWHERE for one outside,
// and, unless null, their weights. Corners count in vectors of V channels from the image's first, `pixel` vectors a
// pixel: in 32 bits, since with 64 the inner loops would spend more on addresses than on loads. With `slopes` a sample
// that adds nothing, but has slopes, has corners too.
constexpr int NOWHERE = -1;

template <typename A, typename O, typename Source>
__device__ __forceinline__ void hold(const Samples<A, O, Source> &samples, const Row &row, int begin, int count,
                                     int pixel, bool slopes, Four<int> *corners, Four<A> *weights) {
  for (int i = row.lane; i < count; i += row.lanes) {
    const auto sample = samples.at(begin + i, slopes);
    Four<int> at;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      at.of[k] = sample.cell.valid[k] ? (sample.map.first + int(sample.cell.at[k])) * pixel : NOWHERE;
    }
    corners[row.held(i)] = at;
    if (weights == nullptr) continue;
    const A weight = sample.cell.adds ? samples.weight(begin + i) : A(0);  // which may be NaN
    Four<A> share;
#pragma unroll
    for (int k = 0; k < 4; ++k) share.of[k] = weight * sample.cell.weight(k);
    weights[row.held(i)] = share;
  }
}

template <typename T, typename O, template <typename> class Source, int V>
__global__ void __launch_bounds__(THREADS, 4)
aggregate_forward(const T *__restrict__ value, const O *__restrict__ places, const O *__restrict__ weights,
                  const long long *__restrict__ shapes, const long long *__restrict__ starts, T *__restrict__ out,
                  Source<arithmetic_t<T>> source, Aggregate p) {
  using A = arithmetic_t<T>;
  SMEM(Four<int>, held_corners, [THREADS * HELD]);
  SMEM(Four<A>, held_weights, [THREADS * HELD]);
  const Row row(p);
  const Samples<A, O, Source<A>> samples(row, p, source, places, weights, shapes, starts);
  const int stride = p.groups * p.channels, group = row.group * p.channels;
  const long long image = (long long)row.image * p.pixels * stride + group;
  const bool together = p.samples <= row.capacity();  // then their sums are one run
  for (int slab = 0; slab < p.channels; slab += row.lanes * V) {
    const int channel = slab + row.lane * V;
    const auto *vectors = reinterpret_cast<const Vector<T, V> *>(value + image + channel);
    Sum<A> sums[V];
    for (int begin = 0; begin < p.samples; begin += row.capacity()) {
      const int count = min(row.capacity(), p.samples - begin);
      hold(samples, row, begin, count, stride / V, false, held_corners, held_weights);
      __syncwarp();
      if (channel < p.channels) {
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          const Four<int> at = held_corners[row.held(i)];
          const Four<A> weight = held_weights[row.held(i)];
          Vector<T, V> pixels[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            pixels[k] = Vector<T, V>::load(vectors + at.of[k], at.of[k] >= 0);
          }
#pragma unroll
          for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int v = 0; v < V; ++v) sums[v].run += weight.of[k] * A(pixels[k][v]);
          }
        }
        if (!together) {
#pragma unroll
          for (int v = 0; v < V; ++v) sums[v].end_run();
        }
      }
      __syncwarp();
    }
    if (row.active && channel < p.channels) {
      Vector<T, V> result;
#pragma unroll
      for (int v = 0; v < V; ++v) result.set(v, T(together ? sums[v].run : sums[v].value()));
      *reinterpret_cast<Vector<T, V> *>(out + row.query * stride + group + channel) = result;
    }
  }
}

// The gradients of places and weights, each written once, by the thread that owns the sample. Null ones are not wanted.
//
// All that the channels have to say of a sample is four inner products, of grad_output with the corners' pixels:
// bilinear interpolation and its slopes are linear in them, and are done afterwards, once for all channels.
template <typename T, typename O, template <typename> class Source, int V>
__global__ void __launch_bounds__(THREADS, 4)
aggregate_backward(const T *__restrict__ grad_output, const T *__restrict__ value, const O *__restrict__ places,
                   const O *__restrict__ weights, const long long *__restrict__ shapes,
                   const long long *__restrict__ starts, O *__restrict__ grad_places, O *__restrict__ grad_weights,
                   Source<arithmetic_t<T>> source, Aggregate p) {
  using A = arithmetic_t<T>;
  SMEM(Four<int>, held_corners, [THREADS * HELD]);
  SMEM(Four<A>, held_products, [THREADS * HELD]);
  const Row row(p);
  const Samples<A, O, Source<A>> samples(row, p, source, places, weights, shapes, starts);
  const int stride = p.groups * p.channels, group = row.group * p.channels;
  const long long image = (long long)row.image * p.pixels * stride + group;
  if (p.packed) grad_weights = grad_places;

  // The softmax's gradient needs the mean over all samples: known in time if they are held together, else a first
  // round is for it alone.
  const bool normalised = p.softmax && grad_weights, together = p.samples <= row.capacity();
  Sum<A> mean;
  A counted = 0;  // of the samples, those that add something
  for (int round = normalised && !together ? 0 : 1; round < 2; ++round) {
    for (int begin = 0; begin < p.samples; begin += row.capacity()) {
      const int count = min(row.capacity(), p.samples - begin);
      hold(samples, row, begin, count, stride / V, true, held_corners, static_cast<Four<A> *>(nullptr));
      for (int i = row.lane; i < count; i += row.lanes) held_products[row.held(i)] = Four<A>{};
      __syncwarp();
      for (int slab = 0; slab < p.channels; slab += row.lanes * V) {
        const int channel = slab + row.lane * V;
        const bool mine = channel < p.channels;
        const auto *vectors = reinterpret_cast<const Vector<T, V> *>(value + image + channel);
        const auto *output = reinterpret_cast<const Vector<T, V> *>(grad_output + row.query * stride + group + channel);
        const auto loaded = Vector<T, V>::load(output, mine);
        A gradient[V];
#pragma unroll
        for (int v = 0; v < V; ++v) gradient[v] = A(loaded[v]);
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          const Four<int> at = held_corners[row.held(i)];
          Vector<T, V> pixels[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            pixels[k] = Vector<T, V>::load(vectors + at.of[k], mine && at.of[k] != NOWHERE);
          }
          Four<A> products = {};
#pragma unroll
          for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int v = 0; v < V; ++v) products.of[k] += gradient[v] * A(pixels[k][v]);
          }
          products = row.sum(products);
          if (row.lane == 0) held_products[row.held(i)] = held_products[row.held(i)] + products;
        }
      }
      __syncwarp();
      if (normalised && (round == 0 || together)) {
        A part = 0, added = 0;
        for (int i = row.lane; i < count; i += row.lanes) {
          const auto sample = samples.at(begin + i, true);
          if (!sample.cell.adds) continue;
          part += samples.weight(begin + i) * sample.cell.value(held_products[row.held(i)].of);
          added = 1;
        }
        mean.add(row.sum(part));
        counted += row.sum(added);
      }
      if (round == 1 && row.active) {
        for (int i = row.lane; i < count; i += row.lanes) {
          const int s = begin + i;
          const auto sample = samples.at(s, true);
          const A weight = samples.weight(s);
          const A(&products)[4] = held_products[row.held(i)].of;
          if (grad_places) {
            O *gradient = grad_places + samples.places_at + 2 * s;
            const bool inside = sample.cell.inside;
            gradient[0] = O(inside ? sample.cell.slope_x(products) * weight * sample.map.scale_x : A(0));
            gradient[1] = O(inside ? sample.cell.slope_y(products) * weight * sample.map.scale_y : A(0));
          }
          if (grad_weights) {
            const A gradient = sample.value(products);
            // weights that are NaN, for one logit is, are so all together: they matter where any sample counts
            const A logit = counted > A(0) ? weight * (gradient - mean.value()) : A(0);
            grad_weights[samples.weights_at + s] = O(p.softmax ? logit : gradient);
          }
        }
      }
      __syncwarp();
    }
  }
}
