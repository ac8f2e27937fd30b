// Linear layers whose weights are stored in the order of use: what the operator calls.
//
// The layouts are the same on every CPU, so what is packed on one is read on another.
#pragma once

#include "../elements.h"

namespace estdgm {

using i64 = int64_t;

// Inputs of a stretch of single weights: the lines of their tokens stay in the first-level cache.
constexpr i64 LINES = 96;

enum class Values { float32, bfloat16, int8 };  // int8 has a scale

// Units of r >= 2 outputs (a power of 2, at most 64) by c inputs. Row o of units holds columns idx[ptr[o]] .. idx[ptr[o +
// 1] - 1]; values are [unit][input][output].
struct PackedUnits {
  const void *values;
  Values type;
  const float *scale, *bias;  // of each output; null: none
  const int32_t *ptr, *idx;
  i64 rows, r, c, in;
};

// Single weights, four outputs side by side with as many entries each within one stretch of LINES inputs. Four i has the
// entries from ends[i - 1] to ends[i]; an entry is a value and a place for each output: an input of the stretch, or LINES
// with a value of 0. outputs[i]: the four outputs; where there is none, their number.
struct PackedSingles {
  const void *values;
  Values type;
  const float *scale, *bias;
  const int32_t *stretch;  // first four of each stretch, and their number at the end
  i64 stretches;
  const int32_t *outputs, *ends;
  const uint8_t *places;
  i64 out, in;
};

// Y[t, o] = sum over active i of X[t, i] W[o, i] + bias[o]; rows of x and y are ldx and ldy apart. False: no memory.
bool multiply(const PackedUnits &weight, const float *x, i64 ldx, i64 tokens, float *y, i64 ldy, int threads);

bool multiply(const PackedSingles &weight, const float *x, i64 ldx, i64 tokens, float *y, i64 ldy, int threads);

}  // namespace estdgm
