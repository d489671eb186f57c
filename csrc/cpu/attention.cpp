// Paged attention. Two ways, chosen per sequence:
// - one row (decode): the query heads of a group share each load of a key and a value, which are widened
//   in registers; long sequences are cut in parts for several threads.
// - several rows (prefill): tiles of rows x heads in the lanes of the vectors and keys one after another,
//   so that both products run on the tile of tile.h without any transposition, and softmax is lane by lane.
// Softmax is online, in float32; keys that no row of a tile sees are skipped.

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "tile.h"

namespace weave {
namespace {

constexpr index_t KEYS = 64;         // keys in a block
constexpr index_t TILE = 64;         // rows x heads in a tile, about
constexpr index_t PART_KEYS = 256;   // a part of a long sequence has at least so many keys
constexpr int GROUP = 4;             // query heads that share a load
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

struct Problem {
  const void *q, *keys, *values;
  void* out;
  const int32_t *table, *starts, *positions;
  index_t q_row, q_head, out_row, out_head, max_pages, page, heads, kv_heads, dim, window;
  float scale;
  index_t group() const { return heads / kv_heads; }
  index_t first_key(index_t row) const {
    const index_t from = positions[row] + 1 - window;
    return from > 0 ? from : 0;
  }
};

struct Task {
  index_t sequence, row, rows, kv_head, part, parts;
};

thread_local Scratch scratch, parts_scratch;

// Where `count` tokens from `at` on lie in a pool.
template <class T>
void find(const Problem& p, const Task& t, const T* pool, index_t at, index_t count, const T** to) {
  const int32_t* pages = p.table + t.sequence * p.max_pages;
  index_t number = at / p.page, offset = at % p.page;
  for (index_t i = 0; i < count; ++i) {
    to[i] = pool + ((pages[number] * p.page + offset) * p.kv_heads + t.kv_head) * p.dim;
    if (++offset == p.page) offset = 0, ++number;
  }
}

// ---- several rows

template <class T>
INLINE void widen(const T* from, index_t count, float* to) {
  index_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, load_floats(from + i));
  for (; i < count; ++i) to[i] = to_float(from[i]);
}

// What a panel of NR lanes (each a row and a head) keeps over the blocks of keys.
struct Panel {
  float* query;    // [dim][NR], scaled
  float* sums;     // [dim][NR]
  float* highest;  // [NR]
  float* total;    // [NR]
  int32_t* from;   // [NR] first and last visible key
  int32_t* last;
  index_t min_from, max_from, min_last, max_last;
};

// One block of keys for one panel: scores, softmax, weighted values.
void attend(const Panel& panel, const float* keys, const float* values, index_t first, index_t count,
            index_t dim, float* scores) {
  for (index_t k = 0; k < count; k += MR) {
    with_rows(int(count - k < MR ? count - k : MR), [&](auto size) {
      constexpr int M = size;
      vf acc[sets<Floats>(M)][M][NV] = {};
      multiply<Floats, M, sets<Floats>(M)>(acc, keys + k * dim, dim, 1, panel.query, NR, dim);
      fold<M, sets<Floats>(M)>(acc);
      UNROLL for (int r = 0; r < M; ++r) {
        UNROLL for (int v = 0; v < NV; ++v) store(scores + (k + r) * NR + v * LANES, acc[0][r][v]);
      }
    });
  }
  bool rescale = false;
  vf factor[NV];
  UNROLL for (int v = 0; v < NV; ++v) {
    float* column = scores + v * LANES;
    if (first < panel.max_from || first + count - 1 > panel.min_last) {
      const vi from = load<vi>(panel.from + v * LANES), last = load<vi>(panel.last + v * LANES);
      for (index_t k = 0; k < count; ++k) {
        const vi key = vi{} + int32_t(first + k);
        vf score = load<vf>(column + k * NR);
        store(column + k * NR, ((key < from) | (key > last)) ? splat(LOWEST) : score);
      }
    }
    const vf before = load<vf>(panel.highest + v * LANES);
    vf highest = before;
    for (index_t k = 0; k < count; ++k) highest = max(load<vf>(column + k * NR), highest);
    const vf base = highest == LOWEST ? vf{} : highest;
    vf total{};
    for (index_t k = 0; k < count; ++k) {
      const vf share = exp(load<vf>(column + k * NR) - base);
      store(column + k * NR, share);
      total += share;
    }
    factor[v] = exp(before - base);
    store(panel.highest + v * LANES, highest);
    store(panel.total + v * LANES, load<vf>(panel.total + v * LANES) * factor[v] + total);
    const vi changed = highest != before;
    for (int i = 0; i < LANES; ++i) rescale |= changed[i] != 0;
  }
  if (!rescale) UNROLL for (int v = 0; v < NV; ++v) factor[v] = splat(1.0f);
  for (index_t d = 0; d < dim; d += MR) {
    with_rows(int(dim - d < MR ? dim - d : MR), [&](auto size) {
      constexpr int M = size;
      vf acc[1][M][NV];
      UNROLL for (int r = 0; r < M; ++r) {
        UNROLL for (int v = 0; v < NV; ++v)
          acc[0][r][v] = load<vf>(panel.sums + (d + r) * NR + v * LANES) * factor[v];
      }
      multiply<Floats, M, 1>(acc, values + d, 1, dim, scores, NR, count);
      UNROLL for (int r = 0; r < M; ++r) {
        UNROLL for (int v = 0; v < NV; ++v)
          store(panel.sums + (d + r) * NR + v * LANES, acc[0][r][v]);
      }
    });
  }
}

// The lanes of a panel: lane i is row i / group and head i % group of the tile; lanes past the tile repeat
// the visible keys of the last, with a query of zeros.
template <class T>
Panel open_panel(const Problem& p, const Task& t, index_t lane, float* memory) {
  const index_t group = p.group(), lanes = t.rows * group;
  Panel panel{memory, memory + p.dim * NR, memory + 2 * p.dim * NR, nullptr, nullptr, nullptr, 0, 0, 0, 0};
  panel.total = panel.highest + NR;
  panel.from = reinterpret_cast<int32_t*>(panel.total + NR);
  panel.last = panel.from + NR;
  panel.min_from = panel.min_last = std::numeric_limits<int32_t>::max();
  panel.max_from = panel.max_last = 0;
  for (index_t i = 0; i < NR; ++i) {
    const bool used = lane + i < lanes;
    const index_t at = used ? lane + i : lanes - 1, row = t.row + at / group;
    const T* q = static_cast<const T*>(p.q) + row * p.q_row + (t.kv_head * group + at % group) * p.q_head;
    for (index_t d = 0; d < p.dim; ++d) panel.query[d * NR + i] = used ? to_float(q[d]) * p.scale : 0;
    const index_t from = p.first_key(row), last = p.positions[row];
    panel.from[i] = int32_t(from);
    panel.last[i] = int32_t(last);
    panel.highest[i] = LOWEST;
    panel.total[i] = 0;
    if (from < panel.min_from) panel.min_from = from;
    if (from > panel.max_from) panel.max_from = from;
    if (last < panel.min_last) panel.min_last = last;
    if (last > panel.max_last) panel.max_last = last;
  }
  for (index_t i = 0; i < p.dim * NR; ++i) panel.sums[i] = 0;
  return panel;
}

template <class T>
void close_panel(const Problem& p, const Task& t, index_t lane, const Panel& panel) {
  const index_t group = p.group(), lanes = t.rows * group;
  for (index_t i = 0; i < NR && lane + i < lanes; ++i) {
    const index_t row = t.row + (lane + i) / group, head = t.kv_head * group + (lane + i) % group;
    T* out = static_cast<T*>(p.out) + row * p.out_row + head * p.out_head;
    const float factor = 1.0f / panel.total[i];
    for (index_t d = 0; d < p.dim; ++d) from_float(panel.sums[d * NR + i] * factor, out + d);
  }
}

template <class T>
void attend_rows(const Problem& p, const Task& t) {
  const index_t panels = ceil_div(t.rows * p.group(), NR), each = 2 * p.dim * NR + 4 * NR;
  float* memory = scratch.get<float>(panels * each + 2 * KEYS * p.dim + KEYS * NR);
  float *keys = memory + panels * each, *values = keys + KEYS * p.dim, *scores = values + KEYS * p.dim;
  std::vector<Panel> open;
  for (index_t i = 0; i < panels; ++i) open.push_back(open_panel<T>(p, t, i * NR, memory + i * each));
  const index_t end = open.back().max_last + 1;
  for (index_t first = open.front().min_from; first < end; first += KEYS) {
    const index_t count = end - first < KEYS ? end - first : KEYS;
    const T *key_at[KEYS], *value_at[KEYS];
    find(p, t, static_cast<const T*>(p.keys), first, count, key_at);
    find(p, t, static_cast<const T*>(p.values), first, count, value_at);
    for (index_t k = 0; k < count; ++k) {
      widen(key_at[k], p.dim, keys + k * p.dim);
      widen(value_at[k], p.dim, values + k * p.dim);
    }
    for (const Panel& panel : open) {
      if (panel.max_last < first || panel.min_from >= first + count) continue;
      const index_t seen = panel.max_last + 1 - first < count ? panel.max_last + 1 - first : count;
      attend(panel, keys, values, first, seen, p.dim, scores);
    }
  }
  for (index_t i = 0; i < panels; ++i) close_panel<T>(p, t, i * NR, open[i]);
}

// ---- one row

// 2 * LANES elements as two vectors, without a shuffle: bfloat16 gives the even and the odd elements.
INLINE void load_two(const float* p, vf& a, vf& b) { a = load<vf>(p), b = load<vf>(p + LANES); }
INLINE void load_two(const bf16* p, vf& a, vf& b) {
  const vu pairs = load<vu>(p);
  a = even(pairs), b = odd(pairs);
}
// Which element load_two puts at a place of the two vectors.
INLINE index_t element(const float*, index_t place) { return place; }
INLINE index_t element(const bf16*, index_t place) {
  const index_t block = place / (2 * LANES), i = place % (2 * LANES);
  return block * 2 * LANES + i % LANES * 2 + i / LANES;
}

typedef float v4 __attribute__((vector_size(16)));
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t i4 __attribute__((vector_size(16)));
#define SHUFFLE4(a, b, i, j, k, l) __builtin_shuffle(a, b, i4{i, j, k, l})
#endif

INLINE v4 narrow(vf x) {
  v4 quarters[LANES / 4];
  __builtin_memcpy(quarters, &x, sizeof x);
  UNROLL for (int i = 1; i < LANES / 4; ++i) quarters[0] += quarters[i];
  return quarters[0];
}

// The sums of four vectors' lanes.
INLINE v4 four_sums(vf a, vf b, vf c, vf d) {
  const v4 w = narrow(a), x = narrow(b), y = narrow(c), z = narrow(d);
  const v4 s = SHUFFLE4(w, x, 0, 4, 1, 5) + SHUFFLE4(w, x, 2, 6, 3, 7);
  const v4 t = SHUFFLE4(y, z, 0, 4, 1, 5) + SHUFFLE4(y, z, 2, 6, 3, 7);
  return SHUFFLE4(s, t, 0, 1, 4, 5) + SHUFFLE4(s, t, 2, 3, 6, 7);
}

// What a group of G heads keeps: state[g] = {highest, total, sums[dim]} in load_two's order.
INLINE index_t state_size(index_t dim) { return round_up(dim + 2, LANES); }

// scores[g][k] of G heads and `count` keys, several keys at a time; query [G][dim].
template <class T, int G>
void score(const float* query, const T* const* keys, index_t count, index_t dim, float* scores) {
  constexpr int AT_ONCE = G == 1 ? 4 : 2, SUMS = AT_ONCE * G;
  for (index_t k = 0; k < count; k += AT_ONCE) {
    vf acc[(SUMS + 3) / 4 * 4] = {};
    const T* key[AT_ONCE];
    UNROLL for (int j = 0; j < AT_ONCE; ++j) key[j] = keys[k + j < count ? k + j : count - 1];
    for (index_t d = 0; d < dim; d += 2 * LANES) {
      vf a[AT_ONCE], b[AT_ONCE];
      UNROLL for (int j = 0; j < AT_ONCE; ++j) load_two(key[j] + d, a[j], b[j]);
      UNROLL for (int g = 0; g < G; ++g) {
        const vf x = load<vf>(query + g * dim + d), y = load<vf>(query + g * dim + d + LANES);
        UNROLL for (int j = 0; j < AT_ONCE; ++j) acc[g * AT_ONCE + j] += x * a[j];
        UNROLL for (int j = 0; j < AT_ONCE; ++j) acc[g * AT_ONCE + j] += y * b[j];
      }
    }
    float done[(SUMS + 3) / 4 * 4];
    UNROLL for (int i = 0; i < SUMS; i += 4)
      store(done + i, four_sums(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]));
    UNROLL for (int g = 0; g < G; ++g) {
      UNROLL for (int j = 0; j < AT_ONCE; ++j) scores[g * KEYS + k + j] = done[g * AT_ONCE + j];
    }
  }
}

