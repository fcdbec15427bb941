// What the kernels of the deformable convolution share: matrix products whose one factor is made on the way, in tiles
// in shared memory, and never reaches the device's memory. T is the data's type.
//
// Layouts, which the caller packs where a tensor does not have them:
//   input         (images, H, W, parts, depth)       channels last. A part is `part` channels of one group and of one
//                                                    offset group; `depth` is that with zeros up to whole 16 bytes
//   grad_output   (images, H_out, W_out, bundles, out_depth)
//   weight        (C_out, bundle_parts, taps, depth)
//   turned        (parts, part, taps, out_depth)     the weights the other way round, for the backward
// All others are read and written through their strides.
//
// A bundle is what shares a tile: the channels, in bundle_parts parts, and the outs of one group. Where groups are
// small (GROUPED, at most 8 channels or outs, depthwise for one), a bundle is several of them, in one part, so many
// that their channels, and their outs, fill at most one step of k; then weight and turned are (C_out, taps, Cg),
// without zeros.
#pragma once
#include "divisor.cuh"
#include "sum.cuh"
#include "tile.cuh"

constexpr int ROWS = 128;

struct Convolution {
  int images, height, width, out_height, out_width;
  int kernel_w, taps, stride_h, stride_w, top, left, dilation_h, dilation_w;
  int bundles, bundle_parts, bundle_outs, part, depth, out_depth, offset_group_parts;
  long long row, line;  // the input's elements from pixel to pixel, bundles * bundle_parts * depth, and from row to row
  int group_channels, group_outs;
  int offset_is_float, mask_is_float;  // though T is a half type
};

// An output pixel, by its number in all images.
struct Pixel {
  int image, y, x;
  bool active;

  __device__ __forceinline__ Pixel(const Convolution &p, int number) {
    const int plane = p.out_height * p.out_width;
    active = number < p.images * plane;
    const int inside = active ? number % plane : 0;
    image = active ? number / plane : 0;
    y = inside / p.out_width;
    x = inside % p.out_width;
  }

  __device__ __forceinline__ long long at(const Strides &s, int c) const {
    return image * s.n + c * s.c + y * s.y + x * s.x;
  }
};

// ---- samples

template <typename T> __device__ __forceinline__ arithmetic_t<T> number(const void *from, long long at, bool is_float) {
  if (sizeof(T) == 2 && is_float) return static_cast<const float *>(from)[at];
  return arithmetic_t<T>(static_cast<const T *>(from)[at]);
}

// Where all samples are: the offset and mask of one call.
struct Places {
  const void *offset, *mask;
  Strides offset_strides, mask_strides;

  // `pitch`: of the rows in which the cell's corners count.
  template <typename T>
  __device__ __forceinline__ Cell<arithmetic_t<T>> cell(const Convolution &p, const Pixel &pixel, int offset_group,
                                                        int tap, int pitch, bool slopes = false) const {
    using A = arithmetic_t<T>;
    const long long at = pixel.at(offset_strides, 2 * (offset_group * p.taps + tap));
    const A dy = number<T>(offset, at, p.offset_is_float);
    const A dx = number<T>(offset, at + offset_strides.c, p.offset_is_float);
    const A y = A(pixel.y * p.stride_h - p.top + tap / p.kernel_w * p.dilation_h) + dy;
    const A x = A(pixel.x * p.stride_w - p.left + tap % p.kernel_w * p.dilation_w) + dx;
    return Cell<A>(y, x, pixel.active ? p.height : 0, p.width, pitch, 1, slopes);
  }

  template <typename T>
  __device__ __forceinline__ arithmetic_t<T> modulation(const Convolution &p, const Pixel &pixel, int offset_group,
                                                        int tap) const {
    if (mask == nullptr) return 1;
    return number<T>(mask, pixel.at(mask_strides, offset_group * p.taps + tap), p.mask_is_float);
  }
};

// One sample of a part's channels.
template <typename A> struct alignas(16) Position {
  long long at;  // of the top left corner's first channel, from the input's first element
  int corners;   // a bit for each that is read
  A weights[4];  // times the mask
};

