// Attention of many rows of a sequence.
//
// The rows, each with the query heads of its KV head, lie in the lanes of panels [dim][NR]. Scores and outputs
// are computed transposed, keys and dims in the place of rows: so neither keys nor values are turned, and
// softmax needs no sum across lanes.
#pragma once

#include <vector>

#include "attention.h"

namespace weave {
namespace {

// What multiplies here: bfloat16 as it is where the hardware knows its products. The exponentials are then
// rounded to it, too, as in FlashAttention (arXiv 2205.14135); their sum is not.
template <class T>
using Products = std::conditional_t<HAS_DOT && std::is_same_v<T, bf16>, Dots, Floats>;

// NR queries of a task, one to a lane. Their bounds ascend with the lanes.
template <class W>
struct Panel {
  vi first[NV], end[NV];  // keys that a lane reads
  vf top[NV], total[NV];
  typename W::B* q;  // a panel of W
  float* sums;       // [dim][NR]
  index_t first_first, last_first, first_end, last_end;
};

// Keys from `first` on [count][step], and their values [count / W::K][step], each with its neighbours'.
template <class W>
struct Block {
  index_t first, count, step;
  const typename W::A *keys, *values;
  bool finite;  // the values
};

// Rows as float32 [count][step], for keys and for values; returns whether all is finite.
template <class T>
bool widen(const T* const* rows, index_t count, index_t dim, index_t step, float* to) {
  vf zero{};
  for (index_t i = 0; i < count; ++i, to += step) {
    index_t d = 0;
    for (; d + LANES <= dim; d += LANES) {
      const vf x = load_floats(rows[i] + d);
      zero += x * 0.0f;
      store(to + d, x);
    }
    for (; d < dim; ++d) {
      to[d] = to_float(rows[i][d]);
      zero += splat(to[d]) * 0.0f;
    }
  }
  return sum(zero) == 0;
}
template <class T>
void copy_keys(const T* const* rows, index_t count, index_t dim, index_t step, float* to) {
  widen(rows, count, dim, step, to);
}
template <class T>
bool copy_values(const T* const* rows, index_t count, index_t dim, index_t step, float* to) {
  return widen(rows, count, dim, step, to);
}

// Keys as pairs of dims, a missing last one as zero.
[[maybe_unused]] void copy_keys(const bf16* const* rows, index_t count, index_t dim, index_t step,
                                uint32_t* to) {
  for (index_t i = 0; i < count; ++i, to += step) {
    to[dim / 2] = dim & 1 ? rows[i][dim - 1] : 0;
    __builtin_memcpy(to, rows[i], size_t(dim & ~index_t(1)) * 2);
  }
}

// Values as pairs of keys, a missing last one as zero; returns whether all is finite.
[[maybe_unused]] bool copy_values(const bf16* const* rows, index_t count, index_t dim, index_t step,
                                  uint32_t* to) {
  uint32_t infinite = 0;
  for (index_t i = 0; i < count; i += 2, to += step) {
    const bf16 *a = rows[i], *b = i + 1 < count ? rows[i + 1] : nullptr;
    for (index_t d = 0; d < dim; ++d) {
      const uint32_t x = a[d], y = b ? b[d] : 0;
      infinite |= ((x & 0x7f80) == 0x7f80) | ((y & 0x7f80) == 0x7f80);
      to[d] = x | y << 16;
    }
  }
  return !infinite;
}

// scores[key][NR] of `count` keys.
template <class W>
void score(const Panel<W>& p, const typename W::A* keys, index_t step, index_t dim, index_t count,
           float scale, float* scores) {
  const index_t groups = ceil_div(count, MR);
  for (index_t g = 0; g < groups; ++g) {
    const index_t key = part(count, groups, g);
    with_rows(int(part(count, groups, g + 1) - key), [&](auto size) {
      constexpr int M = size;
      vf acc[1][M][NV] = {};
      multiply<W, M, 1>(acc, keys + key * step, step, 1, p.q, NR, ceil_div(dim, W::K));
      UNROLL for (int r = 0; r < M; ++r) {
        UNROLL for (int v = 0; v < NV; ++v) store(scores + (key + r) * NR + v * LANES, acc[0][r][v] * scale);
      }
    });
  }
}

// Scores of the keys `first` to `first + count` to exponentials; `decay` is what earlier sums shrink by.
template <class W>
INLINE void soften(Panel<W>& p, index_t first, index_t count, bool masked, float* scores, vf (&decay)[NV]) {
  UNROLL for (int v = 0; v < NV; ++v) {
    float* column = scores + v * LANES;
    const vf before = p.top[v];
    vf top = before;
    if (masked) {
      for (index_t i = 0; i < count; ++i) {
        const vi key = vi{} + int32_t(first + i);
        const vf x = load<vf>(column + i * NR);
        const vf kept = (key >= p.first[v]) & (key < p.end[v]) ? x : splat(NEVER);
        store(column + i * NR, kept);
        top = max(kept, top);
      }
    } else {
      for (index_t i = 0; i < count; ++i) top = max(load<vf>(column + i * NR), top);
    }
    decay[v] = exp_below(before, top);
    vf total = p.total[v] * decay[v];
    for (index_t i = 0; i < count; ++i) {
      const vf x = exp_below(load<vf>(column + i * NR), top);
      store(column + i * NR, x);
      total += x;
    }
    p.top[v] = top, p.total[v] = total;
  }
}

// Exponentials [count][NR] as the product with the values wants them, a missing last of a pair as zero.
[[maybe_unused]] const float* weigh(float* exponentials, index_t, const float*) { return exponentials; }
[[maybe_unused]] const uint32_t* weigh(float* exponentials, index_t count, const uint32_t*) {
  auto* to = reinterpret_cast<uint32_t*>(exponentials);  // never ahead of what is still to be read
  for (index_t i = 0; i < count; i += 2, exponentials += 2 * NR, to += NR) {
    UNROLL for (int v = 0; v < NV; ++v) {
      const vu a = round_bits(load<vf>(exponentials + v * LANES));
      const vu b = i + 1 < count ? round_bits(load<vf>(exponentials + NR + v * LANES)) : vu{};
      store(to + v * LANES, a >> 16 | b);
    }
  }
  return to - ceil_div(count, 2) * NR;
}

// What a lane gives no weight must not count, not even times zero, for it may be infinite or NaN.
INLINE vf add_exactly(vf sum, vf weight, float value) { return sum + (weight != 0 ? weight * value : vf{}); }
[[maybe_unused]] INLINE vf add_exactly(vf sum, const float* weights, float value) {
  return add_exactly(sum, load<vf>(weights), value);
}
[[maybe_unused]] INLINE vf add_exactly(vf sum, const uint32_t* weights, uint32_t values) {
  const vu pairs = load<vu>(weights);
  sum = add_exactly(sum, even(pairs), to_float(bf16(values)));
  return add_exactly(sum, odd(pairs), to_float(bf16(values >> 16)));
}

// sums = sums * decay + values weighted by `weights` [count / W::K][NR].
template <class W>
void add_values(const Panel<W>& p, const typename W::A* values, index_t step, index_t dim, index_t count,
                const typename W::B* weights, const vf (&decay)[NV], bool exactly) {
  const index_t groups = ceil_div(dim, MR), steps = ceil_div(count, W::K);
  for (index_t g = 0; g < groups; ++g) {
    const index_t d = part(dim, groups, g);
    with_rows(int(part(dim, groups, g + 1) - d), [&](auto size) {
      constexpr int M = size;
      vf acc[1][M][NV];
      float* sums = p.sums + d * NR;
      UNROLL for (int r = 0; r < M; ++r) {
        UNROLL for (int v = 0; v < NV; ++v)
          acc[0][r][v] = load<vf>(sums + r * NR + v * LANES) * decay[v];
      }
      if (__builtin_expect(exactly, 0)) {
        for (index_t i = 0; i < steps * M * NV; ++i) {
          const index_t s = i / (M * NV), r = i / NV % M, v = i % NV;
          acc[0][r][v] = add_exactly(acc[0][r][v], weights + s * NR + v * LANES, values[s * step + d + r]);
        }
      } else {
        multiply<W, M, 1>(acc, values + d, 1, step, weights, NR, steps);
      }
      UNROLL for (int r = 0; r < M; ++r) {
        UNROLL for (int v = 0; v < NV; ++v) store(sums + r * NR + v * LANES, acc[0][r][v]);
      }
    });
  }
}

template <class W>
void attend(Panel<W>& p, const Block<W>& b, index_t dim, float scale, float* scores) {
  const index_t skipped = p.first_first > b.first ? (p.first_first - b.first) / W::K : 0;  // whole steps
  const index_t first = b.first + skipped * W::K;
  const index_t end = b.first + b.count < p.last_end ? b.first + b.count : p.last_end;
  if (first >= end) return;
  const index_t count = end - first;
  const bool masked = p.first_end < end || p.last_first > first;
  vf decay[NV];
  score(p, b.keys + skipped * W::K * b.step, b.step, dim, count, scale, scores);
  soften(p, first, count, masked, scores, decay);
  const auto* weights = weigh(scores, count, b.values);
  const bool exactly = !b.finite && (masked || count % W::K);
  add_values(p, b.values + skipped * b.step, b.step, dim, count, weights, decay, exactly);
}

// Rows [LANES][dim] to `to` [dim][NR], or their pairs to [dim / 2][NR].
template <class T>
void load_columns(const T* const* rows, index_t dim, float* to) {
  index_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    vf x[LANES];
    UNROLL for (int i = 0; i < LANES; ++i) x[i] = load_floats(rows[i] + d);
    transpose(x);
    UNROLL for (int i = 0; i < LANES; ++i) store(to + (d + i) * NR, x[i]);
  }
  for (; d < dim; ++d) {
    for (int i = 0; i < LANES; ++i) to[d * NR + i] = to_float(rows[i][d]);
  }
}

[[maybe_unused]] void load_columns(const bf16* const* rows, index_t dim, uint32_t* to) {
  index_t d = 0;
  for (; d + 2 * LANES <= dim; d += 2 * LANES) {
    vf x[LANES];
    UNROLL for (int i = 0; i < LANES; ++i) x[i] = load<vf>(rows[i] + d);
    transpose(x);
    UNROLL for (int i = 0; i < LANES; ++i) store(to + (d / 2 + i) * NR, x[i]);
  }
  for (; d < dim; d += 2) {
    for (int i = 0; i < LANES; ++i)
      to[d / 2 * NR + i] = rows[i][d] | (d + 1 < dim ? uint32_t(rows[i][d + 1]) << 16 : 0);
  }
}

template <class T, class W>
void load_panel(const Call& c, const Task& t, index_t from, Panel<W>& p) {
  const T* rows[NR];
  int32_t first[NR], end[NR];
  const index_t group = c.group();
  index_t row = t.row + from / group, head = from % group;
  for (index_t i = 0; i < NR; ++i) {
    rows[i] = query<T>(c, t, row, head);
    first[i] = int32_t(c.first(row)), end[i] = int32_t(c.end(row));
    if (head + 1 < group)
      ++head;
    else if (row + 1 < t.row + t.rows)
      ++row, head = 0;  // lanes behind the last query repeat it
  }
  p.first_first = first[0], p.last_first = first[NR - 1];
  p.first_end = end[0], p.last_end = end[NR - 1];
  for (int v = 0; v < NV; ++v) {
    p.first[v] = load<vi>(first + v * LANES), p.end[v] = load<vi>(end + v * LANES);
    p.top[v] = splat(NEVER), p.total[v] = vf{};
    load_columns(rows + v * LANES, c.dim, p.q + v * LANES);
  }
  __builtin_memset(p.sums, 0, size_t(c.dim * NR) * 4);
}

template <class T, class W>
void emit_panel(const Call& c, const Task& t, index_t from, const Panel<W>& p, float* rows) {
  const index_t step = round_up(c.dim, LANES), group = c.group();
  index_t row = t.row + from / group, head = from % group;
  for (int v = 0; v < NV; ++v) {
    for (index_t d = 0; d < c.dim; d += LANES) {  // behind the last dim is memory, whatever it holds
      vf x[LANES];
      UNROLL for (int i = 0; i < LANES; ++i) x[i] = load<vf>(p.sums + (d + i) * NR + v * LANES);
      transpose(x);
      UNROLL for (int i = 0; i < LANES; ++i) store(rows + i * step + d, x[i]);
    }
    for (index_t i = 0; i < LANES && row < t.row + t.rows; ++i) {
      emit<T>(c, t, row, head, p.top[v][i], p.total[v][i], rows + i * step);
      if (++head == group) ++row, head = 0;
    }
  }
}

// Moves `key` on to the next key that any of the task's rows reads (`row`: the first that reads on) and
// returns how many from there are read, at most KEYS; 0 at the end. Keys between the windows of two rows
// may have lost their pages.
index_t next_run(const Call& c, const Task& t, index_t& row, index_t& key) {
  const index_t behind = t.row + t.rows;
  while (row < behind && c.end(row) <= key) ++row;
  if (row == behind) return 0;
  key = key > c.first(row) ? key : c.first(row);
  index_t end = c.end(row);
  for (index_t r = row + 1; r < behind && end < key + KEYS && c.first(r) <= end; ++r) end = c.end(r);
  end = end < t.end ? end : t.end;
  const index_t count = end - key < KEYS ? end - key : KEYS;
  return count > 0 ? count : 0;
}

template <class T>
void many_rows(const Call& c, const Task& t) {
  using W = Products<T>;
  // Not a power of two, to spread over the cache's sets.
  const index_t step = round_up(c.dim, 16) + 16, size = round_up(c.dim, LANES) * NR;
  const index_t panels = ceil_div(t.rows * c.group(), NR);
  float* scores = scratch.get<float>(KEYS * NR + 2 * KEYS * step + (2 * panels + 1) * size);
  float *sums = scores + KEYS * NR, *outs = sums + panels * size;
  auto* keys = reinterpret_cast<typename W::A*>(outs + size);
  auto* values = keys + KEYS * step;
  auto* queries = reinterpret_cast<typename W::B*>(values + KEYS * step);
  static thread_local std::vector<Panel<W>> all;
  all.resize(size_t(panels));
  for (index_t i = 0; i < panels; ++i) {
    all[i].q = queries + i * size, all[i].sums = sums + i * size;
    load_panel<T>(c, t, i * NR, all[i]);
  }
  const T* rows[KEYS];
  index_t row = t.row, key = t.first;
  while (const index_t count = next_run(c, t, row, key)) {
    find(c, t, c.keys, key, count, rows);
    copy_keys(rows, count, c.dim, step, keys);
    find(c, t, c.values, key, count, rows);
    const bool finite = copy_values(rows, count, c.dim, step, values);
    const Block<W> block{key, count, step, keys, values, finite};
    for (Panel<W>& p : all) attend(p, block, c.dim, float(c.scale), scores);
    key += count;
  }
  for (index_t i = 0; i < panels; ++i) emit_panel<T>(c, t, i * NR, all[i], outs);
}

}  // namespace
}  // namespace weave
