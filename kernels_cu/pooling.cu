// RoI pooling: the mean over each bin's samples, and the gradients of offset and mask. See pooling.cuh.
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
#include "pooling.cuh"

constexpr int THREADS = 256, BINS = 64;  // of a block, at the most

// Block: (bins, lanes) if planar, (lanes, bins) if interleaved. The lanes of a bin take turns at its channels.
struct Thread {
  int bin, bins, lane, lanes, number;

  __device__ __forceinline__ explicit Thread(bool channels_last)
      : bin(int(channels_last ? threadIdx.y : threadIdx.x)), bins(int(channels_last ? blockDim.y : blockDim.x)),
        lane(int(channels_last ? threadIdx.x : threadIdx.y)), lanes(int(channels_last ? blockDim.x : blockDim.y)),
        number(int(threadIdx.y * blockDim.x + threadIdx.x)) {}
};

// A bin's place in the work, for the channels of a class from `channel` on.
// Grid: x = (class, slab of channels, tile of bins), tiles fastest.
struct Place {
  int roi, cls, row, column, channel;
  bool active;

  Place() = default;

  // Of number `bin` of a block, whose threads sum up to `slab` channels each.
  __device__ __forceinline__ Place(const Pooling &p, int slab, const Thread &thread, int bin) {
    int block = int(blockIdx.x);
    bin += block % p.tiles * thread.bins;
    block /= p.tiles;
    channel = block % p.slabs * slab * thread.lanes;
    cls = block / p.slabs;
    active = bin < p.rois * p.rows * p.columns && channel < p.class_channels;
    column = bin % p.columns;
    bin /= p.columns;
    row = bin % p.rows;
    roi = bin / p.rows;
  }

  // The bin's first channel in the output.
  template <typename T> __device__ __forceinline__ T *output(T *base, const Strides &s, const Pooling &p) const {
    return base + roi * s.n + ((long long)cls * p.class_channels + channel) * s.c + row * s.y + column * s.x;
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
    task.place = Place(p, SLAB<A>, thread, thread.number);
    if (task.place.active) {
      const Place &place = task.place;
      task.bin = Bin<A, Kind>(p, place.roi, place.cls, place.row, place.column, rois, offset, mask);
    }
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
