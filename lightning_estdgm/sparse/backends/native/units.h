// Loops over active units that are finer than a block, for linear layers and convolutions.
//
// Tokens (or pixels) are the vector: a column of a panel is what a tile of them holds of one input. A convolution sees
// its weight as a matrix of which each pair of an input and a tap is a column. Sums are in float.
#pragma once

#include <omp.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "fours.h"
#include "images.h"
#include "places.h"
#include "share.h"

namespace estdgm {

// Four outputs with as many weights each within one stretch of inputs; what is missing of one is a weight of 0 for a
// line of zeros, which follows those of the stretch.
struct Four {
  int32_t outputs[FOUR];  // -1: none
  i64 length, start;      // entries of each, and where their places start
  int32_t units[FOUR];    // of each output, the first of its units in this stretch
};

// The order in which single weights are used: made once a mask.
struct Plan {
  i64 outputs, inputs, lines, c; // lines: inputs of a stretch; c: those of a unit
  std::vector<i64> stretch;      // first four of each stretch of inputs, and their number at the end
  std::vector<Four> fours;
  std::vector<uint16_t> places;  // entry by entry, those of the four outputs side by side: input within the stretch

  // No unit of one output and c inputs may lie in two stretches.
  Plan(Units units, i64 inputs, i64 lines) : outputs(units.rows), inputs(inputs), lines(lines), c(units.c), stretch{0} {
    std::vector<i64> at(units.ptr, units.ptr + outputs), length(outputs), order(outputs);
    for (i64 first = 0; first < inputs; first += lines) {
      for (i64 o = 0; o < outputs; o++) {
        length[o] = 0;
        order[o] = o;
        const i64 end = units.ptr[o + 1];
        while (at[o] + length[o] < end && units.idx[at[o] + length[o]] * units.c < first + lines) length[o]++;
      }
      std::stable_sort(order.begin(), order.end(), [&](i64 a, i64 b) { return length[a] > length[b]; });
      for (i64 i = 0; i < outputs && length[order[i]]; i += FOUR) {
        Four four = {{}, length[order[i]] * units.c, (i64)places.size(), {}};
        for (int g = 0; g < FOUR; g++) {
          four.outputs[g] = i + g < outputs ? order[i + g] : -1;
          four.units[g] = i + g < outputs ? at[order[i + g]] : 0;
        }
        for (i64 p = 0; p < four.length; p++)
          for (const i64 o : four.outputs) {
            const bool there = o >= 0 && p / units.c < length[o];
            places.push_back(there ? units.idx[at[o] + p / units.c] * units.c + p % units.c - first : lines);
          }
        fours.push_back(four);
      }
      for (i64 o = 0; o < outputs; o++) at[o] += length[o];
      stretch.push_back(fours.size());
    }
  }

  // Calls run(index of a four, its stretch) for all fours, in parallel.
  template <class Run>
  void each_four(int threads, Run run) const {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 i = 0; i < (i64)fours.size(); i++)
      run(i, std::upper_bound(stretch.begin(), stretch.end(), i) - stretch.begin() - 1);
  }
};

}  // namespace estdgm

namespace {

using estdgm::Four;
using estdgm::Plan;

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// Calls run<N>() for the N of 1 .. MOST that is `vectors`.
template <int MOST, class Run>
void with_vectors(i64 vectors, Run run) {
  if constexpr (MOST > 1)
    if (vectors < MOST) return with_vectors<MOST - 1>(vectors, run);
  run(std::integral_constant<int, MOST>{});
}

constexpr Tap ONE_TAP = {0, 0, 0};  // of a linear layer

template <class T>
struct Weight {
  const T *data;
  Places places;
  const Tap *taps = &ONE_TAP;
  i64 count = 1;

