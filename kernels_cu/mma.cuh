// Tensor-core products of one warp. All 32 lanes must call these together.
//
//   ldmatrix_x4(registers, row)          four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8
//   ldmatrix_x4_trans(registers, row)    of matrix i / 8, 16-byte aligned, in shared memory
//   ldmatrix_x2(registers, row)          two matrices; lanes 16 to 31 give any valid address
//   mma_m16n8k16<T>(d, a, b, c)          d = a b + c; T = __half or, from sm_80, __nv_bfloat16
//   mma_m16n8k8_tf32(d, a, b, c)         from sm_80
//   f32_to_tf32(value)                   from sm_80; to nearest, ties away from zero
//
// Fragments of m16n8k16, with g = lane / 4, t = lane % 4, two elements a register, the lower k (or column) first:
//   a[0] row g, k 2t..    a[1] row g + 8, k 2t..    a[2] row g, k 2t + 8..    a[3] row g + 8, k 2t + 8..
//   b[0] column g, k 2t..    b[1] column g, k 2t + 8..
//   c, d: [0] row g, column 2t   [1] row g, column 2t + 1   [2] and [3] the same in row g + 8
// Fragments of m16n8k8_tf32, one element a register:
//   a[0] row g, k t    a[1] row g + 8, k t    a[2] row g, k t + 4    a[3] row g + 8, k t + 4
//   b[0] column g, k t    b[1] column g, k t + 4    c, d as above
#pragma once
#include "platform.cuh"

// Whether the tensor cores take a type.
template <typename T> struct HasTensorCores { static constexpr bool value = false; };
template <> struct HasTensorCores<__half> { static constexpr bool value = true; };
#if __CUDA_ARCH__ >= 800 || !defined(__CUDACC__)
template <> struct HasTensorCores<__nv_bfloat16> { static constexpr bool value = true; };
#endif

#if !defined(__CUDACC__)
#include "emulator_mma.h"
#else

__device__ __forceinline__ void ldmatrix_x4(unsigned (&registers)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&registers)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))) : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(unsigned (&registers)[2], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(registers[0]), "=r"(registers[1])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))) : "memory");
}

template <class T>
struct mma_is_bfloat16 {
  static constexpr bool value = false;
};
template <>
struct mma_is_bfloat16<__nv_bfloat16> {
  static constexpr bool value = true;
};

#define MMA_OPERANDS                                                                          \
  : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                            \
  : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]),                         \
    "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3])

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                             const float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
  if constexpr (mma_is_bfloat16<T>::value) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};" MMA_OPERANDS);
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};" MMA_OPERANDS);
  }
#else
  // sm_75 has half the depth: k 0 to 7 is a[0], a[1] and b[0], k 8 to 15 the rest.
  static_assert(!mma_is_bfloat16<T>::value, "mma of bfloat16 needs sm_80");
  asm volatile("{\n"
               ".reg .f32 t0, t1, t2, t3;\n"
               "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
               "{t0, t1, t2, t3}, {%4, %5}, {%8}, {%10, %11, %12, %13};\n"
               "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%6, %7}, {%9}, {t0, t1, t2, t3};\n"
               "}" MMA_OPERANDS);
#endif
}

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                                 const float (&c)[4]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};" MMA_OPERANDS);
}

__device__ __forceinline__ unsigned f32_to_tf32(float value) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}
#endif

#undef MMA_OPERANDS
#endif
