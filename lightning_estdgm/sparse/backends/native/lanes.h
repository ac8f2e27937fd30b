// Tiles of images for loops over vectors: each lane is one image, or one band of an image that is cut into several.
//
// All lanes of a tile are at the same pixel of their bands, so a tap is one distance in memory for all of them, whatever
// stride and dilation are, and zeros around the image are part of each lane's window.
#pragma once

#include <algorithm>
#include <vector>

#include "images.h"
#include "panels.h"

namespace {

// A convolution as it is walked over: an output pixel (u, v) and a tap find their pixel of the image at
// (u * step_row + tap.row, v * step_col + tap.col).
struct Walk {
  const Tap *taps;
  i64 count, step_row, step_col;
  i64 batch, rows, cols;  // of the output
};

// What a tile is cut for.
struct Needs {
  double work;                  // vectors that are multiplied for one of a channel
  i64 strip;                    // pixels side by side that are computed at once
  i64 least;                    // tiles, if there can be as many
  i64 channels, outputs, room;  // so many of its window and of its pixels are to fit into `room` floats
  i64 near_outputs = 0;         // if not 0: a channel's window and so many outputs' pixels fit into the first-level cache
};

class Lanes {
  Walk walk;
  i64 top, left, span_rows, span_cols;  // of all taps
  i64 down = 1, across = 1;             // bands of an image
  i64 band_rows, band_cols, groups;
  i64 tiles_down, tiles_across;         // of a band
  i64 window_rows, window_cols, lane_cols;

  struct Lane {
    i64 image, row, col, end_row, end_col;  // of the output: where its band starts, and where it ends; image -1: none
  };

  Lane lane(i64 group, int i) const {
    const i64 at = group * VL + i, image = at / (down * across), band = at % (down * across);
    if (image >= walk.batch) return {-1, 0, 0, 0, 0};
    const i64 row = band / across * band_rows, col = band % across * band_cols;
    return {image, row, col, std::min(row + band_rows, walk.rows), std::min(col + band_cols, walk.cols)};
  }

  i64 windows_rows(i64 rows) const { return (rows - 1) * walk.step_row + span_rows; }
  i64 windows_cols(i64 cols) const { return (cols - 1) * walk.step_col + span_cols; }
  // Columns of a window that are one step apart lie side by side.
  i64 place(i64 col) const { return col % walk.step_col * lane_cols + col / walk.step_col; }

  // Bands with the fewest pixels to compute for lanes that are all full, and not much more to load.
  void cut() {
    i64 least = -1;
    for (i64 d = 1; d <= std::min<i64>(walk.rows, VL); d++)
      for (i64 a = 1; a <= std::min<i64>(walk.cols, VL); a++) {
        const i64 height = (walk.rows + d - 1) / d, width = (walk.cols + a - 1) / a;
        const i64 cost = (walk.batch * d * a + VL - 1) / VL *
                         (8 * height * width + windows_rows(height) * windows_cols(width));
        if (least >= 0 && cost >= least) continue;
        least = cost;
        down = d;
        across = a;
        band_rows = height;
        band_cols = width;
      }
    groups = (walk.batch * down * across + VL - 1) / VL;
  }

 public:
  i64 tile_rows, tile_cols;      // of the output
  i64 line;                      // floats from one channel of a tile's window to the next
  i64 row_step;                  // floats from an output row to the next, in a window
  std::vector<int32_t> offsets;  // of the taps of output pixel (0, 0), in floats

  Lanes(Walk walk, Needs needs) : walk(walk) {
    i64 bottom = top = walk.taps[0].row, right = left = walk.taps[0].col;
    for (i64 t = 1; t < walk.count; t++) {
      top = std::min(top, walk.taps[t].row);
      left = std::min(left, walk.taps[t].col);
      bottom = std::max(bottom, walk.taps[t].row);
      right = std::max(right, walk.taps[t].col);
    }
    span_rows = bottom - top + 1;
    span_cols = right - left + 1;
    cut();
    double best = -1;
    i64 down_best = band_rows, across_best = band_cols;
    for (i64 d = 1, before = 0; d <= band_rows; d++) {
      const i64 rows = (band_rows + d - 1) / d;
      if (rows == before) continue;
      before = rows;
      for (i64 a = 1, last = 0; a <= band_cols; a++) {
        const i64 cols = (band_cols + a - 1) / a, window = windows_rows(rows) * windows_cols(cols);
        const bool fits = (window * needs.channels + rows * cols * needs.outputs) * VL <= needs.room &&
                          (window + rows * cols * needs.near_outputs) * VL * 4 <= (needs.near_outputs ? 26 : 4096) * 1024;
        const bool smallest = rows == 1 && cols == 1 && best < 0;
        if (!smallest && (cols == last || !fits || groups * d * a < needs.least)) continue;
        last = cols;
        const i64 strips = (cols + needs.strip - 1) / needs.strip;
        const double cost = d * a * (6.0 * window + needs.work * rows * (cols + strips));
        if (best >= 0 && cost >= best) continue;
        best = cost;
        down_best = d;
        across_best = a;
      }
    }
    tile_rows = (band_rows + down_best - 1) / down_best;
    tile_cols = (band_cols + across_best - 1) / across_best;
    tiles_down = (band_rows + tile_rows - 1) / tile_rows;
    tiles_across = (band_cols + tile_cols - 1) / tile_cols;
    window_rows = windows_rows(tile_rows);
    window_cols = windows_cols(tile_cols);
    lane_cols = (window_cols + walk.step_col - 1) / walk.step_col;
    const i64 row = lane_cols * walk.step_col;
    line = (window_rows * row | 1) * VL;  // an odd number: else channels compete for places in the cache
    row_step = row * walk.step_row * VL;
    for (i64 t = 0; t < walk.count; t++)
      offsets.push_back(((walk.taps[t].row - top) * row + place(walk.taps[t].col - left)) * VL);
  }

