// The innermost loop of single weights, stored whole or packed: four outputs at a time, with tokens (or pixels) as the vector.
#pragma once

#include <type_traits>

#include "elements.h"

namespace estdgm {

constexpr int FOUR = 4;  // outputs of single weights whose sums are in registers at once

}  // namespace estdgm

namespace {

using estdgm::FOUR;

// Add to the sums of four outputs, of which each entry has a value and a place in the panel, counted in STEP vectors. A
// line of the panel serves one output only, so it is read from the first-level cache.
template <int N, int STEP, class Place>
void add_four(const float *panel, const float *weights, const Place *places, i64 length, float *const (&sums)[FOUR]) {
  constexpr int BITS = 8 * sizeof(Place);
  using Word = std::conditional_t<BITS == 8, uint32_t, uint64_t>;
  static_assert(sizeof(Word) == FOUR * sizeof(Place));
  alignas(VL * 4) vec sum[FOUR][N];
  for (int g = 0; g < FOUR; g++)
    for (int j = 0; j < N; j++) sum[g][j] = *(const vec *)(sums[g] + j * VL);
  for (i64 p = 0; p < length; p++, places += FOUR, weights += FOUR) {
    Word place;
    memcpy(&place, places, sizeof(place));  // one load for all four
    for (int g = 0; g < FOUR; g++, place >>= BITS) {
      const float *x = panel + (i64)(Place)place * STEP * VL;
      for (int j = 0; j < N; j++) sum[g][j] += weights[g] * *(const vec *)(x + j * VL);
    }
  }
  for (int g = 0; g < FOUR; g++)
    for (int j = 0; j < N; j++) *(vec *)(sums[g] + j * VL) = sum[g][j];
}

}  // namespace
