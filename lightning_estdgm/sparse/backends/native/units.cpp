// Products of a linear layer whose mask units are finer than a block: r outputs that share c inputs, down to 1 x 1.
//
// Tokens are the vector. A tile of tokens of each operand is laid out as a panel (panels.h), column by column, so that
// any column that an active unit names is a stretch of memory; sums are in float, whatever the operands are. The order
// of sums depends on nothing but the shapes and the mask, so results are the same for any number of threads.
//
// Source of the tilings: column-vector sparsity with register tiles over the dense side, as in Gale et al., "Sparse GPU
// Kernels for Deep Learning" (arXiv 2006.10901), section 5, on the CPU.
#include <omp.h>

#include <algorithm>
#include <new>
#include <vector>

#include "kept.h"
#include "panels.h"
#include "share.h"
#include "units.h"

namespace {

using estdgm::Kept;
using estdgm::PackedValues;

template <class T>
struct Result {
  T *data;
  i64 ld, columns;
};

// Vectors of tokens in a tile: at most `most`, and so few that `columns` of them stay in the second-level cache.
i64 tile_vectors(i64 tokens, i64 columns, i64 most) {
  const i64 cached = 1024 * 1024 / (columns * VL * 4), vectors = ceil_div(tokens, VL);
  const i64 room = cached < 1 ? 1 : cached < most ? cached : most;
  return ceil_div(vectors, ceil_div(vectors, room));
}

// ---- r >= 2 outputs a unit: their sums stay in registers

template <class E, int R, int N>
bool gather_tiles(Rows<typename E::type> x, i64 in, const float *packed, const typename E::type *bias, Units units,
                  Result<typename E::type> y, int threads) {
  constexpr i64 WIDTH = N * VL;
  // A thread's task: one tile, and where those are few a share of the outputs, in whole strips.
  constexpr i64 STRIP = VL < 8 ? 8 : VL;
  const i64 tiles = ceil_div(x.count, WIDTH), strips = ceil_div(y.columns, STRIP);
  i64 parts = tiles % threads ? ceil_div(4 * threads, tiles) : 1;
  parts = parts > strips ? strips : parts;
  Shares shares(tiles * parts, threads);
  bool failed = false;
#pragma omp parallel num_threads(threads)
  {
    float *panel = floats((in + STRIP) * WIDTH), *sums = panel + in * WIDTH;
    i64 loaded = -1;
    if (!panel)
#pragma omp atomic write
      failed = true;
    else
      shares.work(omp_get_thread_num(), [&](i64 task) {
        const i64 tile = task / parts, part = task % parts;
        if (tile != loaded) load_panel<E>(x, tile * WIDTH, 0, in, WIDTH, panel);
        loaded = tile;
        for (i64 s = part * strips / parts; s < (part + 1) * strips / parts; s++) {
          const i64 first = s * STRIP, end = std::min(first + STRIP, y.columns);
          for (i64 o = first; o < end; o += R) {
            const i64 row = o / units.r, count = units.count(row), chunk = o % units.r / R;
            gather<R, N>(panel, units.c * WIDTH, Adjacent<WIDTH>{},
                         packed + units.ptr[row] * units.r * units.c + chunk * count * R * units.c,
                         units.idx + units.ptr[row], count, units.c, sums + (o - first) * WIDTH);
          }
          store_panel<E>(sums, WIDTH, bias ? bias + first : nullptr, end - first, tile * WIDTH, x.count,
                         y.data + first, y.ld);
        }
      });
    free(panel);
  }
  return failed;
}

// Y[t, o] = sum over active i of X[t, i] W[o, i] + bias[o], R outputs of a unit at a time.
template <class E, int R, int MOST>
bool gather_linear(Rows<typename E::type> x, i64 in, Weight<typename E::type> weight, const typename E::type *bias,
                   Units units, Result<typename E::type> y, Kept *kept, int threads) {
  const PackedValues packed(kept, units.ptr[units.rows] * units.r * units.c,
                            [&](float *to) { pack<E, R>(weight, units, to, threads); });
  if (!packed.data) return true;
  bool failed = false;
  with_vectors<MOST>(tile_vectors(x.count, in, MOST), [&](auto n) {
    failed = gather_tiles<E, R, n.value>(x, in, packed.data, bias, units, y, threads);
  });
  return failed;
}

// ---- units of one output and c >= 4 inputs: the inputs' tokens stay in registers

template <class E, int R, int N>
bool scatter_tiles(Rows<typename E::type> x, i64 in, const float *packed, const typename E::type *bias, Units columns,
                   Result<typename E::type> y, int threads) {
  constexpr i64 WIDTH = N * VL, STRIP = 64;  // inputs that are laid out at a time
  const i64 tiles = ceil_div(x.count, WIDTH), outputs = ceil_div(y.columns, VL) * VL;
  Shares shares(tiles, threads);
  bool failed = false;
#pragma omp parallel num_threads(threads)
  {
    float *sums = floats((outputs + STRIP) * WIDTH), *panel = sums + outputs * WIDTH;
    if (!sums)
#pragma omp atomic write
      failed = true;
    else
      shares.work(omp_get_thread_num(), [&](i64 tile) {
        memset(sums, 0, outputs * WIDTH * sizeof(float));
        for (i64 i = 0; i < in; i += R) {
          if (i % STRIP == 0) load_panel<E>(x, tile * WIDTH, i, std::min(in - i, STRIP), WIDTH, panel);
          const i64 row = i / columns.r, count = columns.count(row), chunk = i % columns.r / R;
          scatter<R, N>(panel + i % STRIP * WIDTH, WIDTH, packed + columns.ptr[row] * columns.r + chunk * count * R,
                        columns.idx + columns.ptr[row], count, sums);
        }
        store_panel<E>(sums, WIDTH, bias, y.columns, tile * WIDTH, x.count, y.data, y.ld);
      });
    free(sums);
  }
  return failed;
}

// As gather_linear, from the unit columns: `columns` are the units of the transposed matrix, R of whose outputs share
// one input.
template <class E, int R, int MOST>
bool scatter_linear(Rows<typename E::type> x, i64 in, Weight<typename E::type> weight, const typename E::type *bias,
                    Units columns, Result<typename E::type> y, Kept *kept, int threads) {
  const Places &at = weight.places;
  const PackedValues packed(kept, columns.ptr[columns.rows] * columns.r, [&](float *to) {
    pack<E, R>({weight.data, {at.in, at.out, at.unit, at.order}}, columns, to, threads);
  });
  if (!packed.data) return true;
  bool failed = false;
  with_vectors<MOST>(tile_vectors(x.count, y.columns, MOST), [&](auto n) {
    failed = scatter_tiles<E, R, n.value>(x, in, packed.data, bias, columns, y, threads);
  });
  return failed;
}

// ---- single weights

constexpr int SINGLE_VECTORS = WIDE ? 4 : 2;                 // of tokens
constexpr i64 LINES = 24 * 1024 / (SINGLE_VECTORS * VL * 4); // inputs whose tokens stay in the first-level cache

template <class E, int N>
bool single_tiles(Rows<typename E::type> x, const float *packed, const typename E::type *bias, const Plan &plan,
                  Result<typename E::type> y, int threads) {
  constexpr i64 WIDTH = N * VL;
  const i64 tiles = ceil_div(x.count, WIDTH), outputs = ceil_div(plan.outputs, VL) * VL;
  Shares shares(tiles, threads);
  bool failed = false;
#pragma omp parallel num_threads(threads)
  {
    // Sums of all outputs, those of no output, and the inputs' lines with one of zeros.
    float *sums = floats((outputs + 1 + LINES + 1) * WIDTH), *none = sums + outputs * WIDTH, *panel = none + WIDTH;
    if (!sums)
#pragma omp atomic write
      failed = true;
    else
      shares.work(omp_get_thread_num(), [&](i64 tile) {
        memset(sums, 0, (outputs + 1) * WIDTH * sizeof(float));
        memset(panel + LINES * WIDTH, 0, WIDTH * sizeof(float));
        for (i64 s = 0; s + 1 < (i64)plan.stretch.size(); s++) {
          const i64 first = s * LINES, n = plan.inputs - first < LINES ? plan.inputs - first : LINES;
          load_panel<E>(x, tile * WIDTH, first, n, WIDTH, panel);
          stretch_of_fours<N, N>(plan, s, panel, packed, plan.places.data(), sums, none);
        }
        store_panel<E>(sums, WIDTH, bias, plan.outputs, tile * WIDTH, x.count, y.data, y.ld);
      });
    free(sums);
  }
  return failed;
}

template <class E>
bool single_linear(Rows<typename E::type> x, Weight<typename E::type> weight, const typename E::type *bias,
                   const Plan &plan, Result<typename E::type> y, Kept *kept, int threads) {
  const PackedValues packed(kept, plan.places.size(), [&](float *to) { pack_fours<E>(weight, plan, to, threads); });
  if (!packed.data) return true;
  bool failed = false;
  with_vectors<SINGLE_VECTORS>(tile_vectors(x.count, plan.outputs, SINGLE_VECTORS), [&](auto n) {
    failed = single_tiles<E, n.value>(x, packed.data, bias, plan, y, threads);
  });
  return failed;
}

template <class E>
bool units_linear(Rows<typename E::type> x, i64 in, Weight<typename E::type> weight, const typename E::type *bias,
                  Units units, Units columns, Stored stored, const int32_t *numbers, const Plan *plan,
                  Result<typename E::type> y, Kept *kept, int threads) {
  const bool by_column = units.r == 1 && units.c >= 4;
  Order order(numbers);
  if (stored == (by_column ? Stored::BY_ROW : Stored::BY_COLUMN) &&
      !order.transpose(by_column ? columns : units, by_column ? units : columns, threads))
    return true;
  weight.places.order = order.numbers;
  if (units.r % 8 == 0) return gather_linear<E, 8, WIDE ? 3 : 1>(x, in, weight, bias, units, y, kept, threads);
  if (units.r == 4) return gather_linear<E, 4, WIDE ? 6 : 2>(x, in, weight, bias, units, y, kept, threads);
  if (units.r == 2) return gather_linear<E, 2, WIDE ? 8 : 4>(x, in, weight, bias, units, y, kept, threads);
  if (by_column && units.c % 8 == 0)
    return scatter_linear<E, 8, WIDE ? 2 : 1>(x, in, weight, bias, columns, y, kept, threads);
  if (by_column) return scatter_linear<E, 4, WIDE ? 4 : 2>(x, in, weight, bias, columns, y, kept, threads);
  return single_linear<E>(x, weight, bias, *plan, y, kept, threads);
}

// ---- dW[o, i] = sum over t of dY[t, o] X[t, i], for active units: VL sums of RO outputs and VL / RO inputs at a time

constexpr i64 TOKENS = 128;  // in a panel, at most

template <int RO, i64 FIXED>
vec outer(const float *dy, const float *const (&x)[VL / RO], const float *const (&coming)[VL / RO], i64 runtime) {
  const i64 width = FIXED ? FIXED : runtime;
  constexpr int NC = VL / RO;
  alignas(VL * 4) vec sum[VL] = {};
#pragma GCC unroll 4
  for (i64 t = 0; t < width; t += VL) {
    alignas(VL * 4) vec xs[NC];
    for (int c = 0; c < NC; c++) {
      if (RO > 1) __builtin_prefetch(coming[c] + t);
      xs[c] = *(const vec *)(x[c] + t);
    }
    for (int r = 0; r < RO; r++) {
      const vec d = *(const vec *)(dy + r * width + t);
      for (int c = 0; c < NC; c++) sum[c * RO + r] += d * xs[c];
    }
  }
  return lane_sums(sum);
}

template <class E, int RO>
struct GradUnits {
  using T = typename E::type;
  static constexpr i64 NC = VL / RO;
  Units units;
  Rows<T> dy, x;
  i64 in, out, width;  // inputs, outputs, tokens of a tile
  T *dw;
  Places places;       // of the units in dw

