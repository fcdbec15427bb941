// Deformable convolution, the gradients of all but the input. Layouts: see deform_conv2d.cuh.
//
// Each makes its tile's samples again, as all of them would be taps times as large as the input. Sums of many pixels
// are made in runs and in a fixed order.
//
// The two numbers, as for the forward. Compulsory bytes: grad_output, input, offset, mask and weight, and their
// gradients, 15 MB. Instructions by SASS for sm_90: offset and mask 3,900 in each of 8 warps for 128 pixels and a
// tap, 60 us; weight 250, and 350 in 4 warps for every 4th step, for 32 pixels by 128 outs by 64 channels, 36 us. An
// estimate: no GPU has run this.
#include "deform_conv2d.cuh"

// ---- offset and mask

template <typename T>
__device__ __forceinline__ void put(void *to, long long at, arithmetic_t<T> value, bool is_float) {
  if (sizeof(T) == 2 && is_float) static_cast<float *>(to)[at] = float(value);
  else static_cast<T *>(to)[at] = T(value);
}

// The samples' gradient is grad_output times the weights, a tile of it in shared memory. From there come its products
// with the corners, all that the gradients need. A null grad_offset or grad_mask is not wanted.
//
//   grad_output  (images, H_out, W_out, bundles, out_depth)
//   turned       (parts, part, taps, out_depth), or GROUPED: weight as forward has it
//
// Grid: x = (tile of pixels, offset group, tap). A block goes through the offset group's channels, CHANNELS at a
// time, LANES threads a row, and of its outs OUTS_AT_ONCE; then thread r finishes row r.
constexpr int OUTS_AT_ONCE = 1 << 14;  // that one float32 sum of products of half types has

