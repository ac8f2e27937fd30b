// How the threads of a loop divide its tasks.
#pragma once

#include <atomic>

#include "elements.h"

namespace {

// Tasks 0 .. count - 1 in as many stretches as there are threads, neighbours in one stretch. A thread takes those of its
// own stretch in order, then what is left of the others'.
class Shares {
  static constexpr int MOST = 64;
  struct alignas(64) Stretch {
    std::atomic<i64> next;
    i64 end;
  } stretch[MOST];
  int count;

 public:
  Shares(i64 tasks, int threads) : count(threads < MOST ? threads : MOST) {
    for (int i = 0; i < count; i++) {
      stretch[i].next = i * tasks / count;
      stretch[i].end = (i + 1) * tasks / count;
    }
  }

  template <class Run>
  void work(int thread, Run run) {
    for (int i = 0; i < count; i++) {
      Stretch &from = stretch[(thread + i) % count];
      for (i64 task; (task = from.next.fetch_add(1, std::memory_order_relaxed)) < from.end;) run(task);
    }
  }
};

}  // namespace
