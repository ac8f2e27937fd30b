// Products of a block-sparse convolution on the CPU, without a copy of all patches (implicit GEMM).
//
// Images are [batch, height, width, channels]. A tile of output rows is computed at a time: the part of the image that
// its taps see, its window, is copied with zeros around it into the cache, and a pixel of the output is then one
// address in it, and a tap one distance from there. The order of sums depends on nothing but the shapes and the mask, so
// results are the same for any number of threads.
#include "images.h"
#include "kept.h"

namespace {

// How output pixel (u, v) and a tap find their pixel of the image: (u * step_row + tap.row, v * step_col + tap.col).
struct Walk {
  const Tap *taps;
  i64 count, step_row, step_col;
  i64 rows, cols;                // of the output
  i64 top, left, span, width;    // of a window: its first row and column for u = v = 0, its rows for one u, its columns

  Walk(const Tap *taps, i64 count, i64 step_row, i64 step_col, i64 rows, i64 cols)
      : taps(taps), count(count), step_row(step_row), step_col(step_col), rows(rows), cols(cols) {
    i64 bottom = top = taps[0].row, right = left = taps[0].col;
    for (i64 t = 1; t < count; t++) {
      top = taps[t].row < top ? taps[t].row : top;
      left = taps[t].col < left ? taps[t].col : left;
      bottom = taps[t].row > bottom ? taps[t].row : bottom;
      right = taps[t].col > right ? taps[t].col : right;
    }
    span = bottom - top + 1;
    width = step_col * (cols - 1) + right - left + 1;
  }
  i64 window_rows(i64 output_rows) const { return (output_rows - 1) * step_row + span; }
  // Output rows, counted over all images, whose windows have about so many pixels; at least one.
  i64 rows_of(i64 pixels) const {
    const i64 whole = pixels / (window_rows(rows) * width);
    if (whole) return whole * rows;
    const i64 part = pixels / width < span ? 0 : (pixels / width - span) / step_row;
    return part + 1 < rows ? part + 1 : rows;
  }
  // An upper bound on the pixels of the windows of so many output rows, which may lie in several images.
  i64 window_pixels(i64 output_rows) const {
    const i64 images = (output_rows + rows - 2) / rows + 1;
    return (output_rows * step_row + images * span) * width;
  }
};

// Calls copy(image, first output row, end row, first row of the window) for each image that a tile has rows of.
template <class Copy>
void each_image(const Walk &walk, i64 begin, i64 end, Copy copy) {
  i64 window_row = 0;
  while (begin < end) {
    const i64 image = begin / walk.rows, u = begin % walk.rows;
    const i64 rows = end - begin < walk.rows - u ? end - begin : walk.rows - u;
    copy(image, u, u + rows, window_row);
    window_row += walk.window_rows(rows);
    begin += rows;
  }
}

// Calls put(pixel of the window, its row and column in the image) for what output rows [u, end) see.
template <class Put>
void each_pixel(const Walk &walk, i64 u, i64 end, Put put) {
  const i64 rows = walk.window_rows(end - u);
  for (i64 i = 0; i < rows; i++)
    for (i64 j = 0; j < walk.width; j++) put(i * walk.width + j, u * walk.step_row + walk.top + i, walk.left + j);
}

// ---- Y[pixel, r] = sum over active c and taps of X[pixel at tap, c] B[tap, c, r]: forward and input gradient

template <class E, int MR, int NV>
void conv_tile(const typename E::type *window, const i64 *from, const i64 *taps, i64 count, const float *packed,
               const int32_t *cols, i64 blocks, i64 b, const typename E::type *bias, typename E::type *y,
               const i64 *to) {
  using T = typename E::type;
  alignas(VL * 4) vec sum[MR][NV];
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) sum[i][j] = bias ? E::load(bias + j * VL) : vec{};
  const T *a[MR];
  for (int i = 0; i < MR; i++) a[i] = window + from[i];
  for (i64 p = 0; p < blocks; p++)
    for (i64 t = 0; t < count; t++) {
      const i64 at = cols[p] * b + taps[t];
      for (i64 k = at; k < at + b; k += E::PAIR, packed += b)
        for (int i = 0; i < MR; i++) {
          const float s = word(a[i] + k);
          for (int j = 0; j < NV; j++) sum[i][j] = E::mac(sum[i][j], s, packed + j * VL);
        }
    }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) E::store(y + to[i] + j * VL, sum[i][j]);
}

