// Products of a block-sparse linear layer on the CPU: what ops/native compiles on first use and calls.
//
// All three products are one register-blocked loop: a tile of MR x (NV * VL) sums stays in registers while k runs over
// the active blocks, and what a later tile reads is fetched into the cache meanwhile. The order of sums depends on
// nothing but the shapes and the mask, so results are the same for any number of threads.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("ira-region=all")  // else GCC moves sums of bfloat16 to the stack and back in the innermost loop
#endif

#include <omp.h>

#include "elements.h"
#include "kept.h"
#include "places.h"
#include "share.h"
#include "tile.h"

namespace {

// Columns of the strip of a block of which `left` are left.
i64 strip_width(i64 left) {
  if (!WIDE) return 2 * VL;
  return left >= 4 * VL ? 4 * VL : left >= 2 * VL ? 2 * VL : VL;
}

// ---- Y[t, r] = sum over active c of A[t, c] B[c, r]: forward and input gradient

// What all tiles of one call of `linear` share.
template <class E>
struct Linear {
  using T = typename E::type;
  const T *x;
  i64 ldx, tokens;
  const float *packed;
  const T *bias;
  const int32_t *ptr, *idx;
  i64 rows, in, b;
  T *y;
  i64 ldy;

  // NV vectors of columns of a block row from column n of y on, for tokens t .. end - 1. Meanwhile, of the tokens that
  // come `tile` later, this strip's share of x comes into the cache.
  template <int MR, int NV>
  void strip(i64 r, i64 n, i64 t, i64 end, i64 tile) const {
    const i64 width = rows * b / (NV * VL), place = n / (NV * VL);
    const Strip<E> all = {x, ldx, tokens, x, ldx, packed + (ptr[r] * b + n - r * b) * b / E::PAIR, b * b / E::PAIR, NV * VL,
                          idx + ptr[r], ptr[r + 1] - ptr[r], b, bias ? bias + n : nullptr, y + n, ldy,
                          place * in / width, (place + 1) * in / width};
    all.template compute<MR, NV>(t, end, tile);
  }

  void block_row(i64 r, i64 t, i64 end) const {
    const i64 tile = end - t;
    for (i64 j = 0, width; j < b; j += width) {
      width = strip_width(b - j);
      if (!WIDE)
        strip<6, 2>(r, r * b + j, t, end, tile);
      else if (width == 4 * VL)
        strip<6, 4>(r, r * b + j, t, end, tile);
      else if (width == 2 * VL)
        strip<12, 2>(r, r * b + j, t, end, tile);
      else
        strip<12, 1>(r, r * b + j, t, end, tile);
    }
  }
};

// Lay the active blocks out strip by strip, each as words (k / PAIR, n).
template <class E>
void pack(const typename E::type *weight, Places places, const int32_t *ptr, const int32_t *idx, i64 rows, i64 b,
          float *packed, int threads) {
  using T = typename E::type;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (i64 r = 0; r < rows; r++)
    for (i64 p = ptr[r]; p < ptr[r + 1]; p++) {
      const T *from = weight + places.of(p, r * b, idx[p] * b);
      T *to = (T *)(packed + p * b * b / E::PAIR);
      for (i64 j = 0, width; j < b; j += width, from += width * places.out, to += width * b) {
        width = strip_width(b - j);
        for (i64 n0 = 0; n0 < width; n0 += 8)
          for (i64 k = 0; k < b; k += E::PAIR)
            for (i64 n = n0; n < n0 + 8; n++)
              for (int half = 0; half < E::PAIR; half++)
                to[k * width + n * E::PAIR + half] = from[n * places.out + (k + half) * places.in];
      }
    }
}

template <class E>
int linear(const typename E::type *x, i64 ldx, i64 tokens, const typename E::type *weight, Places places,
           const typename E::type *bias, const int32_t *ptr, const int32_t *idx, i64 rows, i64 in, i64 b,
           typename E::type *y, i64 ldy, void *kept, int threads) {
  const estdgm::PackedValues packed((estdgm::Kept *)kept, ptr[rows] * b * b / E::PAIR, [&](float *to) {
    pack<E>(weight, places, ptr, idx, rows, b, to, threads);
  });
  if (!packed.data) return 1;
  const Division parts(tokens, in * (i64)sizeof(typename E::type), rows, threads);
  const Linear<E> all = {x, ldx, tokens, packed.data, bias, ptr, idx, rows, in, b, y, ldy};
  Shares shares(parts.tiles * parts.groups, threads);
#pragma omp parallel num_threads(threads)
  shares.work(omp_get_thread_num(), [&](i64 task) {
    const i64 i = task / parts.groups, g = task % parts.groups, t = parts.token(i), end = parts.token(i + 1);
    for (i64 r = g * rows / parts.groups; r < (g + 1) * rows / parts.groups; r++)
      all.block_row(r, t, end < tokens ? end : tokens);
  });
  return 0;
}

// ---- dW[r, c] = sum over t of dY[t, r] X[t, c], for active blocks

// Rows of dy and x, as words (t / PAIR, column), that a task needs next.
struct Panels {
  const float *a, *x;
};

// Sums go on from `sums` unless `first`. Meanwhile one cache line of each row of the next panels is fetched.
template <class E, int MR, int NV>
void outer_tile(Panels now, Panels next, i64 lda, i64 ldx, i64 words, bool first, float *sums, i64 lds) {
  alignas(VL * 4) vec sum[MR][NV];
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) sum[i][j] = first ? vec{} : *(const vec *)(sums + i * lds + j * VL);
  for (i64 t = 0; t < words; t++) {
    __builtin_prefetch(next.a + t * lda, 0, 2);
    __builtin_prefetch(next.x + t * ldx, 0, 2);
    alignas(VL * 4) vec xv[NV];
    for (int j = 0; j < NV; j++) xv[j] = *(const vec *)(now.x + t * ldx + j * VL);
    for (int i = 0; i < MR; i++) {
      const float s = word(now.a + t * lda + i);
      for (int j = 0; j < NV; j++) sum[i][j] = E::mac(sum[i][j], s, xv[j]);
    }
  }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) *(vec *)(sums + i * lds + j * VL) = sum[i][j];
}

