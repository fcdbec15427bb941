// Deformable convolution, the gradient of the input: no atomics, so that its bits are the same in every run. Layouts:
// see deform_conv2d.cuh.
//
// Samples are sorted by the pixels that they touch, once for all channels. Then it is the forward's product, with
// other rows: for an input pixel and a tap, the sum of the rows of grad_output whose samples touch the pixel, each
// times its weight there; times `turned`.
//
// Sums of float16 may be larger than it is though the gradient is not. Then the sums of their products are infinite or
// NaN, and a second launch makes such tiles once more with all rows times SHRINK. They may be as large as 2**40 there,
// and what they lose at the other end is 2**-17 of what was too large. Only what was not finite is written again.
//
// The two numbers, as for the forward. Compulsory bytes: grad_output, offset, mask, weight and the gradient, 14 MB;
// the lists, 24 bytes a sample and 4 a cell, mostly stay in L2. Instructions: some 300 a step, and 2 x 45 for each
// entry of the longest of 8 lists, 4 where offsets are near 0: 60 to 80 us. An estimate: no GPU has run this.
#include "deform_conv2d.cuh"

// The samples of one image, offset group and tap, a segment, sorted by cell, and in a cell by output pixel: a fixed
// order. Cells have their top left corner from (-1, -1) on, (H + 1) x (W + 1) of them; `starts` has each cell's first
// place in its segment, and one more. A segment has room for all its samples, so that its place follows from the
// shapes.
template <typename A> struct alignas(16) Record {
  int pixel;  // of all images
  A down, right, modulation;
};

constexpr int SORTERS = 1024;  // threads
constexpr int SHORT = 32;      // lists below that are sorted by one thread each

// The sum of the values of all earlier threads; `total` of all.
__device__ __forceinline__ int sum_before(int value, int &total) {
  SMEM(int, warps, [SORTERS / 32]);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int sum = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < int(blockDim.x) / 32; ++w) {
    if (w == warp) before = total;
    total += warps[w];
  }
  __syncthreads();
  return before + sum - value;
}

// A counting sort. Grid: x = segments, of (image, offset group, tap). Block: up to SORTERS threads.
template <typename T>
__global__ void __launch_bounds__(SORTERS, 1)
deform_conv2d_sort(const void *__restrict__ offset, Strides offset_strides, const void *__restrict__ mask,
                   Strides mask_strides, int *starts, int *cells_of, int *order, Record<arithmetic_t<T>> *records,
                   Convolution p) {
  using A = arithmetic_t<T>;
  SMEM(int, waiting, [SORTERS]);
  SMEM(int, waiting_count, [1]);
  const int offset_groups = p.bundles * p.bundle_parts / p.offset_group_parts;
  const int tap = int(blockIdx.x) % p.taps, offset_group = int(blockIdx.x) / p.taps % offset_groups;
  const int plane = p.out_height * p.out_width, first_pixel = int(blockIdx.x) / p.taps / offset_groups * plane;
  const int pitch = p.width + 1, cells = (p.height + 1) * pitch;
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const Places places = {offset, mask, offset_strides, mask_strides};
  int *start = starts + (long long)blockIdx.x * (cells + 1);
  int *cell_of = cells_of + (long long)blockIdx.x * plane;
  order += (long long)blockIdx.x * plane;
  records += (long long)blockIdx.x * plane;

  // start[cell + 1]: first how many samples lie in a cell, then where the next one goes, and in the end the cell's
  // end
  for (int cell = thread; cell <= cells; cell += threads) start[cell] = 0;
  __syncthreads();
  for (int i = thread; i < plane; i += threads) {
    const Cell<A> cell = places.cell<T>(p, Pixel(p, first_pixel + i), offset_group, tap, pitch);
    cell_of[i] = cell.adds ? int(cell.first) + pitch + 1 : -1;
    if (cell.adds) atomicAdd(start + cell_of[i] + 1, 1);  // whole numbers: their order does not matter
  }
  __syncthreads();
  for (int first = 0, carry = 0; first < cells; first += threads) {
    const int cell = first + thread;
    int total;
    const int before = sum_before(cell < cells ? start[cell + 1] : 0, total);
    if (cell < cells) start[cell + 1] = carry + before;
    carry += total;
  }
  __syncthreads();
  for (int i = thread; i < plane; i += threads) {
    if (cell_of[i] >= 0) order[atomicAdd(start + cell_of[i] + 1, 1)] = i;  // in any order, which is set right below
  }
  __syncthreads();
  for (int first = 0; first < cells; first += threads) {
    if (thread == 0) waiting_count[0] = 0;
    __syncthreads();
    const int cell = first + thread, from = cell < cells ? start[cell] : 0, end = cell < cells ? start[cell + 1] : 0;
    if (end - from >= SHORT) {
      waiting[atomicAdd(waiting_count, 1)] = cell;  // in any order: each list is its own
    } else {
      for (int i = from + 1; i < end; ++i) {
        const int moved = order[i];
        int j = i;
        for (; j > from && order[j - 1] > moved; --j) order[j] = order[j - 1];
        order[j] = moved;
      }
    }
    __syncthreads();
    // A long list is collected again from all samples, in their order: linear, however long it is.
    for (int w = 0; w < waiting_count[0]; ++w) {
      int to = start[waiting[w]];
      for (int i = thread; i - thread < plane; i += threads) {
        const int found = i < plane && cell_of[i] == waiting[w];
        int total;
        const int before = sum_before(found, total);
        if (found) order[to + before] = i;
        to += total;
      }
    }
    __syncthreads();
  }
  for (int i = thread; i < start[cells]; i += threads) {
    const Pixel pixel(p, first_pixel + order[i]);
    const Cell<A> cell = places.cell<T>(p, pixel, offset_group, tap, pitch);
    records[i] = {first_pixel + order[i], cell.down, cell.right, places.modulation<T>(p, pixel, offset_group, tap)};
  }
}