template <class E, int MR, int NV>
void conv_strip(const typename E::type *window, const i64 *from, i64 pixels, const i64 *taps, i64 count,
                const float *packed, const int32_t *cols, i64 blocks, i64 b, const typename E::type *bias,
                typename E::type *y, const i64 *to) {
  for (i64 q = 0; q < pixels; q += MR)
    conv_tile<E, MR, NV>(window, from + q, taps, count, packed, cols, blocks, b, bias, y, to + q);
}

// All columns of one block row, for a tile of pixels; the lists of pixels go on to a multiple of PIXELS.
constexpr i64 PIXELS = 12;

template <class E>
void conv_block_row(const typename E::type *window, const i64 *from, i64 pixels, const i64 *taps, i64 count,
                    const float *packed, const int32_t *cols, i64 blocks, i64 b, const typename E::type *bias,
                    typename E::type *y, const i64 *to) {
  for (i64 j = 0; j < b;) {
    const i64 left = (b - j) / VL;
    const float *pj = packed + j;
    const typename E::type *bj = bias ? bias + j : nullptr;
    if (WIDE && left >= 4) {
      conv_strip<E, 6, 4>(window, from, pixels, taps, count, pj, cols, blocks, b, bj, y + j, to);
      j += 4 * VL;
    } else if (left >= 2) {
      conv_strip<E, WIDE ? 12 : 6, 2>(window, from, pixels, taps, count, pj, cols, blocks, b, bj, y + j, to);
      j += 2 * VL;
    } else {
      conv_strip<E, 12, 1>(window, from, pixels, taps, count, pj, cols, blocks, b, bj, y + j, to);
      j += VL;
    }
  }
}

// Lay the active blocks out as words (tap, k / PAIR, n), one block after the other; weight[n, k] is at n * sn + k * sk.
template <class E>
void pack_taps(const typename E::type *weight, i64 sn, i64 sk, const Walk &walk, const int32_t *ptr, const int32_t *idx,
               i64 rows, i64 b, float *packed, int threads) {
  using T = typename E::type;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (i64 r = 0; r < rows; r++)
    for (i64 p = ptr[r]; p < ptr[r + 1]; p++)
      for (i64 t = 0; t < walk.count; t++) {
        const T *from = weight + r * b * sn + idx[p] * b * sk + walk.taps[t].weight;
        T *to = (T *)(packed + (p * walk.count + t) * b * b / E::PAIR);
        for (i64 n0 = 0; n0 < b; n0 += 16)
          for (i64 k = 0; k < b; k += E::PAIR)
            for (i64 n = n0; n < n0 + 16; n++)
              for (int half = 0; half < E::PAIR; half++) to[k * b + n * E::PAIR + half] = from[n * sn + (k + half) * sk];
      }
}

