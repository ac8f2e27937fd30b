// Products of a block-sparse linear layer on the CPU: what ops/native compiles on first use and calls.
//
// All three products are one register-blocked loop: a tile of MR x (NV * VL) sums stays in registers while k runs over
// the active blocks. The order of sums depends on nothing but the shapes and the mask, so results are the same for any
// number of threads.
#include "elements.h"

namespace {

// ---- Y[t, r] = sum over active c of A[t, c] B[c, r]: forward and input gradient

template <class E, int MR, int NV>
void linear_tile(const typename E::type *a, i64 lda, const float *packed, const int32_t *cols, i64 blocks, i64 b,
                 const typename E::type *bias, typename E::type *y, i64 ldy) {
  vec sum[MR][NV];
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) sum[i][j] = bias ? E::load(bias + j * VL) : vec{};
  for (i64 p = 0; p < blocks; p++) {
    const typename E::type *ap = a + cols[p] * b;
    const float *bp = packed + p * b * b / E::PAIR;
    for (i64 k = 0; k < b; k += E::PAIR, bp += b)
      for (int i = 0; i < MR; i++) {
        const float s = word(ap + i * lda + k);
        for (int j = 0; j < NV; j++) sum[i][j] = E::mac(sum[i][j], s, bp + j * VL);
      }
  }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) E::store(y + i * ldy + j * VL, sum[i][j]);
}

template <class E, int MR, int NV>
void linear_strip(const typename E::type *a, i64 lda, i64 rows, const float *packed, const int32_t *cols, i64 blocks,
                  i64 b, const typename E::type *bias, typename E::type *y, i64 ldy) {
  i64 t = 0;
  for (; t + MR <= rows; t += MR) linear_tile<E, MR, NV>(a + t * lda, lda, packed, cols, blocks, b, bias, y + t * ldy, ldy);
  for (; t < rows; t++) linear_tile<E, 1, NV>(a + t * lda, lda, packed, cols, blocks, b, bias, y + t * ldy, ldy);
}

// All columns of one block row, for `rows` tokens.
template <class E>
void linear_block_row(const typename E::type *a, i64 lda, i64 rows, const float *packed, const int32_t *cols, i64 blocks,
                      i64 b, const typename E::type *bias, typename E::type *y, i64 ldy) {
  for (i64 j = 0; j < b;) {
    const i64 left = (b - j) / VL;
    const float *pj = packed + j;
    const typename E::type *bj = bias ? bias + j : nullptr;
    if (WIDE && left >= 4) {
      linear_strip<E, 6, 4>(a, lda, rows, pj, cols, blocks, b, bj, y + j, ldy);
      j += 4 * VL;
    } else if (left >= 2) {
      linear_strip<E, WIDE ? 12 : 6, 2>(a, lda, rows, pj, cols, blocks, b, bj, y + j, ldy);
      j += 2 * VL;
    } else {
      linear_strip<E, 12, 1>(a, lda, rows, pj, cols, blocks, b, bj, y + j, ldy);
      j += VL;
    }
  }
}

// Lay the active blocks out as words (k / PAIR, n), one block after the other; weight[n, k] is at n * sn + k * sk.
template <class E>
void pack(const typename E::type *weight, i64 sn, i64 sk, const int32_t *ptr, const int32_t *idx, i64 rows, i64 b,
          float *packed, int threads) {
  using T = typename E::type;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (i64 r = 0; r < rows; r++)
    for (i64 p = ptr[r]; p < ptr[r + 1]; p++) {
      const T *from = weight + r * b * sn + idx[p] * b * sk;
      T *to = (T *)(packed + p * b * b / E::PAIR);
      for (i64 n0 = 0; n0 < b; n0 += 16)
        for (i64 k = 0; k < b; k += E::PAIR)
          for (i64 n = n0; n < n0 + 16; n++)
            for (int half = 0; half < E::PAIR; half++) to[k * b + n * E::PAIR + half] = from[n * sn + (k + half) * sk];
    }
}

