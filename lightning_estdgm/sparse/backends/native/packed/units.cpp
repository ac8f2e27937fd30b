// Packed units of two and more outputs: a matrix-vector loop for up to three tokens, else outputs as the vector (r of 32
// and more, or few tokens) or tokens as the vector. Values that are no floats become floats a unit row at a time.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("ira-region=all")  // as in linear.cpp
#endif

#include <omp.h>

#include <algorithm>
#include <type_traits>

#include "../panels.h"
#include "../share.h"
#include "../tile.h"
#include "packed.h"
#include "values.h"

namespace {

using estdgm::PackedUnits;
using estdgm::Values;

constexpr i64 FEW = 3;                 // tokens of the matrix-vector loop
constexpr i64 SMALL = 16 * 1024;       // values that one thread multiplies sooner than two

i64 longest_row(const int32_t *ptr, i64 rows) {
  i64 most = 0;
  for (i64 row = 0; row < rows; row++) most = std::max<i64>(most, ptr[row + 1] - ptr[row]);
  return most;
}

// ---- up to three tokens: outputs are the vector, values pass by once

template <class V, int W, int NV, int T>
void few_strip(const PackedUnits &m, const V *values, i64 row, i64 first, const float *x, i64 ldx, float *y, i64 ldy) {
  constexpr int U = NV * T >= 8 ? 1 : NV * T >= 4 ? 2 : 4;  // chains of sums, else each addition waits for the last
  lanes<W> sum[U][T][NV] = {};
  const V *w = values + m.ptr[row] * m.c * m.r + first;
  const auto add = [&](int u, i64 column) {
    for (int j = 0; j < NV; j++) {
      const lanes<W> v = values_at<W>(w + j * W);
      for (int t = 0; t < T; t++) sum[u][t][j] += x[t * ldx + column] * v;
    }
    w += m.r;
  };
  i64 p = m.ptr[row];
  const i64 end = m.ptr[row + 1];
  if (m.c % U == 0)
    for (; p < end; p++)
      for (i64 k = m.idx[p] * m.c, last = k + m.c; k < last; k += U)
        for (int u = 0; u < U; u++) add(u, k + u);
  else if (m.c == 1)
    for (; p + U <= end; p += U)
      for (int u = 0; u < U; u++) add(u, m.idx[p + u]);
  for (; p < end; p++)
    for (i64 k = 0; k < m.c; k++) add(0, m.idx[p] * m.c + k);
  const i64 o = row * m.r + first;
  for (int t = 0; t < T; t++)
    for (int j = 0; j < NV; j++) {
      lanes<W> total = sum[0][t][j];
      for (int u = 1; u < U; u++) total += sum[u][t][j];
      if (m.scale) total *= values_at<W>(m.scale + o + j * W);
      if (m.bias) total += values_at<W>(m.bias + o + j * W);
      *(lanes<W> *)(y + t * ldy + o + j * W) = total;
    }
}

#if defined(__AVX512F__)
// The same for bfloat16 and R >= 16, from both halves of a word at once: no instruction is spent on widening. Words of
// an input hold two outputs each; those of 16 outputs are of two inputs, one in each half of the vector. Loads are what
// this loop waits for: words are loaded once, inputs of 16 outputs come from a register.
typedef uint32_t pairs __attribute__((vector_size(64), aligned(2), may_alias));

inline pairs pairs_at(const uint16_t *p) {
  pairs word = *(const pairs *)p;
  asm("" : "+v"(word));  // else the compiler loads it once for each half
  return word;
}

inline void add_halves(lanes<16> (&sum)[2], lanes<16> x, pairs word) {
  sum[0] += x * (lanes<16>)(word << 16);
  sum[1] += x * (lanes<16>)(word & 0xffff0000u);
}

// Writes 16 outputs, or 32 of which `halves` has the even and the odd ones.
template <int R>
inline void store_halves(const PackedUnits &m, const lanes<16> (&halves)[2], i64 output, float *y) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const auto pick = [&](__m512i places) {
    return (lanes<16>)_mm512_permutex2var_ps((__m512)halves[0], places, (__m512)halves[1]);
  };
  const lanes<16> both[2] = {pick(low), pick(_mm512_or_epi32(low, _mm512_set1_epi32(8)))};
  for (int half = 0; half < (R == 16 ? 1 : 2); half++) {
    lanes<16> total = R == 16 ? both[0] + both[1] : both[half];
    if (m.bias) total += values_at<16>(m.bias + output + half * 16);
    *(lanes<16> *)(y + output + half * 16) = total;
  }
}

