// RoI pooling: the mean over each bin's samples, and its gradients. T is the data's type; rois, offset and mask are
// contiguous, of the type A of positions and sums. Kind says where the samples of a bin lie:
//   Average      on its whole pixels                                      roi_avg_pool, psroi_pool
//   DeformRoI    at the centres of a grid; those outside the image are 0  deform_roi_pool
//   DeformPSRoI  at the edges of a grid; those outside do not count       deform_psroi_pool
// All are regular grids, so a bin is two axes, each with the run of its samples that lie in the image: however large a
// roi is, the work is bounded by the image. A bin without samples there is 0 and has no gradient, whatever its mask or
// its output's gradient are; so is one of more than MOST samples along an axis, and one of an image that there is not.
// Sides are at most MOST pixels: up to there float has all whole numbers and their halves, and int all that follows.
// Bins of group (gh, gw) read the input channels (c * Gh + gh) * Gw + gw; without position-sensitive channels there is
// one group.
//
// A thread computes its bin and each sample's cell once, for a slab of up to SLAB channels whose sums are in registers.
// Planar: neighbouring threads on neighbouring bins, so what one pixel row of a roi touches is shared in L1, and `out`
// is written in order. Interleaved, where the input's channels are: lanes on neighbouring channels. Tiles of bins come
// before slabs of channels in the grid: the blocks that run together read few planes, which stay in L2.
//
// 1,000 rois x 7x7 x 256 channels on 2x256x200x304, float32, 2x2 samples: each byte once is 125 MB in and 50 MB out,
// 58 us at 3 TB/s; the gather is 200 M loads (16 an output), at some five instructions each 35 us. Between them stands
// L1: interleaved, a warp's load is one line of 128 bytes, 6.3 M of them, 28 us; planar, 32 bins of some five pixel
// rows are 5 to 10 lines, and the lines bound it. The gradient of the input is 200 M atomics: 32 lanes on neighbouring
// channels make one transaction, so the caller gives sums with the channels last, whatever the image's order. They are
// double, as nothing bounds how many bins read one pixel: two transactions.
#include "bilinear.cuh"
#include "sum.cuh"

constexpr int SLAB_BYTES = 32;
template <typename A> constexpr int SLAB = SLAB_BYTES / sizeof(A);
constexpr int MOST = 8388608;  // 2**23

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

// A sample that is one pixel, and one that is bilinear.
template <typename A> struct Pixel {
  long long at;

  __device__ __forceinline__ Pixel(const Axis<A> &, const Axis<A> &, int y, int x, const Pooling &, const Strides &s)
      : at(y * s.y + x * s.x) {}
  template <typename T> __device__ __forceinline__ A value(const T *plane) const { return A(plane[at]); }
  __device__ __forceinline__ void add(double *plane, A gradient) const { atomicAdd(plane + at, double(gradient)); }
};