template <class E>
int linear(const typename E::type *x, i64 ldx, i64 tokens, const typename E::type *weight, i64 sn, i64 sk,
           const typename E::type *bias, const int32_t *ptr, const int32_t *idx, i64 rows, i64 in, i64 b,
           typename E::type *y, i64 ldy, int threads) {
  float *packed = (float *)malloc((size_t)ptr[rows] * b * b / E::PAIR * 4 + 64);
  if (!packed) return 1;
  pack<E>(weight, sn, sk, ptr, idx, rows, b, packed, threads);
  // A tile of tokens stays in the second-level cache while all block rows pass over it.
  i64 tile = (512 * 1024) / (in * (i64)sizeof(typename E::type)) / 12 * 12;
  tile = tile < 24 ? 24 : tile > 192 ? 192 : tile;
  const i64 tiles = (tokens + tile - 1) / tile;
  i64 groups = (4 * threads + tiles - 1) / tiles;  // few tokens: share the block rows as well
  groups = groups > rows ? rows : groups;
#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(threads)
  for (i64 i = 0; i < tiles; i++)
    for (i64 g = 0; g < groups; g++) {
      const i64 t = i * tile, n = tokens - t < tile ? tokens - t : tile;
      for (i64 r = g * rows / groups; r < (g + 1) * rows / groups; r++)
        linear_block_row<E>(x + t * ldx, ldx, n, packed + (i64)ptr[r] * b * b / E::PAIR, idx + ptr[r],
                            ptr[r + 1] - ptr[r], b, bias ? bias + r * b : nullptr, y + t * ldy + r * b, ldy);
    }
  free(packed);
  return 0;
}

// ---- dW[r, c] = sum over t of dY[t, r] X[t, c], for active blocks

// `a` and `x` are words (t / PAIR, column); sums go on from `sums` unless `first`.
template <class E, int MR, int NV>
void outer_tile(const float *a, i64 lda, const float *x, i64 ldx, i64 words, bool first, float *sums, i64 lds) {
  vec sum[MR][NV];
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) sum[i][j] = first ? vec{} : *(const vec *)(sums + i * lds + j * VL);
  for (i64 t = 0; t < words; t++)
    for (int i = 0; i < MR; i++) {
      const float s = word(a + t * lda + i);
      for (int j = 0; j < NV; j++) sum[i][j] = E::mac(sum[i][j], s, x + t * ldx + j * VL);
    }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) *(vec *)(sums + i * lds + j * VL) = sum[i][j];
}

template <class E, int MR, int NV>
void outer_strip(const float *a, i64 lda, const float *x, i64 ldx, i64 words, bool first, i64 b, float *sums, i64 lds) {
  i64 m = 0;
  for (; m + MR <= b; m += MR) outer_tile<E, MR, NV>(a + m, lda, x, ldx, words, first, sums + m * lds, lds);
  for (; m < b; m += 2) outer_tile<E, 2, NV>(a + m, lda, x, ldx, words, first, sums + m * lds, lds);
}

template <class E>
void outer_block(const float *a, i64 lda, const float *x, i64 ldx, i64 words, bool first, i64 b, float *sums, i64 lds) {
  for (i64 j = 0; j < b;) {
    const i64 left = (b - j) / VL;
    if (WIDE && left >= 4) {
      outer_strip<E, 6, 4>(a, lda, x + j, ldx, words, first, b, sums + j, lds);
      j += 4 * VL;
    } else if (left >= 2) {
      outer_strip<E, WIDE ? 12 : 6, 2>(a, lda, x + j, ldx, words, first, b, sums + j, lds);
      j += 2 * VL;
    } else {
      outer_strip<E, 12, 1>(a, lda, x + j, ldx, words, first, b, sums + j, lds);
      j += VL;
    }
  }
}

