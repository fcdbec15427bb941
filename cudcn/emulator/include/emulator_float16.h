// __half, __nv_bfloat16, their pairs, and the intrinsics on them. Every operation rounds to 16 bits, as on the device.
// (On a device __hfma of __nv_bfloat16 needs sm_80; NVRTC says so, g++ does not.)
#pragma once

namespace emulator {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// The F16C instructions by g++'s builtins: <immintrin.h> would double the time that a kernel takes to compile.
struct HalfFormat {
  typedef short Short8 __attribute__((vector_size(16)));
  typedef float Float4 __attribute__((vector_size(16)));
  static float to_float(uint16_t bits) { return __builtin_ia32_vcvtph2ps(Short8{short(bits)})[0]; }
  static uint16_t from_float(float value) {
    constexpr int round_to_nearest_even = 0;
    if (value != value) return 0x7fff;  // the device's only NaN
    return uint16_t(__builtin_ia32_vcvtps2ph(Float4{value}, round_to_nearest_even)[0]);
  }
};

struct Bfloat16Format {
  static float to_float(uint16_t bits) { return float_from_bits(uint32_t(bits) << 16); }
  static uint16_t from_float(float value) {
    const uint32_t bits = float_bits(value);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    if (is_nan) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest even
  }
};

// double to float, rounded to odd: rounding the result to 16 bits is then as good as rounding the double itself.
inline float round_to_odd(double value) {
  const float nearest = float(value);
  if (double(nearest) == value || nearest != nearest) return nearest;
  uint32_t bits = float_bits(nearest);
  if (fabs(double(nearest)) > fabs(value)) bits--;
  return float_from_bits(bits | 1);
}

template <class Format>
struct __align__(2) Float16 {
  uint16_t bits;

  Float16() = default;
  Float16(float value) : bits(Format::from_float(value)) {}
  Float16(double value) : bits(Format::from_float(round_to_odd(value))) {}
  template <class Integer, class = std::enable_if_t<std::is_integral_v<Integer>>>
  Float16(Integer value) : Float16(double(value)) {}
  operator float() const { return Format::to_float(bits); }

  static Float16 from_bits(uint16_t bits) {
    Float16 result;
    result.bits = bits;
    return result;
  }

  // Friends, not templates, so that an argument may convert, as with the device's types.
  friend Float16 operator+(Float16 a, Float16 b) { return float(a) + float(b); }
  friend Float16 operator-(Float16 a, Float16 b) { return float(a) - float(b); }
  friend Float16 operator*(Float16 a, Float16 b) { return float(a) * float(b); }
  friend Float16 operator/(Float16 a, Float16 b) { return float(a) / float(b); }
  friend Float16 operator-(Float16 a) { return from_bits(a.bits ^ 0x8000); }
  Float16 &operator+=(Float16 other) { return *this = *this + other; }
  Float16 &operator-=(Float16 other) { return *this = *this - other; }
  Float16 &operator*=(Float16 other) { return *this = *this * other; }
  Float16 &operator/=(Float16 other) { return *this = *this / other; }
  friend bool operator<(Float16 a, Float16 b) { return float(a) < float(b); }
  friend bool operator>(Float16 a, Float16 b) { return float(a) > float(b); }
  friend bool operator<=(Float16 a, Float16 b) { return float(a) <= float(b); }
  friend bool operator>=(Float16 a, Float16 b) { return float(a) >= float(b); }
  friend bool operator==(Float16 a, Float16 b) { return float(a) == float(b); }
  friend bool operator!=(Float16 a, Float16 b) { return float(a) != float(b); }

  friend Float16 __hadd(Float16 a, Float16 b) { return a + b; }
  friend Float16 __hsub(Float16 a, Float16 b) { return a - b; }
  friend Float16 __hmul(Float16 a, Float16 b) { return a * b; }
  friend Float16 __hdiv(Float16 a, Float16 b) { return a / b; }
  friend Float16 __hneg(Float16 a) { return -a; }
  friend Float16 __habs(Float16 a) { return from_bits(a.bits & 0x7fff); }
  friend Float16 __hmax(Float16 a, Float16 b) { return fmaxf(a, b); }
  friend Float16 __hmin(Float16 a, Float16 b) { return fminf(a, b); }
  friend bool __hisnan(Float16 a) { return float(a) != float(a); }
  friend Float16 __hfma(Float16 a, Float16 b, Float16 c) {
    return fma(double(float(a)), double(float(b)), double(float(c)));
  }
};

template <class Format>
struct __align__(4) Float16x2 {
  typedef Float16<Format> Element;
  Element x, y;

  Float16x2() = default;
  Float16x2(Element x, Element y) : x(x), y(y) {}

  friend Float16x2 operator+(Float16x2 a, Float16x2 b) { return {a.x + b.x, a.y + b.y}; }
  friend Float16x2 operator-(Float16x2 a, Float16x2 b) { return {a.x - b.x, a.y - b.y}; }
  friend Float16x2 operator*(Float16x2 a, Float16x2 b) { return {a.x * b.x, a.y * b.y}; }
  friend Float16x2 __hadd2(Float16x2 a, Float16x2 b) { return a + b; }
  friend Float16x2 __hsub2(Float16x2 a, Float16x2 b) { return a - b; }
  friend Float16x2 __hmul2(Float16x2 a, Float16x2 b) { return a * b; }
  friend Float16x2 __hmax2(Float16x2 a, Float16x2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
  friend Float16x2 __hmin2(Float16x2 a, Float16x2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }
  friend Float16x2 __hfma2(Float16x2 a, Float16x2 b, Float16x2 c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
  }
  friend float __low2float(Float16x2 a) { return a.x; }
  friend float __high2float(Float16x2 a) { return a.y; }
};

}  // namespace emulator

typedef emulator::Float16<emulator::HalfFormat> __half, half;
typedef emulator::Float16x2<emulator::HalfFormat> __half2, half2;
typedef emulator::Float16<emulator::Bfloat16Format> __nv_bfloat16, nv_bfloat16;
typedef emulator::Float16x2<emulator::Bfloat16Format> __nv_bfloat162, nv_bfloat162;

inline __half __float2half(float a) { return a; }
inline __half __float2half_rn(float a) { return a; }
inline __half __double2half(double a) { return a; }
inline float __half2float(__half a) { return a; }
inline __half __ushort_as_half(unsigned short bits) { return __half::from_bits(bits); }
inline unsigned short __half_as_ushort(__half a) { return a.bits; }
inline __half2 make_half2(__half x, __half y) { return {x, y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half a) { return {a, a}; }
inline __half2 __float2half2_rn(float a) { return {a, a}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 a) { return {a.x, a.y}; }
inline float2 __half22float2(__half2 a) { return {a.x, a.y}; }
inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }

inline __nv_bfloat16 __float2bfloat16(float a) { return a; }
inline __nv_bfloat16 __float2bfloat16_rn(float a) { return a; }
inline __nv_bfloat16 __double2bfloat16(double a) { return a; }
inline float __bfloat162float(__nv_bfloat16 a) { return a; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return __nv_bfloat16::from_bits(bits); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return {a, a}; }
inline __nv_bfloat162 __float2bfloat162_rn(float a) { return {a, a}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 a) { return {a.x, a.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {a.x, a.y}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }
