// Attention over a paged cache, online softmax over blocks of keys.
//
// Many rows of a sequence: the rows, each with the query heads of its KV head, lie in the lanes of panels
// [dim][NR]. Scores and outputs are computed transposed, keys and dims in the place of rows: so keys and
// values are read as they lie, and softmax needs no sum across lanes.
// One row (decode): keys straight from their pages, each widened in registers once for up to H query heads.

#include <utility>
#include <vector>

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

// Rows `row` to `row + rows` of a sequence with the heads of one KV head (its queries: row by row, the heads
// of each side by side), over the keys `first` to `end`. Where these are one of several shares of the rows'
// keys, the outcome goes to `partial`: per query the highest score, the sum of exponentials, [dim] values.
struct Task {
  index_t sequence, kv_head, row, rows, first, end;
  float* partial;
  index_t shares;
  index_t partial_floats(const Call& c) const { return rows * c.group() * (c.dim + 2); }
};

constexpr index_t KEYS = 64;             // keys in a block: K and V as float32 stay in the second-level cache
constexpr index_t QUERY_FLOATS = 16384;  // of a task's queries: they and their sums stay there too
constexpr index_t SHARE_KEYS = 256;      // a share of the keys is not shorter
constexpr index_t SERIAL = 1 << 18;      // multiply-adds that are not worth waking other threads
constexpr float NEVER = -__builtin_inff();

thread_local Scratch scratch, partial_scratch;
thread_local std::vector<Task> tasks;

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
const T* query(const Call& c, const Task& t, index_t i) {
  const index_t head = t.kv_head * c.group() + i % c.group();
  return static_cast<const T*>(c.q) + (t.row + i / c.group()) * c.q_row + head * c.q_head;
}

// Where `count` keys or values from `first` on lie in their pool.
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

// Divides the weighted values of query i by `total`, or keeps all for merge().
template <class T>
void emit(const Call& c, const Task& t, index_t i, float top, float total, const float* sums) {
  if (t.partial) {
    float* to = t.partial + i * (c.dim + 2);
    to[0] = top, to[1] = total;
    __builtin_memcpy(to + 2, sums, size_t(c.dim) * 4);
    return;
  }
  const index_t head = t.kv_head * c.group() + i % c.group();
  T* out = static_cast<T*>(c.out) + (t.row + i / c.group()) * c.out_row + head * c.out_head;
  index_t d = 0;
  for (; d + LANES <= c.dim; d += LANES) store_floats(out + d, load<vf>(sums + d) / total);
  for (; d < c.dim; ++d) from_float(sums[d] / total, out + d);
}

// ---- many rows

// NR queries of a task, one to a lane. Their bounds ascend with the lanes.
struct Panel {
  vi first[NV], end[NV];  // keys that a lane reads
  vf top[NV], total[NV];
  float *q, *sums;  // [dim][NR]
  index_t first_first, last_first, first_end, last_end;
};

// Keys from `first` on and their values, float32 with row stride `step`.
struct Block {
  index_t first, count, step;
  const float *keys, *values;
  bool finite;  // the values
};

// Rows as float32; returns whether all is finite.
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

// scores[key][NR] of `count` keys.
void score(const Panel& p, const float* keys, index_t step, index_t dim, index_t count, float* scores) {
  const index_t groups = ceil_div(count, MR);
  for (index_t g = 0; g < groups; ++g) {
    const index_t key = part(count, groups, g);
    with_rows(int(part(count, groups, g + 1) - key), [&](auto size) {
      constexpr int M = size;
      vf acc[1][M][NV] = {};
      multiply<Floats, M, 1>(acc, keys + key * step, step, 1, p.q, NR, dim);
      UNROLL for (int r = 0; r < M; ++r) {
        UNROLL for (int v = 0; v < NV; ++v) store(scores + (key + r) * NR + v * LANES, acc[0][r][v]);
      }
    });
  }
}

// Scores of the keys `first` to `first + count` to exponentials; `decay` is what earlier sums shrink by.
INLINE void soften(Panel& p, index_t first, index_t count, bool masked, float* scores, vf (&decay)[NV]) {
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

// sums = sums * decay + values weighted by `weights` [key][NR]. `exact`: what a lane gives no weight must not
// count, not even times zero, for it may be infinite or NaN.
void add_values(const Panel& p, const float* values, index_t step, index_t dim, index_t count,
                const float* weights, const vf (&decay)[NV], bool exact) {
  const index_t groups = ceil_div(dim, MR);
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
      if (__builtin_expect(exact, 0)) {
        for (index_t i = 0; i < count * M * NV; ++i) {
          const index_t key = i / (M * NV), r = i / NV % M, v = i % NV;
          const vf weight = load<vf>(weights + key * NR + v * LANES);
          acc[0][r][v] += weight != 0 ? weight * values[key * step + d + r] : vf{};
        }
      } else {
        multiply<Floats, M, 1>(acc, values + d, 1, step, weights, NR, count);
      }
      UNROLL for (int r = 0; r < M; ++r) {
        UNROLL for (int v = 0; v < NV; ++v) store(sums + r * NR + v * LANES, acc[0][r][v]);
      }
    });
  }
}

void attend(Panel& p, const Block& b, index_t dim, float* scores) {
  const index_t first = b.first > p.first_first ? b.first : p.first_first;
  const index_t end = b.first + b.count < p.last_end ? b.first + b.count : p.last_end;
  if (first >= end) return;
  const index_t offset = (first - b.first) * b.step;
  const bool masked = p.first_end < end || p.last_first > first;
  vf decay[NV];
  score(p, b.keys + offset, b.step, dim, end - first, scores);
  soften(p, first, end - first, masked, scores, decay);
  add_values(p, b.values + offset, b.step, dim, end - first, scores, decay, masked && !b.finite);
}

template <class T>
void load_panel(const Call& c, const Task& t, index_t from, Panel& p) {
  const index_t queries = t.rows * c.group();
  const T* rows[NR];
  int32_t first[NR], end[NR];
  for (index_t i = 0; i < NR; ++i) {  // lanes behind the last query repeat it
    const index_t at = from + i < queries ? from + i : queries - 1, row = t.row + at / c.group();
    rows[i] = query<T>(c, t, at);
    first[i] = int32_t(c.first(row)), end[i] = int32_t(c.end(row));
  }
  p.first_first = first[0], p.last_first = first[NR - 1];
  p.first_end = end[0], p.last_end = end[NR - 1];
  const float scale = float(c.scale);
  for (int v = 0; v < NV; ++v) {
    p.first[v] = load<vi>(first + v * LANES), p.end[v] = load<vi>(end + v * LANES);
    p.top[v] = splat(NEVER), p.total[v] = vf{};
    float* q = p.q + v * LANES;
    const T* const* row = rows + v * LANES;
    index_t d = 0;
    for (; d + LANES <= c.dim; d += LANES) {
      vf x[LANES];
      UNROLL for (int i = 0; i < LANES; ++i) x[i] = load_floats(row[i] + d) * scale;
      transpose(x);
      UNROLL for (int i = 0; i < LANES; ++i) store(q + (d + i) * NR, x[i]);
    }
    for (; d < c.dim; ++d) {
      for (int i = 0; i < LANES; ++i) q[d * NR + i] = to_float(row[i][d]) * scale;
    }
  }
  __builtin_memset(p.sums, 0, size_t(c.dim * NR) * 4);
}

template <class T>
void emit_panel(const Call& c, const Task& t, index_t from, const Panel& p, float* rows) {
  const index_t left = t.rows * c.group() - from, step = round_up(c.dim, LANES);
  for (int v = 0; v < NV; ++v) {
    for (index_t d = 0; d < c.dim; d += LANES) {  // behind the last dim is memory, whatever it holds
      vf x[LANES];
      UNROLL for (int i = 0; i < LANES; ++i) x[i] = load<vf>(p.sums + (d + i) * NR + v * LANES);
      transpose(x);
      UNROLL for (int i = 0; i < LANES; ++i) store(rows + i * step + d, x[i]);
    }
    for (index_t i = 0; i < LANES && v * LANES + i < left; ++i)
      emit<T>(c, t, from + v * LANES + i, p.top[v][i], p.total[v][i], rows + i * step);
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
  return end - key < KEYS ? end - key : KEYS;
}

template <class T>
void many_rows(const Call& c, const Task& t) {
  // Not a power of two, to spread over the cache's sets.
  const index_t step = round_up(c.dim, 16) + 16, size = round_up(c.dim, LANES) * NR;
  const index_t panels = ceil_div(t.rows * c.group(), NR);
  float* scores = scratch.get<float>(KEYS * NR + 2 * KEYS * step + (2 * panels + 1) * size);
  float *keys = scores + KEYS * NR, *values = keys + KEYS * step, *rest = values + KEYS * step;
  static thread_local std::vector<Panel> all;
  all.resize(size_t(panels));
  for (index_t i = 0; i < panels; ++i) {
    all[i].q = rest + 2 * i * size, all[i].sums = all[i].q + size;
    load_panel<T>(c, t, i * NR, all[i]);
  }
  const T* rows[KEYS];
  index_t row = t.row, key = t.first;
  while (const index_t count = key < t.end ? next_run(c, t, row, key) : 0) {
    if (count < 0) break;
    find(c, t, c.keys, key, count, rows);
    widen(rows, count, c.dim, step, keys);
    find(c, t, c.values, key, count, rows);
    const bool finite = widen(rows, count, c.dim, step, values);
    for (Panel& p : all) attend(p, {key, count, step, keys, values, finite}, c.dim, scores);
    key += count;
  }
  for (index_t i = 0; i < panels; ++i) emit_panel<T>(c, t, i * NR, all[i], rest + 2 * panels * size);
}

// ---- one row

// Query heads that share a loaded key, at most; and vectors of their sums at a time.
constexpr int MOST_HEADS = LANES >= 8 && REGISTERS == 32 ? 8 : 4;
constexpr int SUMS = REGISTERS / 2;

// V vectors of a row. Two of bfloat16 are the even and the odd elements: no shuffle. Queries are loaded alike.
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
          UNROLL for (int h = 0; h < H; ++h) acc[k * H + h] += load<vf>(q + h * dim + d + v * LANES) * key[v];
        }
      }
    });
    sum_each(acc);
    store(scores + i * H, acc[0]);
  }
}

