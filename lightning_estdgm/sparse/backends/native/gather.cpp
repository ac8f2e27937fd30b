// Single elements of a tensor, read into a vector and written back. No place may be there twice.
#include "elements.h"

namespace {

constexpr i64 FEW = 1 << 13;  // elements that one thread moves

template <class T>
void gather(T *to, const T *from, const int32_t *places, i64 count, int threads) {
#pragma omp parallel for schedule(static) num_threads(count < FEW ? 1 : threads)
  for (i64 i = 0; i < count; i++) to[i] = from[places[i]];
}

template <class T>
void scatter(T *to, const T *from, const int32_t *places, i64 count, int threads) {
#pragma omp parallel for schedule(static) num_threads(count < FEW ? 1 : threads)
  for (i64 i = 0; i < count; i++) to[places[i]] = from[i];
}

}  // namespace

extern "C" {

void estdgm_gather(void *to, const void *from, i64 bytes, const int32_t *places, i64 count, int threads) {
  by_size(bytes, [&](auto kind) {
    using T = decltype(kind);
    gather((T *)to, (const T *)from, places, count, threads);
  });
}

void estdgm_scatter(void *to, const void *from, i64 bytes, const int32_t *places, i64 count, int threads) {
  by_size(bytes, [&](auto kind) {
    using T = decltype(kind);
    scatter((T *)to, (const T *)from, places, count, threads);
  });
}
}