// `y` is [batch, walk.rows, walk.cols, rows * b] with strides of images, rows and pixels as given.
template <class E>
int conv(const Image<typename E::type> &image, const typename E::type *weight, i64 sn, i64 sk, const Walk &walk,
         const typename E::type *bias, const int32_t *ptr, const int32_t *idx, i64 rows, i64 b, typename E::type *y,
         i64 y_image, i64 y_row, i64 y_pixel, estdgm::Kept *kept, int threads) {
  using T = typename E::type;
  const i64 pitch = image.channels + 64 / (i64)sizeof(T);  // a line more: else pixels compete for places in the cache
  // The windows of a tile stay in the second-level cache while all block rows pass over them.
  const i64 all = image.batch * walk.rows;
  i64 tile = walk.rows_of(384 * 1024 / (pitch * (i64)sizeof(T)));
  const i64 share = (all + 4 * threads - 1) / (4 * threads), least = (96 + walk.cols - 1) / walk.cols;
  if (threads > 1 && tile > share) tile = share > least ? share : least;
  tile = tile > all ? all : tile;
  const i64 tiles = (all + tile - 1) / tile;
  i64 groups = (2 * threads + tiles - 1) / tiles;  // few tiles: share the block rows as well
  groups = threads == 1 ? 1 : groups > rows ? rows : groups;

  const estdgm::PackedValues packed(kept, ptr[rows] * walk.count * b * b / E::PAIR, [&](float *to) {
    pack_taps<E>(weight, sn, sk, walk, ptr, idx, rows, b, to, threads);
  });
  i64 *taps = (i64 *)malloc(walk.count * sizeof(i64));
  bool failed = !packed.data || !taps;
  if (!failed) {
    for (i64 t = 0; t < walk.count; t++)
      taps[t] = ((walk.taps[t].row - walk.top) * walk.width + walk.taps[t].col - walk.left) * pitch;
#pragma omp parallel num_threads(threads)
    {
      T *window = (T *)malloc(walk.window_pixels(tile) * pitch * sizeof(T));
      i64 *from = (i64 *)malloc((tile * walk.cols + PIXELS) * 2 * sizeof(i64));
      i64 *to = from + tile * walk.cols + PIXELS;
      if (!window || !from) {
#pragma omp atomic write
        failed = true;
      }
#pragma omp for collapse(2) schedule(dynamic, 1)
      for (i64 i = 0; i < tiles; i++)
        for (i64 g = 0; g < groups; g++) {
          if (!window || !from) continue;
          i64 pixels = 0;
          each_image(walk, i * tile, (i + 1) * tile < all ? (i + 1) * tile : all, [&](i64 n, i64 u, i64 end, i64 first) {
            T *at = window + first * walk.width * pitch;
            each_pixel(walk, u, end, [&](i64 j, i64 row, i64 col) {
              const T *pixel = image.pixel(n, row, col);
              if (pixel) memcpy(at + j * pitch, pixel, image.channels * sizeof(T));
              else memset(at + j * pitch, 0, image.channels * sizeof(T));
            });
            for (i64 row = u; row < end; row++)
              for (i64 v = 0; v < walk.cols; v++, pixels++) {
                from[pixels] = ((first + (row - u) * walk.step_row) * walk.width + v * walk.step_col) * pitch;
                to[pixels] = n * y_image + row * y_row + v * y_pixel;
              }
          });
          for (i64 q = pixels; q < pixels + PIXELS; q++) from[q] = from[pixels - 1], to[q] = to[pixels - 1];
          for (i64 r = g * rows / groups; r < (g + 1) * rows / groups; r++)
            conv_block_row<E>(window, from, pixels, taps, walk.count,
                              packed.data + (i64)ptr[r] * walk.count * b * b / E::PAIR, idx + ptr[r], ptr[r + 1] - ptr[r], b,
                              bias ? bias + r * b : nullptr, y + r * b, to);
        }
      free(window);
      free(from);
    }
  }
  free(taps);
  return failed;
}

// ---- dW[tap, r, c] = sum over pixels of dY[pixel, r] X[pixel at tap, c], for active blocks

// `a` and `x` are words (pixel / PAIR, column), the latter at `from`; sums go on.
template <class E, int MR, int NV>
void conv_outer_tile(const float *a, i64 lda, const float *x, const i64 *from, i64 words, float *sums, i64 lds) {
  alignas(VL * 4) vec sum[MR][NV];
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) sum[i][j] = *(const vec *)(sums + i * lds + j * VL);
  for (i64 t = 0; t < words; t++) {
    const float *xt = x + from[t];
    for (int i = 0; i < MR; i++) {
      const float s = word(a + t * lda + i);
      for (int j = 0; j < NV; j++) sum[i][j] = E::mac(sum[i][j], s, xt + j * VL);
    }
  }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NV; j++) *(vec *)(sums + i * lds + j * VL) = sum[i][j];
}

template <class E, int MR, int NV>
void conv_outer_strip(const float *a, const float *x, const i64 *from, i64 words, i64 b, float *sums) {
  for (i64 m = 0; m < b; m += MR) conv_outer_tile<E, MR, NV>(a + m, b, x, from, words, sums + m * b, b);
}

