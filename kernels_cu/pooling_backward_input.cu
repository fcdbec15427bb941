// RoI pooling, the gradient of the input, without atomics: each pixel gathers from the bins that touch it, in a fixed
// order, and is written once. As the samples of a bin are a grid, their weights at a pixel are a product of sums along
// the axes:
//   grad[y, x] = sum over bins of weight_y(y) * weight_x(x) * grad_output[bin] / divisor * mask
//
// Samples are not what is sorted: there may be as many as a roi has pixels, which the host does not know. Bins are
// (sort.cuh), by their first pixel's cell in one of several grids: one that touches up to TILE << l pixels along either
// axis lies in grid l, whose cells are of that size. So it touches pixels of its own cell and the next ones at the most,
// and a tile of pixels finds all its bins in the lists of four cells of each grid. Scratch is some 80 bytes a bin, as
// float32, however large it is, and a 40th of the image's pixels.
//
// A block has a tile of pixels of one image, class and group, for CHANNELS channels. It takes HELD bins at a time: first
// their weights at the tile's rows and columns and their gradients, in shared memory, then each thread adds them for its
// pixel and SLAB channels. A bin and a tile cost some 150 instructions of each warp; 1,000 rois x 7x7 x 256 channels on
// 2x256x200x304 have some 100 bins in the lists of each of 15,000 blocks: by estimate 0.5 to 1 ms on an H100, as much
// as its 200 M atomics on doubles.
#include "pooling.cuh"
#include "sort.cuh"

constexpr int TILE = 8, SLICES = 4, THREADS = TILE * TILE * SLICES, HELD = 32;
template <typename A> constexpr int CHANNELS = SLICES * SLAB<A>;

// Cells of all grids of a plane, an image's pixels of a class and group; and the classes that are sorted together.
struct Planes {
  int cells, first_class, classes;
};

// One of a plane's grids, the finest one first. For the sort, its cells are the pixels of a small image, and a bin is a
// sample there whose top left corner is the cell of the bin's first pixel.
struct Grid {
  int first, size, rows, pitch;  // its first cell; pixels along a cell

  __device__ __forceinline__ explicit Grid(const Pooling &p) : first(0) { resize(p, TILE); }

  __device__ __forceinline__ bool is_last(const Pooling &p) const { return size >= max(p.height, p.width); }

  __device__ __forceinline__ void next(const Pooling &p) {
    first += rows * pitch;
    resize(p, 2 * size);
  }

  __device__ __forceinline__ void resize(const Pooling &p, int to) {
    size = to;
    rows = (p.height - 1) / size + 2;
    pitch = (p.width - 1) / size + 2;
  }

  // The first of those around the cell of a pixel.
  __device__ __forceinline__ int cell(int y, int x) const { return first + y / size * pitch + x / size; }
};

// Which pixels a bin's samples touch along an axis, and the sum of their weights at one; -1 where none touches it.
template <typename Sample> struct Touches;

template <typename A> struct Touches<Pixel<A>> {
  static __device__ __forceinline__ void range(const Axis<A> &axis, int, int &first, int &last) {
    first = axis.begin;
    last = axis.end - 1;
  }
  static __device__ __forceinline__ A weight(const Axis<A> &axis, int pixel, int) {
    return pixel >= axis.begin && pixel < axis.end ? A(1) : A(-1);
  }
};

template <typename A> struct Touches<Point<A>> {
  static __device__ __forceinline__ int inside(int pixel, int length) { return min(max(pixel, 0), length - 1); }

  static __device__ __forceinline__ void range(const Axis<A> &axis, int length, int &first, int &last) {
    const A a = axis.position(axis.begin), b = axis.position(axis.end - 1);
    first = inside(int(floor(min(a, b))), length);
    last = inside(int(floor(max(a, b))) + 1, length);
  }

  static __device__ __forceinline__ A weight(const Axis<A> &axis, int pixel, int length) {
    Axis<A> near = axis;
    near.keep(A(axis.end), A(pixel == 0 ? -1 : pixel - 1), A(pixel == length - 1 ? length : pixel + 1));
    Sum<A> sum;
    bool touched = false;
    for (int i = max(near.begin, axis.begin); i < near.end; ++i) {
      const A at = axis.position(i), low = floor(at);
      if (inside(int(low), length) == pixel) {
        sum.add(A(1) - (at - low));
        touched = true;
      }
      if (inside(int(low) + 1, length) == pixel) {
        sum.add(at - low);
        touched = true;
      }
    }
    return touched ? sum.value() : A(-1);
  }
};