// Where the samples are that touch a pixel: those of the two cells above it, and those of the two below.
struct alignas(16) Lists {
  long long first;  // of the segment
  int begin[2], middle[2], end[2];

  __device__ __forceinline__ int count() const { return end[0] - begin[0] + end[1] - begin[1]; }
};

template <typename T> constexpr bool OVERFLOWS = false;  // bfloat16 goes as far as float
template <> constexpr bool OVERFLOWS<__half> = true;
constexpr float SHRINK = 1.0f / (1 << 24);

constexpr int LONG = 64;  // lists above that are summed by all lanes of a warp

// An operand of multiply_rows: for an input pixel, the sum of the rows of grad_output whose samples touch it, each
// times its weight there and its mask; a set is a tap. Rounded to T as samples are.
template <typename T, int OUTS> struct Touching {
  using A = arithmetic_t<T>;
  struct Loaded {
    A sums[WIDE<T>];
  };
  const Convolution &p;
  const T *grad_output;
  int first_out;  // of a row of grad_output
  const int *starts;
  const Record<A> *records;
  Lists (*lists)[ROWS];  // of two sets
  bool again;  // after an overflow

  __device__ __forceinline__ void locate(int set) const {
    if (threadIdx.x >= ROWS) return;
    const int parts = p.bundles * p.bundle_parts, plane = p.height * p.width, pitch = p.width + 1;
    const Tile tile(p.part, parts, OUTS);
    const int number = tile.first + int(threadIdx.x), inside = number % plane;
    Lists found = {};
    if (number < p.images * plane) {
      const int offset_groups = parts / p.offset_group_parts, offset_group = tile.bundle / p.offset_group_parts;
      const long long segment = ((long long)(number / plane) * offset_groups + offset_group) * p.taps + set;
      found.first = segment * (p.out_height * p.out_width);
      const int *start = starts + segment * ((p.height + 1) * pitch + 1) + inside / p.width * pitch + inside % p.width;
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        found.begin[below] = start[below * pitch];
        found.middle[below] = start[below * pitch + 1];
        found.end[below] = start[below * pitch + 2];
      }
    }
    lists[set % 2][threadIdx.x] = found;
  }

  // Adds every `step`-th entry of a list. In runs in float32; in half types one of 2**14 terms is as good as they are.
  __device__ __forceinline__ void add(const Lists &list, int first, int step, const T *from, A (&sums)[WIDE<T>]) const {
    const int above = list.end[0] - list.begin[0], count = list.count();
    const long long row = (long long)p.bundles * p.out_depth;
    constexpr bool RUNS = sizeof(T) == 4;
    A run[WIDE<T>] = {};
    for (int entry = first, in_run = 0; entry < count; entry += step) {
      const bool below = entry >= above;
      const int at = below ? list.begin[1] + entry - above : list.begin[0] + entry;
      const bool right = at >= list.middle[below];
      const Record<A> record = records[list.first + at];
      // the pixel is the bottom right corner of a cell above it to the left
      A weight = (below ? A(1) - record.down : record.down) * (right ? A(1) - record.right : record.right);
      weight *= record.modulation;
      const Wide<T> grads = load_wide(from + record.pixel * row, true);
#pragma unroll
      for (int e = 0; e < WIDE<T>; ++e) (RUNS ? run : sums)[e] += weight * A(grads[e]);
      if (RUNS && (++in_run == RUN || entry + step >= count)) {
        in_run = 0;
#pragma unroll
        for (int e = 0; e < WIDE<T>; ++e) {
          sums[e] += run[e];
          run[e] = 0;
        }
      }
    }
  }

  __device__ __forceinline__ Loaded load(int set, int row, int element) const {
    const bool inside = element < p.out_depth;
    const T *from = grad_output + first_out + (inside ? element : 0);
    const int lane = int(threadIdx.x) % 32, mine = lane / 4;  // four lanes a row
    unsigned left = __ballot_sync(0xffffffffu, lists[set % 2][row].count() > LONG);
    const bool is_short = (left >> lane & 1) == 0;
    Loaded loaded;
    // the warp's short rows, each its own; then one long row after another
    for (int which = mine, first = 0, step = 1;;) {
      A sums[WIDE<T>] = {};
      if (inside && (step > 1 || is_short)) add(lists[set % 2][row - mine + which], first, step, from, sums);
      if (step > 1) {
#pragma unroll
        for (int e = 0; e < WIDE<T>; ++e) {
          for (int apart = 4; apart < 32; apart *= 2) sums[e] += __shfl_xor_sync(0xffffffffu, sums[e], apart);
        }
      }
#pragma unroll
      for (int e = 0; e < WIDE<T>; ++e) loaded.sums[e] = which == mine ? sums[e] : loaded.sums[e];
      if (left == 0) return loaded;
      which = (__ffs(int(left)) - 1) / 4;
      left &= ~(15u << (4 * which));
      first = mine;
      step = 8;
    }
  }

  __device__ __forceinline__ Wide<T> sum(int, int, int, Loaded loaded) const {
    if (again) {
#pragma unroll
      for (int e = 0; e < WIDE<T>; ++e) loaded.sums[e] *= A(SHRINK);
    }
    return narrowed<T, WIDE<T>>(loaded.sums);
  }
};

