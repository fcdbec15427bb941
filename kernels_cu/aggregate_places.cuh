// Where the samples of dcnv3, dcnv4 and ms_deform_attn lie: what a call's tensors are, and how places become positions.
#pragma once
#include "platform.cuh"

// One launch: where the places and weights of a row are, in elements; cudcn/cuda/aggregate.py writes it.
struct Aggregate {
  long long places_query, places_group, weights_query, weights_group, weights_first;
  int images, height, width;  // of the queries
  int pixels, groups, channels, samples, softmax;
  int packed;  // places and weights are one tensor, and so are their gradients
};

// Where the place (y, x) that the caller gives lies: at origin + scale * place in the image from pixel `first`.
template <typename A> struct Map {
  A origin_y, origin_x, scale_y, scale_x;
  int first, height, width;
};

// dcnv3 and dcnv4: the taps of a window, its columns one after another.
template <typename A> struct Windows {
  A scale;
  int height, width, kernel_h, left_out;
  int stride_h, stride_w, top, left, dilation_h, dilation_w, center_h, center_w;

  __device__ __forceinline__ Map<A> map(int y, int x, int sample, const long long *, const long long *) const {
    const int tap = sample + (sample >= left_out);
    const int column = tap / kernel_h, row = tap - column * kernel_h;
    return {A(y * stride_h - top + center_h) + A(row * dilation_h - center_h) * scale,
            A(x * stride_w - left + center_w) + A(column * dilation_w - center_w) * scale,
            scale, scale, 0, height, width};
  }
};

// ms_deform_attn: every level's points. A level that is not inside the value's pixels has none.
template <typename A> struct Attention {
  int points, pixels;

  __device__ __forceinline__ Map<A> map(int, int, int sample, const long long *shapes, const long long *starts) const {
    const int level = sample / points;
    const long long height = shapes[2 * level], width = shapes[2 * level + 1], first = starts[level];
    const bool inside = height > 0 && height <= pixels && width > 0 && width <= pixels && first >= 0 &&
                        first <= pixels && height * width <= pixels - first;
    if (!inside) return {A(0), A(0), A(0), A(0), 0, 0, 0};
    return {A(-0.5), A(-0.5), A(height), A(width), int(first), int(height), int(width)};
  }
};