template <int R, int T>
void few_halves(const PackedUnits &m, const uint16_t *values, i64 row, const float *x, i64 ldx, float *y, i64 ldy) {
  constexpr int NW = R >= 64 ? 2 : 1, U = NW * T >= 2 ? 1 : 2;
  lanes<16> sum[U][T][NW][2] = {};
  const uint16_t *w = values + m.ptr[row] * m.c * R;
  for (i64 p = m.ptr[row], end = m.ptr[row + 1]; p < end; p++)
    for (i64 k = m.idx[p] * m.c, last = k + m.c; k < last; k += U)
      for (int u = 0; u < U; u++, w += R)
        for (int j = 0; j < NW; j++) {
          const pairs word = pairs_at(w + j * 32);
          for (int t = 0; t < T; t++) add_halves(sum[u][t][j], lanes<16>{} + x[t * ldx + k + u], word);
        }
  for (int t = 0; t < T; t++)
    for (int j = 0; j < NW; j++) {
      for (int u = 1; u < U; u++)
        for (int half = 0; half < 2; half++) sum[0][t][j][half] += sum[u][t][j][half];
      store_halves<R>(m, sum[0][t][j], row * R + j * 32, y + t * ldy);
    }
}

// For R = 16 and c a multiple of 16.
template <int T>
void few_halves_16(const PackedUnits &m, const uint16_t *values, i64 row, const float *x, i64 ldx, float *y, i64 ldy) {
  constexpr int U = T >= 2 ? 1 : 2;
  const __m512i first_two = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  lanes<16> sum[U][T][2] = {};
  const uint16_t *w = values + m.ptr[row] * m.c * 16;
  for (i64 p = m.ptr[row], end = m.ptr[row + 1]; p < end; p++)
    for (i64 k = m.idx[p] * m.c, last = k + m.c; k < last; k += 16) {
      __m512 xs[T];
      for (int t = 0; t < T; t++) xs[t] = _mm512_loadu_ps(x + t * ldx + k);
#pragma GCC unroll 8
      for (int two = 0; two < 16; two += 2, w += 32) {
        const pairs word = pairs_at(w);
        const __m512i places = _mm512_add_epi32(first_two, _mm512_set1_epi32(two));
        for (int t = 0; t < T; t++)
          add_halves(sum[two / 2 % U][t], (lanes<16>)_mm512_permutexvar_ps(places, xs[t]), word);
      }
    }
  for (int t = 0; t < T; t++) {
    if (U > 1)
      for (int half = 0; half < 2; half++) sum[0][t][half] += sum[U - 1][t][half];
    store_halves<16>(m, sum[0][t], row * 16, y + t * ldy);
  }
}
#endif

template <class V, int R, int T>
void few_rows(const PackedUnits &m, const V *values, const float *x, i64 ldx, float *y, i64 ldy, int threads) {
  constexpr int W = R < VL ? R : VL, NV = R / W < 4 ? R / W : 4;
#if defined(__AVX512F__)
  if constexpr (R >= 16 && std::is_same_v<V, uint16_t>)
    if (m.c % (R == 16 ? 16 : 4) == 0 && !m.scale) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
      for (i64 row = 0; row < m.rows; row++)
        if constexpr (R == 16)
          few_halves_16<T>(m, values, row, x, ldx, y, ldy);
        else
          few_halves<R, T>(m, values, row, x, ldx, y, ldy);
      return;
    }
#endif
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (i64 row = 0; row < m.rows; row++)
    for (i64 first = 0; first < R; first += W * NV) few_strip<V, W, NV, T>(m, values, row, first, x, ldx, y, ldy);
}

template <class V, int R = 64>
void few_tokens(const PackedUnits &m, const V *values, const float *x, i64 ldx, i64 tokens, float *y, i64 ldy, int threads) {
  if constexpr (R > 2)
    if (m.r < R) return few_tokens<V, R / 2>(m, values, x, ldx, tokens, y, ldy, threads);
  if (m.ptr[m.rows] * m.r * m.c < SMALL) threads = 1;
  if (tokens == 1)
    few_rows<V, R, 1>(m, values, x, ldx, y, ldy, threads);
  else if (tokens == 2)
    few_rows<V, R, 2>(m, values, x, ldx, y, ldy, threads);
  else
    few_rows<V, R, 3>(m, values, x, ldx, y, ldy, threads);
}

// ---- values of a unit row as floats

// A thread's memory for one row; none is needed where they are floats.
struct RowValues {
  const PackedUnits &m;
  float *room;
  i64 held = -1;

  static i64 floats_needed(const PackedUnits &m, i64 longest) {
    return m.type == Values::float32 ? 0 : longest * m.r * m.c;
  }

