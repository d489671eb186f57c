// The scan of the logits that every sampled row needs: the largest, or the largest under a row's noise.

#include "common.h"

using namespace weave;

namespace {

// Gumbel noise of the tokens `ids` under a row's keys: ops/sampling.py, gumbel().
INLINE vf gumbel(vi ids, uint32_t first, uint32_t second) {
  vu state = (vu)ids * 0x9E3779B9u + first;
  state ^= state >> 16;
  state = (state * 0x7FEB352Du) ^ second;
  state ^= state >> 15;
  state *= 0x846CA68Bu;
  state ^= state >> 16;
  vf v = (__builtin_convertvector((vi)(state & 0x7FFFFFFFu), vf) + 0.5f) * 0x1p-31f;
  v = v > 1 - 0x1p-24f ? splat(1 - 0x1p-24f) : v;
  // log(1 - v), of which the difference 1 - v lost the last digits: scaled by what it really is.
  const vf u = 1.0f - v, lost = u - 1.0f;
  const vf exact = u == 1.0f ? v : log(u) * v / lost;
  return -log(exact);
}

// The largest score, divided by the temperature and with its noise if there is one, and the lowest id that
// has it; id -1 where it is NaN (one is enough) or infinite.
template <bool NOISY>
INLINE void draw_row(const float* x, index_t n, index_t start, float temperature, const uint32_t* keys,
                     float* value, float* id) {
  vi lane{};
  UNROLL for (int i = 0; i < LANES; ++i) lane[i] = i;
  vf top = splat(-__builtin_inff()), at = splat(-1.0f), odd{};
  for (index_t i = 0; i < n; i += LANES) {
    float padded[LANES];
    const float* from = x + i;
    if (n - i < LANES) {
      for (index_t j = 0; j < LANES; ++j) padded[j] = j < n - i ? from[j] : -__builtin_inff();
      from = padded;
    }
    vf v = load<vf>(from);
    const vi ids = lane + int32_t(start + i);
    if (NOISY) v = v / temperature + gumbel(ids, keys[0], keys[1]);
    odd = v != v ? v : odd;
    at = v > top ? __builtin_convertvector(ids, vf) : at;
    top = max(v, top);
  }
  float best = top[0], which = at[0];
  bool nan = odd[0] != odd[0];
  for (int i = 1; i < LANES; ++i) {
    if (top[i] > best || (top[i] == best && at[i] < which)) best = top[i], which = at[i];
    nan |= odd[i] != odd[i];
  }
  *value = nan ? __builtin_nanf("") : best;
  *id = nan || __builtin_isinf(best) ? -1.0f : which;
}

}  // namespace

struct Draw {
  const float* scores;
  index_t stride, rows, n, start;
  const float* temperatures;
  const uint32_t* keys;
  float* out;
  index_t threads;
};

// scores float32 [rows, n] with a row stride, of the ids from `start` on; temperatures [rows] (0: neither
// divided nor with noise; null: none is) and keys [rows, 2] -> out [2, rows]: values and ids.
extern "C" int weave_draw(const void* packed) {
  const auto c = unpack<Draw>(packed);
#pragma omp parallel for num_threads(int(c.threads)) if (c.threads > 1 && c.rows * c.n >= WORTH_A_TEAM)
  for (index_t r = 0; r < c.rows; ++r) {
    const float* x = c.scores + r * c.stride;
    if (c.temperatures && c.temperatures[r] > 0)
      draw_row<true>(x, c.n, c.start, c.temperatures[r], c.keys + 2 * r, c.out + r, c.out + c.rows + r);
    else
      draw_row<false>(x, c.n, c.start, 1, nullptr, c.out + r, c.out + c.rows + r);
  }
  return 0;
}
