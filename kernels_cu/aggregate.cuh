// What the kernels of dcnv3, dcnv4 and ms_deform_attn share:
//
//   out[q, g, c] = sum over samples s of a[q, g, s] * x[position(q, g, s), g, c]
//
// T is the data's type, O that of places and weights, Source says how places become positions, and V is the number of
// channels that a thread carries: 16 bytes, or less where the channels of a group or an address ask for it.
//
// A row is one query of one group. A warp owns up to 32 rows. It deals their samples to its lanes, all rows' in one
// list, and each is placed once: its corners and what they weigh are held in shared memory. Then the warp goes over its
// rows, several at a time, each with as many lanes as it has vectors of channels. Rows depend on their warp alone, so
// that __syncwarp is all they need, but for a table of what samples of one number share. If a row has more samples than
// are held, they come in chunks.
//
// A block takes neighbouring queries of one group, numbered column by column in strips of STRIP rows: a rectangle of
// queries, whose samples share cache lines in L1 as far as the offsets allow.
#pragma once
#include "bilinear.cuh"
#include "divisor.cuh"
#include "sum.cuh"
#include "vector.cuh"

constexpr int THREADS = 128, WARPS = THREADS / 32, STRIP = 8;
constexpr unsigned ALL = 0xffffffffu;

constexpr int HELD = 144;  // floats' samples that a warp holds: 16 rows of 9
template <typename A> constexpr int CAPACITY = HELD * 4 / int(sizeof(A));

// One launch, steps in elements; cudcn/cuda/aggregate.py writes it.
struct Aggregate {
  long long places_query, places_group, weights_query, weights_group, weights_first;
  Divisor groups_of, queries_of, strips_of, last_strip_of;  // by groups, queries, a strip's, and the last one's rows
  int images, height, width;  // of the queries
  int pixels, groups, channels, samples, softmax;
  int packed;            // places and weights are one tensor, and so are their gradients
  unsigned pixel_bytes;  // of all groups
  int lanes, log_lanes;  // of a row
  int rows, slots;       // of a warp, and those that it goes over at a time: 32 / lanes
  int held;              // samples of a row that are held at a time
  int reciprocal;        // of `held`: i * reciprocal >> 16 is i / held for i < rows * held
};

// Where the place (y, x) that the caller gives lies: at origin + scale * place in the image from pixel `first`, which
// ends at `end`, the least numbers that are not below its sides.
template <typename A> struct Map {
  A origin_y, origin_x, scale_y, scale_x, end_y, end_x;
  int first, columns, last_row, last_column;

  // From a place to its position.
  __device__ __forceinline__ void locate(A &y, A &x) const {
    y = origin_y + scale_y * y;
    x = origin_x + scale_x * x;
  }
};

// What a warp keeps of a row.
template <typename T, typename O> struct __align__(16) Row {
  const O *places, *weights;
  const T *image;    // its group's channels of the first pixel; null past the last query
  long long output;  // where its group's channels are in the output
  arithmetic_t<T> y, x;         // of the window
  arithmetic_t<T> peak, scale;  // of the softmax
};

// dcnv3 and dcnv4: the taps of a window, its columns one after another.
template <typename A> struct Windows {
  A scale, end_y, end_x;
  Divisor kernel_h_of;
  int columns, last_row, last_column, kernel_h, left_out;
  int stride_h, stride_w, top, left, dilation_h, dilation_w, center_h, center_w;

  struct __align__(2 * sizeof(A)) Shared { A y, x; };  // by all rows' samples of one number

  __device__ __forceinline__ Shared shared(int sample, const long long *, const long long *) const {
    const int tap = sample + (sample >= left_out);
    const int column = int(kernel_h_of(tap)), row = tap - column * kernel_h;
    return {A(row * dilation_h - center_h) * scale, A(column * dilation_w - center_w) * scale};
  }
  __device__ __forceinline__ Shared level(int, const long long *shapes, const long long *starts) const {
    return shared(0, shapes, starts);  // all are of the same image
  }
  __device__ __forceinline__ A row_y(int y) const { return A(y * stride_h - top + center_h); }
  __device__ __forceinline__ A row_x(int x) const { return A(x * stride_w - left + center_w); }
  __device__ __forceinline__ Map<A> map(const Shared &tap, A y, A x) const {
    return {y + tap.y, x + tap.x, scale, scale, end_y, end_x, 0, columns, last_row, last_column};
  }
};

// A level of ms_deform_attn. One that is not inside the value's pixels has none: it ends before it begins.
template <typename A> struct __align__(16) Level {
  A height, width, end_y, end_x;
  int first, columns, last_row, last_column;

  static __device__ __forceinline__ Level of(int level, int pixels, const long long *shapes, const long long *starts) {
    const long long height = shapes[2 * level], width = shapes[2 * level + 1], first = starts[level];
    const bool inside = height > 0 && height <= pixels && width > 0 && width <= pixels && first >= 0 &&
                        first <= pixels && height * width <= pixels - first;
    if (!inside) return {A(0), A(0), A(-1), A(-1), 0, 0, 0, 0};
    return {A(height), A(width), not_below<A>(int(height)), not_below<A>(int(width)),
            int(first), int(width), int(height) - 1, int(width) - 1};
  }
  __device__ __forceinline__ Map<A> map(A y, A x) const {
    return {y, x, height, width, end_y, end_x, first, columns, last_row, last_column};
  }
};