// A bin in its list; cudcn/cuda/pooling.py reads its size here.
template <typename A> struct Listed {
  long long at;  // of the class's first channel, in grad_output
  int top, bottom, left, right;  // the first and last pixels that it touches
  int y_begin, y_end, x_begin, x_end;
  A y_origin, y_spacing, x_origin, x_spacing, divisor, modulation;
};

// The bins, for the sort: numbered by class, roi, row and column.
template <typename A, typename Kind> struct Bins {
  using Touched = Touches<typename Kind::template Sample<A>>;
  const A *rois, *offset, *mask;
  const Strides &gradients;
  const Pooling &p;
  const Planes &planes;

  struct One {
    int roi, cls, row, column;
    Bin<A, Kind> bin;
    int top, bottom, left, right;
  };

  __device__ __forceinline__ One one(int number) const {
    const int column = number % p.columns, row = number / p.columns % p.rows, of_all = number / p.columns / p.rows;
    const int roi = of_all % p.rois, cls = planes.first_class + of_all / p.rois;
    One one = {roi, cls, row, column, Bin<A, Kind>(p, roi, cls, row, column, rois, offset, mask)};
    if (one.bin.empty) return one;
    Touched::range(one.bin.y, p.height, one.top, one.bottom);
    Touched::range(one.bin.x, p.width, one.left, one.right);
    return one;
  }

  __device__ __forceinline__ int cell(int number) const {
    const One found = one(number);
    if (found.bin.empty) return -1;
    Grid grid(p);
    while (max(found.bottom - found.top, found.right - found.left) >= grid.size) grid.next(p);
    const int cls = found.cls - planes.first_class, plane = found.bin.image * planes.classes + cls;
    return (plane * p.group_rows * p.group_columns + found.bin.group) * planes.cells +
           grid.cell(found.top, found.left) + first_cell(grid.pitch);
  }

  __device__ __forceinline__ Listed<A> record(int number) const {
    const One found = one(number);
    const Bin<A, Kind> &bin = found.bin;
    const long long channel = (long long)found.cls * p.class_channels;
    return {found.roi * gradients.n + channel * gradients.c + found.row * gradients.y + found.column * gradients.x,
            found.top, found.bottom, found.left, found.right, bin.y.begin, bin.y.end, bin.x.begin, bin.x.end,
            bin.y.origin, bin.y.spacing, bin.x.origin, bin.x.spacing, bin.divisor(), bin.modulation};
  }
};

template <typename T, typename Kind>
__global__ void __launch_bounds__(SORTERS)
pool_count(const arithmetic_t<T> *__restrict__ rois, const arithmetic_t<T> *__restrict__ offset,
           const arithmetic_t<T> *__restrict__ mask, Strides gradients, Pooling p, Planes planes, int samples,
           int *cell_of, int *starts) {
  const Bins<arithmetic_t<T>, Kind> bins = {rois, offset, mask, gradients, p, planes};
  count_samples(bins, samples, cell_of, starts);
}

template <typename T, typename Kind>
__global__ void __launch_bounds__(SORTERS)
pool_records(const arithmetic_t<T> *__restrict__ rois, const arithmetic_t<T> *__restrict__ offset,
             const arithmetic_t<T> *__restrict__ mask, Strides gradients, Pooling p, Planes planes, int cells,
             const int *cell_of, const int *starts, const int *order, Listed<arithmetic_t<T>> *listed) {
  const Bins<arithmetic_t<T>, Kind> bins = {rois, offset, mask, gradients, p, planes};
  write_records(bins, cells, cell_of, starts, order, listed);
}

