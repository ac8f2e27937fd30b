// Products of a convolution whose mask units are finer than a block: r outputs that share c inputs with all taps, down
// to one tap of one pair.
//
// The loops are those of linear layers (units.h). A vector holds one pixel of several images or bands (lanes.h): a tile's
// window, channel by channel, stays in the second-level cache while all units pass over it, and a column of the weight's
// matrix, which is a tap of an input, is an address in it. The order of sums depends on nothing but the shapes and the
// mask, so results are the same for any number of threads.
#include <omp.h>

#include <new>

#include "kept.h"
#include "lanes.h"
#include "share.h"
#include "units.h"

namespace {

using estdgm::Kept;
using estdgm::PackedValues;

constexpr i64 CACHED = 448 * 1024 / 4;  // floats of a panel
constexpr int SINGLE_VECTORS = WIDE ? 4 : 2;

// An output, with the elements from one image, row and pixel to the next; channels are adjacent.
template <class T>
struct Output {
  T *data;
  i64 image, row, pixel, channels;
};

// Calls make<N>(tile, u, v, load) for each strip of N <= MOST pixels side by side, whose window starts at panel +
// u * row_step + v * VL; `scratch` floats of a thread are for make. A task is one tile, and where those are few a share
// of the outputs: make is given the share and the number of shares.
template <int MOST, class Load, class Make>
bool each_strip(const Lanes &lanes, i64 panel_floats, i64 scratch, i64 most_shares, int threads, Load load, Make make) {
  const i64 tiles = lanes.tiles();
  const i64 parts = tiles % threads ? std::min(ceil_div(4 * threads, tiles), most_shares) : 1;
  Shares shares(tiles * parts, threads);
  bool failed = false;
#pragma omp parallel num_threads(threads)
  {
    float *panel = floats(panel_floats + scratch);
    i64 loaded = -1;
    Lanes::Tile tile;
    if (!panel)
#pragma omp atomic write
      failed = true;
    else
      shares.work(omp_get_thread_num(), [&](i64 task) {
        if (task / parts != loaded) {
          tile = lanes.tile(loaded = task / parts);
          load(tile, panel);
        }
        const i64 strips = ceil_div(tile.cols, MOST);
        for (i64 u = 0; u < tile.rows; u++)
          for (i64 s = 0; s < strips; s++) {
            const i64 v = s * tile.cols / strips, n = (s + 1) * tile.cols / strips - v;
            with_vectors<MOST>(n, [&](auto N) {
              make(N, tile, u, v, panel + u * lanes.row_step + v * VL, panel + panel_floats, task % parts, parts);
            });
          }
      });
    free(panel);
  }
  return failed;
}

// Where the lanes' pixels of a strip of `count` are in the output.
template <class T>
struct Pixels {
  static constexpr int MOST = 8;
  int count;
  i64 at[MOST][VL];

  Pixels(int count, const Lanes::Tile &tile, i64 u, i64 v, const Output<T> &y) : count(count) {
    for (int j = 0; j < count; j++) tile.find(u, v + j, y.image, y.row, y.pixel, at[j]);
  }