// With `slopes`, a sample at exactly -1 has corners too.
template <typename T>
__device__ __forceinline__ Position<arithmetic_t<T>> position(const Convolution &p, const Places &places,
                                                              const Pixel &pixel, int part, int tap,
                                                              bool slopes = false) {
  using A = arithmetic_t<T>;
  const int offset_group = part / p.offset_group_parts;
  const Cell<A> cell = places.cell<T>(p, pixel, offset_group, tap, p.width, slopes);
  const A modulation = cell.adds ? places.modulation<T>(p, pixel, offset_group, tap) : A(0);
  Position<A> found = {};
  found.at = ((long long)pixel.image * p.height * p.width + cell.first) * p.row + part * p.depth;
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    found.corners |= int(cell.valid[corner]) << corner;
    found.weights[corner] = cell.weight(corner) * modulation;
  }
  return found;
}

// 16 bytes of a sample: its corners on their way, and then their sum.
template <typename T> struct Sample {
  Wide<T> corners[4];

  static __device__ __forceinline__ Sample load(const Convolution &p, const T *input,
                                                const Position<arithmetic_t<T>> &position, int channel) {
    const T *from = input + position.at + channel;
    const int corners = channel < p.part ? position.corners : 0;
    Sample sample;
    sample.corners[0] = load_wide(from, corners & 1);
    sample.corners[1] = load_wide(from + p.row, corners & 2);
    sample.corners[2] = load_wide(from + p.line, corners & 4);
    sample.corners[3] = load_wide(from + p.line + p.row, corners & 8);
    return sample;
  }

  __device__ __forceinline__ Wide<T> sum(const Convolution &p, const Position<arithmetic_t<T>> &position,
                                         int channel) const {
    arithmetic_t<T> sums[WIDE<T>];
#pragma unroll
    for (int e = 0; e < WIDE<T>; ++e) {
      sums[e] = position.weights[0] * arithmetic_t<T>(corners[0][e]);
#pragma unroll
      for (int k = 1; k < 4; ++k) sums[e] += position.weights[k] * arithmetic_t<T>(corners[k][e]);
    }
    if (channel + WIDE<T> > p.part) {  // past the part: 0, though the mask be infinite
#pragma unroll
      for (int e = 0; e < WIDE<T>; ++e) sums[e] = channel + e < p.part ? sums[e] : arithmetic_t<T>(0);
    }
    return narrowed<T, WIDE<T>>(sums);
  }
};

// ---- rows times weights

// Products of small groups: a thread has one out in every STEP-th row.
template <typename T> struct Grouped {
  using A = arithmetic_t<T>;
  static constexpr int STEP = THREADS / DEPTH<T>, N = ROWS / STEP;
  A sums[PARTS][N / PARTS] = {}, totals[PARTS][N / PARTS] = {};

  // The thread's `count` weights, `step` apart, times the elements of its group, of which `first` is the first in a
  // line.
  __device__ __forceinline__ void multiply(const T *a, int first, const T *weight, int step, int count, int part) {
    const T *from = a + (int(threadIdx.x) / DEPTH<T> + part * (ROWS / PARTS)) * LINE<T> + first;
    for (int k = 0; k < count; ++k) {
      const A w = A(weight[k * step]);
#pragma unroll
      for (int i = 0; i < N / PARTS; ++i) sums[part][i] += A(from[i * STEP * LINE<T> + k]) * w;
    }
  }

  __device__ __forceinline__ void settle() {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      totals[i / (N / PARTS)][i % (N / PARTS)] += sums[i / (N / PARTS)][i % (N / PARTS)];
      sums[i / (N / PARTS)][i % (N / PARTS)] = 0;
    }
  }

  template <typename Row> __device__ __forceinline__ void each(Row row) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int part = i / (N / PARTS), in_part = i % (N / PARTS);
      const auto put = row(int(threadIdx.x) / DEPTH<T> + i * STEP);
      put(int(threadIdx.x) % DEPTH<T>, totals[part][in_part] + sums[part][in_part]);
    }
  }
};

