// Deformable convolution, forward, and the packing of images. Layouts: see deform_conv2d.cuh.
//
// A block makes ROWS pixels by OUTS outs of a bundle. For each of the bundle's sets, of a part and a tap, 128 threads
// find a position each, one set ahead; four threads sample 64 bytes of a pixel's channels, a step of k; 8 warps
// multiply.
//
// The two numbers, for 128 channels at 28 x 28, batch 32, in half types, on an H100. Compulsory bytes: input, offset,
// mask, weight and output, 14 MB or 4 us. Instructions by SASS for sm_90: some 370 in each of 8 warps for 128 pixels
// by 32 channels by 128 outs, 32 of them HMMA, and 400 in 4 warps for a set; 34 us as 196 tiles lie on 132
// multiprocessors, 25 if they filled them evenly. An estimate: no GPU has run this.
#include "deform_conv2d.cuh"

// An operand of multiply_rows: samples; a set is a part and a tap.
template <typename T, int OUTS> struct Sampled {
  using A = arithmetic_t<T>;
  using Loaded = Sample<T>;
  const Convolution &p;
  const Places &places;
  const T *input;
  Position<A> (*positions)[ROWS];  // of two sets

  __device__ __forceinline__ void locate(int set) const {
    if (threadIdx.x >= ROWS) return;
    const Tile tile(p.bundle_outs, p.bundles, OUTS);
    const Pixel pixel(p, tile.first + int(threadIdx.x));
    const int part = tile.bundle * p.bundle_parts + set / p.taps;
    positions[set % 2][threadIdx.x] = position<T>(p, places, pixel, part, set % p.taps);
  }
  __device__ __forceinline__ Loaded load(int set, int row, int element) const {
    return Sample<T>::load(p, input, positions[set % 2][row], element);
  }
  __device__ __forceinline__ Wide<T> sum(int set, int row, int element, const Loaded &loaded) const {
    return loaded.sum(p, positions[set % 2][row], element);
  }
};

// OUTS = 0: GROUPED. Grid: x = (tile of pixels, bundle, tile of its outs).
template <typename T, int OUTS>
__global__ void __launch_bounds__(THREADS, 2)
deform_conv2d_forward(const T *__restrict__ input, const void *__restrict__ offset, Strides offset_strides,
                      const void *__restrict__ mask, Strides mask_strides, const T *__restrict__ weight,
                      const T *__restrict__ bias, T *__restrict__ out, Strides out_strides, Convolution p) {
  using A = arithmetic_t<T>;
  SMEM(Position<A>, positions, [2][ROWS]);
  const Places places = {offset, mask, offset_strides, mask_strides};
  const Tile tile(p.bundle_outs, p.bundles, OUTS);
  const int sets = p.bundle_parts * p.taps, o = tile.bundle * p.bundle_outs + tile.first_out;
  const int column = int(threadIdx.x) % DEPTH<T>, channels = p.group_channels;
  const GroupWeights<T> group = {weight + (long long)(o + column) * sets * channels, channels, 1, channels,
                                 column / p.group_outs * channels};
  const auto finish = [&](const auto &product) {
    const Tile tile(p.bundle_outs, p.bundles, OUTS);
    const int first = tile.bundle * p.bundle_outs + tile.first_out, outs = p.bundle_outs - tile.first_out;
    product.each([&](int row) {
      const Pixel pixel(p, tile.first + row);
      T *to = out + pixel.at(out_strides, first);
      return [=, &out_strides](int o, A sum) {
        if (!pixel.active || o >= outs) return;
        if (bias != nullptr) sum += A(bias[first + o]);
        to[o * out_strides.c] = T(sum);
      };
    });
  };
  const Sampled<T, OUTS> samples = {p, places, input, positions};
  const T *first_row = weight + (long long)o * sets * p.depth;
  multiply_rows<T, OUTS, EARLY<T>>(samples, first_row, p.bundle_outs - tile.first_out, sets, p.depth, group, finish);
}

// ---- layouts

struct Packing {
  Divisor plane_of, width_of, depth_of;  // by an image's pixels, a row's, and a part's channels with zeros
  int images, height, width, part, depth, parts;
};

// (images, H, W, parts, depth) from images of any strides: part by part, with zeros behind each.
// Grid: x = (tile of 32 pixels of all images, tile of 32 channels), channels fastest. Block: (32, 8).
template <typename T>
__global__ void __launch_bounds__(THREADS)
deform_conv2d_pack(const T *__restrict__ images, Strides strides, T *__restrict__ packed, Packing p) {
  SMEM(T, tile, [32][33]);
  const int row = p.parts * p.depth, tiles = (row + 31) / 32, x = int(threadIdx.x);
  const int pixel_tile = int(blockIdx.x) / tiles, begin = (int(blockIdx.x) - pixel_tile * tiles) * 32;
  const long long plane = (long long)p.height * p.width, pixels = p.images * plane;
  const long long first = (long long)pixel_tile * 32, number = first + x;
  const bool few = pixels < 1LL << 31;
  const long long image = few ? p.plane_of(unsigned(number)) : number / plane, inside = number - image * plane;
  const long long line = few ? p.width_of(unsigned(inside)) : inside / p.width;
  const T *from = images + image * strides.n + line * strides.y + (inside - line * p.width) * strides.x;
  for (int y = int(threadIdx.y); y < 32; y += THREADS / 32) {
    const int part = int(p.depth_of(begin + y)), in_part = begin + y - part * p.depth;
    const bool valid = number < pixels && part < p.parts && in_part < p.part;
    tile[y][x] = valid ? from[(part * p.part + in_part) * strides.c] : T(0.0f);
  }
  __syncthreads();
  T *to = packed + (first * row + begin + x);
  for (int y = int(threadIdx.y); y < 32; y += THREADS / 32) {
    if (first + y < pixels && begin + x < row) to[(long long)y * row] = tile[x][y];
  }
}

struct WeightPacking {
  int inner_rows, taps, kernel_w, part, depth, turned;
};

// (rows, inner_rows, taps, depth) from weights (C_out, C_in / groups, Kh, Kw) of any strides: an out's channels, part
// by part, or, turned, a group's outs for each channel; with zeros behind them. Grid: x = row and inner row.
template <typename T>
__global__ void __launch_bounds__(THREADS)
deform_conv2d_pack_weight(const T *__restrict__ weight, Strides strides, T *__restrict__ packed, WeightPacking p) {
  const int row = int(blockIdx.x) / p.inner_rows, inner = int(blockIdx.x) % p.inner_rows;
  const int out = p.turned ? row * p.part : row, channel = p.turned ? inner : inner * p.part;
  const T *from = weight + out * strides.n + channel * strides.c;
  T *to = packed + (long long)int(blockIdx.x) * p.taps * p.depth;
  for (int i = int(threadIdx.x); i < p.taps * p.depth; i += THREADS) {
    const int tap = i / p.depth, k = i % p.depth;
    const long long window = tap / p.kernel_w * strides.y + tap % p.kernel_w * strides.x;
    const long long at = k * (p.turned ? strides.n : strides.c) + window;
    to[i] = k < p.part ? from[at] : T(0.0f);
  }
}