template <typename T, bool GROUPED>
__global__ void __launch_bounds__(THREADS, 2)
deform_conv2d_backward_offset(const T *__restrict__ grad_output, const T *__restrict__ input,
                              const void *__restrict__ offset, Strides offset_strides, const void *__restrict__ mask,
                              Strides mask_strides, const T *__restrict__ turned, void *__restrict__ grad_offset,
                              Strides grad_offset_strides, void *__restrict__ grad_mask, Strides grad_mask_strides,
                              Convolution p) {
  using A = arithmetic_t<T>;
  constexpr int CHANNELS = GROUPED ? DEPTH<T> : sizeof(T) == 8 ? 16 : 64, PITCH = CHANNELS + 16 / int(sizeof(A));
  constexpr int LANES = CHANNELS / WIDE<T>, PASS = THREADS / LANES, PASSES = ROWS / PASS;
  constexpr int TILES = 2 * (ROWS + CHANNELS) * 80, SUMS = ROWS * PITCH * int(sizeof(A));
  SMEM(unsigned char, shared, [TILES > SUMS ? TILES : SUMS]);  // first the factors, then their product
  SMEM(Position<A>, positions, [ROWS]);
  SMEM(A, totals, [ROWS][5][2]);  // each a sum and its rounding errors
  const auto grads = [&](int index) { return reinterpret_cast<T *>(shared) + index % 2 * (ROWS * LINE<T>); };
  const auto weights = [&](int index) { return grads(0) + 2 * (ROWS * LINE<T>) + index % 2 * (CHANNELS * LINE<T>); };
  A *columns = reinterpret_cast<A *>(shared);

  const int thread = int(threadIdx.x), line = thread / 4, element = thread % 4 * WIDE<T>;
  const int offset_groups = p.bundles * p.bundle_parts / p.offset_group_parts;
  const int tap = int(blockIdx.x) % p.taps, offset_group = int(blockIdx.x) / p.taps % offset_groups;
  const int first = int(blockIdx.x) / p.taps / offset_groups * ROWS;
  const Places places = {offset, mask, offset_strides, mask_strides};
  if (thread < ROWS) {
    const Pixel pixel(p, first + thread);
    positions[thread] = position<T>(p, places, pixel, offset_group * p.offset_group_parts, tap, true);
#pragma unroll
    for (int k = 0; k < 5; ++k) totals[thread][k][0] = totals[thread][k][1] = 0;
  }

  // totals, of the samples' gradient g and the corners v: g v0, and g times their differences along x, above and
  // below, and along y, left and right
  const int lane = thread % LANES;
#pragma unroll 1
  for (int in_group = 0; in_group < p.offset_group_parts; ++in_group) {
    const int part = offset_group * p.offset_group_parts + in_group, bundle = part / p.bundle_parts;
#pragma unroll 1
    for (int begin = 0, first_out = 0; begin < p.part;) {
      const int number = anew(int(blockIdx.x)) / p.taps / offset_groups * ROWS + line;
      const int pixels_left = p.images * p.out_height * p.out_width - number;
      const int outs = p.out_depth - first_out;
      const T *grad = grad_output + (((long long)number * p.bundles + bundle) * p.out_depth + first_out + element);
      const T *weight_row =
          turned + ((((long long)part * p.part + begin + line) * p.taps + tap) * p.out_depth + first_out + element);
      const bool weight_valid = line < CHANNELS && begin + line < p.part;
      const auto fetch = [&](const Step &step) {
        const int o = step.block * DEPTH<T>;
        const bool inside = o + element < outs;
#pragma unroll
        for (int j = 0; j < ROWS; j += THREADS / 4) {
          const bool valid = j < pixels_left && inside;
          const T *from = grad + ((long long)(j * p.bundles) * p.out_depth + o);
          cp_async<16>(grads(step.index) + (line + j) * LINE<T> + element, valid ? from : grad_output, valid);
        }
        if (!GROUPED && line < CHANNELS) {
          const bool valid = weight_valid && inside;
          cp_async<16>(weights(step.index) + line * LINE<T> + element, valid ? weight_row + o : turned, valid);
        }
      };
      const auto nothing = [](const Step &, int) { return 0; };
      const auto multiplied = [&](int steps, auto multiply) {
        pipeline<false>(steps, steps, [](int) {}, fetch, nothing, [](const Step &, int, int) {}, multiply);
      };
      const auto keep = [&](const auto &product) {
        __syncthreads();  // the factors are done with
        product.each([&](int row) {
          A *to = columns + row * PITCH;
          return [=](int column, A sum) { to[column] = sum; };
        });
        __syncthreads();
      };
      if constexpr (GROUPED) {
        Grouped<T> product;
        const int column = thread % DEPTH<T>, group = column / p.group_channels;
        multiplied(1, [&](int, int half) {
          if (column >= p.part) return;
          const int o = bundle * p.bundle_outs + group * p.group_outs, step = p.taps * p.group_channels;
          const T *from = turned + ((long long)o * p.taps + tap) * p.group_channels + column % p.group_channels;
          product.multiply(grads(0), group * p.group_outs, from, step, p.group_outs, half);
        });
        keep(product);
      } else {
        Product<T, ROWS, CHANNELS> product;
        const int steps = (min(outs, OUTS_AT_ONCE) + DEPTH<T> - 1) / DEPTH<T>, run = run_of(steps);
        multiplied(steps, [&](int index, int half) {
          product.multiply(grads(index), weights(index), half);
          if (half == PARTS - 1 && ((index + 1) & (run - 1)) == 0) product.settle();
        });
        keep(product);
      }

      const int channel = begin + lane * WIDE<T>;
#pragma unroll 1
      for (int pass = 0; pass < PASSES; ++pass) {
        const int row = pass * PASS + thread / LANES;
        Position<A> position = positions[row];
        position.at += (long long)in_group * p.depth;
        const Sample<T> sample = Sample<T>::load(p, input, position, channel);
        A products[5] = {};
#pragma unroll
        for (int e = 0; e < WIDE<T>; ++e) {
          const A g = channel + e < p.part ? columns[row * PITCH + lane * WIDE<T> + e] : A(0);
          const A v0 = A(sample.corners[0][e]), v1 = A(sample.corners[1][e]);
          const A v2 = A(sample.corners[2][e]), v3 = A(sample.corners[3][e]);
          products[0] += g * v0;
          products[1] += g * (v1 - v0);
          products[2] += g * (v3 - v2);
          products[3] += g * (v2 - v0);
          products[4] += g * (v3 - v1);
        }
#pragma unroll
        for (int k = 0; k < 5; ++k) {
#pragma unroll
          for (int distance = LANES / 2; distance > 0; distance /= 2) {
            products[k] += __shfl_xor_sync(0xffffffffu, products[k], distance);
          }
          if (lane == 0) {
            Sum<A> sum = {products[k], totals[row][k][0], totals[row][k][1]};
            sum.end_run();
            totals[row][k][0] = sum.high;
            totals[row][k][1] = sum.low;
          }
        }
      }
      __syncthreads();  // the product is done with
      first_out += OUTS_AT_ONCE;
      if (first_out >= p.out_depth) {
        first_out = 0;
        begin += CHANNELS;
      }
    }
  }

  const int tile = anew(int(blockIdx.x)) / p.taps / offset_groups;
  const Pixel pixel(p, tile * ROWS + thread);
  if (thread >= ROWS || !pixel.active) return;
  const Cell<A> cell = places.cell<T>(p, pixel, offset_group, tap, p.width, true);
  const A modulation = cell.inside ? places.modulation<T>(p, pixel, offset_group, tap) : A(0);
  const auto total = [&](int k) { return Sum<A>{A(0), totals[thread][k][0], totals[thread][k][1]}.value(); };
  const A slope_y = cell.inside ? (A(1) - cell.right) * total(3) + cell.right * total(4) : A(0);
  const A slope_x = cell.inside ? (A(1) - cell.down) * total(1) + cell.down * total(2) : A(0);
  const int sample = offset_group * p.taps + tap;
  if (grad_offset != nullptr) {
    const long long at = pixel.at(grad_offset_strides, 2 * sample);
    put<T>(grad_offset, at, slope_y * modulation, p.offset_is_float);
    put<T>(grad_offset, at + grad_offset_strides.c, slope_x * modulation, p.offset_is_float);
  }
  if (grad_mask != nullptr) {
    const A value = cell.adds ? total(0) + cell.right * total(1) + cell.down * slope_y : A(0);
    put<T>(grad_mask, pixel.at(grad_mask_strides, sample), value, p.mask_is_float);
  }
}

