// The register-blocked tile of a product of tokens with active blocks: outputs are the vector.
#pragma once

#include "elements.h"

namespace {

// Part of some rows that a later tile reads, fetched into the cache a line of each at a time.
struct Ahead {
  const char *next, *end;  // in the first row
  i64 ld;                  // bytes from one row to the next

  template <int ROWS>
  void fetch() {
    if (next >= end) return;
    for (int i = 0; i < ROWS; i++) __builtin_prefetch(next + i * ld);
    next += 64;
  }
};

// ---- Y[t, r] = sum over active c of A[t, c] B[c, r]

// Sums of MR tokens and NV vectors of outputs over `blocks` units of c inputs. Weights are words (k / PAIR, n), those of
// one unit `unit` floats after those of the one before, those of one k `pitch` after those of the one before. CHUNK
// divides c: so many inputs from one fetch to the next.
template <class E, int MR, int NV, int CHUNK = 16>
void linear_tile(const typename E::type *a, i64 lda, const float *packed, i64 unit, i64 pitch, const int32_t *cols,
                 i64 blocks, i64 c, const typename E::type *bias, typename E::type *y, i64 ldy, Ahead ahead) {
  alignas(VL * 4) vec sum[MR][NV];
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) {
      __builtin_prefetch(y + i * ldy + j * VL, 1);
      sum[i][j] = bias ? E::load(bias + j * VL) : vec{};
    }
  for (i64 p = 0; p < blocks; p++) {
    const typename E::type *ap = a + cols[p] * c;
    const float *bp = packed + p * unit;
    for (i64 k = 0; k < c; k += CHUNK) {
      ahead.fetch<MR>();
      for (i64 kk = k; kk < k + CHUNK; kk += E::PAIR, bp += pitch) {
        alignas(VL * 4) vec bv[NV];
        for (int j = 0; j < NV; j++) bv[j] = ((const vec *)bp)[j];
        for (int i = 0; i < MR; i++) {
          const float s = word(ap + i * lda + kk);
          for (int j = 0; j < NV; j++) sum[i][j] = E::mac(sum[i][j], s, bv[j]);
        }
      }
    }
  }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) E::store(y + i * ldy + j * VL, sum[i][j]);
}

// A strip of outputs: NV vectors of them for all tokens.
template <class E>
struct Strip {
  using T = typename E::type;
  const T *x;
  i64 ldx, tokens;
  const T *all;  // where tokens that come a tile later are: x itself, or what x is a copy of
  i64 ldall;
  const float *packed;  // its weights, as of linear_tile
  i64 unit, pitch;
  const int32_t *cols;
  i64 blocks, c;
  const T *bias;  // of its first output, as y
  T *y;
  i64 ldy;
  i64 first, last;  // its share of the inputs: of the tokens that come a tile later it fetches these

  template <int MR, int NV, int CHUNK = 16>
  void compute(i64 t, i64 end, i64 tile) const {
    for (; t + MR <= end; t += MR) {
      const T *coming = all + (t + tile < tokens ? t + tile : t) * ldall;
      Ahead ahead = {(const char *)(coming + first), (const char *)(coming + last), ldall * (i64)sizeof(T)};
      linear_tile<E, MR, NV, CHUNK>(x + t * ldx, ldx, packed, unit, pitch, cols, blocks, c, bias, y + t * ldy, ldy,
                                    ahead);
    }
    if constexpr (MR > 1)
      if (t < end) compute<(MR > 6 ? 4 : MR > 2 ? 2 : 1), NV, CHUNK>(t, end, tile);  // 12 4 2 1, or 6 2 1
  }
};

// How threads divide tokens and block rows. Tokens are counted in twelves, whole tiles of sums. So many of them that x
// stays in the second-level cache for all block rows, beside that of the tile that comes next.
struct Division {
  i64 twelves, tiles, groups;

  Division(i64 tokens, i64 row_bytes, i64 rows, int threads) : twelves((tokens + 11) / 12) {
    const i64 cached = 256 * 1024 / (12 * row_bytes), most = cached < 2 ? 2 : cached > 16 ? 16 : cached;
    tiles = (twelves + most - 1) / most;
    tiles = (tiles + threads - 1) / threads * threads;  // equally many for each thread
    tiles = tiles > twelves ? twelves : tiles;
    groups = (4 * threads + tiles - 1) / tiles;  // few tokens: share the block rows as well
    groups = groups > rows ? rows : groups;
  }
  i64 token(i64 tile) const { return tile * twelves / tiles * 12; }
  i64 most_tokens() const { return (twelves + tiles - 1) / tiles * 12; }  // of a tile
};

}  // namespace