template <class E>
void conv_outer_block(const float *a, const float *x, const i64 *from, i64 words, i64 b, float *sums) {
  for (i64 j = 0; j < b;) {
    const i64 left = (b - j) / VL;
    if (WIDE && left >= 4) {
      conv_outer_strip<E, 4, 4>(a, x + j, from, words, b, sums + j);
      j += 4 * VL;
    } else if (left >= 2) {
      conv_outer_strip<E, WIDE ? 8 : 4, 2>(a, x + j, from, words, b, sums + j);
      j += 2 * VL;
    } else {
      conv_outer_strip<E, WIDE ? 16 : 8, 1>(a, x + j, from, words, b, sums + j);
      j += VL;
    }
  }
}

// Words of channels [from, from + b) of a pixel; of two pixels where a word holds two values (null: zeros).
void join(const float *pixel, const float *, i64 from, i64 b, float *words) {
  if (pixel) memcpy(words, pixel + from, b * 4);
  else memset(words, 0, b * 4);
}

void join(const uint16_t *first, const uint16_t *second, i64 from, i64 b, float *words) {
  uint32_t *to = (uint32_t *)words;
  if (first && second)
    for (i64 c = 0; c < b; c++) to[c] = first[from + c] | (uint32_t)second[from + c] << 16;
  else if (first)
    for (i64 c = 0; c < b; c++) to[c] = first[from + c];
  else if (second)
    for (i64 c = 0; c < b; c++) to[c] = (uint32_t)second[from + c] << 16;
  else memset(to, 0, b * 4);
}

// Of the taps' offsets `weight` is where the tap is in a row of `dw`, which has columns side by side and holds zeros.
template <class E>
int conv_grad_weight(const typename E::type *dy, const Image<typename E::type> &image, const Walk &walk,
                     const int32_t *ptr, const int32_t *idx, i64 rows, i64 cols, i64 b, typename E::type *dw, i64 dw_row,
                     int threads) {
  using T = typename E::type;
  const i64 all = image.batch * walk.rows, out = rows * b, row_words = (walk.cols + E::PAIR - 1) / E::PAIR;
  i64 tile = walk.rows_of(256 * 1024 / (b * 4));
  tile = tile > all ? all : tile;
  const i64 most = 4096 / b > 16 ? 4096 / b : 16;  // so many words at a time stay in the first-level cache
  // A task is some taps of the blocks of one block column, whose part of the image it copies.
  const i64 steps = ptr[cols] * walk.count, limit = 512 * 1024 / (b * b * 4);
  i64 run = threads == 1 ? limit : steps / (6 * threads);
  run = run > limit ? limit : run;
  run = run < 1 ? 1 : run;
  i64 *tasks = (i64 *)malloc((cols + 1) * sizeof(i64));  // before each block column
  i64 *taps = (i64 *)malloc(walk.count * sizeof(i64));
  bool failed = !tasks || !taps;
  if (!failed) {
    tasks[0] = 0;
    for (i64 c = 0; c < cols; c++) tasks[c + 1] = tasks[c] + ((ptr[c + 1] - ptr[c]) * walk.count + run - 1) / run;
    for (i64 t = 0; t < walk.count; t++)
      taps[t] = ((walk.taps[t].row - walk.top) * walk.width + walk.taps[t].col - walk.left) * b;
#pragma omp parallel num_threads(threads)
    {
      float *window = (float *)malloc((walk.window_pixels(tile) + most) * b * 4);
      float *sums = (float *)malloc(run * b * b * 4);
      i64 *from = (i64 *)malloc(tile * row_words * 2 * sizeof(i64)), *at = from + tile * row_words;
      const bool memory = window && sums && from;
      float *a = window + walk.window_pixels(tile) * b;
      if (!memory) {
#pragma omp atomic write
        failed = true;
      }
#pragma omp for schedule(dynamic, 1)
      for (i64 task = 0; task < tasks[cols]; task++) {
        if (!memory) continue;
        i64 c = 0;
        while (tasks[c + 1] <= task) c++;
        const i64 begin = (task - tasks[c]) * run, left = (ptr[c + 1] - ptr[c]) * walk.count - begin;
        const i64 end = begin + (left < run ? left : run);
        memset(sums, 0, (end - begin) * b * b * 4);
        for (i64 i = 0; i < all; i += tile) {
          i64 words = 0;
          each_image(walk, i, i + tile < all ? i + tile : all, [&](i64 n, i64 u, i64 stop, i64 first) {
            float *to = window + first * walk.width * b;
            each_pixel(walk, u, stop, [&](i64 j, i64 row, i64 col) {
              join(image.pixel(n, row, col), image.pixel(n, row, col + walk.step_col), c * b, b, to + j * b);
            });
            for (i64 row = u; row < stop; row++)
              for (i64 v = 0; v < walk.cols; v += E::PAIR, words++) {
                from[words] = ((first + (row - u) * walk.step_row) * walk.width + v * walk.step_col) * b;
                at[words] = (n * walk.rows + row) * walk.cols + v;
              }
          });
          for (i64 w = 0; w < words; w += most) {
            const i64 some = words - w < most ? words - w : most;
            for (i64 s = begin; s < end;) {
              const i64 p = s / walk.count, stop = (p + 1) * walk.count < end ? (p + 1) * walk.count : end;
              for (i64 q = 0; q < some; q++) {
                const T *pixel = dy + at[w + q] * out;
                const bool last = at[w + q] % walk.cols + 1 == walk.cols;
                join(pixel, last ? nullptr : pixel + out, idx[ptr[c] + p] * b, b, a + q * b);
              }
              for (; s < stop; s++)
                conv_outer_block<E>(a, window + taps[s % walk.count], from + w, some, b, sums + (s - begin) * b * b);
            }
          }
        }
        for (i64 s = begin; s < end; s++) {
          T *block = dw + idx[ptr[c] + s / walk.count] * b * dw_row + walk.taps[s % walk.count].weight + c * b;
          for (i64 m = 0; m < b; m++)
            for (i64 j = 0; j < b; j += VL)
              E::store(block + m * dw_row + j, *(const vec *)(sums + ((s - begin) * b + m) * b + j));
        }
      }
      free(window);
      free(sums);
      free(from);
    }
  }
  free(tasks);
  free(taps);
  return failed;
}

}  // namespace