// Grid: x = (image, class, group, slab of channels, tile of pixels), tiles fastest.
template <typename T, typename Kind>
__global__ void __launch_bounds__(THREADS, 2)
pool_backward_input(const T *__restrict__ grad_output, Strides grad_output_strides, const int *__restrict__ starts,
                    const Listed<arithmetic_t<T>> *__restrict__ listed, T *__restrict__ grad_input,
                    Strides grad_input_strides, Pooling p, Planes planes) {
  using A = arithmetic_t<T>;
  using Touched = Touches<typename Kind::template Sample<A>>;
  SMEM(A, weights, [HELD][2 * TILE]);  // at the tile's rows, and at its columns
  SMEM(A, gradients, [CHANNELS<A>][HELD + 1]);
  const int thread = int(threadIdx.x), in_tile_y = thread / TILE % TILE, in_tile_x = thread % TILE;
  const int slice = thread / (TILE * TILE) * SLAB<A>;  // the thread's first channel, of the block's
  const int groups = p.group_rows * p.group_columns, columns = (p.width - 1) / TILE + 1;
  const int tiles = ((p.height - 1) / TILE + 1) * columns, slabs = (p.class_channels - 1) / CHANNELS<A> + 1;
  int block = int(blockIdx.x);
  const int top = block % tiles / columns * TILE, left = block % tiles % columns * TILE;
  block /= tiles;
  const int first_channel = block % slabs * CHANNELS<A>, plane = block / slabs;

  Sum<A> sums[SLAB<A>];
  int run = 0;
  for (Grid grid(p);; grid.next(p)) {
    const Lists lists(starts + (plane * planes.cells + grid.cell(top, left)), grid.pitch);
    for (int below = 0; below < 2; ++below) {
      const int begin = below ? lists.begin[1] : lists.begin[0], end = below ? lists.end[1] : lists.end[0];
      for (int first = begin; first < end; first += HELD) {
        const int count = min(HELD, end - first);
        for (int i = thread; i < count * 2 * TILE; i += THREADS) {
          const Listed<A> &bin = listed[first + i / (2 * TILE)];
          const int at = i % (2 * TILE), row = top + at, column = left + at - TILE;
          A weight = -1;
          if (at < TILE) {
            const Axis<A> axis = {bin.y_begin, bin.y_end, bin.y_origin, bin.y_spacing};
            if (row >= bin.top && row <= bin.bottom) weight = Touched::weight(axis, row, p.height);
          } else {
            const Axis<A> axis = {bin.x_begin, bin.x_end, bin.x_origin, bin.x_spacing};
            if (column >= bin.left && column <= bin.right) weight = Touched::weight(axis, column, p.width);
          }
          weights[i / (2 * TILE)][at] = weight;
        }
        for (int i = thread; i < HELD * CHANNELS<A>; i += THREADS) {
          const int held = i % HELD, channel = i / HELD;
          if (held >= count || first_channel + channel >= p.class_channels) continue;
          const Listed<A> &bin = listed[first + held];
          const bool touches = bin.top < top + TILE && bin.bottom >= top && bin.left < left + TILE && bin.right >= left;
          if (!touches) continue;
          const A gradient = A(grad_output[bin.at + (first_channel + channel) * grad_output_strides.c]);
          gradients[channel][held] = gradient / bin.divisor * bin.modulation;
        }
        __syncthreads();
        for (int held = 0; held < count; ++held) {
          const A weight_y = weights[held][in_tile_y], weight_x = weights[held][TILE + in_tile_x];
          if (weight_y < A(0) || weight_x < A(0)) continue;
#pragma unroll
          for (int k = 0; k < SLAB<A>; ++k) {
            if (first_channel + slice + k < p.class_channels) {
              sums[k].run += weight_y * weight_x * gradients[slice + k][held];
            }
          }
          if (++run == RUN) {
            run = 0;
#pragma unroll
            for (int k = 0; k < SLAB<A>; ++k) sums[k].end_run();
          }
        }
        __syncthreads();
      }
    }
    if (grid.is_last(p)) break;
  }

  const int y = top + in_tile_y, x = left + in_tile_x, group = plane % groups;
  const int cls = planes.first_class + plane / groups % planes.classes, image = plane / groups / planes.classes;
  if (y >= p.height || x >= p.width) return;
  T *to = grad_input + (image * grad_input_strides.n + y * grad_input_strides.y + x * grad_input_strides.x);
#pragma unroll
  for (int k = 0; k < SLAB<A>; ++k) {
    const int channel = first_channel + slice + k;
    if (channel >= p.class_channels) break;
    const long long in_image = ((long long)cls * p.class_channels + channel) * groups + group;
    to[in_image * grad_input_strides.c] = T(sums[k].value());
  }
}