template <typename A> struct Point : Cell<A> {
  __device__ __forceinline__ Point(const Axis<A> &y, const Axis<A> &x, int i, int j, const Pooling &p, const Strides &s)
      : Cell<A>(Cell<A>::clamped(y.position(i), x.position(j), p.height, p.width, s.y, s.x)) {}
  template <typename T> __device__ __forceinline__ A value(const T *plane) const {
    A corners[4];
    this->load(plane, corners);
    return Cell<A>::value(corners);
  }
  __device__ __forceinline__ void add(double *plane, A gradient) const {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      atomicAdd(plane + this->at[corner], double(this->weight(corner) * gradient));
    }
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

// One thread's place in the work: a bin, and every lanes-th channel of a class from `channel` on.
// Grid: x = (class, slab of channels, tile of bins), tiles fastest. Block: (bins, lanes) if planar, (lanes, bins) if
// interleaved.
struct Place {
  int roi, cls, row, column, channel, lanes, lane;
  bool active;

  __device__ __forceinline__ Place(const Pooling &p, int slab) {
    const int bins = int(p.channels_last ? blockDim.y : blockDim.x);
    lanes = int(p.channels_last ? blockDim.x : blockDim.y);
    lane = int(p.channels_last ? threadIdx.x : threadIdx.y);
    int block = int(blockIdx.x);
    int bin = block % p.tiles * bins + int(p.channels_last ? threadIdx.y : threadIdx.x);
    block /= p.tiles;
    channel = block % p.slabs * slab * lanes + lane;
    cls = block / p.slabs;
    active = bin < p.rois * p.rows * p.columns && channel < p.class_channels;
    column = bin % p.columns;
    bin /= p.columns;
    row = bin % p.rows;
    roi = bin / p.rows;
  }

  // How many channels there are from the thread's first one on.
  __device__ __forceinline__ int count(const Pooling &p) const {
    return (p.class_channels - channel + lanes - 1) / lanes;
  }

  // The bin's first channel in the output.
  template <typename T> __device__ __forceinline__ T *output(T *base, const Strides &s, const Pooling &p) const {
    return base + roi * s.n + ((long long)cls * p.class_channels + channel) * s.c + row * s.y + column * s.x;
  }
};

// A bin of a roi, for the channels of one class.
template <typename A, typename Kind> struct Bin {
  Axis<A> y, x;
  int image;
  bool empty;
  long long channel;  // of the input, for the class's first one
  A modulation;

  __device__ __forceinline__ Bin(const Pooling &p, const Place &place, const A *rois, const A *offset, const A *mask) {
    const int row = place.row, column = place.column;
    const long long owner = (long long)place.roi * p.classes + place.cls;
    rois += 5LL * place.roi;
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
    const int group = row * p.group_rows / p.rows * p.group_columns + column * p.group_columns / p.columns;
    channel = (long long)place.cls * p.class_channels * p.group_rows * p.group_columns + group;
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

// Each thread owns its elements of `out`.
template <typename T, typename Kind>
__global__ void __launch_bounds__(256, 2)
pool(const T *__restrict__ input, Strides input_strides, const arithmetic_t<T> *__restrict__ rois,
     const arithmetic_t<T> *__restrict__ offset, const arithmetic_t<T> *__restrict__ mask, T *__restrict__ out,
     Strides out_strides, Pooling p) {
  using A = arithmetic_t<T>;
  const Place place(p, SLAB<A>);
  if (!place.active) return;
  const Bin<A, Kind> bin(p, place, rois, offset, mask);
  const int count = place.count(p);
  const T *plane = bin.plane(input, input_strides, p, place.channel);
  const long long step = bin.step(input_strides, p, place.lanes);
  Sum<A> sums[SLAB<A>];
  int run = 0;
  for (int i = bin.y.begin; i < bin.y.end && !bin.empty; ++i) {
    for (int j = bin.x.begin; j < bin.x.end; ++j) {
      const typename Kind::template Sample<A> sample(bin.y, bin.x, i, j, p, input_strides);
#pragma unroll
      for (int k = 0; k < SLAB<A>; ++k) {
        if (k < count) sums[k].run += sample.value(plane + k * step);
      }
      if (++run == RUN) {
        run = 0;
#pragma unroll
        for (int k = 0; k < SLAB<A>; ++k) sums[k].end_run();
      }
    }
  }
  T *first = place.output(out, out_strides, p);
#pragma unroll
  for (int k = 0; k < SLAB<A>; ++k) {
    if (k < count) {
      const A mean = bin.empty ? A(0) : sums[k].value() / bin.divisor() * bin.modulation;
      first[k * place.lanes * out_strides.c] = T(mean);
    }
  }
}

// Scatters the output's gradient. `grad_input` starts as zeros.
template <typename T, typename Kind>
__global__ void __launch_bounds__(256, 2)
pool_backward_input(const T *__restrict__ grad_output, Strides grad_output_strides,
                    const arithmetic_t<T> *__restrict__ rois, const arithmetic_t<T> *__restrict__ offset,
                    const arithmetic_t<T> *__restrict__ mask, double *__restrict__ grad_input,
                    Strides grad_input_strides, Pooling p) {
  using A = arithmetic_t<T>;
  const Place place(p, SLAB<A>);
  if (!place.active) return;
  const Bin<A, Kind> bin(p, place, rois, offset, mask);
  const int count = place.count(p);
  if (bin.empty) return;
  double *plane = bin.plane(grad_input, grad_input_strides, p, place.channel);
  const long long step = bin.step(grad_input_strides, p, place.lanes);
  const T *first = place.output(grad_output, grad_output_strides, p);
  A gradients[SLAB<A>];
#pragma unroll
  for (int k = 0; k < SLAB<A>; ++k) {
    const A gradient = k < count ? A(first[k * place.lanes * grad_output_strides.c]) : A(0);
    gradients[k] = gradient / bin.divisor() * bin.modulation;
  }
  for (int i = bin.y.begin; i < bin.y.end; ++i) {
    for (int j = bin.x.begin; j < bin.x.end; ++j) {
      const typename Kind::template Sample<A> sample(bin.y, bin.x, i, j, p, grad_input_strides);
#pragma unroll
      for (int k = 0; k < SLAB<A>; ++k) {
        if (k < count) sample.add(plane + k * step, gradients[k]);  // atomic: bins of other blocks share its pixels
      }
    }
  }
}

// The gradients of each bin's offset and mask. The lanes of a bin take turns at its channels, and their sums are added
// in order, so the result is always the same. A null `grad_offset` or `grad_mask` is not wanted.
template <typename T, typename Kind>
__global__ void __launch_bounds__(256, 2)
pool_backward_offset(const T *__restrict__ grad_output, Strides grad_output_strides, const T *__restrict__ input,
                     Strides input_strides, const arithmetic_t<T> *__restrict__ rois,
                     const arithmetic_t<T> *__restrict__ offset, const arithmetic_t<T> *__restrict__ mask,
                     arithmetic_t<T> *__restrict__ grad_offset, arithmetic_t<T> *__restrict__ grad_mask, Pooling p) {
  using A = arithmetic_t<T>;
  SMEM(A, partial, [3][256]);
  const Place place(p, SLAB<A>);
  const int thread = int(threadIdx.y * blockDim.x + threadIdx.x);
  A value = 0, shift_y = 0, shift_x = 0;
  if (place.active) {
    const Bin<A, Kind> bin(p, place, rois, offset, mask);
    Sum<A> sum, sum_y, sum_x;
    int run = 0;
    const T *first_plane = bin.plane(input, input_strides, p, place.channel);
    const T *first_gradient = place.output(grad_output, grad_output_strides, p);
    for (int i = bin.y.begin; i < bin.y.end && !bin.empty; ++i) {
      for (int j = bin.x.begin; j < bin.x.end; ++j) {
        const typename Kind::template Sample<A> sample(bin.y, bin.x, i, j, p, input_strides);
        const T *plane = first_plane, *gradient = first_gradient;
        for (int c = place.channel; c < p.class_channels; c += place.lanes) {
          A corners[4];
          sample.load(plane, corners);
          sum.run += A(*gradient) * sample.Cell<A>::value(corners);
          sum_y.run += A(*gradient) * sample.slope_y(corners);
          sum_x.run += A(*gradient) * sample.slope_x(corners);
          if (++run == RUN) {
            run = 0;
            sum.end_run();
            sum_y.end_run();
            sum_x.end_run();
          }
          plane += bin.step(input_strides, p, place.lanes);
          gradient += place.lanes * grad_output_strides.c;
        }
      }
    }
    if (!bin.empty) {
      value = sum.value() / bin.divisor();
      shift_y = sum_y.value() * (bin.y.unit * bin.modulation / bin.divisor());
      shift_x = sum_x.value() * (bin.x.unit * bin.modulation / bin.divisor());
    }
  }
  partial[0][thread] = value;
  partial[1][thread] = shift_y;
  partial[2][thread] = shift_x;
  __syncthreads();
  if (!place.active || place.lane != 0) return;
  const int step = p.channels_last ? 1 : int(blockDim.x);
  for (int lane = 1; lane < place.lanes; ++lane) {
    value += partial[0][thread + lane * step];
    shift_y += partial[1][thread + lane * step];
    shift_x += partial[2][thread + lane * step];
  }
  const long long owner = (long long)place.roi * p.classes + place.cls, bins = (long long)p.rows * p.columns;
  const long long at = place.row * p.columns + place.column;
  if (grad_mask) grad_mask[owner * bins + at] = value;
  if (grad_offset) {
    grad_offset[2 * owner * bins + at] = shift_x;
    grad_offset[(2 * owner + 1) * bins + at] = shift_y;
  }
}