// sums[h][dim] = sums * decay + values weighted by `weights` [key][H].
template <int H, class T>
INLINE void add_row(float* sums, index_t dim, const float* decay, const float* weights, const T* const* values,
                    index_t count) {
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
INLINE void attend_row(const Call& c, const float* q, const T* const* keys, const T* const* values, index_t count,
                       float* sums, float* tops, float* totals) {
  float scores[KEYS * H + LANES], decay[LANES];
  score_row<H>(q, c.dim, keys, count, scores);
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
  add_row<H>(sums, c.dim, decay, scores, values, count);
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
      load_vectors(query<T>(c, t, g) + d, x);
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
      attend_row<H>(c, q + i * size, keys[turn], values, count, sums + i * size, tops + i * LANES,
                    totals + i * LANES);
  }
  for (index_t i = 0; i < chunks; ++i) {
    const vf total = fold_lanes<H>(load<vf>(totals + i * LANES), [](vf a, vf b) { return a + b; });
    for (index_t h = 0; h < H && i * H + h < group; ++h) {
      float* of_head = sums + i * size + h * c.dim;
      restore_order<T>(of_head, c.dim);
      emit<T>(c, t, i * H + h, tops[i * LANES + h], total[h], of_head);
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

// ---- all

// Makes tasks of at most `most` rows, a sequence's last rows, of the most keys, first. Returns the multiply-adds
// of a product.
index_t divide(const Call& c, index_t most) {
  index_t total = 0;
  tasks.clear();
  for (index_t s = 0; s < c.sequences; ++s) {
    const index_t start = c.starts[s], rows = c.starts[s + 1] - start, tiles = ceil_div(rows, most);
    for (index_t i = tiles; i-- > 0;) {
      const index_t row = start + part(rows, tiles, i), behind = start + part(rows, tiles, i + 1);
      const index_t first = c.first(row), end = c.end(behind - 1);
      for (index_t head = 0; head < c.kv_heads; ++head)
        tasks.push_back({s, head, row, behind - row, first, end, nullptr, 1});
      total += (behind - row) * c.heads * c.dim * (end - first);
    }
  }
  return total;
}

// Tasks of many keys become several, each with a share of them. Returns what they were.
const std::vector<Task>& share_keys(const Call& c, index_t wanted) {
  static thread_local std::vector<Task> wholes;
  wholes.swap(tasks);
  tasks.clear();
  const index_t most = ceil_div(wanted, index_t(wholes.size()));
  index_t floats = 0;
  for (Task& t : wholes) {
    const index_t shares = (t.end - t.first) / SHARE_KEYS;
    t.shares = shares < most ? (shares < 1 ? 1 : shares) : most;
    if (t.shares > 1) floats += t.shares * t.partial_floats(c);
  }
  float* at = partial_scratch.get<float>(floats);
  for (Task& t : wholes) {
    t.partial = t.shares > 1 ? at : nullptr;
    for (index_t i = 0; i < t.shares; ++i) {
      Task share = t;
      share.first = t.first + part(t.end - t.first, t.shares, i);
      share.end = t.first + part(t.end - t.first, t.shares, i + 1);
      if (t.partial) share.partial = at, at += t.partial_floats(c);
      tasks.push_back(share);
    }
  }
  return wholes;
}

// What the shares of a task's keys gave, one after another at `partial`, to outputs.
template <class T>
void merge(const Call& c, Task t) {
  float* const partial = std::exchange(t.partial, nullptr);
  for (index_t i = 0; i < t.rows * c.group(); ++i) {
    float* all = partial + i * (c.dim + 2);
    for (index_t n = 1; n < t.shares; ++n) {
      const float* one = all + n * t.partial_floats(c);
      const float top = all[0] > one[0] ? all[0] : one[0];
      const vf weights = exp_below(vf{all[0], one[0]}, splat(top));
      all[0] = top;
      for (index_t d = 1; d < c.dim + 2; ++d) all[d] = all[d] * weights[0] + one[d] * weights[1];
    }
    emit<T>(c, t, i, all[0], all[1], all + 2);
  }
}

template <class T>
void attention(const Call& c) {
  index_t most = QUERY_FLOATS / c.dim / c.group();
  most = most < 1 ? 1 : most;
  const int threads = divide(c, most) > SERIAL ? int(c.threads) : 1;
  // As many tasks as keep all threads busy to the end.
  while (threads > 1 && index_t(tasks.size()) < 4 * threads && most * c.group() > 2 * NR) {
    most = ceil_div(most, 2);
    divide(c, most);
  }
  const bool shared = threads > 1 && index_t(tasks.size()) < 2 * threads;
  const std::vector<Task>* wholes = shared ? &share_keys(c, 2 * threads) : nullptr;
  const std::vector<Task>& all = tasks;  // this thread's
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].rows == 1 && c.dim % LANES == 0)
      one_row_of<T>(c, all[i]);
    else
      many_rows<T>(c, all[i]);
  }
  if (!wholes) return;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (size_t i = 0; i < wholes->size(); ++i) {
    if ((*wholes)[i].partial) merge<T>(c, (*wholes)[i]);
  }
}

}  // namespace
}  // namespace weave

extern "C" void weave_attention(const void* packed) {
  weave::Call c;
  __builtin_memcpy(&c, packed, sizeof c);
  if (c.dtype == weave::BFLOAT16)
    weave::attention<weave::bf16>(c);
  else
    weave::attention<float>(c);
}
