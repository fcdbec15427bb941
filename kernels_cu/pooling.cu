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
// A thread computes each sample's cell once, for a slab of up to SLAB channels whose sums are in registers; the bin
// itself one thread computes for all lanes that share its channels.
// Planar: neighbouring threads on neighbouring bins, so what one pixel row of a roi touches is shared in L1, and `out`
// is written in order. Interleaved, where the input's channels are: lanes on neighbouring channels, V of them to a
// thread, which it reads by 16 bytes where strides and alignment allow. Tiles of bins come before slabs of channels in
// the grid: the blocks that run together read few planes, which stay in L2.
//
// 1,000 rois x 7x7 x 256 channels on 2x256x200x304, float32, 2x2 samples: each byte once is 125 MB in and 50 MB out,
// 58 us at 3 TB/s. The gather is 200 M loads, 16 an output. Planar, a warp's 32 bins lie in some five pixel rows, 5 to
// 10 lines a load, and L1 bounds it, at some 200 us. Interleaved it reads whole lines of 128 bytes, 28 us; but each
// element would be a store to a sector of its own, 400 MB, were they not put in order in shared memory first.
// Estimates from the SASS for sm_90, at 528 instructions a clock and 1.75 GHz; 49,000 warps, of 32 bins x 8 channels:
//
//   instructions of a warp      bin  a sample  mean, output    all    time   loads on their way  registers
//   before, in either order     760       408           320  2,770  147 us                    4        122
//   float, planar               200       213           230  1,350   71 us                   32         80
//   float, interleaved, V = 4   185       134           310  1,110   59 us     8 of 16 bytes            80
//   half, interleaved, V = 8    165       151           360  1,210   64 us     4 of 16 bytes            80
//
// The 710 that find a bin are those of one warp of eight. A sample takes some 60 for its cell, and for each channel 4
// loads, 8 additions of 64-bit addresses (a vector: 8 in all) and 5 of sums. The sums are 24 registers, 16 of which are
// for bins of more than RUN samples. The gradients of offset and mask: 41 a channel of a sample planar and 26 by V = 4,
// after 46, with 20 and 8 loads on their way, after 5, and 96 and 79 registers, after 95.
//
// The gradient of the input is 200 M atomics: 32 lanes on neighbouring channels make one transaction, so the caller
// gives sums with the channels last, whatever the image's order. They are double, as nothing bounds how many bins read
// one pixel: two transactions.
#include "bilinear.cuh"
#include "sum.cuh"
#include "vector.cuh"

constexpr int SLAB_BYTES = 32;
template <typename A> constexpr int SLAB = SLAB_BYTES / sizeof(A);
constexpr int MOST = 8388608;  // 2**23
constexpr int THREADS = 256, BINS = 64;  // of a block, at the most

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
  __device__ __forceinline__ void add(double *plane, A gradient) const { atomicAdd(plane + at, double(gradient)); }
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

// Block: (bins, lanes) if planar, (lanes, bins) if interleaved. The lanes of a bin take turns at its channels.
struct Thread {
  int bin, bins, lane, lanes, number;

  __device__ __forceinline__ explicit Thread(bool channels_last)
      : bin(int(channels_last ? threadIdx.y : threadIdx.x)), bins(int(channels_last ? blockDim.y : blockDim.x)),
        lane(int(channels_last ? threadIdx.x : threadIdx.y)), lanes(int(channels_last ? blockDim.x : blockDim.y)),
        number(int(threadIdx.y * blockDim.x + threadIdx.x)) {}
};

// One thread's place in the work: a bin, and every lanes-th channel of a class from `channel` on.
// Grid: x = (class, slab of channels, tile of bins), tiles fastest.
struct Place {
  int roi, cls, row, column, channel, lanes, lane;
  bool active;

  Place() = default;

  __device__ __forceinline__ Place(const Pooling &p, int slab)
      : Place(p, slab, Thread(p.channels_last), Thread(p.channels_last).bin, Thread(p.channels_last).lane) {}

