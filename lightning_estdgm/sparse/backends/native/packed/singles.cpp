// Packed single weights: each serves one output and one input.
#include <omp.h>

#include <algorithm>
#include <vector>
#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define ESTDGM_PERMUTE 1
#endif

#include "../fours.h"
#include "../panels.h"
#include "../share.h"
#include "packed.h"
#include "values.h"

namespace {

using estdgm::LINES;
using estdgm::PackedSingles;
using estdgm::Values;

constexpr i64 FEW = 3;            // tokens of the matrix-vector loop
constexpr i64 SMALL = 16 * 1024;  // values that one thread multiplies sooner than two
constexpr int VECTORS = WIDE ? 4 : 2;  // of tokens

// ---- up to three tokens: entries are the vector

// The inputs of a stretch, of one token; what comes after the last reads as 0.
#if defined(ESTDGM_PERMUTE)
// In registers: two instructions of two each find any 16 of them. Gathers from memory are slow where the CPU has to
// keep them from leaking (CVE-2022-40982).
struct Line {
  __m512 x[LINES / 16];

  void load(const float *from, i64 n) {
    for (i64 i = 0; i < LINES / 16; i++, n -= 16)
      x[i] = _mm512_maskz_loadu_ps(n >= 16 ? 0xffff : n > 0 ? (1u << n) - 1 : 0, from + i * 16);
  }
  __m512 at(__m512i places) const {
    static_assert(LINES == 96, "places are 7 bits: 0 to 31, 32 to 63, 64 to 95, and 96 for 0");
    const __mmask16 second = _mm512_test_epi32_mask(places, _mm512_set1_epi32(32));
    const __mmask16 third = _mm512_test_epi32_mask(places, _mm512_set1_epi32(64));
    const __m512 low = _mm512_mask_mov_ps(_mm512_permutex2var_ps(x[0], places, x[1]), second,
                                          _mm512_permutex2var_ps(x[2], places, x[3]));
    return _mm512_mask_mov_ps(low, third, _mm512_maskz_permutex2var_ps(_mm512_knot(second), x[4], places, x[5]));
  }
};

inline __m512 entries(const float *p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline __m512 entries(const uint16_t *p, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}
inline __m512 entries(const int8_t *p, __mmask16 mask) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, p)));
}