// Strides and sizes in elements; `taps` holds three numbers a tap; a result of 1: no memory.
#define ESTDGM_CONV(E, T, dtype)                                                                                       \
  extern "C" int estdgm_conv_##dtype(                                                                                  \
      const T *x, i64 batch, i64 height, i64 width, i64 channels, const T *weight, i64 sn, i64 sk, const i64 *taps,    \
      i64 count, i64 step_row, i64 step_col, const T *bias, const int32_t *ptr, const int32_t *idx, i64 rows, i64 b,   \
      T *y, i64 y_rows, i64 y_cols, i64 y_image, i64 y_row, i64 y_pixel, void *kept, int threads) {                    \
    return conv<E>({x, batch, height, width, channels}, weight, sn, sk,                                                \
                   Walk((const Tap *)taps, count, step_row, step_col, y_rows, y_cols), bias, ptr, idx, rows, b, y,     \
                   y_image, y_row, y_pixel, (estdgm::Kept *)kept, threads);                                            \
  }                                                                                                                    \
  extern "C" int estdgm_conv_grad_weight_##dtype(                                                                      \
      const T *dy, i64 y_rows, i64 y_cols, const T *x, i64 batch, i64 height, i64 width, i64 channels,                 \
      const i64 *taps, i64 count, i64 step_row, i64 step_col, const int32_t *ptr, const int32_t *idx, i64 rows,        \
      i64 cols, i64 b, T *dw, i64 dw_row, int threads) {                                                               \
    return conv_grad_weight<E>(dy, {x, batch, height, width, channels},                                                \
                               Walk((const Tap *)taps, count, step_row, step_col, y_rows, y_cols), ptr, idx, rows,     \
                               cols, b, dw, dw_row, threads);                                                          \
  }

ESTDGM_CONV(Float, float, float32)
#if defined(__AVX512BF16__)
ESTDGM_CONV(BFloat16, uint16_t, bfloat16)
#endif