// sums[g] = sums[g] * factor[g] + shares[g][k] * value[k] for BLOCKS blocks of 2 * LANES elements.
template <class T, int G, int BLOCKS>
INLINE void weigh(const float* shares, const float* factor, const T* const* values, index_t count,
                  index_t d, float* state, index_t state_stride) {
  vf acc[G][BLOCKS][2];
  UNROLL for (int g = 0; g < G; ++g) {
    UNROLL for (int b = 0; b < BLOCKS; ++b) {
      UNROLL for (int v = 0; v < 2; ++v)
        acc[g][b][v] = load<vf>(state + g * state_stride + 2 + d + (2 * b + v) * LANES) * factor[g];
    }
  }
  for (index_t k = 0; k < count; ++k) {
    UNROLL for (int b = 0; b < BLOCKS; ++b) {
      vf x, y;
      load_two(values[k] + d + b * 2 * LANES, x, y);
      UNROLL for (int g = 0; g < G; ++g) {
        acc[g][b][0] += shares[g * KEYS + k] * x;
        acc[g][b][1] += shares[g * KEYS + k] * y;
      }
    }
  }
  UNROLL for (int g = 0; g < G; ++g) {
    UNROLL for (int b = 0; b < BLOCKS; ++b) {
      UNROLL for (int v = 0; v < 2; ++v)
        store(state + g * state_stride + 2 + d + (2 * b + v) * LANES, acc[g][b][v]);
    }
  }
}

