// Scalar device functions that <math.h> does not have.
#pragma once

// ---- min and max, overloaded as CUDA has them
#define EMULATOR_MIN_MAX(T)                            \
  inline T min(T a, T b) { return a < b ? a : b; }     \
  inline T max(T a, T b) { return a > b ? a : b; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long)
EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
#undef EMULATOR_MIN_MAX
inline unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
inline unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
inline unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
inline unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }
// A NaN gives way to a number.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double max(double a, float b) { return fmax(a, b); }

// ---- rounding modes: only to nearest
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return float(1.0 / sqrt(double(a))); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

// ---- the fast functions, here as exact as the slow ones
inline float __expf(float a) { return expf(a); }
inline float __exp10f(float a) { return powf(10.0f, a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __sinf(float a) { return sinf(a); }
inline float __cosf(float a) { return cosf(a); }
inline float __tanhf(float a) { return tanhf(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float fdividef(float a, float b) { return a / b; }
inline float __saturatef(float a) { return a > 0.0f ? fminf(a, 1.0f) : 0.0f; }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline double rsqrt(double a) { return 1.0 / sqrt(a); }

// ---- bits and conversions
inline int __float_as_int(float a) { return int(emulator::float_bits(a)); }
inline unsigned __float_as_uint(float a) { return emulator::float_bits(a); }
inline float __int_as_float(int bits) { return emulator::float_from_bits(unsigned(bits)); }
inline float __uint_as_float(unsigned bits) { return emulator::float_from_bits(bits); }

namespace emulator {
// The device's conversion: it saturates, and NaN becomes 0. (A plain cast of such a value is undefined in C++.)
inline int saturating_int(double a) {
  if (a != a) return 0;
  if (a >= 2147483647.0) return 2147483647;
  if (a <= -2147483648.0) return -2147483647 - 1;
  return int(a);
}
}  // namespace emulator

inline int __float2int_rn(float a) { return emulator::saturating_int(rint(double(a))); }
inline int __float2int_rd(float a) { return emulator::saturating_int(floor(double(a))); }
inline int __float2int_ru(float a) { return emulator::saturating_int(ceil(double(a))); }
inline int __float2int_rz(float a) { return emulator::saturating_int(trunc(double(a))); }
inline int __double2int_rn(double a) { return emulator::saturating_int(rint(a)); }
inline int __double2int_rd(double a) { return emulator::saturating_int(floor(a)); }
inline int __double2int_rz(double a) { return emulator::saturating_int(trunc(a)); }
inline float __int2float_rn(int a) { return float(a); }
inline float __int2float_ru(int a) { return double(float(a)) < a ? nextafterf(float(a), INFINITY) : float(a); }
inline float __uint2float_rn(unsigned a) { return float(a); }

inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __clz(int a) { return a ? __builtin_clz(unsigned(a)) : 32; }
inline int __clzll(long long a) { return a ? __builtin_clzll((unsigned long long)a) : 64; }
inline int __mul24(int a, int b) { return a * b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
inline int __mulhi(int a, int b) { return int((long long)a * b >> 32); }

// ---- loads and stores with a cache hint
#define EMULATOR_LOAD(name)  \
  template <class T>         \
  __forceinline__ T name(const T *address) { return *address; }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldca)
EMULATOR_LOAD(__ldcg)
EMULATOR_LOAD(__ldcs)
EMULATOR_LOAD(__ldcv)
EMULATOR_LOAD(__ldlu)
#undef EMULATOR_LOAD
#define EMULATOR_STORE(name) \
  template <class T>         \
  __forceinline__ void name(T *address, T value) { *address = value; }
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stcs)
EMULATOR_STORE(__stwb)
EMULATOR_STORE(__stwt)
#undef EMULATOR_STORE

inline void __threadfence() {}
inline void __threadfence_block() {}
#define __trap() ::emulator::fail("__trap() at %s:%d", __FILE__, __LINE__)
