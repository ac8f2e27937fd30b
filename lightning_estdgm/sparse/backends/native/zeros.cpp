// Zeros outside a mask: everything is read, and only what is not zero there is written.
#include <algorithm>
#include <cstring>
#include <vector>

#include "elements.h"

namespace {

constexpr i64 FEW = 1 << 16;     // elements that one thread looks at
constexpr i64 STRETCH = 1 << 9;  // elements that are looked at before any is written
constexpr i64 AHEAD = 1 << 11;   // elements between what is looked at and what is asked of memory

// Gives each flag to `run` elements.
void spread(uint8_t *to, const uint8_t *flags, i64 count, i64 step, i64 run) {
  for (i64 i = 0; i < count; i++, to += run)
    if (run == 4)
      std::memset(to, flags[i * step], 4);  // of a size that is known: one store
    else
      std::memset(to, flags[i * step], run);
}

// A weight of rows * r lines, each of columns * c * inner elements that lie side by side. Elements are bits: NaN and -0 are
// not zero.
template <class T>
void zero_outside(T *weight, i64 rows, i64 r, i64 columns, i64 run, const uint8_t *mask, i64 row_step, i64 column_step,
                  int threads) {
  const i64 length = columns * run, size = rows * r * length;
#pragma omp parallel num_threads(size < FEW ? 1 : threads)
  {
    std::vector<uint8_t> expanded(run == 1 && column_step == 1 ? 0 : length);
#pragma omp for schedule(static)
    for (i64 row = 0; row < rows; row++) {
      const uint8_t *keep = mask + row * row_step;
      if (!expanded.empty()) {
        spread(expanded.data(), keep, columns, column_step, run);
        keep = expanded.data();
      }
      for (i64 line = row * r; line < (row + 1) * r; line++)
        for (i64 from = 0; from < length; from += STRETCH) {
          T *w = weight + line * length + from;
          const uint8_t *k = keep + from;
          const i64 count = std::min(STRETCH, length - from);
          for (i64 i = 0; i < count; i += 64 / (i64)sizeof(T)) __builtin_prefetch(w + i + AHEAD);
          T found = 0;
          for (i64 i = 0; i < count; i++) found |= k[i] ? T(0) : w[i];
          if (found)
            for (i64 i = 0; i < count; i++) w[i] = k[i] ? w[i] : T(0);
        }
    }
  }
}

}  // namespace

extern "C" {

// Of a weight of 1, 2, 4 or 8 bytes an element; `run` elements of a line share a flag of the mask.
void estdgm_zero_outside(void *weight, i64 bytes, i64 rows, i64 r, i64 columns, i64 run, const void *mask, i64 row_step,
                         i64 column_step, int threads) {
  by_size(bytes, [&](auto kind) {
    using T = decltype(kind);
    zero_outside((T *)weight, rows, r, columns, run, (const uint8_t *)mask, row_step, column_step, threads);
  });
}
}
