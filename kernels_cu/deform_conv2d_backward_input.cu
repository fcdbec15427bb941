// Deformable convolution, the gradient of the input: no atomics, so that its bits are the same in every run. Layouts:
// see deform_conv2d.cuh.
//
// Samples are sorted by the cell that they lie in, once for all channels (sort.cuh); a segment is the samples of one
// image, offset group and tap. Then it is the forward's product, with other rows: for an input pixel and a tap, the sum
// of the rows of grad_output whose samples touch the pixel, each times its weight there; times `turned`.
//
// Sums of float16 may be larger than it is though the gradient is not. Then the sums of their products are infinite or
// NaN, and a second launch makes such tiles once more with all rows times SHRINK. They may be as large as 2**40 there,
// and what they lose at the other end is 2**-17 of what was too large. Only what was not finite is written again.
//
// The two numbers, as for the forward. Compulsory bytes: grad_output, offset, mask, weight and the gradient, 14 MB;
// the lists, 24 bytes a sample and 4 a cell, mostly stay in L2. Instructions: some 300 a step, and 2 x 45 for each
// entry of the longest of 8 lists, 4 where offsets are near 0: 60 to 80 us. An estimate: no GPU has run this.
#include "deform_conv2d.cuh"
#include "sort.cuh"

// The samples, for the sort: numbered by image, offset group, tap and output pixel.
template <typename T> struct Samples {
  using A = arithmetic_t<T>;
  const Places places;
  const Convolution &p;

  struct One {
    int segment, offset_group, tap, number;  // number: of the output pixel, in all images
    Pixel pixel;
    Cell<A> cell;
  };

  __device__ __forceinline__ One one(int sample) const {
    const int plane = p.out_height * p.out_width, offset_groups = p.bundles * p.bundle_parts / p.offset_group_parts;
    const int segment = sample / plane, tap = segment % p.taps, offset_group = segment / p.taps % offset_groups;
    const int number = segment / p.taps / offset_groups * plane + (sample - segment * plane);
    const Pixel pixel(p, number);
    return {segment, offset_group, tap, number, pixel, places.cell<T>(p, pixel, offset_group, tap, p.width + 1)};
  }

  __device__ __forceinline__ int cell(int sample) const {
    const One found = one(sample);
    const int pitch = p.width + 1, cells = (p.height + 1) * pitch;
    return found.cell.adds ? found.segment * cells + first_cell(pitch) + int(found.cell.first) : -1;
  }

  __device__ __forceinline__ Record<A> record(int sample) const {
    const One found = one(sample);
    return {found.number, found.cell.down, found.cell.right,
            places.modulation<T>(p, found.pixel, found.offset_group, found.tap)};
  }
};

template <typename T>
__global__ void __launch_bounds__(SORTERS)
deform_conv2d_count(const void *__restrict__ offset, Strides offset_strides, const void *__restrict__ mask,
                    Strides mask_strides, Convolution p, int samples, int *cell_of, int *starts) {
  count_samples(Samples<T>{{offset, mask, offset_strides, mask_strides}, p}, samples, cell_of, starts);
}

template <typename T>
__global__ void __launch_bounds__(SORTERS)
deform_conv2d_records(const void *__restrict__ offset, Strides offset_strides, const void *__restrict__ mask,
                      Strides mask_strides, Convolution p, int cells, const int *cell_of, const int *starts,
                      const int *order, Record<arithmetic_t<T>> *records) {
  write_records(Samples<T>{{offset, mask, offset_strides, mask_strides}, p}, cells, cell_of, starts, order, records);
}

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
      const int segment = (number / plane * offset_groups + offset_group) * p.taps + set;
      const int cell = segment * ((p.height + 1) * pitch) + inside / p.width * pitch + inside % p.width;
      found = Lists(starts + cell, pitch);
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
      const Record<A> record = records[at];
      const A weight = list.weight(record, at, below);
      const Wide<T> grads = load_wide(from + record.row * row, true);
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

  __device__ __forceinline__ Wide<T> sum(int, int, int element, Loaded loaded) const {
    if (element + WIDE<T> > p.bundle_outs) {  // past the outs: 0, though a sample's weight be infinite
#pragma unroll
      for (int e = 0; e < WIDE<T>; ++e) loaded.sums[e] = element + e < p.bundle_outs ? loaded.sums[e] : A(0);
    }
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