  // That of any lane of any bin of the thread's block.
  __device__ __forceinline__ Place(const Pooling &p, int slab, const Thread &thread, int bin, int lane)
      : lanes(thread.lanes), lane(lane) {
    int block = int(blockIdx.x);
    bin += block % p.tiles * thread.bins;
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

  Bin() = default;

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

// What a bin's lanes share. One thread computes it: the divisions by which a bin is found take longer than its sums.
template <typename A, typename Kind> struct Task {
  Place place;  // of the first lane
  Bin<A, Kind> bin;
};

template <typename A, typename Kind>
__device__ __forceinline__ void share_bins(Task<A, Kind> (&tasks)[BINS], const Thread &thread, const Pooling &p,
                                           const A *rois, const A *offset, const A *mask) {
  if (thread.number < thread.bins) {
    Task<A, Kind> &task = tasks[thread.number];
    task.place = Place(p, SLAB<A>, thread, thread.number, 0);
    if (task.place.active) task.bin = Bin<A, Kind>(p, task.place, rois, offset, mask);
  }
  __syncthreads();
}

// Adds up a bin's samples of N channels from the plane's on: vectors of V, each `step` after the one before. No vector
// is tested for, so that the loads of all are on their way at once.
template <int V, typename T, typename A, typename Kind, int N>
__device__ __forceinline__ void add_samples(const Bin<A, Kind> &bin, const T *plane, long long step, const Pooling &p,
                                            const Strides &strides, Sum<A> (&sums)[N]) {
  int run = 0;
  for (int i = bin.y.begin; i < bin.y.end && !bin.empty; ++i) {
#pragma unroll 1
    for (int j = bin.x.begin; j < bin.x.end; ++j) {
      const typename Kind::template Sample<A> sample(bin.y, bin.x, i, j, p, strides);
#pragma unroll
      for (int k = 0; k < N / V; ++k) {
        A values[V];
        sample.values(plane, k * step, values);
#pragma unroll
        for (int v = 0; v < V; ++v) sums[k * V + v].run += values[v];
      }
      if (++run == RUN) {
        run = 0;
#pragma unroll
        for (int k = 0; k < N; ++k) sums[k].end_run();
      }
    }
  }
}

// Each thread owns its elements of `out`: of one bin, in vectors of V channels. Interleaved, where neighbouring threads
// have neighbouring channels, they leave the block's elements in shared memory, and write them bin by bin.
template <typename T, typename Kind, int V>
__global__ void __launch_bounds__(THREADS, sizeof(T) < 8 ? 3 : 2)
pool(const T *__restrict__ input, Strides input_strides, const arithmetic_t<T> *__restrict__ rois,
     const arithmetic_t<T> *__restrict__ offset, const arithmetic_t<T> *__restrict__ mask, T *__restrict__ out,
     Strides out_strides, Pooling p) {
  using A = arithmetic_t<T>;
  using Shared = Task<A, Kind>;
  SMEM(Shared, tasks, [BINS]);
  SMEM(T, tile, [SLAB<A> * (THREADS + 32)]);
  const bool channels_last = V > 1 || p.channels_last;
  const Thread thread(channels_last);
  share_bins(tasks, thread, p, rois, offset, mask);
  // of the block; read again where it is wanted, which costs less than a register all along
  const auto count = [&] { return min(p.class_channels - tasks[0].place.channel, SLAB<A> * thread.lanes); };

  const Place &place = tasks[thread.bin].place;
  const Bin<A, Kind> &bin = tasks[thread.bin].bin;
  const int apart = thread.lanes * V;
  const auto pool_channels = [&](int first, auto &sums) {
    const T *plane = bin.plane(input, input_strides, p, place.channel + first);
    const long long step = V > 1 ? apart : bin.step(input_strides, p, apart);
    add_samples<V>(bin, plane, step, p, input_strides, sums);
    T *to = channels_last ? tile + thread.bin : place.output(out, out_strides, p);
    const long long pitch = channels_last ? thread.bins + 1 : out_strides.c;
    const A divisor = bin.divisor(), modulation = bin.modulation;
#pragma unroll
    for (int k = 0; k < int(sizeof(sums) / sizeof(sums[0])); ++k) {
      const A mean = sums[k].value() / divisor * modulation;
      to[(first + k / V * apart + k % V) * pitch] = T(bin.empty ? A(0) : mean);
    }
  };
  if (place.active) {
    int c = thread.lane * V;
    if (c + SLAB<A> * thread.lanes - apart < count()) {
      Sum<A> sums[SLAB<A>];
      pool_channels(c, sums);
    } else {
      for (; c < count(); c += apart) {
        Sum<A> sums[V];
        pool_channels(c, sums);
      }
    }
  }
  if (!channels_last) return;
  __syncthreads();
  const int owner = thread.number % thread.bins;
  if (!tasks[owner].place.active) return;
  T *to = tasks[owner].place.output(out, out_strides, p);
  for (int c = thread.number / thread.bins; c < count(); c += thread.lanes) {
    to[c * out_strides.c] = tile[c * (thread.bins + 1) + owner];
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

// A lane's part of a bin: sums over samples and channels of the output's gradient times the value, and times slopes.
template <typename A> struct Products {
  Sum<A> value, slope_y, slope_x;
  int run = 0;

  // A sample in U vectors of V channels, `apart` channels from one to the next; all loads are on their way at once.
  template <int U, int V, typename T>
  __device__ __forceinline__ void add(const Point<A> &sample, const T *plane, long long step, const T *gradient,
                                      long long pitch, int apart) {
    A corners[U][V][4], gradients[U][V];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      sample.corners(plane, u * step, corners[u]);
#pragma unroll
      for (int v = 0; v < V; ++v) gradients[u][v] = A(gradient[(u * apart + v) * pitch]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        value.run += gradients[u][v] * sample.value(corners[u][v]);
        slope_y.run += gradients[u][v] * sample.slope_y(corners[u][v]);
        slope_x.run += gradients[u][v] * sample.slope_x(corners[u][v]);
      }
    }
    run += U * V;
    if (run >= RUN) {
      run = 0;
      value.end_run();
      slope_y.end_run();
      slope_x.end_run();
    }
  }
};

// The gradients of each bin's offset and mask. The lanes of a bin take turns at its channels, and their sums are added
// in order, so the result is always the same. A null `grad_offset` or `grad_mask` is not wanted.
template <typename T, typename Kind, int V>
__global__ void __launch_bounds__(THREADS, 2)
pool_backward_offset(const T *__restrict__ grad_output, Strides grad_output_strides, const T *__restrict__ input,
                     Strides input_strides, const arithmetic_t<T> *__restrict__ rois,
                     const arithmetic_t<T> *__restrict__ offset, const arithmetic_t<T> *__restrict__ mask,
                     arithmetic_t<T> *__restrict__ grad_offset, arithmetic_t<T> *__restrict__ grad_mask, Pooling p) {
  using A = arithmetic_t<T>;
  using Shared = Task<A, Kind>;
  constexpr int U = V < 4 ? 4 / V : 1;
  SMEM(Shared, tasks, [BINS]);
  SMEM(A, partial, [3][THREADS]);
  const bool channels_last = V > 1 || p.channels_last;
  const Thread thread(channels_last);
  share_bins(tasks, thread, p, rois, offset, mask);
  const Place &place = tasks[thread.bin].place;
  const Bin<A, Kind> &bin = tasks[thread.bin].bin;
  A value = 0, shift_y = 0, shift_x = 0;
  if (place.active && !bin.empty) {
    Products<A> sums;
    const int apart = thread.lanes * V, first = thread.lane * V;
    const long long step = V > 1 ? apart : bin.step(input_strides, p, apart), pitch = grad_output_strides.c;
    for (int i = bin.y.begin; i < bin.y.end; ++i) {
      for (int j = bin.x.begin; j < bin.x.end; ++j) {
        const Point<A> sample(bin.y, bin.x, i, j, p, input_strides);
        const T *plane = bin.plane(input, input_strides, p, first);
        const T *gradient = place.output(grad_output, grad_output_strides, p) + first * pitch;
        for (int c = first; c < p.class_channels;) {
          const bool full = c + (U - 1) * apart < p.class_channels;
          if (full) {
            sums.template add<U, V>(sample, plane, step, gradient, pitch, apart);
          } else {
            sums.template add<1, V>(sample, plane, step, gradient, pitch, apart);
          }
          const int count = full ? U : 1;
          plane += count * step;
          gradient += count * apart * pitch;
          c += count * apart;
        }
      }
    }
    value = sums.value.value() / bin.divisor();
    shift_y = sums.slope_y.value() * (bin.y.unit * bin.modulation / bin.divisor());
    shift_x = sums.slope_x.value() * (bin.x.unit * bin.modulation / bin.divisor());
  }
  partial[0][thread.number] = value;
  partial[1][thread.number] = shift_y;
  partial[2][thread.number] = shift_x;
  __syncthreads();
  if (!place.active || thread.lane != 0) return;
  const int next = channels_last ? 1 : thread.bins;
  for (int lane = 1; lane < thread.lanes; ++lane) {
    value += partial[0][thread.number + lane * next];
    shift_y += partial[1][thread.number + lane * next];
    shift_x += partial[2][thread.number + lane * next];
  }
  const long long owner = (long long)place.roi * p.classes + place.cls, bins = (long long)p.rows * p.columns;
  const long long at = place.row * p.columns + place.column;
  if (grad_mask) grad_mask[owner * bins + at] = value;
  if (grad_offset) {
    grad_offset[2 * owner * bins + at] = shift_x;
    grad_offset[(2 * owner + 1) * bins + at] = shift_y;
  }
}