// One active block, or `height` of its rows: sums (height, b) += a^T x over `words` words.
template <class E>
struct Outer {
  Panels now, next;
  i64 lda, ldx, words, height, b;
  bool first;
  float *sums;
  i64 line = 0;  // of 16 columns: the one to fetch next

  template <int MR, int NV>
  void tiles(i64 m, i64 j) {
    for (; m + MR <= height; m += MR, line++) {
      const Panels here = {now.a + m, now.x + j};
      const Panels fetch = {line * 16 < height ? next.a + line * 16 : here.a,
                            line * 16 < b ? next.x + line * 16 : here.x};
      outer_tile<E, MR, NV>(here, fetch, lda, ldx, words, first, sums + m * b + j, b);
    }
    if constexpr (MR > 2)
      if (m < height) tiles<MR - 2, NV>(m, j);
  }

  void block() {
    for (i64 j = 0, width; j < b; j += width) {
      width = strip_width(b - j);
      if (!WIDE)
        tiles<6, 2>(0, j);
      else if (width == 4 * VL)
        tiles<6, 4>(0, j);
      else if (width == 2 * VL)
        tiles<8, 2>(0, j);
      else
        tiles<16, 1>(0, j);
    }
  }
};

// `dy` and `x` as words; A whole `dw` (out, in) need not be initialised: inactive blocks become 0.
template <class E>
struct GradWeight {
  using T = typename E::type;
  const float *dy;
  i64 ldd;
  const float *x;
  i64 ldx, words;
  const int32_t *ptr, *idx;
  i64 rows, b;
  T *dw;
  Places places;  // of the blocks in dw
  i64 in;
  i64 run;    // blocks that one task computes: neighbours share a block row of dy
  i64 parts;  // few blocks: tasks share the rows of each as well

  static constexpr i64 CHUNK = 128;  // words of rows of dy and x that stay in the second-level cache

  i64 tasks() const { return (ptr[rows] + run - 1) / run * parts; }

  void zero(i64 row) const {
    i64 from = 0;
    for (i64 p = ptr[row / b]; p <= ptr[row / b + 1]; p++) {
      const i64 to = p < ptr[row / b + 1] ? idx[p] * b : in;
      memset(dw + row * in + from, 0, (to - from) * sizeof(T));
      from = to + b;
    }
  }

  void work(i64 task, float *sums) const {
    const i64 begin = task / parts * run, end = begin + run < ptr[rows] ? begin + run : ptr[rows], height = b / parts;
    i64 first_row = 0;
    while (ptr[first_row + 1] <= begin) first_row++;
    const float *first_dy = dy + task % parts * height;
    Panels now = {first_dy + first_row * b, x + idx[begin] * b};
    for (i64 t = 0; t < words; t += CHUNK)
      for (i64 p = begin, r = first_row; p < end; p++) {
        const bool again = p + 1 == end;
        const i64 next_t = again ? t + CHUNK : t, next_p = again ? begin : p + 1;
        r = again ? first_row : r;
        while (ptr[r + 1] <= next_p) r++;
        Panels next = now;
        if (next_t < words) next = {first_dy + next_t * ldd + r * b, x + next_t * ldx + idx[next_p] * b};
        Outer<E>{now, next, ldd, ldx, words - t < CHUNK ? words - t : CHUNK, height, b, t == 0,
                 sums + (p - begin) * height * b}
            .block();
        now = next;
      }
    for (i64 p = begin, r = first_row; p < end; p++) {
      while (ptr[r + 1] <= p) r++;
      for (i64 m = 0; m < height; m++)
        for (i64 j = 0; j < b; j += VL)
          E::store(dw + places.of(p, r * b, idx[p] * b) + (task % parts * height + m) * places.out + j,
                   *(const vec *)(sums + ((p - begin) * height + m) * b + j));
    }
  }
};