// `overflows` takes whether a block's sums are not all finite; `overflowed` is that of the first launch, null in it.
// Grid: x = (tile of input pixels, part, tile of its channels).
template <typename T, int OUTS>
__global__ void __launch_bounds__(THREADS, 2)
deform_conv2d_backward_input(const T *__restrict__ grad_output, const int *__restrict__ starts,
                             const Record<arithmetic_t<T>> *__restrict__ records, const T *__restrict__ turned,
                             T *__restrict__ grad_input, Strides strides, int *__restrict__ overflows,
                             const int *__restrict__ overflowed, Convolution p) {
  using A = arithmetic_t<T>;
  const bool again = OVERFLOWS<T> && overflowed != nullptr;
  if (again && !overflowed[blockIdx.x]) return;
  SMEM(Lists, lists, [2][ROWS]);
  const int parts = p.bundles * p.bundle_parts;
  const Tile tile(p.part, parts, OUTS);
  const int column = int(threadIdx.x) % DEPTH<T>, in_bundle = column / p.group_channels;
  const long long o = tile.bundle * p.bundle_outs + in_bundle * p.group_outs, by_tap = p.taps * p.group_channels;
  const GroupWeights<T> group = {turned + (o * by_tap + column % p.group_channels), p.group_channels, int(by_tap),
                                 p.group_outs, in_bundle * p.group_outs};
  const auto finish = [&](const auto &product) {
    bool finite = true;
    const Tile tile(p.part, parts, OUTS);
    const int first = tile.bundle * p.part + tile.first_out, channels = p.part - tile.first_out;
    const int plane = p.height * p.width, pixels = p.images * plane;
    product.each([&](int row) {
      const int number = tile.first + row, inside = number % plane;
      const bool active = number < pixels;
      T *to = grad_input + (number / plane * strides.n + first * strides.c + inside / p.width * strides.y +
                            inside % p.width * strides.x);
      return [=, &strides, &finite](int channel, A sum) {
        if (!active || channel >= channels) return;
        T &at = to[channel * strides.c];
        if (again) {
          if (!isfinite(A(at))) at = T(sum / A(SHRINK));
        } else {
          at = T(sum);
        }
        finite &= bool(isfinite(sum));
      };
    });
    if (!OVERFLOWS<T> || again) return;
    const bool any = __syncthreads_or(!finite);
    if (threadIdx.x == 0) overflows[blockIdx.x] = any;
  };
  const int first_out = tile.bundle / p.bundle_parts * p.out_depth;
  const T *weight = turned + ((long long)tile.bundle * p.part + tile.first_out) * p.taps * p.out_depth;
  multiply_rows<T, OUTS, false>(Touching<T, OUTS>{p, grad_output, first_out, starts, records, lists, again}, weight,
                                p.part - tile.first_out, p.taps, p.out_depth, group, finish);
}