// ---- weight

// The pixels of one launch, a run of them for each split.
struct Splits {
  int first, end, run;
};

// For one part and tap: grad_output, transposed, times the samples, with the pixel as k; a tile of 128 outs by 64
// channels, summed over the pixels of one split. partial (splits, bundles, bundle_parts, taps, bundle_outs, columns)
// takes the sums, of which `columns` is part, or GROUPED: Cg. Then a step is 64 pixels, and a thread has one element
// of them over every few pixels.
// Grid: x = (split, bundle, part of it, tap, tile of outs, tile of channels).
constexpr int WEIGHT_OUTS = 128, WEIGHT_CHANNELS = 64;

template <typename T, bool GROUPED>
__global__ void __launch_bounds__(THREADS, 2)
deform_conv2d_backward_weight(const T *__restrict__ grad_output, const T *__restrict__ input,
                              const void *__restrict__ offset, Strides offset_strides, const void *__restrict__ mask,
                              Strides mask_strides, arithmetic_t<T> *__restrict__ partial, Convolution p, Splits s) {
  using A = arithmetic_t<T>;
  constexpr int OUTS = GROUPED ? DEPTH<T> : WEIGHT_OUTS, CHANNELS = GROUPED ? DEPTH<T> : WEIGHT_CHANNELS;
  constexpr int K = GROUPED ? ROWS / 2 : DEPTH<T>;  // pixels of a step
  constexpr int OUT_LINE = OUTS + WIDE<T>, CHANNEL_LINE = CHANNELS + WIDE<T>;
  constexpr int OUT_LANES = OUTS / WIDE<T>, LANES = CHANNELS / WIDE<T>, AT_ONCE = THREADS / LANES;
  constexpr int LOADING = K / AT_ONCE;  // parts in which samples are loaded
  SMEM(T, grads, [2][K * OUT_LINE]);
  SMEM(T, samples, [2][K * CHANNEL_LINE]);
  SMEM(Position<A>, positions, [2][ROWS]);
  const int thread = int(threadIdx.x);
  const int channel_tiles = (p.part + CHANNELS - 1) / CHANNELS, out_tiles = (p.bundle_outs + OUTS - 1) / OUTS;
  int block = int(blockIdx.x);
  const int begin = block % channel_tiles * CHANNELS;
  block /= channel_tiles;
  const int first_out = block % out_tiles * OUTS;
  block /= out_tiles;
  const int unit = block % (p.bundles * p.bundle_parts * p.taps), split = block / (p.bundles * p.bundle_parts * p.taps);
  const int tap = unit % p.taps, part = unit / p.taps, bundle = part / p.bundle_parts;
  const int first = s.first + split * s.run, end = min(first + s.run, s.end);
  const long long out_row = (long long)p.bundles * p.out_depth;
  const Places places = {offset, mask, offset_strides, mask_strides};

  const auto locate = [&](int set) {
    if (thread >= ROWS) return;
    const int number = anew(first) + set * ROWS + thread;
    const Pixel pixel(p, number < end ? number : p.images * p.out_height * p.out_width);
    positions[set % 2][thread] = position<T>(p, places, pixel, part, tap);
  };
  const auto fetch = [&](const Step &step) {
    const int o = first_out + thread % OUT_LANES * WIDE<T>;
#pragma unroll
    for (int j = 0; j < K; j += THREADS / OUT_LANES) {
      const int row = j + thread / OUT_LANES, number = first + step.index * K + row;
      const bool valid = number < end && o < p.out_depth;
      const long long at = number * out_row + bundle * p.out_depth + o;
      T *to = &grads[step.index % 2][row * OUT_LINE + thread % OUT_LANES * WIDE<T>];
      cp_async<16>(to, grad_output + (valid ? at : 0), valid);
    }
  };
  const int element = thread % LANES * WIDE<T>;
  const auto row_of = [&](int half) { return half * AT_ONCE + thread / LANES; };
  const auto at = [&](const Step &step, int half) -> const Position<A> & {
    return positions[step.set % 2][step.block * K + row_of(half)];
  };
  const auto load = [&](const Step &step, int half) {
    if (half < LOADING) return Sample<T>::load(p, input, at(step, half), begin + element);
    return Sample<T>();
  };
  const auto store = [&](const Step &step, int half, const Sample<T> &sample) {
    if (half >= LOADING) return;
    T *to = &samples[step.index % 2][row_of(half) * CHANNEL_LINE + element];
    *reinterpret_cast<Wide<T> *>(to) = sample.sum(p, at(step, half), begin + element);
  };
  const int steps = (end - first + K - 1) / K, blocks = ROWS / K;
  A *to = partial + ((long long)split * (p.bundles * p.bundle_parts * p.taps) + unit) * p.bundle_outs *
                        (GROUPED ? p.group_channels : p.part);

  if constexpr (GROUPED) {
    const int elements = p.bundle_outs * p.group_channels, shares = THREADS / elements;
    const int mine = thread % elements, share = thread / elements;
    const int o = mine / p.group_channels, c = o / p.group_outs * p.group_channels + mine % p.group_channels;
    Sum<A> sum;
    pipeline<true>(steps, blocks, locate, fetch, load, store, [&](int index, int half) {
      if (half != 0 || share >= shares) return;
      int run = 0;
      for (int row = share; row < K; row += shares) {
        sum.run += A(grads[index % 2][row * OUT_LINE + o]) * A(samples[index % 2][row * CHANNEL_LINE + c]);
        if (++run % RUN == 0) sum.end_run();
      }
      sum.end_run();
    });
    SMEM(A, sums, [THREADS]);
    sums[thread] = sum.value();
    __syncthreads();
    if (share != 0) return;
    A total = 0;
    for (int i = 0; i < shares; ++i) total += sums[i * elements + mine];
    to[mine] = total;
  } else {
    Product<T, OUTS, CHANNELS, true> product;
    const int run = run_of(steps);
    pipeline<EARLY<T>>(steps, blocks, locate, fetch, load, store, [&](int index, int half) {
      product.multiply(grads[index % 2], samples[index % 2], half);
      if (half == PARTS - 1 && ((index + 1) & (run - 1)) == 0) product.settle();
    });
    product.each([&](int row) {
      const bool valid = first_out + row < p.bundle_outs;
      A *line = to + (long long)(first_out + row) * p.part + begin;
      const int left = valid ? p.part - begin : 0;
      return [=](int column, A sum) {
        if (column < left) line[column] = sum;
      };
    });
  }
}

