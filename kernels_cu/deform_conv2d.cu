// Deformable convolution by columns: every tap of every output pixel is sampled into a matrix that the caller
// multiplies with the weights. T is the data's type, O the offset's, M the mask's.
//
// Columns of a chunk of images, with Cg = channels per group and P = images * out_pixels:
//   planar   (CHANNELS_LAST = false)  (channels, taps, P)      neighbouring threads on neighbouring pixels
//   interleaved (CHANNELS_LAST = true)  (groups, P, taps, Cg)  neighbouring threads on neighbouring channels
// Images are read through their strides, so either kind of columns can be made from either layout.
//
// Grid: x = (image, slab of channels, tap, tile of pixels), tiles fastest. A slab never crosses an offset group, so
// a thread computes its position, weights and addresses once for all channels of its slab. The columns' gradient is of
// the type of sums, so that what comes of it for an offset or mask in float32 is as good.
// Block: (pixels, 1) if planar, (channel lanes, pixels) if interleaved. At least two blocks a multiprocessor: with no
// number there, ptxas aims at full occupancy and spills.
#include "bilinear.cuh"
#include "sum.cuh"

constexpr int THREADS = 256;

struct Convolution {
  int height, width, out_height, out_width;
  int kernel_w, taps, stride_h, stride_w, top, left, dilation_h, dilation_w;
  int channels_per_group, channels_per_offset_group, slab, slabs_per_offset_group;
  int offset_groups, images, tiles;
};

// One thread's place in the work.
template <bool CHANNELS_LAST> struct Place {
  int image, offset_group, tap, pixel, out_y, out_x;
  int channel, channel_end, channel_step;
  bool active;  // false past the last pixel

  __device__ __forceinline__ explicit Place(const Convolution &p) {
    int block = int(blockIdx.x);
    const int tile = block % p.tiles;
    block /= p.tiles;
    tap = block % p.taps;
    block /= p.taps;
    const int slab = block % p.slabs_per_offset_group;
    block /= p.slabs_per_offset_group;
    offset_group = block % p.offset_groups;
    image = block / p.offset_groups;

    pixel = CHANNELS_LAST ? tile * int(blockDim.y) + int(threadIdx.y) : tile * int(blockDim.x) + int(threadIdx.x);
    active = pixel < p.out_height * p.out_width;
    out_y = pixel / p.out_width;
    out_x = pixel % p.out_width;
    const int first = offset_group * p.channels_per_offset_group, begin = slab * p.slab;
    channel = first + begin + (CHANNELS_LAST ? int(threadIdx.x) : 0);
    channel_end = first + min(begin + p.slab, p.channels_per_offset_group);
    channel_step = CHANNELS_LAST ? int(blockDim.x) : 1;
  }

  __device__ __forceinline__ long long column(const Convolution &p, int c) const {
    const long long pixels = (long long)p.images * p.out_height * p.out_width;
    const long long at = (long long)image * p.out_height * p.out_width + pixel;
    if (!CHANNELS_LAST) return ((long long)c * p.taps + tap) * pixels + at;
    const int group = c / p.channels_per_group;
    return ((group * pixels + at) * p.taps + tap) * p.channels_per_group + c % p.channels_per_group;
  }

  template <typename T> __device__ __forceinline__ T *at_output(T *base, const Strides &s, int c) const {
    return base + image * s.n + c * s.c + out_y * s.y + out_x * s.x;
  }

  template <typename A, typename O>
  __device__ __forceinline__ Cell<A> cell(const Convolution &p, const O *offset, const Strides &s, const Strides &plane,
                                          bool slopes = false) const {
    const int c = 2 * (offset_group * p.taps + tap);
    const A dy = A(*at_output(offset, s, c)), dx = A(*at_output(offset, s, c + 1));
    const A y = A(out_y * p.stride_h - p.top + tap / p.kernel_w * p.dilation_h) + dy;
    const A x = A(out_x * p.stride_w - p.left + tap % p.kernel_w * p.dilation_w) + dx;
    return Cell<A>(y, x, p.height, p.width, plane.y, plane.x, slopes);
  }

  template <typename A, typename M>
  __device__ __forceinline__ A modulation(const Convolution &p, const M *mask, const Strides &s) const {
    return mask ? A(*at_output(mask, s, offset_group * p.taps + tap)) : A(1);
  }
};