// Sums of four outputs over `n` values with their places.
template <class V>
inline lanes<4> few_four(const Line &line, const V *values, const uint8_t *places, i64 n) {
  __m512 sum = _mm512_setzero_ps();
  for (i64 e = 0; e < n; e += 16) {
    const __mmask16 mask = n - e >= 16 ? 0xffff : (1u << (n - e)) - 1;
    const __m512i at = _mm512_mask_cvtepu8_epi32(_mm512_set1_epi32(LINES), mask, _mm_maskz_loadu_epi8(mask, places + e));
    sum = _mm512_fmadd_ps(entries(values + e, mask), line.at(at), sum);
  }
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
  return (lanes<4>)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#else
struct Line {
  float x[LINES + 1] = {};

  void load(const float *from, i64 n) { memcpy(x, from, n * sizeof(float)); }
};

template <class V>
inline lanes<4> few_four(const Line &line, const V *values, const uint8_t *places, i64 n) {
  lanes<4> sum = {};
  for (i64 e = 0; e < n; e += 4) {
    const float *x = line.x;
    sum += values_at<4>(values + e) * lanes<4>{x[places[e]], x[places[e + 1]], x[places[e + 2]], x[places[e + 3]]};
  }
  return sum;
}
#endif

// Stretches in parts with sums of their own, as many whatever the number of threads: so are the results the same.
template <class V>
bool few_tokens(const PackedSingles &m, const V *values, const float *x, i64 ldx, i64 tokens, float *y, i64 ldy, int threads) {
  const i64 fours = m.stretch[m.stretches], width = m.out + 1;  // a sum for what is no output
  const i64 parts = m.stretches >= 32 ? 8 : m.stretches >= 8 ? 4 : 1, length = tokens * width;
  if (!fours || m.ends[fours - 1] * FOUR < SMALL) threads = 1;
  float *sums = floats(parts * length);
  if (!sums) return false;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (i64 part = 0; part < parts; part++) {
    float *own = sums + part * length;
    memset(own, 0, length * sizeof(float));
    Line line[FEW];
    for (i64 s = part * m.stretches / parts; s < (part + 1) * m.stretches / parts; s++) {
      const i64 first = s * LINES, n = std::min(LINES, m.in - first);
      for (i64 t = 0; t < tokens; t++) line[t].load(x + t * ldx + first, n);
      for (i64 i = m.stretch[s]; i < m.stretch[s + 1]; i++) {
        const i64 start = i ? m.ends[i - 1] : 0, count = (m.ends[i] - start) * FOUR;
        for (i64 t = 0; t < tokens; t++) {
          const lanes<4> sum = few_four(line[t], values + start * FOUR, m.places + start * FOUR, count);
          for (int g = 0; g < FOUR; g++) own[t * width + m.outputs[i * FOUR + g]] += sum[g];
        }
      }
    }
  }
  for (i64 t = 0; t < tokens; t++)
    for (i64 o = 0; o < m.out; o++) {
      float sum = sums[t * width + o];
      for (i64 part = 1; part < parts; part++) sum += sums[part * length + t * width + o];
      y[t * ldy + o] = sum * (m.scale ? m.scale[o] : 1) + (m.bias ? m.bias[o] : 0);
    }
  free(sums);
  return true;
}

// ---- tokens as the vector

// n values from one on as floats, in room where they are none.
const float *as_floats(const PackedSingles &m, i64 start, i64 n, float *room) {
  if (m.type == Values::float32) return (const float *)m.values + start;
  with_values(m.values, m.type, [&](auto values) {
    for (i64 e = 0; e < n; e += 4) *(lanes<4> *)(room + e) = values_at<4>(values + start + e);
  });
  return room;
}

template <int N>
bool single_tiles(const PackedSingles &m, Rows<float> x, float *y, i64 ldy, int threads) {
  constexpr i64 WIDTH = N * VL;
  const i64 tiles = (x.count + WIDTH - 1) / WIDTH, outputs = (m.out + VL) / VL * VL;  // one more than there are
  Shares shares(tiles, threads);
  bool failed = false;
#pragma omp parallel num_threads(threads)
  {
    float *sums = floats((outputs + LINES + 1) * WIDTH), *panel = sums + outputs * WIDTH;
    float room[LINES * FOUR];
    if (!sums)
#pragma omp atomic write
      failed = true;
    else
      shares.work(omp_get_thread_num(), [&](i64 tile) {
        memset(sums, 0, outputs * WIDTH * sizeof(float));
        memset(panel + LINES * WIDTH, 0, WIDTH * sizeof(float));
        for (i64 s = 0; s < m.stretches; s++) {
          const i64 first = s * LINES;
          load_panel<Float>(x, tile * WIDTH, first, std::min(LINES, m.in - first), WIDTH, panel);
          for (i64 i = m.stretch[s]; i < m.stretch[s + 1]; i++) {
            const i64 start = i ? m.ends[i - 1] : 0, length = m.ends[i] - start;
            float *to[FOUR];
            for (int g = 0; g < FOUR; g++) {
              to[g] = sums + (i64)m.outputs[i * FOUR + g] * WIDTH;
              if (i + 1 < m.stretch[s + 1])
                for (int j = 0; j < N; j++)
                  __builtin_prefetch(sums + (i64)m.outputs[(i + 1) * FOUR + g] * WIDTH + j * VL, 1);
            }
            add_four<N, N>(panel, as_floats(m, start * FOUR, length * FOUR, room), m.places + start * FOUR, length,
                      to);
          }
        }
        if (m.scale)
          for (i64 o = 0; o < m.out; o++)
            for (i64 t = 0; t < WIDTH; t++) sums[o * WIDTH + t] *= m.scale[o];
        store_panel<Float>(sums, WIDTH, m.bias, m.out, tile * WIDTH, x.count, y, ldy);
      });
    free(sums);
  }
  return !failed;
}

template <int N>
bool by_tokens(const PackedSingles &m, Rows<float> x, float *y, i64 ldy, int threads, i64 vectors) {
  if constexpr (N > 1)
    if (vectors < N) return by_tokens<N - 1>(m, x, y, ldy, threads, vectors);
  return single_tiles<N>(m, x, y, ldy, threads);
}

}  // namespace

namespace estdgm {

bool multiply(const PackedSingles &m, const float *x, i64 ldx, i64 tokens, float *y, i64 ldy, int threads) {
  if (tokens <= FEW)
    return with_values(m.values, m.type,
                       [&](auto values) { return few_tokens(m, values, x, ldx, tokens, y, ldy, threads); });
  const i64 vectors = (tokens + VL - 1) / VL;
  i64 tiles = (vectors + VECTORS - 1) / VECTORS;
  tiles = std::min((tiles + threads - 1) / threads * threads, vectors);  // equally many for each thread
  return by_tokens<VECTORS>(m, {x, ldx, tokens}, y, ldy, threads, (vectors + tiles - 1) / tiles);
}

}  // namespace estdgm
