// Gradient of the weight of a convolution whose mask units are finer than a block: see units_conv.cpp for how images are
// laid out. Tiles are summed in order, and their size depends on nothing but shapes and the mask.
#include "lanes.h"
#include "units.h"

namespace {

// dW[o, i, tap] = sum over pixels of dY[pixel, o] X[pixel at tap, i], for active units: VL sums over a tile's pixels, of
// RO lines `line` apart from `a`, and of VL / RO lines that are `at` from x.
template <int RO>
[[gnu::noinline]] vec outer(const float *a, i64 line, i64 a_step, const float *x, const int32_t *at, i64 x_step,
                            i64 rows, i64 cols) {
  constexpr int NC = VL / RO;
  alignas(VL * 4) vec sum[VL] = {};
  const float *xs[NC];
  for (int c = 0; c < NC; c++) xs[c] = x + at[c];
  for (i64 u = 0; u < rows; u++)
    for (i64 v = 0; v < cols; v++) {
      alignas(VL * 4) vec b[NC];
      for (int c = 0; c < NC; c++) b[c] = *(const vec *)(xs[c] + u * x_step + v * VL);
      for (int r = 0; r < RO; r++) {
        const vec d = *(const vec *)(a + r * line + u * a_step + v * VL);
        for (int c = 0; c < NC; c++) sum[c * RO + r] += d * b[c];
      }
    }
  return lane_sums(sum);
}

// Units with at least as many outputs as inputs, by row: RO outputs by VL / RO taps of inputs. Or, if SWAPPED, those
// with more inputs, by column: RO inputs at one tap by VL / RO outputs.
template <class E, int RO, bool SWAPPED>
struct GradConvUnits {
  using T = typename E::type;
  static constexpr i64 NC = VL / RO;
  const Lanes &lanes;
  Image<T> dy, x;
  Units units;  // of one row; c columns, which are taps of inputs if not SWAPPED
  i64 taps;
  const Tap *tap;
  T *dw;
  i64 dw_out, dw_in;  // elements from one output or input to the next
  std::vector<i64> starts;          // of each row in columns_at
  std::vector<int32_t> columns_at;  // where the columns of a unit row are in a panel

  GradConvUnits(const Lanes &lanes, Image<T> dy, Image<T> x, Units units, Walk walk, T *dw, i64 dw_out, i64 dw_in)
      : lanes(lanes), dy(dy), x(x), units(units), taps(walk.count), tap(walk.taps), dw(dw), dw_out(dw_out),
        dw_in(dw_in), starts(units.rows + 1) {
    for (i64 row = 0; row < units.rows; row++) starts[row + 1] = starts[row] + padded(row);
    columns_at = places();
  }

  i64 tiles() const { return lanes.tiles(); }
  i64 panel() const { return x.channels * lanes.line + dy.channels * lanes.pixels() * VL; }
  i64 repeats() const { return SWAPPED ? taps : 1; }
  i64 sums(i64 row) const { return ceil_div(units.count(row) * units.c, NC) * VL * (units.r / RO) * repeats(); }

  void load(i64 index, float *panel) const {
    const Lanes::Tile tile = lanes.tile(index);
    lanes.load<E>(x, tile, 0, x.channels, panel);
    lanes.load_output<E>(dy, tile, 0, dy.channels, panel + x.channels * lanes.line);
  }

  // Column of a unit row in the order of its active units.
  i64 column(i64 row, i64 k) const { return units.idx[units.ptr[row] + k / units.c] * units.c + k % units.c; }

  // Columns of a row, NC at a time; the last one again where they run out.
  i64 padded(i64 row) const { return ceil_div(units.count(row) * units.c, NC) * NC; }
  std::vector<int32_t> places() const {
    std::vector<int32_t> places;
    for (i64 row = 0; row < units.rows; row++)
      for (i64 k = 0, total = units.count(row) * units.c; k < padded(row); k++) {
        const i64 i = column(row, k < total ? k : total - 1);
        places.push_back(SWAPPED ? i * lanes.pixels() * VL : i / taps * lanes.line + lanes.offsets[i % taps]);
      }
    return places;
  }

  void add(i64 row, const float *panel, float *to) const {
    const i64 total = units.count(row) * units.c, dy_line = lanes.pixels() * VL, dy_step = lanes.tile_cols * VL;
    const float *of_dy = panel + x.channels * lanes.line;
    const int32_t *at = &columns_at[starts[row]];
    for (i64 o = row * units.r; o < (row + 1) * units.r; o += RO)
      for (i64 t = 0; t < repeats(); t++)
        for (i64 k = 0; k < total; k += NC, to += VL)
          *(vec *)to += SWAPPED ? outer<RO>(panel + o * lanes.line + lanes.offsets[t], lanes.line, lanes.row_step, of_dy,
                                            at + k, dy_step, lanes.tile_rows, lanes.tile_cols)
                                : outer<RO>(of_dy + o * dy_line, dy_line, dy_step, panel, at + k, lanes.row_step,
                                            lanes.tile_rows, lanes.tile_cols);
  }

  void store(i64 row, const float *from) const {
    const i64 total = units.count(row) * units.c;
    for (i64 o = row * units.r; o < (row + 1) * units.r; o += RO)
      for (i64 t = 0; t < repeats(); t++)
        for (i64 k = 0; k < total; k += NC, from += VL) {
          T rounded[VL];
          E::store(rounded, *(const vec *)from);
          for (i64 j = 0; j < NC && k + j < total; j++) {
            const i64 i = column(row, k + j);
            T *to = SWAPPED ? dw + i * dw_out + o * dw_in + tap[t].weight
                            : dw + o * dw_out + i / taps * dw_in + tap[i % taps].weight;
            for (i64 r = 0; r < RO; r++) to[r * (SWAPPED ? dw_in : dw_out)] = rounded[j * RO + r];
          }
        }
  }
};

template <class E, int RO, bool SWAPPED>
bool units_conv_grad_weight(const Image<typename E::type> &dy, const Image<typename E::type> &x, Walk walk, Units units,
                            typename E::type *dw, i64 dw_out, i64 dw_in, int threads) {
  // Whole tiles are summed, so their number decides the order of sums: no matter how many threads there are.
  const double work = (double)units.ptr[units.rows] * units.r * units.c * (SWAPPED ? walk.count : 1) / x.channels;
  const Lanes lanes(walk, {work, 1, 1, x.channels, dy.channels, 2048 * 1024 / 4, RO});
  const i64 columns = (SWAPPED ? dy : x).channels * walk.count;
  return sum_over_tiles(
      GradConvUnits<E, RO, SWAPPED>(lanes, dy, x, units, walk, dw, dw_out, dw_in), dw, columns, threads);
}

template <class E>
bool units_conv_grad(const Image<typename E::type> &dy, const Image<typename E::type> &x, Walk walk, Units units,
                     Units columns, typename E::type *dw, i64 dw_out, i64 dw_in, int threads) {
  constexpr int RO = VL < 8 ? 2 : 4;
  if (units.r < columns.r) {
    if (columns.r % RO == 0)
      return units_conv_grad_weight<E, RO, true>(dy, x, walk, columns, dw, dw_out, dw_in, threads);
    return units_conv_grad_weight<E, 2, true>(dy, x, walk, columns, dw, dw_out, dw_in, threads);
  }
  if (units.r % RO == 0) return units_conv_grad_weight<E, RO, false>(dy, x, walk, units, dw, dw_out, dw_in, threads);
  if (units.r == 2) return units_conv_grad_weight<E, 2, false>(dy, x, walk, units, dw, dw_out, dw_in, threads);
  return units_conv_grad_weight<E, 1, false>(dy, x, walk, units, dw, dw_out, dw_in, threads);
}

}  // namespace

// Strides and sizes in elements; `taps` holds three numbers a tap; a result of 1: no memory.
extern "C" {

#define PRODUCTS(E, T, name)                                                                                          \
  int estdgm_units_conv_grad_weight_##name(const T *dy, i64 y_rows, i64 y_cols, const T *x, i64 batch, i64 height,     \
                                           i64 width, i64 channels, const i64 *taps, i64 count, i64 step_row,         \
                                           i64 step_col, const int32_t *ptr, const int32_t *idx, const int32_t *tptr, \
                                           const int32_t *tidx, i64 rows, i64 cols, i64 r, i64 c, i64 columns,        \
                                           T *dw, i64 dw_out, i64 dw_in, int threads) {                               \
    return units_conv_grad<E>({dy, batch, y_rows, y_cols, rows * r}, {x, batch, height, width, channels},              \
                              {(const Tap *)taps, count, step_row, step_col, batch, y_rows, y_cols},                  \
                              {ptr, idx, rows, r, columns}, {tptr, tidx, cols, c, r}, dw, dw_out, dw_in, threads);     \
  }

PRODUCTS(Float, float, float32)
#if defined(__AVX512BF16__)
PRODUCTS(BFloat16, uint16_t, bfloat16)
#endif

}  // extern "C"