template <class T, int G>
void attend_one(const Problem& p, const Task& t, const float* query, index_t from, index_t to,
                float* state) {
  const index_t stride = state_size(p.dim);
  alignas(64) float scores[G * KEYS + 8];
  const T *keys[KEYS], *values[KEYS];
  for (index_t first = from; first < to; first += KEYS) {
    const index_t count = to - first < KEYS ? to - first : KEYS;
    find(p, t, static_cast<const T*>(p.keys), first, count, keys);
    find(p, t, static_cast<const T*>(p.values), first, count, values);
    score<T, G>(query, keys, count, p.dim, scores);
    float factor[G];
    for (int g = 0; g < G; ++g) {
      float* row = scores + g * KEYS;
      float* kept = state + g * stride;
      for (index_t k = count; k < round_up(count, LANES); ++k) row[k] = LOWEST;
      vf highest = splat(LOWEST);
      for (index_t k = 0; k < count; k += LANES) highest = max(load<vf>(row + k), highest);
      float top = kept[0];
      for (int i = 0; i < LANES; ++i) top = highest[i] > top ? highest[i] : top;
      vf total{};
      for (index_t k = 0; k < count; k += LANES) {
        const vf share = exp(load<vf>(row + k) - top);
        store(row + k, share);
        total += share;
      }
      factor[g] = std::exp(kept[0] - top);
      kept[0] = top;
      kept[1] = kept[1] * factor[g] + sum(total);
    }
    constexpr int BLOCKS = G == 1 ? 4 : G == 2 ? 2 : 1;
    index_t d = 0;
    for (; d + BLOCKS * 2 * LANES <= p.dim; d += BLOCKS * 2 * LANES)
      weigh<T, G, BLOCKS>(scores, factor, values, count, d, state, stride);
    for (; d < p.dim; d += 2 * LANES)
      weigh<T, G, 1>(scores, factor, values, count, d, state, stride);
  }
}

