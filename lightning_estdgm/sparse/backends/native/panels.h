// Panels: a tile of rows of a matrix with its columns as rows, so that one vector holds one column of VL tokens.
#pragma once

#include <utility>

#include "elements.h"

namespace {

template <int... I>
inline vec pick(vec a, vec b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  typedef int lanes __attribute__((vector_size(VL * 4)));
  return __builtin_shuffle(a, b, lanes{I...});
#endif
}

// Lanes of (a, b) in groups of S: the even groups of both, or the odd ones, those of a in the even places.
template <int S, int ODD, int... I>
constexpr auto every_other(std::integer_sequence<int, I...>) {
  return std::integer_sequence<int, ((I & S ? VL : 0) + (I & ~S) + ODD * S)...>{};
}

template <int S, int ODD>
inline vec groups(vec a, vec b) {
  return pick(a, b, every_other<S, ODD>(std::make_integer_sequence<int, VL>{}));
}

template <int S = VL / 2>
inline void transpose(vec (&r)[VL]) {
  for (int i = 0; i < VL; i++)
    if (!(i & S)) {
      const vec a = r[i], b = r[i | S];
      r[i] = groups<S, 0>(a, b);
      r[i | S] = groups<S, 1>(a, b);
    }
  if constexpr (S > 1) transpose<S / 2>(r);
}

// Lane i of the result: the sum of the lanes of r[i].
template <int S = VL / 2>
inline vec lane_sums(vec (&r)[VL]) {
  for (int i = 0; i < S; i++) {
    const vec a = r[i], b = r[i + S];
    r[i] = groups<S, 0>(a, b) + groups<S, 1>(a, b);
  }
  if constexpr (S > 1) return lane_sums<S / 2>(r);
  return r[0];
}

template <class T>
struct Rows {
  const T *data;
  i64 ld, count;  // elements from one row to the next; rows
};

// panel[c][t] = row first + t, column column + c of x; 0 beyond its last row. `width` is a multiple of VL.
template <class E>
void load_panel(Rows<typename E::type> x, i64 first, i64 column, i64 columns, i64 width, float *panel) {
  using T = typename E::type;
  const i64 left = x.count - first;
  for (i64 t = 0; t < width; t += VL)
    for (i64 c = 0; c < columns; c += VL) {
      const i64 n = columns - c < VL ? columns - c : VL;
      alignas(VL * 4) vec r[VL];
      for (i64 i = 0; i < VL; i++) {
        const T *from = x.data + (first + t + i) * x.ld + column + c;
        if (t + i >= left)
          r[i] = vec{};
        else if (n == VL)
          r[i] = E::load(from);
        else {
          T part[VL] = {};
          memcpy(part, from, n * sizeof(T));
          r[i] = E::load(part);
        }
      }
      transpose(r);
      for (i64 i = 0; i < n; i++) *(vec *)(panel + (c + i) * width + t) = r[i];
    }
}

// Rows first .. of y, `columns` of them, from panel[column][width], plus their bias. The panel has whole vectors of columns.
template <class E>
void store_panel(const float *panel, i64 width, const typename E::type *bias, i64 columns, i64 first, i64 count,
                 typename E::type *y, i64 ldy) {
  using T = typename E::type;
  for (i64 c = 0; c < columns; c += VL) {
    const i64 n = columns - c < VL ? columns - c : VL;
    T part[VL] = {};
    if (bias) memcpy(part, bias + c, n * sizeof(T));
    const vec b = E::load(part);
    for (i64 t = 0; t < width && first + t < count; t += VL) {
      alignas(VL * 4) vec r[VL];
      for (int i = 0; i < VL; i++) r[i] = *(const vec *)(panel + (c + i) * width + t);
      transpose(r);
      for (i64 i = 0; i < VL && first + t + i < count; i++) {
        T *to = y + (first + t + i) * ldy + c;
        if (n == VL)
          E::store(to, r[i] + b);
        else {
          E::store(part, r[i] + b);
          memcpy(to, part, n * sizeof(T));
        }
      }
    }
  }
}

}  // namespace
