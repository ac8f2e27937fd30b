// Where the units of a matrix lie in memory: in dense storage, or one after the other.
#pragma once

#include <algorithm>

#include "elements.h"

namespace estdgm {

using i64 = int64_t;

// Active units of a matrix: unit row o holds columns idx[ptr[o]] .. idx[ptr[o + 1] - 1], r outputs by c inputs each.
struct Units {
  const int32_t *ptr, *idx;
  i64 rows, r, c;

  i64 count(i64 row) const { return ptr[row + 1] - ptr[row]; }
};

// What the values of a matrix's units are: a part of the whole matrix, or all that is stored, in the order of the lists
// by row or of those by column.
enum Stored { WHOLE, BY_ROW, BY_COLUMN };

}  // namespace estdgm

namespace {

using estdgm::Stored;
using estdgm::Units;

struct Places {
  i64 out, in;                     // elements from one output of a unit to the next, and from one input
  i64 unit = 0;                    // elements of a unit, if units lie one after the other; 0: in the whole matrix
  const int32_t *order = nullptr;  // which one unit p of the lists that a loop walks is; null: p

  // Of unit p, whose first output and input these are in the matrix.
  i64 of(i64 p, i64 output, i64 input) const {
    return unit ? (order ? order[p] : p) * unit : output * out + input * in;
  }
};

// Order in which the units of the lists `stored` come where a loop walks those of the transposed matrix.
struct Order {
  int32_t *numbers = nullptr;

  Order() = default;
  Order(const Order &) = delete;
  ~Order() { free(numbers); }

  // False: no memory.
  bool find(Units walked, Units stored, int threads) {
    const i64 count = stored.ptr[stored.rows];
    numbers = (int32_t *)floats(count + walked.rows);
    if (!numbers) return false;
    int32_t *next = numbers + count;
    std::copy(walked.ptr, walked.ptr + walked.rows, next);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int share = 0; share < threads; share++) {  // of the walked rows, which are columns of the stored ones
      const i64 first = share * walked.rows / threads, end = (share + 1) * walked.rows / threads;
      for (i64 row = 0; row < stored.rows; row++) {
        const int32_t *last = stored.idx + stored.ptr[row + 1];
        for (const int32_t *at = std::lower_bound(stored.idx + stored.ptr[row], last, (int32_t)first);
             at < last && *at < end; at++)
          numbers[next[*at]++] = at - stored.idx;
      }
    }
    return true;
  }
};

}  // namespace
