// RoI pooling: where the samples of a bin lie. T is the data's type; rois, offset and mask are contiguous, of the type A of
// positions and sums. Kind says where:
//   Average      on its whole pixels                                      roi_avg_pool, psroi_pool
//   DeformRoI    at the centres of a grid; those outside the image are 0  deform_roi_pool
//   DeformPSRoI  at the edges of a grid; those outside do not count       deform_psroi_pool
// All are regular grids, so a bin is two axes, each with the run of its samples that lie in the image: however large a
// roi is, the work is bounded by the image. A bin without samples there is 0 and has no gradient, whatever its mask or
// its output's gradient are; so is one of more than MOST samples along an axis, and one of an image that there is not.
// Sides are at most MOST pixels: up to there float has all whole numbers and their halves, and int all that follows.
// Bins of group (gh, gw) read the input channels (c * Gh + gh) * Gw + gw; without position-sensitive channels there is
// one group.
#pragma once
#include "bilinear.cuh"
#include "sum.cuh"
#include "vector.cuh"

constexpr int MOST = 8388608;  // 2**23
constexpr int SLAB_BYTES = 32;  // of the channels that a thread sums at a time
template <typename A> constexpr int SLAB = SLAB_BYTES / sizeof(A);

struct Pooling {
  double spatial_scale, offset_unit;
  int images, height, width, rois, rows, columns, group_rows, group_columns, part_rows, part_columns;
  int classes, class_channels, samples;
  int channels_last, tiles, slabs;
};

// A product that is never fused with the sum it goes into: borders and limits must round as on the CPU.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }

// The samples of a bin along one axis: number i, begin <= i < end, lies at origin + i * spacing.
template <typename A> struct Axis {
  int begin, end;
  A origin, spacing;
  A unit;     // an offset of 1, in pixels
  A divisor;  // of the mean

  __device__ __forceinline__ A position(int i) const { return origin + product(A(i), spacing); }

  // The i of [0, count) with low <= position(i) <= high: a run, as positions only grow or only fall. Comparisons are
  // false for NaN, which leaves none.
  __device__ __forceinline__ void keep(A count, A low, A high) {
    const A a = (low - origin) / spacing, b = (high - origin) / spacing;
    const A first = spacing == A(0) ? A(0) : min(a, b) - A(1), last = spacing == A(0) ? count : max(a, b) + A(1);
    const int samples = count > A(0) && count <= A(MOST) ? int(count) : 0;
    begin = first > A(0) ? (first < A(samples) ? int(first) : samples) : 0;
    end = last > A(0) ? (last < A(samples) ? int(last) + 1 : samples) : 0;
    if (spacing == A(0) && !(origin >= low && origin <= high)) end = begin;  // all lie at one place
    while (begin < end && !(position(begin) >= low && position(begin) <= high)) ++begin;  // the division was rounded
    while (begin < end && !(position(end - 1) >= low && position(end - 1) <= high)) --end;
    end = max(begin, end);
  }
};

// One axis of a roi whose coordinates are whole pixels, from the first one's edge to the last one's.
template <typename A> struct Extent {
  A start, size;

  __device__ __forceinline__ Extent(const Pooling &p, A low, A high, A edge) {
    const A scale = A(p.spatial_scale), least = A(0.1);
    start = product(round(low), scale) - edge;
    size = product(round(high) + A(1), scale) - edge - start;
    if (isfinite(size) && size < least) size = least;
  }
};

// V neighbouring channels of one pixel, `step` further than `from`. The address is an integer's sum: a pointer's the
// compiler turns into an index, which takes two instructions more for every load, and twice the registers.
template <int V, typename T> __device__ __forceinline__ Vector<T, V> read(const T *from, long long step) {
  using word_t = typename Vector<T, V>::word_t;
  const unsigned long long address = reinterpret_cast<unsigned long long>(from) + step * sizeof(T);
  return {__ldg(reinterpret_cast<const word_t *>(address))};
}

// A sample that is one pixel, and one that is bilinear.
template <typename A> struct Pixel {
  long long at;

  __device__ __forceinline__ Pixel(const Axis<A> &, const Axis<A> &, int y, int x, const Pooling &, const Strides &s)
      : at(y * s.y + x * s.x) {}

  // Of V channels, `step` further than the plane's first one.
  template <int V, typename T>
  __device__ __forceinline__ void values(const T *plane, long long step, A (&values)[V]) const {
    const Vector<T, V> pixel = read<V>(plane + at, step);
#pragma unroll
    for (int v = 0; v < V; ++v) values[v] = A(pixel[v]);
  }
};

