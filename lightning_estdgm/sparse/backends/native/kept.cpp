// What is kept of a weight over calls, and a sum by which a weight is known to be the same.
#include "kept.h"

#include <new>

#include "images.h"
#include "places.h"

namespace {

constexpr i64 FEW = 1 << 16;  // weights that one thread sums

// The taps of each pair of an output and an input. Columns of the units are inputs with all taps, or, where depth is the
// number of taps, taps of inputs.
struct Kernel {
  const Tap *taps;
  i64 count, depth;

  // Whether the taps of one input lie side by side, and those of the next after them.
  bool adjacent(i64 sk) const {
    for (i64 t = 0; t < count; t++)
      if (taps[t].weight != t) return false;
    return sk == count;
  }
};

// Each weight's bits times an odd number of its place: 64 bits hold every product, so a change of one weight changes the
// sum, and changes of several leave it only by a chance of 2^-64 or so.
template <class T>
uint64_t sum_of(const T *weight, i64 sn, i64 sk, Kernel kernel, Units units, int threads) {
  const bool by_tap = kernel.depth > 1;  // r = c = 1
  if (!by_tap && kernel.adjacent(sk)) {
    units.c *= kernel.count;
    kernel.count = sk = 1;
  }
  const i64 taps = by_tap ? 1 : kernel.count, size = units.r * units.c * taps;
  const int shares = units.ptr[units.rows] * size < FEW ? 1 : threads;
  const bool by_row = sk == 1 || sn != 1;
  const i64 lines = by_row ? units.r : units.c, length = by_row ? units.c : units.r;
  const i64 line_step = by_row ? sn : sk, step = by_row ? sk : sn;
  uint64_t sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum) num_threads(shares)
  for (i64 row = 0; row < units.rows; row++)
    for (i64 p = units.ptr[row]; p < units.ptr[row + 1]; p++) {
      const i64 column = units.idx[p] * units.c;
      const T *unit = weight + row * units.r * sn + (by_tap ? column / kernel.depth : column) * sk;
      uint32_t place = (uint32_t)(p * size);
      for (i64 line = 0; line < lines; line++, unit += line_step)
        for (i64 t = 0; t < taps; t++) {
          const T *from = unit + kernel.taps[by_tap ? column % kernel.depth : t].weight;
          for (i64 i = 0; i < length; i++) sum += (uint64_t)(uint32_t)from[i * step] * (place++ * 0x9E3779B1u | 1u);
        }
    }
  return sum;
}

}  // namespace

using estdgm::Kept;

extern "C" {

void *estdgm_kept_new() { return new (std::nothrow) Kept; }

void estdgm_kept_free(void *kept) { delete (Kept *)kept; }

i64 estdgm_packings() { return estdgm::packings; }

// Of the active units of a weight of 4 or 2 bytes an element, with `count` taps of three numbers each.
uint64_t estdgm_weight_sum(const void *weight, i64 bytes, i64 sn, i64 sk, const i64 *taps, i64 count, i64 depth,
                           const int32_t *ptr, const int32_t *idx, i64 rows, i64 r, i64 c, int threads) {
  const Units units = {ptr, idx, rows, r, c};
  const Kernel kernel = {(const Tap *)taps, count, depth};
  return bytes == 4 ? sum_of((const uint32_t *)weight, sn, sk, kernel, units, threads)
                    : sum_of((const uint16_t *)weight, sn, sk, kernel, units, threads);
}
}
