// Images in [batch, height, width, channels], and the taps of a convolution over them.
#pragma once

#include "elements.h"

namespace {

struct Tap {
  i64 row, col;  // from the first pixel of the image, where the tap of output pixel (0, 0) is
  i64 weight;    // of its weights from those of the first tap, in elements
};

template <class T>
struct Image {
  const T *data;
  i64 batch, height, width, channels;

  const T *pixel(i64 n, i64 row, i64 col) const {
    const bool inside = row >= 0 && row < height && col >= 0 && col < width;
    return inside ? data + ((n * height + row) * width + col) * channels : nullptr;
  }
};

}  // namespace