  // Channels [first, end) from sums[channel - first][pixel][lane], plus their bias; whole vectors of channels are there.
  template <class E>
  [[gnu::noinline]] void store(const float *sums, const T *bias, i64 first, i64 end, T *y) const {
    for (i64 c = first; c < end; c += VL, sums += count * VL * VL) {
      const i64 n = std::min<i64>(end - c, VL);
      T part[VL] = {};
      if (bias) memcpy(part, bias + c, n * sizeof(T));
      const vec b = E::load(part);
      for (int j = 0; j < count; j++) {
        alignas(VL * 4) vec r[VL];
        for (int i = 0; i < VL; i++) r[i] = *(const vec *)(sums + (i * count + j) * VL);
        transpose(r);
        for (int l = 0; l < VL; l++) {
          if (at[j][l] < 0) continue;
          if (n == VL)
            E::store(y + at[j][l] + c, r[l] + b);
          else {
            E::store(part, r[l] + b);
            memcpy(y + at[j][l] + c, part, n * sizeof(T));
          }
        }
      }
    }
  }
};

// Columns of a unit, taps of one input after those of another.
struct Taps {
  const int32_t *at;
  i64 operator()(i64 column) const { return at[column]; }
  i64 line(i64 column) const { return column * VL; }
};

// As `gather`, for operands of every type.
template <int R, int N>
[[gnu::noinline]] void gather_taps(const float *panel, i64 unit, Taps places, const float *weights, const int32_t *idx,
                                   i64 count, i64 c, float *sums) {
  gather<R, N>(panel, unit, places, weights, idx, count, c, sums);
}

// ---- several outputs a unit: their sums stay in registers

template <class E, int R, int MOST>
bool gather_conv(const Image<typename E::type> &x, Weight<typename E::type> weight, Walk walk,
                 const typename E::type *bias, Units units, const Output<typename E::type> &y, Kept *kept, int threads) {
  constexpr i64 STRIP = VL < 8 ? 8 : VL;  // outputs whose sums are stored at once
  const i64 taps = walk.count, c = units.c * taps, all = units.ptr[units.rows] * units.r * c;
  const Lanes lanes(walk, {(double)all / x.channels, MOST, 2 * threads, x.channels, 0, CACHED});
  const PackedValues packed(kept, all, [&](float *to) { pack<E, R>(weight, units, to, threads); });
  if (!packed.data) return true;
  std::vector<int32_t> places;
  for (i64 k = 0; k < c; k++) places.push_back(k / taps * lanes.line + lanes.offsets[k % taps]);
  const i64 strips = ceil_div(y.channels, STRIP);
  return each_strip<MOST>(
      lanes, x.channels * lanes.line, STRIP * MOST * VL, strips, threads,
      [&](const Lanes::Tile &tile, float *panel) { lanes.load<E>(x, tile, 0, x.channels, panel); },
      [&](auto n, const Lanes::Tile &tile, i64 u, i64 v, const float *panel, float *sums, i64 part, i64 parts) {
        constexpr int N = n.value;
        const Pixels<typename E::type> pixels(N, tile, u, v, y);
        for (i64 s = part * strips / parts; s < (part + 1) * strips / parts; s++) {
          const i64 first = s * STRIP, end = std::min(first + STRIP, y.channels);
          for (i64 o = first; o < end; o += R) {
            const i64 row = o / units.r, count = units.count(row), chunk = o % units.r / R;
            gather_taps<R, N>(panel, units.c * lanes.line, Taps{places.data()},
                              packed.data + units.ptr[row] * units.r * c + chunk * count * R * c, units.idx + units.ptr[row],
                              count, c, sums + (o - first) * N * VL);
          }
          pixels.template store<E>(sums, bias, first, end, y.data);
        }
      });
}

// ---- units of one output and c >= 4 inputs: the inputs' pixels stay in registers, tap by tap

template <class E, int R, int MOST>
bool scatter_conv(const Image<typename E::type> &x, Weight<typename E::type> weight, Walk walk,
                  const typename E::type *bias, Units columns, const Output<typename E::type> &y, Kept *kept,
                  int threads) {
  const i64 taps = walk.count, all = columns.ptr[columns.rows] * columns.r * taps;
  const i64 outputs = ceil_div(y.channels, VL) * VL;
  const Lanes lanes(walk, {(double)all / x.channels, MOST, 2 * threads, x.channels, 0, CACHED});
  weight = {weight.data, {weight.places.in, weight.places.out}, weight.taps, weight.count};
  const PackedValues packed(kept, all, [&](float *to) { pack<E, R, true>(weight, columns, to, threads); });
  if (!packed.data) return true;
  return each_strip<MOST>(
      lanes, x.channels * lanes.line, outputs * MOST * VL, 1, threads,
      [&](const Lanes::Tile &tile, float *panel) { lanes.load<E>(x, tile, 0, x.channels, panel); },
      [&](auto n, const Lanes::Tile &tile, i64 u, i64 v, const float *panel, float *sums, i64, i64) {
        constexpr int N = n.value;
        const Pixels<typename E::type> pixels(N, tile, u, v, y);
        memset(sums, 0, outputs * N * VL * sizeof(float));
        for (i64 i = 0; i < x.channels; i += R) {
          const i64 row = i / columns.r, count = columns.count(row), chunk = i % columns.r / R;
          const float *weights = packed.data + (columns.ptr[row] * columns.r + chunk * count * R) * taps;
          for (i64 t = 0; t < taps; t++, weights += count * R)
            scatter<R, N>(panel + i * lanes.line + lanes.offsets[t], lanes.line, weights,
                          columns.idx + columns.ptr[row], count, sums);
        }
        pixels.template store<E>(sums, bias, 0, y.channels, y.data);
      });
}

// ---- single weights

constexpr i64 PLACES = 60000;  // vectors that 16 bits reach, with some to spare

// Inputs of a stretch, a multiple of c: of a strip of so many, windows stay in the first-level cache.
i64 stretch_inputs(const Tap *taps, i64 count, i64 c) {
  i64 top = taps[0].row, bottom = top, left = taps[0].col, right = left;
  for (i64 t = 1; t < count; t++) {
    top = std::min(top, taps[t].row);
    bottom = std::max(bottom, taps[t].row);
    left = std::min(left, taps[t].col);
    right = std::max(right, taps[t].col);
  }
  const i64 least = (bottom - top + 1) * (right - left + 1);  // of a window
  return std::max<i64>(std::min(192 / count, PLACES / least - 1) / c, 1) * c;
}

template <class E>
bool single_conv(const Image<typename E::type> &x, Weight<typename E::type> weight, Walk walk,
                 const typename E::type *bias, const Plan &plan, const Output<typename E::type> &y, Kept *kept,
                 int threads) {
  const i64 taps = walk.count, inputs = plan.lines / taps, outputs = ceil_div(y.channels, VL) * VL;
  const i64 entries = plan.places.size(), stretches = plan.stretch.size() - 1;
  const i64 room = std::min(CACHED, PLACES / (inputs + 1) * x.channels * VL);
  const Lanes lanes(walk, {(double)entries / x.channels, SINGLE_VECTORS, 2 * threads, x.channels, 0, room});
  const i64 stretch = (inputs + 1) * lanes.line;  // a window of zeros ends each stretch
  if (stretch > 65535 * VL) return true;
  const PackedValues packed(kept, entries, [&](float *to) { pack_fours<E>(weight, plan, to, threads); });
  if (!packed.data) return true;
  std::vector<uint16_t> places(entries + 4);  // of this tile's window
  plan.each_four(threads, [&](i64 i, i64) {
    const Four &four = plan.fours[i];
    for (i64 p = four.start; p < four.start + four.length * FOUR; p++) {
      const i64 k = plan.places[p];
      places[p] = (k / taps * lanes.line + (k == plan.lines ? 0 : lanes.offsets[k % taps])) / VL;
    }
  });
  return each_strip<SINGLE_VECTORS>(
      lanes, stretches * stretch, (outputs + 1) * SINGLE_VECTORS * VL, 1, threads,
      [&](const Lanes::Tile &tile, float *panel) {
        for (i64 s = 0; s < stretches; s++) {
          lanes.load<E>(x, tile, s * inputs, std::min((s + 1) * inputs, x.channels), panel + s * lanes.line);
          memset(panel + (s * (inputs + 1) + inputs) * lanes.line, 0, lanes.line * sizeof(float));
        }
      },
      [&](auto n, const Lanes::Tile &tile, i64 u, i64 v, const float *panel, float *sums, i64, i64) {
        constexpr int N = n.value;
        const Pixels<typename E::type> pixels(N, tile, u, v, y);
        memset(sums, 0, (outputs + 1) * N * VL * sizeof(float));
        for (i64 s = 0; s < stretches; s++)
          stretch_of_fours<N, 1>(plan, s, panel + s * stretch, packed.data, places.data(), sums, sums + outputs * N * VL);
        pixels.template store<E>(sums, bias, 0, y.channels, y.data);
      });
}

template <class E>
bool units_conv(const Image<typename E::type> &x, Weight<typename E::type> weight, Walk walk,
                const typename E::type *bias, Units units, Units columns, const Plan *plan,
                const Output<typename E::type> &y, Kept *kept, int threads) {
  if (units.r % 8 == 0) return gather_conv<E, 8, WIDE ? 3 : 1>(x, weight, walk, bias, units, y, kept, threads);
  if (units.r == 4) return gather_conv<E, 4, WIDE ? 6 : 2>(x, weight, walk, bias, units, y, kept, threads);
  if (units.r == 2) return gather_conv<E, 2, WIDE ? 8 : 4>(x, weight, walk, bias, units, y, kept, threads);
  if (units.c % 8 == 0) return scatter_conv<E, 8, WIDE ? 2 : 1>(x, weight, walk, bias, columns, y, kept, threads);
  if (units.c == 4) return scatter_conv<E, 4, WIDE ? 4 : 2>(x, weight, walk, bias, columns, y, kept, threads);
  return single_conv<E>(x, weight, walk, bias, *plan, y, kept, threads);
}

// The order of single weights, as `estdgm_units_conv_plan` says.
Plan *conv_plan(const int32_t *ptr, const int32_t *idx, i64 rows, i64 in, i64 c, const Tap *taps, i64 count, i64 depth,
                const i64 *which) {
  const i64 lines = stretch_inputs(taps, count, c) * count;
  if (!which) return new Plan({ptr, idx, rows, 1, depth == 1 ? c * count : c}, in * count, lines);
  std::vector<i64> slot(depth, -1);
  for (i64 t = 0; t < count; t++) slot[which[t]] = t;
  // Row by row of the transposed matrix: of input i, the taps of each output.
  std::vector<int32_t> starts(in + 1), columns(ptr[rows]);
  for (i64 p = 0; p < ptr[rows]; p++) starts[idx[p] / depth + 1] += slot[idx[p] % depth] >= 0;
  for (i64 i = 0; i < in; i++) starts[i + 1] += starts[i];
  std::vector<int32_t> at(starts.begin(), starts.end() - 1);
  for (i64 o = 0; o < rows; o++)
    for (i64 p = ptr[o]; p < ptr[o + 1]; p++)
      if (const i64 t = slot[idx[p] % depth]; t >= 0) columns[at[idx[p] / depth]++] = o * count + t;
  return new Plan({starts.data(), columns.data(), in, 1, 1}, rows * count, lines);
}

}  // namespace

