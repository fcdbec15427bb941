// dcnv3, dcnv4 and ms_deform_attn, the gradient of the image: for pixel x of group g,
//   grad[x, g, c] = sum over samples (q, s) of group g that touch x of a[q, g, s] * weight there * grad_output[q, g, c].
// Samples are sorted by cell, once for all channels (sort.cuh), and each pixel gathers, in a fixed order: no atomics on
// floats, no sums in memory, and every pixel is written once. T is the data's type, O that of places and weights.
//
// A segment is a level of a pair, an image and one of its groups. All levels of an image have room for as many cells as
// one may have, and as many samples, so that segments follow from the shapes; those that hold no level have none.
//
// What it takes, by estimate, for dcnv4 at 64 x 56 x 56 x 128, 4 groups, 9 taps, half precision, on an H100: 7.2 M
// samples, of which places and weights are read twice (90 MB), numbers, cells and records written and read (290 MB),
// some 130 us at 3 TB/s; then 36 records of 16 bytes and as many rows of 64 bytes for each of 0.8 M pixels, 2.3 GB out
// of L1 and L2, 26 loads and 70 instructions each of a warp for 8 pixels: 100 us.
#include "aggregate.cuh"
#include "sort.cuh"

constexpr int LONG = 256;  // records of a pixel above that are shared by all lanes of a warp

// The pairs that are sorted together, image by image; `levels`, and the points, cells and samples of each, are those of
// a pair.
struct Pairs {
  int first, count, levels, points, cells, samples;
};

// The number among a row's samples of a level's point, and whether it has the point.
template <typename Source>
__device__ __forceinline__ int number_of(const Source &, const Pairs &pairs, int level, int point) {
  return level * pairs.points + point;
}
template <typename Source> __device__ __forceinline__ bool has(const Source &, int, int) { return true; }

// Levels with fewer points than `pairs.points`: of those that they lack, the number is another's.
template <typename A>
__device__ __forceinline__ int number_of(const AttentionV2<A> &source, const Pairs &, int level, int point) {
  return min(source.bounds[level] + point, source.bounds[level + 1] - 1);
}
template <typename A> __device__ __forceinline__ bool has(const AttentionV2<A> &source, int level, int point) {
  return source.bounds[level] + point < source.bounds[level + 1];
}

// A discrete sample touches no pixel but the top left one of its cell.
template <typename Source> __device__ __forceinline__ Lists touching(const Source &, const Lists &lists) {
  return lists;
}
template <typename A> __device__ __forceinline__ Lists touching(const AttentionV2<A> &source, Lists lists) {
  if (source.discrete) {
    lists.begin[0] = lists.end[0];
    lists.begin[1] = lists.middle[1];
  }
  return lists;
}

// The softmax of every query of the pairs. Threads (lanes, rows), a row a query; lanes are a power of two up to 32.
template <typename T, typename O>
__global__ void __launch_bounds__(THREADS, 4)
aggregate_softmax(const O *__restrict__ weights, Softmax<arithmetic_t<T>> *__restrict__ softmax, Aggregate p,
                  Pairs pairs) {
  const int queries = p.height * p.width, lanes = int(blockDim.x), lane = int(threadIdx.x);
  const unsigned rows = unsigned(pairs.count) * queries, row = blockIdx.x * blockDim.y + threadIdx.y;
  const int inside = int(min(row, rows - 1) / queries), query = int(min(row, rows - 1)) - inside * queries;
  const int pair = pairs.first + inside, image = pair / p.groups, group = pair - image * p.groups;
  weights += ((long long)image * queries + query) * p.weights_query + group * p.weights_group + p.weights_first;
  const auto found = Softmax<arithmetic_t<T>>::of(weights, p.samples, lane, lanes);
  if (row < rows && lane == 0) softmax[row] = found;
}