  const float *of(i64 row) {
    const i64 start = m.ptr[row] * m.r * m.c;
    if (m.type == Values::float32) return (const float *)m.values + start;
    if (row != held) {
      const i64 n = (m.ptr[row + 1] - m.ptr[row]) * m.c;
      with_values(m.values, m.type, [&](auto values) {
        if (m.r % 8 == 0)
          convert<8>(values + start, n, row * m.r);
        else
          convert<2>(values + start, n, row * m.r);
      });
    }
    held = row;
    return room;
  }

 private:
  template <int W, class V>
  void convert(const V *from, i64 n, i64 output) {
    for (i64 k = 0; k < n; k++)
      for (i64 o = 0; o < m.r; o += W) {
        lanes<W> v = values_at<W>(from + k * m.r + o);
        if (m.scale) v *= values_at<W>(m.scale + output + o);
        *(lanes<W> *)(room + k * m.r + o) = v;
      }
  }
};

// ---- outputs as the vector

template <int CHUNK>
void block_row(const Strip<Float> &row, i64 r, i64 t, i64 end) {
  Strip<Float> strip = row;
  const i64 tile = end - t;
  for (i64 j = 0, width; j < r; j += width, strip.packed += width, strip.y += width) {
    width = !WIDE ? 2 * VL : r - j < 4 * VL ? r - j : 4 * VL;
    strip.bias = row.bias ? row.bias + j : nullptr;
    if (!WIDE)
      strip.compute<6, 2, CHUNK>(t, end, tile);
    else if (width == 4 * VL)
      strip.compute<6, 4, CHUNK>(t, end, tile);
    else if (width == 2 * VL)
      strip.compute<12, 2, CHUNK>(t, end, tile);
    else
      strip.compute<12, 1, CHUNK>(t, end, tile);
  }
}

bool by_outputs(const PackedUnits &m, const float *x, i64 ldx, i64 tokens, float *y, i64 ldy, int threads) {
  const Division parts(tokens, m.in * 4, m.rows, threads);
  const i64 longest = longest_row(m.ptr, m.rows);
  // Rows of a tile are copied to where they are no power of 2 apart: else their lines compete for places in the cache.
  const i64 ld = m.in + 16, most = parts.most_tokens();
  Shares shares(parts.tiles * parts.groups, threads);
  bool failed = false;
#pragma omp parallel num_threads(threads)
  {
    float *room = floats(most * ld + RowValues::floats_needed(m, longest)), *panel = room;
    i64 loaded = -1;
    if (!room)
#pragma omp atomic write
      failed = true;
    else {
      RowValues values{m, room + most * ld};
      shares.work(omp_get_thread_num(), [&](i64 task) {
        const i64 i = task / parts.groups, g = task % parts.groups, t = parts.token(i);
        const i64 end = std::min(parts.token(i + 1), tokens);
        if (i != loaded)
          for (i64 row = t; row < end; row++) memcpy(panel + (row - t) * ld, x + row * ldx, m.in * sizeof(float));
        loaded = i;
        for (i64 row = g * m.rows / parts.groups; row < (g + 1) * m.rows / parts.groups; row++) {
          const i64 o = row * m.r;
          const Strip<Float> strip = {panel - t * ld, ld, tokens, x, ldx, values.of(row), m.r * m.c, m.r,
                                      m.idx + m.ptr[row], m.ptr[row + 1] - m.ptr[row], m.c,
                                      m.bias ? m.bias + o : nullptr, y + o, ldy, row * m.in / m.rows,
                                      (row + 1) * m.in / m.rows};
          if (m.c % 16 == 0)
            block_row<16>(strip, m.r, t, end);
          else
            block_row<1>(strip, m.r, t, end);
        }
      });
    }
    free(room);
  }
  return !failed;
}

// ---- tokens as the vector

// Sums of R outputs for N vectors of tokens, over `count` units; weights of one input are `pitch` after the last one's.
// Not the one of units.h: with its function of places, units of 8 x 1 take 6 to 13 % longer.
template <int R, int N>
void gather(const float *panel, const float *weights, i64 pitch, const int32_t *idx, i64 count, i64 c, float *sums) {
  constexpr i64 WIDTH = N * VL;
  alignas(VL * 4) vec sum[R][N];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < N; j++) sum[r][j] = vec{};  // not {} of all, which would fill memory
  for (i64 p = 0; p < count; p++) {
    const float *x = panel + idx[p] * c * WIDTH, *coming = panel + idx[p + 2 < count ? p + 2 : p] * c * WIDTH;
    for (i64 k = 0; k < c; k++, x += WIDTH, coming += WIDTH, weights += pitch) {
      if (R < 8) __builtin_prefetch(coming);  // larger units run long enough in one place
      alignas(VL * 4) vec xs[N];
      for (int j = 0; j < N; j++) xs[j] = *(const vec *)(x + j * VL);
      for (int r = 0; r < R; r++)
        for (int j = 0; j < N; j++) sum[r][j] += weights[r] * xs[j];
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < N; j++) *(vec *)(sums + r * WIDTH + j * VL) = sum[r][j];
}

