// RoI pooling: the mean over each bin's samples, and the gradients of offset and mask. See pooling.cuh.
//
// A thread computes its bin and each sample's cell once, for a slab of up to SLAB channels whose sums are in registers.
// Planar: neighbouring threads on neighbouring bins, so what one pixel row of a roi touches is shared in L1, and `out`
// is written in order. Interleaved, where the input's channels are: lanes on neighbouring channels. Tiles of bins come
// before slabs of channels in the grid: the blocks that run together read few planes, which stay in L2.
//
// 1,000 rois x 7x7 x 256 channels on 2x256x200x304, float32, 2x2 samples: each byte once is 125 MB in and 50 MB out,
// 58 us at 3 TB/s; the gather is 200 M loads (16 an output), at some five instructions each 35 us. Between them stands
// L1: interleaved, a warp's load is one line of 128 bytes, 6.3 M of them, 28 us; planar, 32 bins of some five pixel
// rows are 5 to 10 lines, and the lines bound it.
#include "pooling.cuh"

constexpr int SLAB_BYTES = 32;
template <typename A> constexpr int SLAB = SLAB_BYTES / sizeof(A);

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

// Each thread owns its elements of `out`.
template <typename T, typename Kind>
__global__ void __launch_bounds__(256, 2)
pool(const T *__restrict__ input, Strides input_strides, const arithmetic_t<T> *__restrict__ rois,
     const arithmetic_t<T> *__restrict__ offset, const arithmetic_t<T> *__restrict__ mask, T *__restrict__ out,
     Strides out_strides, Pooling p) {
  using A = arithmetic_t<T>;
  const Place place(p, SLAB<A>);
  if (!place.active) return;
  const Bin<A, Kind> bin(p, place.roi, place.cls, place.row, place.column, rois, offset, mask);
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
    const Bin<A, Kind> bin(p, place.roi, place.cls, place.row, place.column, rois, offset, mask);
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
