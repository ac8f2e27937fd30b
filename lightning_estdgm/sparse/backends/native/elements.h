// What a value is to the loops of this folder: how it is read, multiplied and added up, and stored.
//
// An operand is read as 32-bit words: one float, or two neighbouring bfloat16 along k, which the dot-product instruction
// multiplies and adds at once. Sums are in float.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

using i64 = int64_t;

// Calls `run` with an integer of so many bytes: where values are moved, and not computed with.
template <class Run>
void by_size(i64 bytes, Run run) {
  if (bytes == 1) run(uint8_t());
  if (bytes == 2) run(uint16_t());
  if (bytes == 4) run(uint32_t());
  if (bytes == 8) run(uint64_t());
}

#if defined(__AVX512F__)
constexpr int VL = 16;  // floats in a vector register
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif
// Vectors side by side in a tile, and its rows for 1, 2 and 4 of them: 16 or 32 registers hold sums and operands.
constexpr bool WIDE = VL == 16;

typedef float vec __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint16_t half_vec __attribute__((vector_size(VL * 2), aligned(2), may_alias));

struct Float {
  using type = float;
  static constexpr int PAIR = 1;  // values of k in a word
  static vec mac(vec sum, float a, vec b) { return sum + a * b; }
  static vec mac(vec sum, float a, const float *b) { return mac(sum, a, *(const vec *)b); }
  static vec load(const type *p) { return *(const vec *)p; }
  static void store(type *p, vec v) { *(vec *)p = v; }
  static float value(type x) { return x; }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
  using type = uint16_t;
  static constexpr int PAIR = 2;
  static vec mac(vec sum, float a, vec b) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
  }
  static vec mac(vec sum, float a, const float *b) { return mac(sum, a, *(const vec *)b); }
  static vec load(const type *p) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
  }
  static void store(type *p, vec v) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)v)); }
  static float value(type x) {
    const uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
  }
};
#endif

// The value, which the compiler then keeps: else GCC reads what is in memory anew for each product with it.
inline vec in_register(vec value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#endif
  return value;
}

// Memory for so many floats, or null.
inline float *floats(i64 count) { return (float *)aligned_alloc(64, (size_t)(count + 16) / 16 * 64); }

// One word of an operand; reads two bfloat16 as the bits of a float, which nothing computes with.
inline float word(const void *p) {
  float f;
  memcpy(&f, p, 4);
  return f;
}

}  // namespace