// One part of a row's keys: fills the states of the group's heads.
template <class T>
void attend_part(const Problem& p, const Task& t, float* states) {
  const index_t group = p.group(), stride = state_size(p.dim);
  const index_t from = p.first_key(t.row), count = p.positions[t.row] + 1 - from;
  const T* q = static_cast<const T*>(p.q) + t.row * p.q_row + t.kv_head * group * p.q_head;
  float* query = scratch.get<float>(group * p.dim);
  for (index_t g = 0; g < group; ++g) {
    for (index_t i = 0; i < p.dim; ++i)
      query[g * p.dim + i] = to_float(q[g * p.q_head + element(q, i)]) * p.scale;
    states[g * stride] = LOWEST;
    for (index_t i = 1; i < stride; ++i) states[g * stride + i] = 0;
  }
  const index_t begin = from + part(count, t.parts, t.part), end = from + part(count, t.parts, t.part + 1);
  for (index_t g = 0; g < group; g += GROUP) {
    with_rows<GROUP>(int(group - g < GROUP ? group - g : GROUP), [&](auto size) {
      constexpr int G = size;
      attend_one<T, G>(p, t, query + g * p.dim, begin, end, states + g * stride);
    });
  }
}

// Adds the parts up and writes the row's heads of this group. states: [parts][group][state].
template <class T>
void finish_row(const Problem& p, const Task& t, const float* states) {
  const index_t group = p.group(), stride = state_size(p.dim);
  for (index_t g = 0; g < group; ++g) {
    T* out = static_cast<T*>(p.out) + t.row * p.out_row + (t.kv_head * group + g) * p.out_head;
    float highest = LOWEST, total = 0;
    for (index_t i = 0; i < t.parts; ++i) highest = std::fmax(highest, states[(i * group + g) * stride]);
    for (index_t i = 0; i < t.parts; ++i) {
      const float* state = states + (i * group + g) * stride;
      total += state[1] * std::exp(state[0] - highest);
    }
    for (index_t d = 0; d < p.dim; ++d) {
      float value = 0;
      for (index_t i = 0; i < t.parts; ++i) {
        const float* state = states + (i * group + g) * stride;
        value += state[2 + d] * (t.parts == 1 ? 1.0f : std::exp(state[0] - highest));
      }
      from_float(value / total, out + element(out, d));
    }
  }
}

