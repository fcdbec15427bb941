// float4, make_float4 and their like, with CUDA's alignments, and dim3.
#pragma once

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define EMULATOR_VECTOR_TYPES(T, name)                                                  \
  struct name##1 { T x; };                                                              \
  struct __align__(2 * sizeof(T)) name##2 { T x, y; };                                  \
  struct name##3 { T x, y, z; };                                                        \
  struct __align__(sizeof(T) > 4 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; };       \
  inline name##1 make_##name##1(T x) { return {x}; }                                    \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                            \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                    \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

EMULATOR_VECTOR_TYPES(signed char, char)
EMULATOR_VECTOR_TYPES(unsigned char, uchar)
EMULATOR_VECTOR_TYPES(short, short)
EMULATOR_VECTOR_TYPES(unsigned short, ushort)
EMULATOR_VECTOR_TYPES(int, int)
EMULATOR_VECTOR_TYPES(unsigned, uint)
EMULATOR_VECTOR_TYPES(long long, longlong)
EMULATOR_VECTOR_TYPES(unsigned long long, ulonglong)
EMULATOR_VECTOR_TYPES(float, float)
EMULATOR_VECTOR_TYPES(double, double)
#undef EMULATOR_VECTOR_TYPES