// `dy` and `x` as words; `dw` (out, in) need not be initialised: inactive blocks become 0.
template <class E>
int grad_weight(const float *dy, i64 ldd, const float *x, i64 ldx, i64 words, const int32_t *ptr, const int32_t *idx,
                i64 rows, i64 b, typename E::type *dw, i64 in, int threads) {
  using T = typename E::type;
  const i64 blocks = ptr[rows];
  i64 run = blocks / (8 * threads);  // blocks that one task computes: neighbours share a block row of dy
  run = run < 1 ? 1 : run > 32 ? 32 : run;
  bool failed = false;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (i64 row = 0; row < rows * b; row++) {
      i64 from = 0;
      for (i64 p = ptr[row / b]; p <= ptr[row / b + 1]; p++) {
        const i64 to = p < ptr[row / b + 1] ? idx[p] * b : in;
        memset(dw + row * in + from, 0, (to - from) * sizeof(T));
        from = to + b;
      }
    }
    float *sums = (float *)malloc((size_t)run * b * b * 4);
    if (!sums) {
#pragma omp atomic write
      failed = true;
    }
#pragma omp for schedule(dynamic, 1)
    for (i64 begin = 0; begin < blocks; begin += run) {
      if (!sums) continue;
      const i64 end = begin + run < blocks ? begin + run : blocks;
      i64 first_row = 0;
      while (ptr[first_row + 1] <= begin) first_row++;
      // So many tokens at a time that their rows of dy and x stay in the second-level cache.
      for (i64 t = 0; t < words; t += 64) {
        i64 r = first_row;
        for (i64 p = begin; p < end; p++) {
          while (ptr[r + 1] <= p) r++;
          outer_block<E>(dy + t * ldd + r * b, ldd, x + t * ldx + idx[p] * b, ldx, words - t < 64 ? words - t : 64,
                         t == 0, b, sums + (p - begin) * b * b, b);
        }
      }
      i64 r = first_row;
      for (i64 p = begin; p < end; p++) {
        while (ptr[r + 1] <= p) r++;
        for (i64 m = 0; m < b; m++)
          for (i64 j = 0; j < b; j += VL)
            E::store(dw + (r * b + m) * in + idx[p] * b + j, *(const vec *)(sums + (p - begin) * b * b + m * b + j));
      }
    }
    free(sums);
  }
  return failed;
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

// Strides and sizes in elements; a result of 1: no memory.
extern "C" {

int estdgm_has_bfloat16() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

int estdgm_linear_float32(const float *x, i64 ldx, i64 tokens, const float *weight, i64 sn, i64 sk, const float *bias,
                          const int32_t *ptr, const int32_t *idx, i64 rows, i64 in, i64 b, float *y, i64 ldy,
                          int threads) {
  return linear<Float>(x, ldx, tokens, weight, sn, sk, bias, ptr, idx, rows, in, b, y, ldy, threads);
}

int estdgm_grad_weight_float32(const float *dy, i64 ldd, const float *x, i64 ldx, i64 tokens, const int32_t *ptr,
                               const int32_t *idx, i64 rows, i64 in, i64 b, float *dw, int threads) {
  return grad_weight<Float>(dy, ldd, x, ldx, tokens, ptr, idx, rows, b, dw, in, threads);
}

#if defined(__AVX512BF16__)
int estdgm_linear_bfloat16(const uint16_t *x, i64 ldx, i64 tokens, const uint16_t *weight, i64 sn, i64 sk,
                           const uint16_t *bias, const int32_t *ptr, const int32_t *idx, i64 rows, i64 in, i64 b,
                           uint16_t *y, i64 ldy, int threads) {
  return linear<BFloat16>(x, ldx, tokens, weight, sn, sk, bias, ptr, idx, rows, in, b, y, ldy, threads);
}

int estdgm_grad_weight_bfloat16(const uint16_t *dy, i64 ldd, const uint16_t *x, i64 ldx, i64 tokens, const int32_t *ptr,
                                const int32_t *idx, i64 rows, i64 in, i64 b, uint16_t *dw, int threads) {
  const i64 out = rows * b, words = (tokens + 1) / 2;
  uint32_t *pairs = (uint32_t *)malloc((size_t)words * (out + in) * 4);
  if (!pairs) return 1;
  uint32_t *x_pairs = pairs + words * out;
  pair_rows(dy, ldd, tokens, out, pairs, threads);
  pair_rows(x, ldx, tokens, in, x_pairs, threads);
  const int failed = grad_weight<BFloat16>((const float *)pairs, out, (const float *)x_pairs, in, words, ptr, idx, rows,
                                           b, dw, in, threads);
  free(pairs);
  return failed;
}
#endif

}  // extern "C"
