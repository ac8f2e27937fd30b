// Weights in the order of use: of one call, or kept over calls for as long as the caller says that they are the same.
#pragma once

#include <atomic>
#include <mutex>

#include "elements.h"

namespace estdgm {

// What a caller keeps: filled by the first call that is given it.
struct Kept {
  std::mutex filling;
  float *data = nullptr;

  ~Kept() { free(data); }
};

inline std::atomic<i64> packings{0};  // so many times weights were laid out

// `count` floats that `pack` has filled, or null where there is no memory.
class PackedValues {
  float *own = nullptr;

 public:
  const float *data;

  template <class Pack>
  PackedValues(Kept *kept, i64 count, Pack pack) {
    std::unique_lock<std::mutex> lock;
    if (kept) lock = std::unique_lock<std::mutex>(kept->filling);
    if (kept && kept->data) {
      data = kept->data;
      return;
    }
    float *made = floats(count);
    data = made;
    if (!made) return;
    pack(made);
    packings++;
    (kept ? kept->data : own) = made;
  }
  ~PackedValues() { free(own); }
  PackedValues(const PackedValues &) = delete;
};

}  // namespace estdgm