// grad_weight (C_out, Cg, kh, kw) from the splits of one launch after another, in their order, in double; `totals`
// has what the earlier ones left. Grid: x = THREADS elements a block.
struct Weights {
  int outs, channels, kernel_w, taps, bundle_outs, columns, splits, is_first, is_last;
};

template <typename T>
__global__ void __launch_bounds__(THREADS)
deform_conv2d_add_splits(const arithmetic_t<T> *__restrict__ partial, double *__restrict__ totals,
                         T *__restrict__ grad_weight, Strides strides, Weights p) {
  const long long element = (long long)blockIdx.x * THREADS + threadIdx.x;
  const long long count = (long long)p.outs * p.channels * p.taps;
  if (element >= count) return;
  const int tap = int(element % p.taps), c = int(element / p.taps % p.channels), o = int(element / p.taps / p.channels);
  const int bundle = o / p.bundle_outs, parts = p.channels / p.columns;
  const long long unit = ((long long)bundle * parts + c / p.columns) * p.taps + tap;
  const long long at = (unit * p.bundle_outs + o % p.bundle_outs) * p.columns + c % p.columns;
  double sum = p.is_first ? 0.0 : totals[element];
  for (int split = 0; split < p.splits; ++split) sum += double(partial[split * count + at]);
  if (p.is_last) {
    const long long to = o * strides.n + c * strides.c + tap / p.kernel_w * strides.y + tap % p.kernel_w * strides.x;
    grad_weight[to] = T(arithmetic_t<T>(sum));
  } else {
    totals[element] = sum;
  }
}

