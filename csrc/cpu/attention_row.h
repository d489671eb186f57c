// Attention of one row (decode): keys and values straight from their pages, each widened in registers once
// for up to H query heads.
#pragma once

#include "attention.h"

namespace weave {
namespace {

// Query heads that share a loaded key, at most; and vectors of their sums at a time.
constexpr int MOST_HEADS = LANES >= 8 && REGISTERS == 32 ? 8 : 4;
constexpr int SUMS = REGISTERS / 2;
constexpr index_t LEAST_SHARE = 256, MOST_SHARE = 2048;  // keys of a task, where threads share a row's
constexpr index_t BLOCK_BYTES = 1 << 17;  // keys and values of a block stay in the second-level cache

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

// Keys of a task, in whole blocks, of a row of so many.
inline index_t share_of(index_t keys, index_t threads, index_t block) {
  const index_t part = round_up(ceil_div(keys, 4 * threads), block);
  return part < LEAST_SHARE ? LEAST_SHARE : part > MOST_SHARE ? MOST_SHARE : part;
}

// Memory wanted for the next block, asked for little by little: a burst would stall the loads of this one.
struct Feed {
  const char* const* rows;
  index_t count, bytes, rate = 0, offset = 0;  // rows that are left, their bytes, lines at a time

  INLINE void operator()(index_t times) {
    for (index_t i = times * rate; i > 0 && count > 0; --i) {
      __builtin_prefetch(*rows + offset, 0, 2);
      if ((offset += 64) >= bytes) offset = 0, ++rows, --count;
    }
  }
};
constexpr int SCORE_LINES = 4;  // as long as so many steps of add_row takes one of score_row

// acc[k][h] += q[h] * keys[k], whole vectors of them.
template <int H, class T>
INLINE void multiply_keys(const float* q, index_t dim, const T* const* keys, vf (&acc)[LANES]) {
  for_vectors<1>(dim, [&](index_t d, auto vectors) {
    constexpr int V = vectors;
    UNROLL for (int k = 0; k < LANES / H; ++k) {
      vf key[V];
      load_vectors(keys[k] + d, key);
      UNROLL for (int v = 0; v < V; ++v) {
        UNROLL for (int h = 0; h < H; ++h) acc[k * H + h] += load<vf>(q + h * dim + d + v * LANES) * key[v];
      }
    }
  });
}

// The same of pairs, as the hardware multiplies them.
template <int H>
INLINE void multiply_keys(const bf16* q, index_t dim, const bf16* const* keys, vf (&acc)[LANES]) {
  index_t d = 0;
  for (; d + 2 * LANES <= dim; d += 2 * LANES) {
    UNROLL for (int k = 0; k < LANES / H; ++k) {
      const vu key = load<vu>(keys[k] + d);
      UNROLL for (int h = 0; h < H; ++h) acc[k * H + h] = dot(acc[k * H + h], load<vu>(q + h * dim + d), key);
    }
  }
  if (d == dim) return;
  UNROLL for (int k = 0; k < LANES / H; ++k) {
    const vf key = load_floats(keys[k] + d);
    UNROLL for (int h = 0; h < H; ++h) acc[k * H + h] += load_floats(q + h * dim + d) * key;
  }
}

// What queries are where they are multiplied with keys of T, and how they get there.
template <class T>
using Query = std::conditional_t<HAS_DOT && std::is_same_v<T, bf16>, bf16, float>;
template <class T>
INLINE void place_query(const T* from, index_t dim, Query<T>* to) {
  if constexpr (std::is_same_v<T, Query<T>>) {
    __builtin_memcpy(to, from, size_t(dim) * sizeof(T));
  } else {
    for_vectors<1>(dim, [&](index_t d, auto vectors) {
      vf x[vectors];
      load_vectors(from + d, x);
      for (int v = 0; v < vectors; ++v) store(to + d + v * LANES, x[v]);
    });
  }
}

// scores[key][H] of `count` keys, and of repeats of the last to a whole vector.
template <int H, class T>
INLINE void score_row(const Query<T>* q, index_t dim, float scale, const T* const* keys, index_t count,
                      float* scores, Feed& feed) {
  for (index_t i = 0; i < count; i += LANES / H) {
    feed(SCORE_LINES);
    vf acc[LANES] = {};
    multiply_keys<H>(q, dim, keys + i, acc);
    sum_each(acc);
    store(scores + i * H, acc[0] * scale);
  }
}

// sums[h][dim] = sums * decay + values weighted by `weights` [key][H].
template <int H, class T>
INLINE void add_row(float* sums, index_t dim, const float* decay, const float* weights,
                    const T* const* values, index_t count, Feed& feed) {
  for_vectors<SUMS / H / 2>(dim, [&](index_t d, auto vectors) {
    constexpr int V = vectors, AT_ONCE = V < 2 ? V : 2;
    vf acc[H][V];
    UNROLL for (int h = 0; h < H; ++h) {
      UNROLL for (int v = 0; v < V; ++v) acc[h][v] = load<vf>(sums + h * dim + d + v * LANES) * decay[h];
    }
    for (index_t i = 0; i < count; ++i) {
      feed(1);
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

// H heads of a row over one block. tops, totals: lane i is of head i % H.
template <int H, class T>
INLINE void attend_row(index_t dim, const Query<T>* q, float scale, const T* const* keys, const T* const* values,
                       index_t count, float* sums, float* tops, float* totals, Feed& feed) {
  float scores[KEYS * H + LANES], decay[LANES];
  score_row<H>(q, dim, scale, keys, count, scores, feed);
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
  add_row<H>(sums, dim, decay, scores, values, count, feed);
}

// The query heads of each KV head lie in `chunks` of H, those that are missing with a query of zeros.
template <int H, class T>
void one_row(const Call& c, const Task& t) {
  const index_t group = c.group(), chunks = ceil_div(group, H), all = t.kv_heads * chunks;
  const index_t size = H * c.dim;
  float* sums = scratch.get<float>(2 * all * (size + LANES));
  float *totals = sums + all * size, *tops = totals + all * LANES;
  auto* q = reinterpret_cast<Query<T>*>(tops + all * LANES);
  __builtin_memset(sums, 0, size_t(all) * 2 * (size + LANES) * 4);
  for (index_t i = 0; i < all; ++i) store(tops + i * LANES, splat(NEVER));
  const auto place = [&](index_t head) {
    return (head / group * chunks + head % group / H) * size + head % group % H * c.dim;
  };
  for (index_t head = 0; head < t.heads(c); ++head)
    place_query(query<T>(c, t, t.row, head), c.dim, q + place(head));
  const index_t width = t.kv_heads * c.dim;
  index_t block = BLOCK_BYTES / (2 * width * index_t(sizeof(T))) / LANES * LANES;
  block = block < LANES ? LANES : block > KEYS ? KEYS : block;
  const T *rows[2][2 * KEYS], *keys[KEYS + LANES], *values[KEYS];
  const auto locate = [&](index_t key, const T** to) {  // keys, then values
    const index_t count = t.end - key < block ? t.end - key : block;
    find(c, t, c.keys, key, count, to);
    find(c, t, c.values, key, count, to + count);
    return count;
  };
  const index_t steps = all * (ceil_div(block, LANES / H) * SCORE_LINES + block * (c.dim / LANES));
  index_t count = 0, next = locate(t.first, rows[0]);
  Feed{reinterpret_cast<const char* const*>(rows[0]), 2 * next, width * index_t(sizeof(T)), 1}(1 << 20);
  for (index_t key = t.first, turn = 0; key < t.end; key += count, turn ^= 1) {
    count = next;
    next = locate(key + count, rows[turn ^ 1]);
    Feed feed{reinterpret_cast<const char* const*>(rows[turn ^ 1]), 2 * next, width * index_t(sizeof(T))};
    feed.rate = ceil_div(feed.count * ceil_div(feed.bytes, 64), steps);
    for (index_t kv = 0; kv < t.kv_heads; ++kv) {
      for (index_t i = 0; i < count; ++i) {
        keys[i] = rows[turn][i] + kv * c.dim;
        values[i] = rows[turn][count + i] + kv * c.dim;
      }
      for (index_t i = count; i % (LANES / H); ++i) keys[i] = keys[count - 1];
      for (index_t i = kv * chunks; i < (kv + 1) * chunks; ++i)
        attend_row<H>(c.dim, q + i * size, float(c.scale), keys, values, count, sums + i * size,
                      tops + i * LANES, totals + i * LANES, feed);
    }
  }
  for (index_t head = 0; head < t.heads(c); ++head) {
    const index_t lanes = place(head) / size * LANES, lane = head % group % H;
    const vf total = fold_lanes<H>(load<vf>(totals + lanes), [](vf a, vf b) { return a + b; });
    restore_order<T>(sums + place(head), c.dim);
    emit<T>(c, t, t.row, head, tops[lanes + lane], total[lane], sums + place(head));
  }
}

// Calls f with as many heads as share a loaded key: a power of two that holds `heads`, or the most there are.
template <int H = 1, class F>
void with_heads(index_t heads, F&& f) {
  if constexpr (H < MOST_HEADS) {
    if (H < heads) return with_heads<2 * H>(heads, f);
  }
  f(std::integral_constant<int, H>{});
}

}  // namespace
}  // namespace weave