template <class T>
void attention(const Problem& p, index_t sequences, int threads) {
  const index_t group = p.group(), rows_at_once = TILE / group > 1 ? TILE / group : 1;
  const bool pairs = p.dim % (2 * LANES) == 0;
  std::vector<Task> tasks;
  std::vector<Task> parted;  // the rows whose parts have to be added up, by their first part's index
  for (index_t s = 0; s < sequences; ++s) {
    const index_t start = p.starts[s], end = p.starts[s + 1];
    for (index_t kv = 0; kv < p.kv_heads; ++kv) {
      if (end - start == 1 && pairs) {
        const index_t count = p.positions[start] + 1 - p.first_key(start);
        index_t parts = threads > sequences * p.kv_heads ? ceil_div(2 * threads, sequences * p.kv_heads) : 1;
        const index_t most = ceil_div(count, PART_KEYS);
        parts = parts < most ? parts : most;
        if (parts > 1) parted.push_back({s, start, index_t(tasks.size()), kv, 0, parts});
        for (index_t i = 0; i < parts; ++i) tasks.push_back({s, start, 1, kv, i, parts});
      } else {
        for (index_t row = start; row < end; row += rows_at_once)
          tasks.push_back({s, row, end - row < rows_at_once ? end - row : rows_at_once, kv, 0, 0});
      }
    }
  }
  const index_t size = group * state_size(p.dim);
  float* shared = parted.empty() ? nullptr : parts_scratch.get<float>(index_t(tasks.size()) * size);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (index_t i = 0; i < index_t(tasks.size()); ++i) {
    const Task& t = tasks[i];
    if (t.parts == 0) {
      attend_rows<T>(p, t);
    } else if (t.parts == 1) {
      static thread_local Scratch own;
      float* states = own.get<float>(size);
      attend_part<T>(p, t, states);
      finish_row<T>(p, t, states);
    } else {
      attend_part<T>(p, t, shared + i * size);
    }
  }
#pragma omp parallel for num_threads(threads) if (threads > 1 && parted.size() > 1)
  for (index_t i = 0; i < index_t(parted.size()); ++i)
    finish_row<T>(p, parted[i], shared + parted[i].rows * size);
}

}  // namespace
}  // namespace weave

using namespace weave;

// The arguments as ops/attention.py packs them. q, out: [rows, heads, dim], strides in elements; pools
// [pages, page, kv_heads, dim]; table [sequences, table_row]; starts [sequences + 1]; positions [rows].
struct Call {
  const void *q, *keys, *values;
  void* out;
  const int32_t *table, *starts, *positions;
  index_t q_row, q_head, out_row, out_head, table_row, sequences, heads, kv_heads, dim, page, window, dtype,
      threads;
  double scale;
};

extern "C" void weave_attention(const Call* c) {
  const Problem p{c->q,         c->keys,  c->values,  c->out,      c->table,    c->starts,
                  c->positions, c->q_row, c->q_head,  c->out_row,  c->out_head, c->table_row,
                  c->page,      c->heads, c->kv_heads, c->dim,     c->window,   float(c->scale)};
  if (c->dtype == BFLOAT16)
    attention<bf16>(p, c->sequences, int(c->threads));
  else
    attention<float>(p, c->sequences, int(c->threads));
}