// ms_deform_attn, with as many points in every level.
template <typename A> struct Attention {
  int points, pixels;

  using Shared = Level<A>;

  __device__ __forceinline__ Shared shared(int sample, const long long *shapes, const long long *starts) const {
    return level(sample / points, shapes, starts);
  }
  __device__ __forceinline__ Shared level(int level, const long long *shapes, const long long *starts) const {
    return Shared::of(level, pixels, shapes, starts);
  }
  __device__ __forceinline__ A row_y(int) const { return A(-0.5); }
  __device__ __forceinline__ A row_x(int) const { return A(-0.5); }
  __device__ __forceinline__ Map<A> map(const Shared &level, A y, A x) const { return level.map(y, x); }
};

// ms_deform_attn with a number of points for each level, or with discrete samples: those of the pixels that the places
// lie in. A source of its own, for what it costs; the functions below say what it does otherwise.
constexpr int BOUNDS = 17;
template <typename A> struct AttentionV2 {
  int bounds[BOUNDS];  // each level's first sample, and from the end of the last level on how many there are
  int pixels, discrete;

  using Shared = Level<A>;

  __device__ __forceinline__ Shared shared(int sample, const long long *shapes, const long long *starts) const {
    int number = 0;
    while (sample >= bounds[number + 1]) ++number;
    return level(number, shapes, starts);
  }
  __device__ __forceinline__ Shared level(int level, const long long *shapes, const long long *starts) const {
    return Shared::of(level, pixels, shapes, starts);
  }
  __device__ __forceinline__ A row_y(int) const { return discrete ? A(0.5) : A(-0.5); }
  __device__ __forceinline__ A row_x(int) const { return discrete ? A(0.5) : A(-0.5); }
  __device__ __forceinline__ Map<A> map(const Shared &level, A y, A x) const { return level.map(y, x); }
};

// A number for each corner of a cell.
template <typename A> struct __align__(16) Four {
  A of[4];
};

// ---- addresses

// A base that offsets are added to as it is: else the compiler takes the sum apart, and adds 64 bits by halves.
template <typename T> __device__ __forceinline__ const T *opaque(const T *pointer) {
#if defined(__CUDACC__)
  asm volatile("" : "+l"(pointer));
#endif
  return pointer;
}

// from + index * bytes: one instruction, where `from` is opaque.
template <typename T> __device__ __forceinline__ const T *step(const T *from, unsigned index, unsigned bytes) {
  return reinterpret_cast<const T *>(reinterpret_cast<const char *>(from) + (unsigned long long)index * bytes);
}

// ---- a warp and its rows

__device__ __forceinline__ float shuffled(float value, int distance) { return __shfl_xor_sync(ALL, value, distance); }
__device__ __forceinline__ double shuffled(double value, int distance) { return __shfl_xor_sync(ALL, value, distance); }

struct Warp {
  int number, lane;  // the warp's in its block, and the thread's
  int part, slot;    // which of them the thread is, and which of the rows at a time has it
  int group;
  unsigned first;    // of the warp's queries, in the order of their numbers

  __device__ __forceinline__ explicit Warp(const Aggregate &p) {
    number = int(threadIdx.x) / 32;
    lane = int(threadIdx.x) % 32;
    part = lane & (p.lanes - 1);
    slot = lane >> p.log_lanes;
    const unsigned block = p.groups_of(blockIdx.x);
    group = int(blockIdx.x - block * p.groups);
    first = (block * WARPS + number) * p.rows;
  }
};

template <typename T, typename O, typename Source>
__device__ __forceinline__ Row<T, O> row_of(const Aggregate &p, const Source &source, const Warp &warp, const T *value,
                                            const O *places, const O *weights) {
  const unsigned queries = unsigned(p.height) * p.width, all = queries * p.images;
  const unsigned number = min(warp.first + warp.lane, all - 1);  // a row past the last query goes along with the last
  const unsigned image = p.queries_of(number), inside = number - image * queries;
  const unsigned strip = p.strips_of(inside), top = strip * STRIP;
  const unsigned in_strip = inside - top * p.width;
  const bool last = int(top + STRIP) > p.height;
  const unsigned x = last ? p.last_strip_of(in_strip) : in_strip / STRIP;
  const unsigned y = top + in_strip - x * (last ? p.height - top : STRIP);
  const unsigned query = image * queries + y * p.width + x;
  const long long stride = (long long)p.groups * p.channels;
  const T *pixels = value + ((long long)image * p.pixels * stride + warp.group * p.channels);
  return {places + (query * p.places_query + warp.group * p.places_group),
          weights + (query * p.weights_query + warp.group * p.weights_group + p.weights_first),
          warp.first + warp.lane < all ? pixels : nullptr,
          query * stride + warp.group * p.channels, source.row_y(int(y)), source.row_x(int(x)), {}, {}};
}

