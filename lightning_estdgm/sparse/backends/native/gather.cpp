// Single elements of several tensors, read into one vector and written back.
//
// Element j of tensor i that takes part is at places[i][j] there; counting on over all tensors, its number n is at
// order[n] of the vector. No place may be there twice.
#include <omp.h>

#include <algorithm>

#include "elements.h"

namespace {

constexpr i64 FEW = 1 << 13;  // elements that one thread moves

struct Elements {
  void *const *tensors;
  const int32_t *const *places;
  const i64 *counts;
  i64 count;  // of tensors
  void *vector;
  const int32_t *order;
};

template <class T, class Move>
void each(const Elements &all, int threads, Move move) {
  i64 total = 0;
  for (i64 i = 0; i < all.count; i++) total += all.counts[i];
  T *vector = (T *)all.vector;
#pragma omp parallel num_threads(total < FEW ? 1 : threads)
  {
    const i64 thread = omp_get_thread_num(), count = omp_get_num_threads();
    const i64 first = thread * total / count, end = (thread + 1) * total / count;
    for (i64 i = 0, begin = 0; i < all.count; begin += all.counts[i++]) {
      T *tensor = (T *)all.tensors[i];
      const int32_t *places = all.places[i] - begin;
      const i64 last = std::min(end, begin + all.counts[i]);
      for (i64 n = std::max(first, begin); n < last; n++) move(tensor[places[n]], vector[all.order[n]]);
    }
  }
}

}  // namespace

extern "C" {

void estdgm_gather(void *const *tensors, const int32_t *const *places, const i64 *counts, i64 count, void *vector,
                   const int32_t *order, i64 bytes, int threads) {
  by_size(bytes, [&](auto kind) {
    using T = decltype(kind);
    each<T>({tensors, places, counts, count, vector, order}, threads, [](T &own, T &copy) { copy = own; });
  });
}

void estdgm_scatter(void *const *tensors, const int32_t *const *places, const i64 *counts, i64 count, void *vector,
                    const int32_t *order, i64 bytes, int threads) {
  by_size(bytes, [&](auto kind) {
    using T = decltype(kind);
    each<T>({tensors, places, counts, count, vector, order}, threads, [](T &own, T &copy) { own = copy; });
  });
}
}
