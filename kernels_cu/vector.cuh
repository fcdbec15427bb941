// Neighbouring elements that one thread moves together: one load or store of up to 16 bytes.
#pragma once
#include "platform.cuh"

template <int BYTES> struct Word;
template <> struct Word<2> { using type = unsigned short; };
template <> struct Word<4> { using type = unsigned; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

// V elements, at an address aligned to all of them.
template <typename T, int V> struct Vector {
  using word_t = typename Word<V * sizeof(T)>::type;
  word_t word;

  // Zeros where nothing is to be read.
  __device__ __forceinline__ static Vector load(const Vector *from, bool valid) {
    Vector vector = {};
    if (valid) vector.word = from->word;
    return vector;
  }

  __device__ __forceinline__ T operator[](int v) const { return reinterpret_cast<const T *>(&word)[v]; }
  __device__ __forceinline__ void set(int v, T element) { reinterpret_cast<T *>(&word)[v] = element; }
};

// A vector's elements as numbers to sum.
template <typename T, typename A, int V> __device__ __forceinline__ void widen(const Vector<T, V> &from, A (&to)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = A(from[v]);
}

// By whole words: a bfloat16 is the upper half of a float, and element by element it takes three instructions.
template <> __device__ __forceinline__ void widen(const Vector<__nv_bfloat16, 8> &from, float (&to)[8]) {
  const unsigned words[4] = {from.word.x, from.word.y, from.word.z, from.word.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    to[2 * w] = __uint_as_float(words[w] << 16);
    to[2 * w + 1] = __uint_as_float(words[w] & 0xffff0000u);
  }
}

// 16 bytes of memory that nobody writes meanwhile, zeros where nothing is to be read; without a branch, so that several
// are on their way at once.
template <typename T> __device__ __forceinline__ Vector<T, 16 / int(sizeof(T))> load_wide(const T *from, int valid) {
#if defined(__CUDACC__)
  uint4 word;
  asm("{\n"
      ".reg .pred valid;\n"
      "setp.ne.b32 valid, %5, 0;\n"
      "mov.b32 %0, 0;\n"
      "mov.b32 %1, 0;\n"
      "mov.b32 %2, 0;\n"
      "mov.b32 %3, 0;\n"
      "@valid ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=&r"(word.x), "=&r"(word.y), "=&r"(word.z), "=&r"(word.w)
      : "l"(__cvta_generic_to_global(from)), "r"(valid));
  return {word};
#else
  using V = Vector<T, 16 / int(sizeof(T))>;
  return V::load(reinterpret_cast<const V *>(from), valid != 0);
#endif
}