// A softmax's largest logit, and the sum of the exponentials of their distances to it.
template <typename A> struct alignas(2 * sizeof(A)) Softmax {
  A peak, total;

  // By `lanes` neighbouring threads of a warp, a power of two, of which this is number `lane`.
  template <typename O>
  static __device__ __forceinline__ Softmax of(const O *logits, int samples, int lane, int lanes) {
    A peak = A(logits[0]);
    for (int s = lane; s < samples; s += lanes) peak = max(peak, A(logits[s]));
    for (int distance = lanes / 2; distance > 0; distance /= 2) peak = max(peak, shuffled(peak, distance));
    Sum<A> sum;
    for (int s = lane; s < samples; s += lanes) sum.add(exp(A(logits[s]) - peak));
    A total = sum.value();
    for (int distance = lanes / 2; distance > 0; distance /= 2) total += shuffled(total, distance);
    return {peak, total};
  }
};

// The softmax of each of a warp's rows, by the row's lanes.
template <typename T, typename O>
__device__ __forceinline__ void normalise(const Aggregate &p, const Warp &warp, Row<T, O> *rows) {
  using A = arithmetic_t<T>;
  for (int r = warp.slot; r < p.rows; r += p.slots) {
    const auto softmax = Softmax<A>::of(rows[r].weights, p.samples, warp.part, p.lanes);
    if (warp.part == 0) {
      rows[r].peak = softmax.peak;
      rows[r].scale = A(1) / softmax.total;
    }
  }
}

// ---- samples

// What all rows have in common of `count` samples from number `begin` on, by the block's threads.
template <typename Source>
__device__ __forceinline__ void fill(typename Source::Shared *table, const Source &source, int begin, int count,
                                     const long long *shapes, const long long *starts) {
  __syncthreads();  // the last ones are done with
#pragma unroll 1
  for (int k = int(threadIdx.x); k < count; k += THREADS) table[k] = source.shared(begin + k, shapes, starts);
  __syncthreads();
}

// The i-th of a warp's samples that are held: the k-th of those of row r.
struct Held {
  int r, k, at;

  __device__ __forceinline__ Held(const Aggregate &p, int i) {
    r = i * p.reciprocal >> 16;
    k = i - r * p.held;
    at = first(p, r) + k;
  }

  // Where those of a row begin: an odd number from row to row, so that they lie in different banks.
  static __device__ __forceinline__ int first(const Aggregate &p, int r) { return r * (p.held | 1); }
};

// From a place to the position that is sampled.
template <typename A, typename Source>
__device__ __forceinline__ void locate(const Source &, const Map<A> &map, A &y, A &x) {
  map.locate(y, x);
}

__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }

// A discrete sample's is its pixel, the nearest one of the level. The product is rounded as on the CPU: the sum with
// one that is not could lie in the next pixel.
template <typename A>
__device__ __forceinline__ void locate(const AttentionV2<A> &source, const Map<A> &map, A &y, A &x) {
  if (!source.discrete) return map.locate(y, x);
  y = map.origin_y + rounded_product(map.scale_y, y);
  x = map.origin_x + rounded_product(map.scale_x, x);
  const bool finite = isfinite(y) && isfinite(x);
  y = finite ? floor(min(max(y, A(0)), nextafter(map.end_y, A(0)))) : A(-2);  // outside
  x = finite ? floor(min(max(x, A(0)), nextafter(map.end_x, A(0)))) : A(-2);
}

// Makes a discrete sample's pixel an image of its own, so that none beside it is read.
template <typename A, typename Source>
__device__ __forceinline__ void isolate(const Source &, Map<A> &, A &, A &) {}
template <typename A> __device__ __forceinline__ void isolate(const AttentionV2<A> &source, Map<A> &map, A &y, A &x) {
  if (!source.discrete || y < A(0)) return;
  map.first += int(y) * map.columns + int(x);
  map.columns = 1;
  map.last_row = map.last_column = 0;
  map.end_y = map.end_x = A(1);
  y = x = A(0);
}

// Where sample s of a row lies, in the image of its map.
template <typename A> struct Position {
  Map<A> map;
  A y, x;

  template <typename T, typename O, typename Source>
  __device__ __forceinline__ Position(const Source &source, const typename Source::Shared &shared, const Row<T, O> &row,
                                      int s)
      : map(source.map(shared, row.y, row.x)) {
    const O *place = step(row.places, s, 2 * sizeof(O));
    y = A(__ldg(place + 1));
    x = A(__ldg(place));
    locate(source, map, y, x);
    isolate(source, map, y, x);
  }
};

template <typename T, typename O>
__device__ __forceinline__ arithmetic_t<T> weight_of(const Row<T, O> &row, int s, bool softmax) {
  using A = arithmetic_t<T>;
  const A weight = A(__ldg(step(row.weights, s, sizeof(O))));
  return softmax ? exp(weight - row.peak) * row.scale : weight;
}

__device__ __forceinline__ int floor_int(float a) { return __float2int_rd(a); }  // saturates, 0 for NaN
__device__ __forceinline__ int floor_int(double a) { return __double2int_rd(a); }