// Strides and sizes in elements; `taps` holds three numbers a tap; a result of 1: no memory.
extern "C" {

// The order of single weights, for `count` taps. Units are one output by c inputs of depth 1, or, where depth is the
// number of all taps, single columns: the taps of the first input, then those of the next. For the latter, `which` says
// that the order is that of the input's gradient, by those of all taps; null: that of the output.
void *estdgm_units_conv_plan(const int32_t *ptr, const int32_t *idx, i64 rows, i64 in, i64 c, const i64 *taps, i64 count,
                             i64 depth, const i64 *which) {
  try {
    return conv_plan(ptr, idx, rows, in, c, (const Tap *)taps, count, depth, which);
  } catch (const std::bad_alloc &) {
    return nullptr;
  }
}

#define PRODUCTS(E, T, name)                                                                                          \
  int estdgm_units_conv_##name(const T *x, i64 batch, i64 height, i64 width, i64 channels, const T *weight, i64 sn,    \
                               i64 sk, const i64 *taps, i64 count, i64 step_row, i64 step_col, const T *bias,          \
                               const int32_t *ptr, const int32_t *idx, const int32_t *tptr, const int32_t *tidx,      \
                               i64 rows, i64 cols, i64 r, i64 c, const void *plan, T *y, i64 y_rows, i64 y_cols,      \
                               i64 y_image, i64 y_row, i64 y_pixel, void *kept, int threads) {                        \
    return units_conv<E>({x, batch, height, width, channels}, {weight, {sn, sk}, (const Tap *)taps, count},           \
                         {(const Tap *)taps, count, step_row, step_col, batch, y_rows, y_cols}, bias,                  \
                         {ptr, idx, rows, r, c}, {tptr, tidx, cols, c, r}, (const Plan *)plan,                         \
                         {y, y_image, y_row, y_pixel, rows * r}, (Kept *)kept, threads);                              \
  }

PRODUCTS(Float, float, float32)
#if defined(__AVX512BF16__)
PRODUCTS(BFloat16, uint16_t, bfloat16)
#endif

}  // extern "C"
