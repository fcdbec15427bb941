// Bilinear sampling of one pixel position, shared by all channels that are read there.
#pragma once
#include "platform.cuh"

// Positions and sums: float for half types and float, double for double.
template <typename T> struct Arithmetic { using type = float; };
template <> struct Arithmetic<double> { using type = double; };
template <typename T> using arithmetic_t = typename Arithmetic<T>::type;

// Element strides of an image tensor, whatever its layout; cudcn/launch.py writes it.
struct Strides {
  long long n, c, y, x;
};

// The least number that is not below n: float does not hold every int, and a place is outside if it is not below n.
template <typename A> __device__ __forceinline__ A not_below(int n) { return n; }
template <> __device__ __forceinline__ float not_below<float>(int n) { return __int2float_ru(n); }

// The cell [floor(y), floor(y) + 1] x [floor(x), floor(x) + 1] around a position. Corners outside the image count as 0.
//
// A position is outside where it is <= -1 or >= the image's size along either axis, NaN or infinite. Its sample is left
// out: it adds nothing, whatever its weight, and gets no gradient. At exactly -1 the gradient of the position is the
// slope of the cell [-1, 0] all the same, so `slopes` asks for that cell's corners, though none of them `adds`.
template <typename A> struct Cell {
  bool valid[4];     // top left, top right, bottom left, bottom right; all false outside
  bool inside;       // that there is a cell
  bool adds;         // that its value counts
  long long first;   // element offset of the top left corner from the plane's first element, outside the image too
  long long at[4];   // of the corners that are valid
  A down, right;     // distances from the top left corner

  Cell() = default;

  __device__ __forceinline__ Cell(A y, A x, int height, int width, long long stride_y, long long stride_x,
                                  bool slopes = false) {
    // comparisons are false for NaN
    const bool before_end = y < not_below<A>(height) && x < not_below<A>(width);
    adds = before_end && y > A(-1) && x > A(-1);
    inside = slopes ? before_end && y >= A(-1) && x >= A(-1) : adds;
    const A top = inside ? floor(y) : A(0), left = inside ? floor(x) : A(0);
    down = inside ? y - top : A(0);
    right = inside ? x - left : A(0);
    const int y0 = int(top), x0 = int(left);
    first = y0 * stride_y + x0 * stride_x;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const int yy = y0 + corner / 2, xx = x0 + corner % 2;
      valid[corner] = inside && yy >= 0 && yy < height && xx >= 0 && xx < width;
      at[corner] = valid[corner] ? yy * stride_y + xx * stride_x : 0;
    }
  }

  // Where the image goes on outside as its outermost pixels: for positions from -1 to height, and from -1 to width,
  // this is the cell around the position clamped into the image, and its slopes are 0 along the axes that are clamped.
  static __device__ __forceinline__ Cell clamped(A y, A x, int height, int width, long long stride_y,
                                                 long long stride_x) {
    const A top = floor(y), left = floor(x);
    const int y0 = int(top), x0 = int(left);
    Cell cell;
    cell.inside = cell.adds = true;
    cell.down = y - top;
    cell.right = x - left;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const int yy = min(max(y0 + corner / 2, 0), height - 1), xx = min(max(x0 + corner % 2, 0), width - 1);
      cell.valid[corner] = true;
      cell.at[corner] = yy * stride_y + xx * stride_x;
    }
    return cell;
  }

  template <typename T> __device__ __forceinline__ void load(const T *plane, A (&corners)[4]) const {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) corners[corner] = valid[corner] ? A(plane[at[corner]]) : A(0);
  }

  __device__ __forceinline__ A weight(int corner) const {
    return (corner / 2 ? down : A(1) - down) * (corner % 2 ? right : A(1) - right);
  }

  __device__ __forceinline__ A value(const A (&v)[4]) const {
    return weight(0) * v[0] + weight(1) * v[1] + weight(2) * v[2] + weight(3) * v[3];
  }

  __device__ __forceinline__ A slope_y(const A (&v)[4]) const {
    return (A(1) - right) * (v[2] - v[0]) + right * (v[3] - v[1]);
  }

  __device__ __forceinline__ A slope_x(const A (&v)[4]) const {
    return (A(1) - down) * (v[1] - v[0]) + down * (v[3] - v[2]);
  }
};
