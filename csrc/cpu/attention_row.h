// Attention of one row (decode): keys and values straight from their pages, each widened in registers once
// for up to H query heads.
#pragma once

#include "attention.h"

namespace weave {
namespace {

// Query heads that share a loaded key, at most; and vectors of their sums at a time.
constexpr int MOST_HEADS = LANES >= 8 && REGISTERS == 32 ? 8 : 4;
constexpr int SUMS = REGISTERS / 2;

// Vectors of a row. Two of bfloat16 are the even and the odd elements: no shuffle. Queries come alike.
INLINE void load_vectors(const float* p, vf (&to)[2]) { to[0] = load<vf>(p), to[1] = load<vf>(p + LANES); }
INLINE void load_vectors(const bf16* p, vf (&to)[2]) {
  const vu pairs = load<vu>(p);
  to[0] = even(pairs), to[1] = odd(pairs);
}
template <class T>
INLINE void load_vectors(const T* p, vf (&to)[1]) { to[0] = load_floats(p); }

// Calls f(d, vectors) for all of `dim`: 2 V vectors at a time, then 2, then the one that may be left.
template <int V, class F>
INLINE void for_vectors(index_t dim, F&& f) {
  index_t d = 0;
  for (; d + V * 2 * LANES <= dim; d += V * 2 * LANES) f(d, std::integral_constant<int, 2 * V>{});
  if constexpr (V > 1) {
    for (; d + 2 * LANES <= dim; d += 2 * LANES) f(d, std::integral_constant<int, 2>{});
  }
  if (d < dim) f(d, std::integral_constant<int, 1>{});
}

// scores[key][H] of `count` keys, and of repeats of the last to a whole vector.
template <int H, class T>
INLINE void score_row(const float* q, index_t dim, const T* const* keys, index_t count, float* scores) {
  constexpr int AT_ONCE = LANES / H;
  for (index_t i = 0; i < count; i += AT_ONCE) {
    vf acc[LANES] = {};
    for_vectors<1>(dim, [&](index_t d, auto vectors) {
      constexpr int V = vectors;
      UNROLL for (int k = 0; k < AT_ONCE; ++k) {
        vf key[V];
        load_vectors(keys[i + k] + d, key);
        UNROLL for (int v = 0; v < V; ++v) {
          UNROLL for (int h = 0; h < H; ++h)
            acc[k * H + h] += load<vf>(q + h * dim + d + v * LANES) * key[v];
        }
      }
    });
    sum_each(acc);
    store(scores + i * H, acc[0]);
  }
}

// sums[h][dim] = sums * decay + values weighted by `weights` [key][H].
template <int H, class T>
INLINE void add_row(float* sums, index_t dim, const float* decay, const float* weights,
                    const T* const* values, index_t count) {
  for_vectors<SUMS / H / 2>(dim, [&](index_t d, auto vectors) {
    constexpr int V = vectors, AT_ONCE = V < 2 ? V : 2;
    vf acc[H][V];
    UNROLL for (int h = 0; h < H; ++h) {
      UNROLL for (int v = 0; v < V; ++v) acc[h][v] = load<vf>(sums + h * dim + d + v * LANES) * decay[h];
    }
    for (index_t i = 0; i < count; ++i) {
      UNROLL for (int v = 0; v < V; v += AT_ONCE) {
        vf value[AT_ONCE];
        load_vectors(values[i] + d + v * LANES, value);
        UNROLL for (int h = 0; h < H; ++h) {
          UNROLL for (int w = 0; w < AT_ONCE; ++w) acc[h][v + w] += weights[i * H + h] * value[w];
        }
      }
    }
    UNROLL for (int h = 0; h < H; ++h) {
      UNROLL for (int v = 0; v < V; ++v) store(sums + h * dim + d + v * LANES, acc[h][v]);
    }
  });
}

// Elements in the order of load_vectors to their own.
template <class T>
INLINE void restore_order(float* sums, index_t dim) {
  if constexpr (!std::is_same_v<T, bf16>) return;
  for (index_t d = 0; d + 2 * LANES <= dim; d += 2 * LANES) {
    const vf x = load<vf>(sums + d), y = load<vf>(sums + d + LANES);
    store(sums + d, shuffle<Zip, 0, false>(x, y));
    store(sums + d + LANES, shuffle<Zip, 0, true>(x, y));
  }
}

template <class T>
INLINE void prefetch(const T* const* rows, index_t count, index_t dim) {
  for (index_t i = 0; i < count; ++i) {
    for (index_t d = 0; d < dim; d += 64 / index_t(sizeof(T))) __builtin_prefetch(rows[i] + d);
  }
}

// H heads of a row over one block. tops, totals: lane i is of head i % H.
template <int H, class T>
INLINE void attend_row(index_t dim, const float* q, const T* const* keys, const T* const* values,
                       index_t count, float* sums, float* tops, float* totals) {
  float scores[KEYS * H + LANES], decay[LANES];
  score_row<H>(q, dim, keys, count, scores);
  for (index_t s = count * H; s % LANES; ++s) scores[s] = NEVER;
  const vf before = load<vf>(tops);
  vf top = before;
  for (index_t s = 0; s < count * H; s += LANES) top = max(load<vf>(scores + s), top);
  top = fold_lanes<H>(top, [](vf a, vf b) { return max(a, b); });
  const vf fade = exp_below(before, top);
  vf total = load<vf>(totals) * fade;
  for (index_t s = 0; s < count * H; s += LANES) {
    const vf x = exp_below(load<vf>(scores + s), top);
    store(scores + s, x);
    total += x;
  }
  store(tops, top), store(totals, total), store(decay, fade);
  add_row<H>(sums, dim, decay, scores, values, count);
}

template <int H, class T>
void one_row(const Call& c, const Task& t) {
  const index_t group = c.group(), chunks = ceil_div(group, H), size = H * c.dim;
  float* q = scratch.get<float>(2 * chunks * (size + LANES));
  float *sums = q + chunks * size, *totals = sums + chunks * size, *tops = totals + chunks * LANES;
  __builtin_memset(q, 0, size_t(tops - q) * 4);
  for (index_t i = 0; i < chunks; ++i) store(tops + i * LANES, splat(NEVER));
  for (index_t g = 0; g < group; ++g) {
    for_vectors<1>(c.dim, [&](index_t d, auto vectors) {
      vf x[vectors];
      load_vectors(query<T>(c, t, t.row, g) + d, x);
      for (int v = 0; v < vectors; ++v) store(q + g * c.dim + d + v * LANES, x[v] * float(c.scale));
    });
  }
  const T *keys[2][KEYS + LANES], *values[KEYS];
  index_t count = 0, next = t.end - t.first < KEYS ? t.end - t.first : KEYS;
  find(c, t, c.keys, t.first, next, keys[0]);
  prefetch(keys[0], next, c.dim);
  for (index_t key = t.first, turn = 0; key < t.end; key += count, turn ^= 1) {
    count = next;
    next = t.end - key - count < KEYS ? t.end - key - count : KEYS;
    // The pages are anywhere: ask for what comes after these keys before these are used.
    find(c, t, c.values, key, count, values);
    prefetch(values, count, c.dim);
    find(c, t, c.keys, key + count, next, keys[turn ^ 1]);
    prefetch(keys[turn ^ 1], next, c.dim);
    for (index_t i = count; i % (LANES / H); ++i) keys[turn][i] = keys[turn][count - 1];
    for (index_t i = 0; i < chunks; ++i)
      attend_row<H>(c.dim, q + i * size, keys[turn], values, count, sums + i * size, tops + i * LANES,
                    totals + i * LANES);
  }
  for (index_t i = 0; i < chunks; ++i) {
    const vf total = fold_lanes<H>(load<vf>(totals + i * LANES), [](vf a, vf b) { return a + b; });
    for (index_t h = 0; h < H && i * H + h < group; ++h) {
      float* of_head = sums + i * size + h * c.dim;
      restore_order<T>(of_head, c.dim);
      emit<T>(c, t, t.row, i * H + h, tops[i * LANES + h], total[h], of_head);
    }
  }
}

template <class T, int H = 1>
void one_row_of(const Call& c, const Task& t) {
  if constexpr (H < MOST_HEADS) {
    if (H < c.group()) return one_row_of<T, 2 * H>(c, t);
  }
  one_row<H, T>(c, t);
}

}  // namespace
}  // namespace weave