// Each thread owns its elements of `columns`.
template <typename T, typename O, typename M, bool CHANNELS_LAST>
__global__ void __launch_bounds__(THREADS, 2)
deform_conv2d_sample(const T *__restrict__ input, Strides input_strides, const O *__restrict__ offset,
                     Strides offset_strides, const M *__restrict__ mask, Strides mask_strides,
                     T *__restrict__ columns, Convolution p) {
  using A = arithmetic_t<T>;
  const Place<CHANNELS_LAST> place(p);
  if (!place.active) return;
  const Cell<A> cell = place.template cell<A>(p, offset, offset_strides, input_strides);
  const A modulation = cell.adds ? place.template modulation<A>(p, mask, mask_strides) : A(0);
  const T *image = input + place.image * input_strides.n;
  for (int c = place.channel; c < place.channel_end; c += place.channel_step) {
    A corners[4];
    cell.load(image + c * input_strides.c, corners);
    columns[place.column(p, c)] = T(cell.value(corners) * modulation);
  }
}

// Scatters the columns' gradient. `grad_input` holds sums in A and starts as zeros.
template <typename T, typename O, typename M, bool CHANNELS_LAST>
__global__ void __launch_bounds__(THREADS, 2)
deform_conv2d_backward_input(const arithmetic_t<T> *__restrict__ grad_columns, const O *__restrict__ offset,
                             Strides offset_strides, const M *__restrict__ mask, Strides mask_strides,
                             arithmetic_t<T> *__restrict__ grad_input, Strides grad_input_strides, Convolution p) {
  using A = arithmetic_t<T>;
  const Place<CHANNELS_LAST> place(p);
  if (!place.active) return;
  const Cell<A> cell = place.template cell<A>(p, offset, offset_strides, grad_input_strides);
  if (!cell.adds) return;
  const A modulation = place.template modulation<A>(p, mask, mask_strides);
  A *image = grad_input + place.image * grad_input_strides.n;
  for (int c = place.channel; c < place.channel_end; c += place.channel_step) {
    const A gradient = grad_columns[place.column(p, c)] * modulation;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      // atomic: samples of other taps and pixels, in other blocks too, fall on the same pixel
      if (cell.valid[corner]) atomicAdd(image + c * grad_input_strides.c + cell.at[corner], cell.weight(corner) * gradient);
    }
  }
}