template <class E>
int grad_weight(const float *dy, i64 ldd, const float *x, i64 ldx, i64 words, const int32_t *ptr, const int32_t *idx,
                i64 rows, i64 b, typename E::type *dw, Places places, i64 in, int threads) {
  const i64 wanted = 8 * threads, most = b < 48 ? 32 : 65536 / (b * b);  // sums of 256 kB at most
  i64 run = ptr[rows] / wanted, parts = 1;
  run = run > most ? most : run;
  run = run < 1 ? 1 : run;
  while (ptr[rows] * parts < wanted && b / parts % 64 == 0) parts *= 2;
  const GradWeight<E> all = {dy, ldd, x, ldx, words, ptr, idx, rows, b, dw, places, in, run, parts};
  Shares shares(all.tasks(), threads);
  bool failed = false;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static) nowait
    for (i64 row = 0; row < (places.unit ? 0 : rows * b); row++) all.zero(row);
    float *sums = floats(run * (b / parts) * b);
    if (sums)
      shares.work(omp_get_thread_num(), [&](i64 task) { all.work(task, sums); });
    else
#pragma omp atomic write
      failed = true;
    free(sums);
  }
  return failed;
}

// Of the blocks in dW: in the whole one, or of their values alone.
Places places_of(int stored, const int32_t *order, i64 cols, i64 b) {
  return {stored ? b : cols * b, 1, stored ? b * b : 0, order};
}

#if defined(__AVX512BF16__)
// Words (t / 2, column) of a bfloat16 matrix (tokens, columns); an odd last token is paired with zeros.
void pair_rows(const uint16_t *from, i64 ld, i64 tokens, i64 columns, uint32_t *to, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (i64 t = 0; t < tokens; t += 2)
    for (i64 c = 0; c < columns; c++)
      to[t / 2 * columns + c] = from[t * ld + c] | (t + 1 < tokens ? (uint32_t)from[(t + 1) * ld + c] << 16 : 0u);
}
#endif

}  // namespace

// Strides and sizes in elements; a result of 1: no memory. `stored` and `order`: as in units.cpp.
extern "C" {

int estdgm_has_bfloat16() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

#define LINEAR(E, T, name)                                                                                            \
  int estdgm_linear_##name(const T *x, i64 ldx, i64 tokens, const T *weight, i64 sn, i64 sk, const T *bias,            \
                           const int32_t *ptr, const int32_t *idx, const int32_t *tptr, const int32_t *tidx, i64 rows, \
                           i64 cols, i64 b, int stored, const int32_t *order, T *y, i64 ldy, void *kept,              \
                           int threads) {                                                                             \
    Order walked(order);                                                                                              \
    if (stored == Stored::BY_COLUMN && !walked.transpose({ptr, idx, rows, b, b}, {tptr, tidx, cols, b, b}, threads))  \
      return 1;                                                                                                       \
    const Places places = {sn, sk, stored ? b * b : 0, walked.numbers};                                               \
    return linear<E>(x, ldx, tokens, weight, places, bias, ptr, idx, rows, cols * b, b, y, ldy, kept, threads);       \
  }

LINEAR(Float, float, float32)

int estdgm_grad_weight_float32(const float *dy, i64 ldd, const float *x, i64 ldx, i64 tokens, const int32_t *ptr,
                               const int32_t *idx, i64 rows, i64 cols, i64 b, int stored, const int32_t *order, float *dw,
                               int threads) {
  return grad_weight<Float>(dy, ldd, x, ldx, tokens, ptr, idx, rows, b, dw, places_of(stored, order, cols, b), cols * b,
                            threads);
}

#if defined(__AVX512BF16__)
LINEAR(BFloat16, uint16_t, bfloat16)

int estdgm_grad_weight_bfloat16(const uint16_t *dy, i64 ldd, const uint16_t *x, i64 ldx, i64 tokens, const int32_t *ptr,
                                const int32_t *idx, i64 rows, i64 cols, i64 b, int stored, const int32_t *order, uint16_t *dw,
                                int threads) {
  const i64 out = rows * b, in = cols * b, words = (tokens + 1) / 2;
  uint32_t *pairs = (uint32_t *)malloc((size_t)words * (out + in) * 4);
  if (!pairs) return 1;
  uint32_t *x_pairs = pairs + words * out;
  pair_rows(dy, ldd, tokens, out, pairs, threads);
  pair_rows(x, ldx, tokens, in, x_pairs, threads);
  const int failed = grad_weight<BFloat16>((const float *)pairs, out, (const float *)x_pairs, in, words, ptr, idx, rows,
                                           b, dw, places_of(stored, order, cols, b), in, threads);
  free(pairs);
  return failed;
}
#endif

}  // extern "C"
