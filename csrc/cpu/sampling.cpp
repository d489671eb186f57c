// The scan of the logits that every sampled row needs.

#include "common.h"

using namespace weave;

namespace {

// The largest of x[0..n) and its lowest index; a NaN counts as largest.
void best_of_row(const float* x, index_t n, float* value, int64_t* column) {
  constexpr index_t BLOCK = 8 * LANES;
  float top = -__builtin_inff();
  index_t start = 0;
  bool found = false;
  // First the maximum and where its block begins: no index in the inner loop.
  for (index_t i = 0; i < n; i += BLOCK) {
    const index_t end = i + BLOCK < n ? i + BLOCK : n;
    float peak = -__builtin_inff();
    bool nan = false;
    if (end - i == BLOCK) {
      vf high = load<vf>(x + i);
      vi odd = high != high;
      UNROLL for (index_t j = LANES; j < BLOCK; j += LANES) {
        const vf v = load<vf>(x + i + j);
        odd |= v != v;
        high = max(high, v);
      }
      float lanes[LANES];
      int32_t odds[LANES];
      store(lanes, high);
      store(odds, odd);
      for (index_t j = 0; j < LANES; ++j) {
        peak = lanes[j] > peak ? lanes[j] : peak;
        nan |= odds[j] != 0;
      }
    } else {
      for (index_t j = i; j < end; ++j) {
        peak = x[j] > peak ? x[j] : peak;
        nan |= x[j] != x[j];
      }
    }
    if (nan) {
      for (index_t j = i;; ++j) {
        if (x[j] != x[j]) {
          *value = x[j];
          *column = j;
          return;
        }
      }
    }
    if (!found || peak > top) {
      found = true;
      top = peak;
      start = i;
    }
  }
  while (x[start] != top) ++start;
  *value = top;
  *column = start;
}

}  // namespace

// scores float32 [rows, n] with a row stride -> values [rows], columns int64 [rows]; n > 0.
extern "C" void weave_best(const float* scores, index_t stride, index_t rows, index_t n, float* values,
                           int64_t* columns, index_t threads) {
#pragma omp parallel for num_threads(int(threads)) if (threads > 1 && rows > 1)
  for (index_t r = 0; r < rows; ++r) best_of_row(scores + r * stride, n, values + r, columns + r);
}