// The gradients of offset and mask: one sum over an offset group's channels for each sample, so its slab is the whole
// group. Planar: a thread owns a sample. Interleaved: the blockDim.x lanes (a power of two up to 32) share one, and
// all lanes of a warp stay for the shuffles. A null `grad_offset` or `grad_mask` is not wanted.
template <typename T, typename O, typename M, bool CHANNELS_LAST>
__global__ void __launch_bounds__(THREADS, 2)
deform_conv2d_backward_offset(const arithmetic_t<T> *__restrict__ grad_columns, const T *__restrict__ input,
                              Strides input_strides, const O *__restrict__ offset, Strides offset_strides,
                              const M *__restrict__ mask, Strides mask_strides, O *__restrict__ grad_offset,
                              Strides grad_offset_strides, M *__restrict__ grad_mask, Strides grad_mask_strides,
                              Convolution p) {
  using A = arithmetic_t<T>;
  const Place<CHANNELS_LAST> place(p);
  Sum<A> sum_y, sum_x, sum_modulation;
  A modulation = 0;
  if (place.active) {
    const Cell<A> cell = place.template cell<A>(p, offset, offset_strides, input_strides, true);
    const T *image = input + place.image * input_strides.n;
    if (cell.inside) modulation = place.template modulation<A>(p, mask, mask_strides);
    int run = 0;
    for (int c = place.channel; cell.inside && c < place.channel_end; c += place.channel_step) {
      A corners[4];
      cell.load(image + c * input_strides.c, corners);
      const A gradient = grad_columns[place.column(p, c)];
      sum_y.run += gradient * cell.slope_y(corners);
      sum_x.run += gradient * cell.slope_x(corners);
      if (cell.adds) sum_modulation.run += gradient * cell.value(corners);
      if (++run == RUN) {
        run = 0;
        sum_y.end_run();
        sum_x.end_run();
        sum_modulation.end_run();
      }
    }
  }
  A grad_y = sum_y.value(), grad_x = sum_x.value(), grad_modulation = sum_modulation.value();
  if (CHANNELS_LAST) {
    for (int distance = int(blockDim.x) / 2; distance > 0; distance /= 2) {
      grad_y += __shfl_xor_sync(0xffffffffu, grad_y, distance);
      grad_x += __shfl_xor_sync(0xffffffffu, grad_x, distance);
      grad_modulation += __shfl_xor_sync(0xffffffffu, grad_modulation, distance);
    }
  }
  if (!place.active || (CHANNELS_LAST && threadIdx.x != 0)) return;
  const int sample = place.offset_group * p.taps + place.tap;
  if (grad_offset) {
    *place.at_output(grad_offset, grad_offset_strides, 2 * sample) = O(grad_y * modulation);
    *place.at_output(grad_offset, grad_offset_strides, 2 * sample + 1) = O(grad_x * modulation);
  }
  if (grad_mask) *place.at_output(grad_mask, grad_mask_strides, sample) = M(grad_modulation);
}

struct Pixels {
  int images, channels, height, width;
  int summands;  // of each thread
};

// The bias's gradient: the sums of each channel over the pixels of all images, in two launches. The first has a block
// for every tile of pixels, summands * blockDim.y of them, and blockDim.x channels, and leaves its sums in row `tile` of
// `sums` (tiles, channels); the second, with one tile, sums those. A thread sums few enough numbers in T's own type of
// sums to lose nothing, the rest is done in double: float32 sums of millions of pixels would stand still.
// Grid: x = (tile of pixels, tile of channels), channels fastest. Block: (channels, pixels).
template <typename T, typename S>
__global__ void __launch_bounds__(THREADS)
deform_conv2d_backward_bias(const T *__restrict__ grad_output, Strides strides, S *__restrict__ sums, Pixels p) {
  SMEM(double, partial, [THREADS]);
  const int channel_tiles = (p.channels + int(blockDim.x) - 1) / int(blockDim.x);
  const int tile = int(blockIdx.x) / channel_tiles;
  const int channel = int(blockIdx.x) % channel_tiles * int(blockDim.x) + int(threadIdx.x);
  const int pixels = p.height * p.width, thread = int(threadIdx.y * blockDim.x + threadIdx.x);
  arithmetic_t<T> sum = 0;
  if (channel < p.channels) {
    const long long first = (long long)tile * p.summands * int(blockDim.y) + int(threadIdx.y);
    long long image = first / pixels;
    int pixel = int(first % pixels);
    for (int i = 0; i < p.summands && image < p.images; ++i) {
      const int y = pixel / p.width, x = pixel % p.width;
      sum += arithmetic_t<T>(grad_output[image * strides.n + channel * strides.c + y * strides.y + x * strides.x]);
      pixel += int(blockDim.y);
      image += pixel / pixels;
      pixel %= pixels;
    }
  }
  partial[thread] = sum;
  for (int rows = int(blockDim.y) / 2; rows > 0; rows /= 2) {
    __syncthreads();
    if (int(threadIdx.y) < rows) partial[thread] += partial[thread + rows * int(blockDim.x)];
  }
  if (threadIdx.y == 0 && channel < p.channels) sums[(long long)tile * p.channels + channel] = S(partial[thread]);
}
