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

// What the values of a matrix's units are: a part of the whole matrix, or all that is stored, counted in the order of the
// lists by row or of those by column.
enum Stored { WHOLE, BY_ROW, BY_COLUMN };

}  // namespace estdgm

namespace {

using estdgm::Stored;
using estdgm::Units;

struct Places {
  i64 out, in;                     // elements from one output of a unit to the next, and from one input
  i64 unit = 0;                    // elements of a unit, if units lie one after the other; 0: in the whole matrix
  const int32_t *order = nullptr;  // which one in memory unit p of the lists that a loop walks is; null: p

  // Of unit p, whose first output and input these are in the matrix.
  i64 of(i64 p, i64 output, i64 input) const {
    return unit ? (order ? order[p] : p) * unit : output * out + input * in;
  }
};

// Which one in memory each unit is that a loop walks.
class Order {
  int32_t *own = nullptr;

 public:
  const int32_t *numbers;  // null: they lie as they are walked

  // `given`: numbers of the units in the order of the lists that count them; null: that order itself.
  explicit Order(const int32_t *given) : numbers(given) {}
  Order(const Order &) = delete;
  ~Order() { free(own); }

  // For a loop that walks the lists of the transposed matrix, where those of `stored` count. False: no memory.
  bool transpose(Units walked, Units stored, int threads) {
    const i64 count = stored.ptr[stored.rows];
    const int32_t *given = numbers;
    own = (int32_t *)floats(count + walked.rows);
    if (!own) return false;
    numbers = own;
    int32_t *next = own + count;
    std::copy(walked.ptr, walked.ptr + walked.rows, next);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int share = 0; share < threads; share++) {  // of the walked rows, which are columns of the stored ones
      const i64 first = share * walked.rows / threads, end = (share + 1) * walked.rows / threads;
      for (i64 row = 0; row < stored.rows; row++) {
        const int32_t *last = stored.idx + stored.ptr[row + 1];
        for (const int32_t *at = std::lower_bound(stored.idx + stored.ptr[row], last, (int32_t)first);
             at < last && *at < end; at++) {
          const i64 p = at - stored.idx;
          own[next[*at]++] = given ? given[p] : p;
        }
      }
    }
    return true;
  }
};

}  // namespace