template <int R, int N>
bool gather_tiles(const PackedUnits &m, Rows<float> x, float *y, i64 ldy, int threads) {
  constexpr i64 WIDTH = N * VL, STRIP = VL < 16 ? 16 : VL;  // outputs of a strip: whole unit rows and whole vectors
  const i64 outputs = m.rows * m.r, tiles = (x.count + WIDTH - 1) / WIDTH, strips = (outputs + STRIP - 1) / STRIP;
  const i64 longest = longest_row(m.ptr, m.rows);
  i64 parts = tiles % threads ? (4 * threads + tiles - 1) / tiles : 1;
  parts = std::min(parts, strips);
  Shares shares(tiles * parts, threads);
  bool failed = false;
#pragma omp parallel num_threads(threads)
  {
    float *panel = floats((m.in + STRIP) * WIDTH + RowValues::floats_needed(m, longest));
    float *sums = panel + m.in * WIDTH;
    i64 loaded = -1;
    if (!panel)
#pragma omp atomic write
      failed = true;
    else {
      RowValues values{m, sums + STRIP * WIDTH};
      shares.work(omp_get_thread_num(), [&](i64 task) {
        const i64 tile = task / parts, part = task % parts;
        if (tile != loaded) load_panel<Float>(x, tile * WIDTH, 0, m.in, WIDTH, panel);
        loaded = tile;
        for (i64 s = part * strips / parts; s < (part + 1) * strips / parts; s++) {
          const i64 first = s * STRIP, end = std::min(first + STRIP, outputs);
          for (i64 t = tile * WIDTH; t < std::min((tile + 1) * WIDTH, x.count); t++)  // there when it is written
            __builtin_prefetch(y + t * ldy + first, 1);
          for (i64 o = first; o < end; o += R) {
            const i64 row = o / m.r, count = m.ptr[row + 1] - m.ptr[row];
            gather<R, N>(panel, values.of(row) + o % m.r, m.r, m.idx + m.ptr[row], count, m.c,
                         sums + (o - first) * WIDTH);
          }
          store_panel<Float>(sums, WIDTH, m.bias ? m.bias + first : nullptr, end - first, tile * WIDTH, x.count,
                             y + first, ldy);
        }
      });
    }
    free(panel);
  }
  return !failed;
}

template <int R, int N>
bool by_tokens(const PackedUnits &m, Rows<float> x, float *y, i64 ldy, int threads, i64 vectors) {
  if constexpr (N > 1)
    if (vectors < N) return by_tokens<R, N - 1>(m, x, y, ldy, threads, vectors);
  return gather_tiles<R, N>(m, x, y, ldy, threads);
}

// Vectors of tokens in a tile: at most `most`, so few that the inputs' stay in the second-level cache, and with few left
// empty in the last tile. A tile costs about a fifth of a vector by itself.
i64 tile_vectors(i64 tokens, i64 in, i64 most) {
  const i64 vectors = (tokens + VL - 1) / VL, room = std::clamp<i64>(1024 * 1024 / (in * VL * 4), 1, most);
  const auto cost = [&](i64 n) { return (vectors + n - 1) / n * (5 * n + 1); };
  i64 best = 1;
  for (i64 n = 2; n <= room; n++)
    if (cost(n) <= cost(best)) best = n;
  return best;
}

}  // namespace

namespace estdgm {

bool multiply(const PackedUnits &m, const float *x, i64 ldx, i64 tokens, float *y, i64 ldy, int threads) {
  if (tokens <= FEW) {
    with_values(m.values, m.type, [&](auto values) { few_tokens(m, values, x, ldx, tokens, y, ldy, threads); });
    return true;
  }
  if (m.r > 16 || (m.r == 16 && tokens < 16)) return by_outputs(m, x, ldx, tokens, y, ldy, threads);
  const Rows<float> rows = {x, ldx, tokens};
  const auto vectors = [&](i64 most) { return tile_vectors(tokens, m.in, most); };
  if (m.r >= 8) return by_tokens<8, WIDE ? 2 : 1>(m, rows, y, ldy, threads, vectors(WIDE ? 2 : 1));
  if (m.r == 4) return by_tokens<4, WIDE ? 6 : 2>(m, rows, y, ldy, threads, vectors(WIDE ? 6 : 2));
  return by_tokens<2, WIDE ? 8 : 4>(m, rows, y, ldy, threads, vectors(WIDE ? 8 : 4));
}

}  // namespace estdgm