// ---- bias

struct Pixels {
  Divisor plane_of, width_of;  // by an image's pixels, and a row's
  int images, channels, height, width;
  int summands;  // of each thread
};

// The bias's gradient: the sums of each channel over the pixels of all images, in two launches. The first has a block
// for every tile of pixels, summands * blockDim.y of them, and blockDim.x channels, and leaves its sums in row `tile`
// of `sums` (tiles, channels); the second, with one tile, sums those. A thread sums few enough numbers in T's own
// type of sums to lose nothing, the rest is done in double: float32 sums of millions of pixels would stand still.
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
      const int y = int(p.width_of(pixel)), x = pixel - y * p.width;
      sum += arithmetic_t<T>(grad_output[image * strides.n + channel * strides.c + y * strides.y + x * strides.x]);
      pixel += int(blockDim.y);
      const int images = int(p.plane_of(pixel));
      image += images;
      pixel -= images * pixels;
    }
  }
  partial[thread] = sum;
  for (int rows = int(blockDim.y) / 2; rows > 0; rows /= 2) {
    __syncthreads();
    if (int(threadIdx.y) < rows) partial[thread] += partial[thread + rows * int(blockDim.x)];
  }
  if (threadIdx.y == 0 && channel < p.channels) sums[(long long)tile * p.channels + channel] = S(partial[thread]);
}