  i64 tiles() const { return groups * tiles_down * tiles_across; }
  i64 pixels() const { return tile_rows * tile_cols; }

  // One tile: `rows` by `cols` output pixels of each lane's band.
  struct Tile {
    i64 row, col, rows, cols;  // from the start of the band
    Lane lanes[VL];

    // Where each lane's output pixel (u, v) is in memory; -1: it has none.
    void find(i64 u, i64 v, i64 image, i64 row_length, i64 pixel, i64 (&at)[VL]) const {
      for (int l = 0; l < VL; l++) {
        const i64 i = lanes[l].row + row + u, j = lanes[l].col + col + v;
        const bool there = u < rows && v < cols && i < lanes[l].end_row && j < lanes[l].end_col;
        at[l] = there ? lanes[l].image * image + i * row_length + j * pixel : -1;
      }
    }
  };

  Tile tile(i64 index) const {
    const i64 down_at = index / tiles_across % tiles_down * tile_rows, across_at = index % tiles_across * tile_cols;
    Tile tile = {down_at, across_at, std::min(tile_rows, band_rows - down_at),
                 std::min(tile_cols, band_cols - across_at), {}};
    for (int l = 0; l < VL; l++) tile.lanes[l] = lane(index / (tiles_down * tiles_across), l);
    return tile;
  }

  // panel[channel][pixel of the window][lane], for channels [first, end) of the image.
  template <class E>
  void load(const Image<typename E::type> &image, const Tile &tile, i64 first, i64 end, float *panel) const {
    const i64 row = tile.row * walk.step_row + top, col = tile.col * walk.step_col + left;
    for (i64 i = 0; i < window_rows; i++)
      for (i64 j = 0; j < window_cols; j++) {
        const typename E::type *from[VL];
        for (int l = 0; l < VL; l++) {
          const Lane &at = tile.lanes[l];
          from[l] = image.pixel(at.image, at.row * walk.step_row + row + i, at.col * walk.step_col + col + j);
          if (at.image < 0) from[l] = nullptr;
        }
        turn<E>(from, first, end, line, panel + first * line + (i * lane_cols * walk.step_col + place(j)) * VL);
      }
  }

  // panel[channel][pixel of the tile][lane], for channels [first, end) of an image of the output's size.
  template <class E>
  void load_output(const Image<typename E::type> &image, const Tile &tile, i64 first, i64 end, float *panel) const {
    const i64 row = image.width * image.channels, line = pixels() * VL;
    for (i64 p = 0; p < pixels(); p++) {
      i64 at[VL];
      tile.find(p / tile_cols, p % tile_cols, image.height * row, row, image.channels, at);
      const typename E::type *from[VL];
      for (int l = 0; l < VL; l++) from[l] = at[l] < 0 ? nullptr : image.data + at[l];
      turn<E>(from, first, end, line, panel + first * line + p * VL);
    }
  }

 private:
  // to[c - first][lane] = from[lane][c]; `line` floats from one channel to the next; null: zeros.
  template <class E>
  [[gnu::noinline]] static void turn(const typename E::type *const (&from)[VL], i64 first, i64 end, i64 line, float *to) {
    using T = typename E::type;
    for (i64 c = first; c < end; c += VL, to += line * VL) {
      const i64 n = std::min<i64>(end - c, VL);
      alignas(VL * 4) vec r[VL];
      for (int l = 0; l < VL; l++) {
        if (!from[l])
          r[l] = vec{};
        else if (n == VL)
          r[l] = E::load(from[l] + c);
        else {
          T part[VL] = {};
          memcpy(part, from[l] + c, n * sizeof(T));
          r[l] = E::load(part);
        }
      }
      transpose(r);
      for (i64 i = 0; i < n; i++) *(vec *)(to + i * line) = r[i];
    }
  }
};

}  // namespace