  // Of the whole matrix, from output o; column k is tap k % count of input k / count.
  T at(i64 o, i64 k) const { return data[o * places.out + k / count * places.in + taps[k % count].weight]; }
};

// Weights in the order of use: R outputs of a unit row at a time; then unit by unit, input by input and tap by tap, or
// taps first.
template <class E, int R, bool TAPS_FIRST = false>
void pack(Weight<typename E::type> weight, Units units, float *packed, int threads) {
  const Places &places = weight.places;
  const i64 chunks = units.r / R, outer = TAPS_FIRST ? weight.count : 1, inner = TAPS_FIRST ? 1 : weight.count;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (i64 row = 0; row < units.rows; row++) {
    float *to = packed + units.ptr[row] * units.r * units.c * weight.count;
    for (i64 chunk = 0; chunk < chunks; chunk++)
      for (i64 a = 0; a < outer; a++)
        for (i64 p = units.ptr[row]; p < units.ptr[row + 1]; p++)
          for (i64 c = 0; c < units.c; c++) {
            const typename E::type *from = weight.data + places.of(p, row * units.r, units.idx[p] * units.c) +
                                           chunk * R * places.out + c * places.in;
            for (i64 b = 0; b < inner; b++)
              for (int r = 0; r < R; r++) *to++ = E::value(from[r * places.out + weight.taps[a + b].weight]);
          }
  }
}

// Where the columns of a unit lie, from the first one of a linear layer's unit: side by side.
template <int WIDTH>
struct Adjacent {
  i64 operator()(i64 column) const { return column * WIDTH; }
  i64 line(i64 column) const { return column * WIDTH; }  // to fetch while that column of the unit before is used
};

// Sums of R outputs for N vectors, over `count` units of c columns. A unit's columns start at idx[p] * unit.
template <int R, int N, class Places>
void gather(const float *panel, i64 unit, Places places, const float *weights, const int32_t *idx, i64 count, i64 c,
            float *sums) {
  alignas(VL * 4) vec sum[R][N];  // never in memory: its loops are unrolled before the compiler decides where it lies
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) sum[r][j] = vec{};
  for (i64 p = 0; p < count; p++) {
    const float *x = panel + idx[p] * unit, *coming = panel + idx[p + 2 < count ? p + 2 : p] * unit;
    for (i64 k = 0; k < c; k++, weights += R) {
      const float *at = x + places(k);
      alignas(VL * 4) vec xs[N];
      for (int j = 0; j < N; j++) {
        __builtin_prefetch(coming + places.line(k) + j * VL);
        xs[j] = in_register(*(const vec *)(at + j * VL));
      }
      for (int r = 0; r < R; r++)
        for (int j = 0; j < N; j++) sum[r][j] += weights[r] * xs[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) *(vec *)(sums + (r * N + j) * VL) = sum[r][j];
}

// Add R inputs, `line` apart, to the sums of each output of their unit column.
template <int R, int N>
void scatter(const float *x, i64 line, const float *weights, const int32_t *idx, i64 count, float *sums) {
  constexpr i64 WIDTH = N * VL;
  alignas(VL * 4) vec xs[R][N];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < N; j++) xs[r][j] = *(const vec *)(x + r * line + j * VL);
  for (i64 p = 0; p < count; p++, weights += R) {
    float *to = sums + idx[p] * WIDTH, *coming = sums + idx[p + 3 < count ? p + 3 : p] * WIDTH;
    for (int j = 0; j < N; j++) __builtin_prefetch(coming + j * VL, 1);
    alignas(VL * 4) vec sum[N];
    for (int j = 0; j < N; j++) sum[j] = *(const vec *)(to + j * VL);
    for (int r = 0; r < R; r++)
      for (int j = 0; j < N; j++) sum[j] += weights[r] * xs[r][j];
    for (int j = 0; j < N; j++) *(vec *)(to + j * VL) = sum[j];
  }
}

// ---- single weights

template <class E>
void pack_fours(Weight<typename E::type> weight, const Plan &plan, float *packed, int threads) {
  plan.each_four(threads, [&](i64 i, i64 stretch) {
    const Four &four = plan.fours[i];
    const uint16_t *places = plan.places.data() + four.start;
    float *to = packed + four.start;
    for (i64 p = 0; p < four.length / plan.c; p++)
      for (i64 c = 0; c < plan.c; c++, places += FOUR)
        for (int g = 0; g < FOUR; g++)
          if (places[g] == plan.lines)
            *to++ = 0;
          else if (weight.places.unit)
            *to++ = E::value(weight.data[weight.places.of(four.units[g] + p, 0, 0) + c * weight.places.in]);
          else
            *to++ = E::value(weight.at(four.outputs[g], stretch * plan.lines + places[g]));
  });
}

// All fours of one stretch, of whose outputs `sums` holds N vectors each, and `none` those of no output.
template <int N, int STEP>
[[gnu::noinline]] void stretch_of_fours(const Plan &plan, i64 stretch, const float *panel, const float *packed,
                                        const uint16_t *places, float *sums, float *none) {
  constexpr i64 WIDTH = N * VL;
  for (i64 i = plan.stretch[stretch]; i < plan.stretch[stretch + 1]; i++) {
    const Four &four = plan.fours[i];
    float *to[FOUR];
    for (int g = 0; g < FOUR; g++) {
      to[g] = four.outputs[g] < 0 ? none : sums + four.outputs[g] * WIDTH;
      if (i + 1 < plan.stretch[stretch + 1])
        for (int j = 0; j < N; j++) __builtin_prefetch(sums + plan.fours[i + 1].outputs[g] * WIDTH + j * VL, 1);
    }
    add_four<N, STEP>(panel, packed + four.start, places + four.start, four.length, to);
  }
}

// ---- gradients of the weight: sums over tiles of tokens, in order, unit row by unit row

// Stretches of tiles with sums of their own: as many as fit into 8 MB.
inline i64 stretches_of(i64 tiles, i64 sums) {
  i64 count = 4;
  while (count > 1 && (count > tiles || count * sums > 2 * 1024 * 1024)) count /= 2;
  return count;
}

// `all` has `units`, `tiles()` whose panels of `panel()` floats it loads, and for each unit row `sums(row)` floats that
// `add` adds a tile to and that `store` writes. A whole `dw` of `columns` for each output becomes 0 before; null: there is
// none, but the units' values alone.
//
// A thread lays out what it reads, as what another core has just written comes slowly, and waits for others once. So each
// of some stretches of tiles has sums of its own, which are added in order; how many depends on shapes and mask alone.
template <class All, class T>
bool sum_over_tiles(const All &all, T *dw, i64 columns, int threads) {
  const i64 rows = all.units.rows, zeros = dw ? rows * all.units.r : 0, tiles = all.tiles();
  std::vector<i64> start(rows + 1);
  for (i64 row = 0; row < rows; row++) start[row + 1] = start[row] + all.sums(row);
  const i64 total = start[rows], stretches = stretches_of(tiles, total);
  const i64 parts = std::min<i64>(rows, ceil_div(threads, stretches));  // few stretches: threads share the rows of each
  float *sums = floats(total * stretches);
  if (!sums) return true;
  Shares shares(stretches * parts, threads);
  bool failed = false;
#pragma omp parallel num_threads(threads)
  {
    float *panel = floats(all.panel());
#pragma omp for schedule(static) nowait
    for (i64 o = 0; o < zeros; o++) memset(dw + o * columns, 0, columns * sizeof(T));  // any order
    if (!panel)
#pragma omp atomic write
      failed = true;
    else
      shares.work(omp_get_thread_num(), [&](i64 task) {
        const i64 stretch = task / parts, part = task % parts;
        const i64 first = part * rows / parts, end = (part + 1) * rows / parts;
        float *to = sums + stretch * total;
        memset(to + start[first], 0, (start[end] - start[first]) * sizeof(float));
        for (i64 tile = stretch * tiles / stretches; tile < (stretch + 1) * tiles / stretches; tile++) {
          all.load(tile, panel);
          for (i64 row = first; row < end; row++) all.add(row, panel, to + start[row]);
        }
      });
    free(panel);
#pragma omp barrier
#pragma omp for schedule(static)
    for (i64 row = 0; row < rows; row++) {
      for (i64 s = 1; s < stretches; s++)
        for (i64 i = start[row]; i < start[row + 1]; i++) sums[i] += sums[s * total + i];
      all.store(row, sums + start[row]);
    }
  }
  free(sums);
  return failed;
}

}  // namespace