// The samples of the pairs, for the sort: numbered by pair, level, query and point.
template <typename A, typename O, typename Source> struct Samples {
  const O *places, *weights;
  const long long *shapes, *starts;
  const Softmax<A> *softmax;  // null for none
  const Source &source;
  const Aggregate &p;
  const Pairs &pairs;

  struct One {
    int segment, inside, query, row, at;  // inside: the number of its pair among those of the sort; row: of all queries
    bool exists;                          // the sample does
    const O *places, *weights;            // of the query and group
    Map<A> map;
    Cell<A> cell;
  };

  __device__ __forceinline__ One one(int sample) const {
    One one;
    one.segment = sample / pairs.samples;
    const int in_segment = sample - one.segment * pairs.samples, points = pairs.points;
    one.inside = one.segment / pairs.levels;
    one.query = in_segment / points;
    const int level = one.segment - one.inside * pairs.levels, point = in_segment - one.query * points;
    const int pair = pairs.first + one.inside, image = pair / p.groups, group = pair - image * p.groups;
    const int y = one.query / p.width, x = one.query - y * p.width;
    one.row = image * p.height * p.width + one.query;
    one.at = number_of(source, pairs, level, point);
    one.places = places + (one.row * p.places_query + group * p.places_group);
    one.weights = weights + (one.row * p.weights_query + group * p.weights_group + p.weights_first);
    one.map = source.map(source.shared(one.at, shapes, starts), source.row_y(y), source.row_x(x));
    one.exists = has(source, level, point) && one.map.end_y > A(0);  // and its level
    A x_at = A(one.places[2 * one.at]), y_at = A(one.places[2 * one.at + 1]);
    locate(source, one.map, y_at, x_at);
    one.cell = Cell<A>(y_at, x_at, one.map.last_row + 1, one.map.columns, one.map.columns + 1, 1);
    return one;
  }

  __device__ __forceinline__ int cell(int sample) const {
    const One found = one(sample);
    const int inside = first_cell(found.map.columns + 1) + int(found.cell.first);
    return found.exists && found.cell.adds ? found.segment * pairs.cells + inside : -1;
  }

  __device__ __forceinline__ Record<A> record(int sample) const {
    const One found = one(sample);
    A weight = A(found.weights[found.at]);
    if (softmax) {
      const Softmax<A> of = softmax[(long long)found.inside * p.height * p.width + found.query];
      weight = exp(weight - of.peak) / of.total;
    }
    return {found.row, found.cell.down, found.cell.right, weight};
  }
};

template <typename T, typename O, template <typename> class Source>
__global__ void __launch_bounds__(SORTERS)
aggregate_count(const O *__restrict__ places, const O *__restrict__ weights, const long long *__restrict__ shapes,
                const long long *__restrict__ starts, const Softmax<arithmetic_t<T>> *__restrict__ softmax,
                Source<arithmetic_t<T>> source, Aggregate p, Pairs pairs, int samples, int *cell_of,
                int *cell_starts) {
  using A = arithmetic_t<T>;
  const Samples<A, O, Source<A>> all = {places, weights, shapes, starts, softmax, source, p, pairs};
  count_samples(all, samples, cell_of, cell_starts);
}

template <typename T, typename O, template <typename> class Source>
__global__ void __launch_bounds__(SORTERS)
aggregate_records(const O *__restrict__ places, const O *__restrict__ weights, const long long *__restrict__ shapes,
                  const long long *__restrict__ starts, const Softmax<arithmetic_t<T>> *__restrict__ softmax,
                  Source<arithmetic_t<T>> source, Aggregate p, Pairs pairs, int cells, const int *cell_of,
                  const int *cell_starts, const int *order, Record<arithmetic_t<T>> *records) {
  using A = arithmetic_t<T>;
  const Samples<A, O, Source<A>> all = {places, weights, shapes, starts, softmax, source, p, pairs};
  write_records(all, cells, cell_of, cell_starts, order, records);
}