  i64 tiles() const { return ceil_div(x.count, width); }
  i64 panel() const { return (in + out) * width; }
  i64 sums(i64 row) const { return ceil_div(units.count(row) * units.c, NC) * VL * (units.r / RO); }

  void load(i64 tile, float *panel) const {
    load_panel<E>(x, tile * width, 0, in, width, panel);
    load_panel<E>(dy, tile * width, 0, out, width, panel + in * width);
  }

  // Inputs of a unit row in the order of its active units, NC at a time; the last one again where they run out.
  void lines(const float *panel, const int32_t *idx, i64 total, i64 first, const float *(&to)[VL / RO]) const {
    if (units.c == 1)
      for (i64 j = 0; j < NC; j++) to[j] = panel + idx[first + j < total ? first + j : total - 1] * width;
    else {
      const float *at = panel + (idx[first / units.c] * units.c + first % units.c) * width;
      for (i64 j = 0; j < NC; j++) to[j] = at + j * width;
    }
  }

  void add(i64 row, const float *panel, float *to) const {
    const int32_t *idx = units.idx + units.ptr[row];
    const i64 total = units.count(row) * units.c;
    for (i64 o = row * units.r; o < (row + 1) * units.r && total; o += RO) {
      const float *now[NC], *coming[NC], *dy = panel + (in + o) * width;
      lines(panel, idx, total, 0, coming);
      for (i64 k = 0; k < total; k += NC, to += VL) {
        std::copy(coming, coming + NC, now);
        lines(panel, idx, total, k + NC < total ? k + NC : 0, coming);
        *(vec *)to += width == TOKENS ? outer<RO, TOKENS>(dy, now, coming, width) : outer<RO, 0>(dy, now, coming, width);
      }
    }
  }

