// Stored values as floats: float, bfloat16 (its bits), or int8 without its scale.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "packed.h"

namespace {

template <int W>
struct Lanes {
  typedef float type __attribute__((vector_size(W * 4), aligned(4), may_alias));
  typedef int32_t words __attribute__((vector_size(W * 4)));
  typedef uint16_t halves __attribute__((vector_size(W * 2), aligned(2), may_alias));
  typedef int8_t bytes __attribute__((vector_size(W), aligned(1), may_alias));
};

template <int W>
using lanes = typename Lanes<W>::type;

template <int W>
inline lanes<W> values_at(const float *p) {
  return *(const lanes<W> *)p;
}

template <int W>
inline lanes<W> values_at(const uint16_t *p) {
  return (lanes<W>)(__builtin_convertvector(*(const typename Lanes<W>::halves *)p, typename Lanes<W>::words) << 16);
}

template <int W>
inline lanes<W> values_at(const int8_t *p) {
#if defined(__AVX512F__)
  if constexpr (W == 16) return (lanes<W>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#endif
  return __builtin_convertvector(
      __builtin_convertvector(*(const typename Lanes<W>::bytes *)p, typename Lanes<W>::words), lanes<W>);
}

// Calls run(values as what they are).
template <class Run>
auto with_values(const void *values, estdgm::Values type, Run run) {
  switch (type) {
    case estdgm::Values::float32: return run((const float *)values);
    case estdgm::Values::bfloat16: return run((const uint16_t *)values);
    default: return run((const int8_t *)values);
  }
}

}  // namespace