template <typename A> struct Point : Cell<A> {
  __device__ __forceinline__ Point(const Axis<A> &y, const Axis<A> &x, int i, int j, const Pooling &p, const Strides &s)
      : Cell<A>(Cell<A>::clamped(y.position(i), x.position(j), p.height, p.width, s.y, s.x)) {}

  template <int V, typename T>
  __device__ __forceinline__ void corners(const T *plane, long long step, A (&corners)[V][4]) const {
    Vector<T, V> pixels[4];
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) pixels[corner] = read<V>(plane + this->at[corner], step);
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) corners[v][corner] = A(pixels[corner][v]);
    }
  }
  template <int V, typename T>
  __device__ __forceinline__ void values(const T *plane, long long step, A (&values)[V]) const {
    A corners[V][4];
    this->corners(plane, step, corners);
#pragma unroll
    for (int v = 0; v < V; ++v) values[v] = Cell<A>::value(corners[v]);
  }
};

struct Average {
  template <typename A> using Sample = Pixel<A>;

  template <typename A>
  static __device__ __forceinline__ Axis<A> axis(const Pooling &p, A low, A high, int bin, int bins, int length, A) {
    const Extent<A> roi(p, low, high, A(0));
    const A first = floor(roi.start + product(A(bin), roi.size) / A(bins));
    const A last = ceil(roi.start + product(A(bin + 1), roi.size) / A(bins));
    Axis<A> axis;
    axis.begin = first < A(length) ? (first > A(0) ? int(first) : 0) : length;  // NaN: none
    axis.end = max(axis.begin, last > A(0) ? (last < A(length) ? int(last) : length) : 0);
    axis.divisor = A(max(axis.end - axis.begin, 1));
    return axis;
  }
};

struct DeformRoI {
  template <typename A> using Sample = Point<A>;

  template <typename A>
  static __device__ __forceinline__ Axis<A> axis(const Pooling &p, A low, A high, int bin, int bins, int length,
                                                 A offset) {
    const A scale = A(p.spatial_scale);
    const A start = product(low, scale) - A(0.5), size = product(high, scale) - A(0.5) - start;
    const A count = p.samples ? A(p.samples) : ceil(size / A(bins));
    Axis<A> axis;
    axis.unit = product(A(p.offset_unit), size);
    axis.spacing = size / A(bins) / count;
    axis.origin = start + product(A(bin), size) / A(bins) + product(axis.unit, offset) + product(axis.spacing, A(0.5));
    axis.keep(count, A(-1), A(length));
    axis.divisor = count >= A(1) ? count : A(1);
    return axis;
  }
};

struct DeformPSRoI {
  template <typename A> using Sample = Point<A>;

  template <typename A>
  static __device__ __forceinline__ Axis<A> axis(const Pooling &p, A low, A high, int bin, int bins, int length,
                                                 A offset) {
    const Extent<A> roi(p, low, high, A(0.5));
    Axis<A> axis;
    axis.unit = product(A(p.offset_unit), roi.size);
    axis.spacing = roi.size / A(bins) / A(p.samples);
    axis.origin = roi.start + product(A(bin), roi.size) / A(bins) + product(axis.unit, offset);
    axis.keep(A(p.samples), A(-0.5), A(length) - A(0.5));
    axis.divisor = A(max(axis.end - axis.begin, 1));
    return axis;
  }
};

// A bin of a roi, for the channels of one class.
template <typename A, typename Kind> struct Bin {
  Axis<A> y, x;
  int image;
  bool empty;
  int group;
  long long channel;  // of the input, for the class's first one
  A modulation;

  Bin() = default;

  __device__ __forceinline__ Bin(const Pooling &p, int roi, int cls, int row, int column, const A *rois,
                                 const A *offset, const A *mask) {
    const long long owner = (long long)roi * p.classes + cls;
    rois += 5LL * roi;
    A dy = 0, dx = 0;
    if (offset) {
      const long long parts = (long long)p.part_rows * p.part_columns;
      offset += 2 * owner * parts + row * p.part_rows / p.rows * p.part_columns + column * p.part_columns / p.columns;
      dx = offset[0];
      dy = offset[parts];
    }
    y = Kind::axis(p, rois[2], rois[4], row, p.rows, p.height, dy);
    x = Kind::axis(p, rois[1], rois[3], column, p.columns, p.width, dx);
    modulation = mask ? mask[(owner * p.rows + row) * p.columns + column] : A(1);
    const A index = rois[0];
    const bool exists = index >= A(0) && index < A(p.images) && index == floor(index);
    image = exists ? int(index) : 0;
    empty = !exists || y.begin == y.end || x.begin == x.end;
    group = row * p.group_rows / p.rows * p.group_columns + column * p.group_columns / p.columns;
    channel = (long long)cls * p.class_channels * p.group_rows * p.group_columns + group;
  }

  __device__ __forceinline__ A divisor() const { return y.divisor * x.divisor; }

  // From the plane of one channel of the class to that of the channel `lanes` further on.
  __device__ __forceinline__ long long step(const Strides &s, const Pooling &p, int lanes) const {
    return (long long)lanes * p.group_rows * p.group_columns * s.c;
  }

  template <typename T>
  __device__ __forceinline__ T *plane(T *images, const Strides &s, const Pooling &p, int c) const {
    return images + image * s.n + channel * s.c + step(s, p, c);
  }
};