  void store(i64 row, const float *from) const {
    const i64 total = units.count(row) * units.c;
    for (i64 o = row * units.r; o < (row + 1) * units.r; o += RO)
      for (i64 k = 0; k < total; k += NC, from += VL) {
        T rounded[VL];
        E::store(rounded, *(const vec *)from);
        for (i64 j = 0; j < NC && k + j < total; j++) {
          const i64 p = units.ptr[row] + (k + j) / units.c, of_unit = o - row * units.r;
          T *to = dw + places.of(p, row * units.r, units.idx[p] * units.c) + (k + j) % units.c * places.in;
          for (i64 r = 0; r < RO; r++) to[(of_unit + r) * places.out] = rounded[j * RO + r];
        }
      }
  }
};

template <class E, int RO>
bool units_grad_weight(Rows<typename E::type> dy, Rows<typename E::type> x, i64 in, Units units,
                       typename E::type *dw, Places places, int threads) {
  const i64 out = units.rows * units.r, width = std::min(ceil_div(x.count, VL) * VL, TOKENS);
  return sum_over_tiles(GradUnits<E, RO>{units, dy, x, in, out, width, dw, places}, places.unit ? nullptr : dw, in,
                        threads);
}

// `stored`: WHOLE or BY_ROW.
template <class E>
bool units_grad(Rows<typename E::type> dy, Rows<typename E::type> x, i64 in, Units units, Units columns, Stored stored,
                const int32_t *numbers, typename E::type *dw, int threads) {
  constexpr int RO = VL < 8 ? 2 : 4;
  const i64 out = units.rows * units.r, unit = stored ? units.r * units.c : 0, line = stored ? units.c : in;
  Order order(numbers);
  // The side with more of a unit's weights takes the part of the outputs.
  if (units.r < units.c) {
    if (stored && !order.transpose(columns, units, threads)) return true;
    const Places places = {1, line, unit, order.numbers};
    if (units.c % RO == 0) return units_grad_weight<E, RO>(x, dy, out, columns, dw, places, threads);
    return units_grad_weight<E, 2>(x, dy, out, columns, dw, places, threads);
  }
  const Places places = {line, 1, unit, order.numbers};
  if (units.r % RO == 0) return units_grad_weight<E, RO>(dy, x, in, units, dw, places, threads);
  if (units.r == 2) return units_grad_weight<E, 2>(dy, x, in, units, dw, places, threads);
  return units_grad_weight<E, 1>(dy, x, in, units, dw, places, threads);
}

}  // namespace