// A thread's weights of one out of a small group, for one set after another: see Grouped.
template <typename T> struct GroupWeights {
  const T *from;
  int set_step, step, count, first;
};

// A block's place in the grid of products, tiles of outs fastest, as their rows are alike. Made anew where it is
// needed.
struct Tile {
  int first_out, bundle, first;  // first: row

  __device__ __forceinline__ Tile(int outs, int bundles, int size) {
    const int block = anew(int(blockIdx.x)), tiles = size ? (outs + size - 1) / size : 1;
    first_out = block % tiles * size;
    bundle = block / tiles % bundles;
    first = block / tiles / bundles * ROWS;
  }
};

// ROWS rows of what `operand` makes times up to OUTS rows of `weight` (.., sets, depth), from the tile's first of
// `outs` on; OUTS = 0: small groups. finish(product) writes the sums. The operand has
//   locate(set)                    what the rows of a set are made of; for all threads
//   load(set, row, element)        starts to load 16 bytes of one, and
//   sum(set, row, element, loaded) makes them
template <typename T, int OUTS, bool LOADS_EARLY, typename Operand, typename Finish>
__device__ __forceinline__ void multiply_rows(const Operand &operand, const T *weight, int outs, int sets, int depth,
                                              const GroupWeights<T> &group, Finish finish) {
  SMEM(T, rows, [2][ROWS * LINE<T>]);
  SMEM(T, weights, [2][OUTS ? OUTS * LINE<T> : 1]);
  const int line = int(threadIdx.x) / 4, element = int(threadIdx.x) % 4 * WIDE<T>;  // the thread's 16 bytes of a tile
  const int blocks = (depth + DEPTH<T> - 1) / DEPTH<T>, outs_left = outs - line;
  const T *weight_row = weight + (long long)line * sets * depth;

  const auto locate = [&](int set) { operand.locate(set); };
  const auto fetch = [&](const Step &step) {
    const int column = step.block * DEPTH<T> + element;
    const T *from = weight_row + ((long long)step.set * depth + column);
#pragma unroll
    for (int j = 0; j < OUTS; j += THREADS / 4) {
      const bool valid = j < outs_left && column < depth;
      cp_async<16>(&weights[step.index % 2][(line + j) * LINE<T> + element], valid ? from : weight, valid);
      from += (long long)(THREADS / 4) * sets * depth;
    }
  };
  const auto load = [&](const Step &step, int part) {
    return operand.load(step.set, line + part * (ROWS / PARTS), step.block * DEPTH<T> + element);
  };
  const auto store = [&](const Step &step, int part, const typename Operand::Loaded &loaded) {
    const int row = line + part * (ROWS / PARTS);
    *reinterpret_cast<Wide<T> *>(&rows[step.index % 2][row * LINE<T> + element]) =
        operand.sum(step.set, row, step.block * DEPTH<T> + element, loaded);
  };
  if constexpr (OUTS == 0) {
    Grouped<T> product;
    const bool active = int(threadIdx.x) % DEPTH<T> < outs;
    const int run = run_of(sets);
    pipeline<LOADS_EARLY>(sets, 1, locate, [](const Step &) {}, load, store, [&](int set, int part) {
      const T *from = group.from + (long long)set * group.set_step;
      if (active) product.multiply(rows[set % 2], group.first, from, group.step, group.count, part);
      if (part == PARTS - 1 && ((set + 1) & (run - 1)) == 0) product.settle();
    });
    finish(product);
  } else {
    Product<T, ROWS, OUTS, false, OUTS <= 64> product;
    const int run = run_of(sets * blocks);
    pipeline<LOADS_EARLY>(sets * blocks, blocks, locate, fetch, load, store, [&](int index, int part) {
      product.multiply(rows[index % 2], weights[index % 2], part);
      if (part == PARTS - 1 && ((index + 1) & (run - 1)) == 0) product.settle();
    });
    finish(product);
  }
}