// Threads (lanes, rows): a row is a pixel of a pair, its lanes, a power of two inside one warp, take V channels each.
// Rows of one warp lie far apart, and those of neighbouring warps are neighbours: small levels have long lists, which
// are so spread over many warps, while neighbours find the samples that they share in L1.
template <typename T, template <typename> class Source, int V>
__global__ void __launch_bounds__(THREADS, 6)
aggregate_backward_input(const T *__restrict__ grad_output, const long long *__restrict__ shapes,
                         const long long *__restrict__ starts, const int *__restrict__ cell_starts,
                         const Record<arithmetic_t<T>> *__restrict__ records, T *__restrict__ grad_value,
                         Source<arithmetic_t<T>> source, Aggregate p, Pairs pairs) {
  using A = arithmetic_t<T>;
  const int lanes = int(blockDim.x), slots = 32 / lanes, slot = int(threadIdx.y) % slots;
  const unsigned warp = blockIdx.x * (THREADS / 32) + threadIdx.y / slots, warps = gridDim.x * (THREADS / 32);
  const int stride = p.groups * p.channels;
  const unsigned rows = unsigned(pairs.count) * p.pixels;

  // The lists of the row in slot `which`: visit(lists, group) for each level that has the pixel.
  const auto visit_lists = [&](int which, auto visit) {
    const unsigned row = which * warps + warp;
    if (row >= rows) return;
    const int inside = int(row / p.pixels), pixel = int(row) - inside * p.pixels;
#pragma unroll 1
    for (int level = 0; level < pairs.levels; ++level) {
      const Map<A> map = source.map(source.level(level, shapes, starts), A(0), A(0));
      const int in_level = pixel - map.first;
      if (in_level < 0 || in_level >= (map.last_row + 1) * map.columns) continue;
      const int y = in_level / map.columns, x = in_level - y * map.columns, pitch = map.columns + 1;
      const int segment = inside * pairs.levels + level;
      const Lists lists(cell_starts + (segment * pairs.cells + y * pitch + x), pitch);
      visit(touching(source, lists), (pairs.first + inside) % p.groups);
    }
  };

  // Adds every `step`-th record of each of the row's lists, from number `first` on.
  const auto add = [&](int which, int first, int step, int channel, A (&result)[V]) {
    Sum<A> sums[V];
    visit_lists(which, [&](const Lists &lists, int group) {
      const T *from = grad_output + (group * p.channels + channel);
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        for (int at = lists.begin[below] + first; at < lists.end[below];) {
#pragma unroll 2
          for (int i = 0; i < RUN && at < lists.end[below]; ++i, at += step) {
            const Record<A> record = records[at];
            const A weight = lists.weight(record, at, below);
            const auto *row = reinterpret_cast<const Vector<T, V> *>(from + (long long)record.row * stride);
            const auto loaded = Vector<T, V>::load(row, true);
#pragma unroll
            for (int v = 0; v < V; ++v) sums[v].run += weight * A(loaded[v]);
          }
#pragma unroll
          for (int v = 0; v < V; ++v) sums[v].end_run();
        }
      }
    });
#pragma unroll
    for (int v = 0; v < V; ++v) result[v] = sums[v].value();
  };

  int count = 0;
  visit_lists(slot, [&](const Lists &lists, int) { count += lists.count(); });
  const bool is_long = count > LONG && slots > 1;
  const unsigned long_rows = __ballot_sync(ALL, is_long && threadIdx.x == 0);
  for (int slab = 0; slab < p.channels; slab += lanes * V) {
    const int channel = slab + int(threadIdx.x) * V;
    const bool mine = channel < p.channels;
    A result[V] = {};
    if (mine && !is_long) add(slot, 0, 1, channel, result);
    for (unsigned left = long_rows; left != 0; left &= left - 1) {
      const int which = (__ffs(int(left)) - 1) / lanes;
      A part[V] = {};
      if (mine) add(which, slot, slots, channel, part);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        for (int distance = lanes; distance < 32; distance *= 2) part[v] += __shfl_xor_sync(ALL, part[v], distance);
        if (which == slot) result[v] = part[v];
      }
    }
    const unsigned row = slot * warps + warp;
    if (row >= rows || !mine) continue;
    Vector<T, V> vector;
#pragma unroll
    for (int v = 0; v < V; ++v) vector.set(v, T(result[v]));
    const int inside = int(row / p.pixels), pair = pairs.first + inside, image = pair / p.groups;
    const long long pixel = (long long)image * p.pixels + (int(row) - inside * p.pixels);
    T *to = grad_value + (pixel * stride + (pair - image * p.groups) * p.channels + channel);
    *reinterpret_cast<Vector<T, V> *>(to) = vector;
  }
}
