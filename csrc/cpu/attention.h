// What the two kernels of attention share: the call, its tasks, moves across lanes, where things lie.
#pragma once

#include <type_traits>
#include <utility>

#include "tile.h"

namespace weave {
namespace {

// What weaveinf/ops/attention.py packs, in its order. Strides in elements.
struct Call {
  const void *q, *keys, *values;
  void* out;
  const int32_t *table, *starts, *positions;
  index_t q_row, q_head, out_row, out_head, table_row, sequences, heads, kv_heads, dim, page_size, window,
      dtype, threads;
  double scale;

  index_t group() const { return heads / kv_heads; }
  // A row reads the keys first(row) to end(row) - 1.
  index_t end(index_t row) const { return index_t(positions[row]) + 1; }
  index_t first(index_t row) const { return end(row) > window ? end(row) - window : 0; }
};

// Rows `row` to `row + rows` of a sequence with the query heads of some KV heads, over the keys `first` to
// `end`. Where these are one of several shares of the rows' keys, the outcome goes to `partial`, per row and
// head: the highest score, the sum of exponentials, the weighted values.
struct Task {
  index_t sequence, kv_head, kv_heads, row, rows, first, end;
  float* partial;
  index_t shares;
  index_t heads(const Call& c) const { return kv_heads * c.group(); }
  index_t partial_floats(const Call& c) const { return rows * heads(c) * (c.dim + 2); }
};

constexpr index_t KEYS = 64;  // keys in a block: K and V stay in the second-level cache
constexpr float NEVER = -__builtin_inff();

thread_local Scratch scratch;

// ---- lanes

struct Halves {  // of every 2 S lanes of a and b, the first halves side by side, or the second halves
  template <int S, bool SECOND>
  static constexpr int pick(int lane) {
    const int within = lane % (2 * S);
    return lane - within + within % S + (SECOND ? S : 0) + (within < S ? 0 : LANES);
  }
};
struct Zip {  // a[0], b[0], a[1], b[1], ... of the first halves of a and b, or the second
  template <int, bool SECOND>
  static constexpr int pick(int lane) {
    return lane / 2 + (SECOND ? LANES / 2 : 0) + lane % 2 * LANES;
  }
};
template <class P, int S, bool SECOND, size_t... LANE>
INLINE vf shuffle(vf a, vf b, std::index_sequence<LANE...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, P::template pick<S, SECOND>(LANE)...);
#else
  return __builtin_shuffle(a, b, vi{P::template pick<S, SECOND>(LANE)...});
#endif
}
template <class P, int S, bool SECOND>
INLINE vf shuffle(vf a, vf b) {
  return shuffle<P, S, SECOND>(a, b, std::make_index_sequence<LANES>{});
}

// Lane i of a[0] becomes the sum of a[i]'s lanes.
template <int S = LANES / 2>
INLINE void sum_each(vf (&a)[LANES]) {
  UNROLL for (int i = 0; i < S; ++i)
    a[i] = shuffle<Halves, S, false>(a[i], a[i + S]) + shuffle<Halves, S, true>(a[i], a[i + S]);
  if constexpr (S > 1) sum_each<S / 2>(a);
}

template <int S = LANES / 2>
INLINE void transpose(vf (&a)[LANES]) {
  UNROLL for (int i = 0; i < LANES; ++i) {
    if (i & S) continue;
    const vf x = a[i], y = a[i + S];
    a[i] = shuffle<Halves, S, false>(x, y), a[i + S] = shuffle<Halves, S, true>(x, y);
  }
  if constexpr (S > 1) transpose<S / 2>(a);
}

// Combines lanes i, i + H, i + 2 H, ...; all of them get the result.
template <int H, int S = LANES / 2, class F>
INLINE vf fold_lanes(vf x, F&& f) {
  if constexpr (S < H) {
    return x;
  } else {
    const vf second = shuffle<Halves, S, true>(x, x);  // twice; then x with its halves exchanged
    return fold_lanes<H, S / 2>(f(x, shuffle<Halves, S, false>(second, x)), f);
  }
}

// exp(x - top), where nothing was above NEVER yet: 0.
INLINE vf exp_below(vf x, vf top) { return exp(x - (top == NEVER ? vf{} : top)); }

// ---- queries, keys, values, outputs

template <class T>
const T* query(const Call& c, const Task& t, index_t row, index_t head) {
  return static_cast<const T*>(c.q) + row * c.q_row + (t.kv_head * c.group() + head) * c.q_head;
}

// Where `count` keys or values from `first` on lie in their pool: those of the task's first KV head, the
// other heads' behind.
template <class T>
void find(const Call& c, const Task& t, const void* pool, index_t first, index_t count, const T** rows) {
  const int32_t* page = c.table + t.sequence * c.table_row + first / c.page_size;
  const index_t step = c.kv_heads * c.dim;
  index_t slot = first % c.page_size;
  for (index_t i = 0; i < count; slot = 0, ++page) {
    const T* at = static_cast<const T*>(pool) + (*page * c.page_size + slot) * step + t.kv_head * c.dim;
    for (; slot < c.page_size && i < count; ++slot, at += step) rows[i++] = at;
  }
}

// Divides the weighted values of a query by `total`, or keeps all for merge().
template <class T>
void emit(const Call& c, const Task& t, index_t row, index_t head, float top, float total,
          const float* sums) {
  if (t.partial) {
    float* to = t.partial + ((row - t.row) * t.heads(c) + head) * (c.dim + 2);
    to[0] = top, to[1] = total;
    __builtin_memcpy(to + 2, sums, size_t(c.dim) * 4);
    return;
  }
  T* out = static_cast<T*>(c.out) + row * c.out_row + (t.kv_head * c.group() + head) * c.out_head;
  const float share = 1 / total;
  index_t d = 0;
  for (; d + LANES <= c.dim; d += LANES) store_floats(out + d, load<vf>(sums + d) * share);
  for (; d < c.dim; ++d) from_float(sums[d] * share, out + d);
}

}  // namespace
}  // namespace weave