// Sizes and strides in elements; a result of 1: no memory. `ptr`, `idx`: the units by row; `tptr`, `tidx`: by column.
// `stored`: 0 for a whole weight, 1 for its units' values alone, by row, 2 for those by column; strides are then a unit's,
// and `order` says which one in memory each of them is; null: they lie one after the other.
extern "C" {

void *estdgm_units_plan(const int32_t *ptr, const int32_t *idx, i64 rows, i64 c, i64 in) {
  try {
    return new Plan({ptr, idx, rows, 1, c}, in, LINES);
  } catch (const std::bad_alloc &) {
    return nullptr;
  }
}

void estdgm_units_free(void *plan) { delete (Plan *)plan; }

#define PRODUCTS(E, T, name)                                                                                          \
  int estdgm_units_linear_##name(const T *x, i64 ldx, i64 tokens, const T *weight, i64 sn, i64 sk, const T *bias,      \
                                 const int32_t *ptr, const int32_t *idx, const int32_t *tptr, const int32_t *tidx,    \
                                 i64 rows, i64 cols, i64 r, i64 c, int stored, const int32_t *order, const void *plan, \
                                 T *y, i64 ldy, void *kept, int threads) {                                            \
    return units_linear<E>({x, ldx, tokens}, cols * c, {weight, {sn, sk, stored ? r * c : 0}}, bias,                  \
                           {ptr, idx, rows, r, c}, {tptr, tidx, cols, c, r}, (Stored)stored, order,                   \
                           (const Plan *)plan, {y, ldy, rows * r}, (Kept *)kept, threads);                            \
  }                                                                                                                   \
  int estdgm_units_grad_weight_##name(const T *dy, i64 ldd, const T *x, i64 ldx, i64 tokens, const int32_t *ptr,      \
                                      const int32_t *idx, const int32_t *tptr, const int32_t *tidx, i64 rows,         \
                                      i64 cols, i64 r, i64 c, int stored, const int32_t *order, T *dw, int threads) { \
    return units_grad<E>({dy, ldd, tokens}, {x, ldx, tokens}, cols * c, {ptr, idx, rows, r, c},                      \
                         {tptr, tidx, cols, c, r}, (Stored)stored, order, dw, threads);                                \
  }

PRODUCTS(Float, float, float32)
#if defined(__AVX512BF16__)
PRODUCTS(BFloat16, uint16_t, bfloat16)
#endif

}  // extern "C"
