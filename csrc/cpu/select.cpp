// Choosing cached tokens (weaveinf/ops/select.py): how much each KV head's queries want each key, and the
// positions of the largest scores.

#include <algorithm>
#include <vector>

#include "attention_row.h"

namespace weave {
namespace {

// What weaveinf/ops/select.py packs, in its order. Strides in elements; out: [rows, kv_heads, width]. Keys
// before firsts[row] and from ends[row] on get an infinite vote.
//
// Queries have `dim` elements, but for two cases: with `channels` (int32 [kv_heads, dim]) those elements of them, 0 for -1; with
// `halves` half as many, which come as what is positive of them and then what is negative.
struct Wish {
  const void *q, *keys;
  float* out;
  const int32_t *table, *firsts, *ends, *channels;
  index_t q_row, q_head, table_row, rows, heads, kv_heads, dim, page_size, width, halves, soft, dtype, threads;
  double scale;
};

constexpr index_t MOST_CHANNELS = 1024;

thread_local Scratch wish_scratch;

// A row's scores lie as [kv head][chunk of H heads][key][H]. `tops` and `totals` are per share, [head lanes].
template <class T, int H>
struct Row {
  const Wish& w;
  const Call& c;
  index_t row, first, end, chunks, all, keys, each;  // each: keys of a share
  Query<T>* q;
  float *scores, *tops, *totals;

  float* of(index_t chunk) const { return scores + chunk * (keys + LANES) * H; }

  void place_queries() {
    const index_t group = c.group(), size = H * c.dim;
    __builtin_memset(q, 0, size_t(all * size) * sizeof *q);
    for (index_t head = 0; head < c.heads; ++head) {
      Query<T>* to = q + (head / group * chunks + head % group / H) * size + head % group % H * c.dim;
      const T* from = static_cast<const T*>(w.q) + row * w.q_row + head * w.q_head;
      T own[MOST_CHANNELS];
      if (w.channels) {
        const int32_t* channels = w.channels + head / group * c.dim;
        for (index_t d = 0; d < c.dim; ++d) own[d] = channels[d] < 0 ? T(0) : from[channels[d]];
        from = own;
      } else if (w.halves) {
        const index_t half = c.dim / 2;
        for (index_t d = 0; d < half; ++d) {
          const bool positive = to_float(from[d]) > 0;
          own[d] = positive ? from[d] : T(0), own[half + d] = positive ? T(0) : from[d];
        }
        from = own;
      }
      place_query(from, c.dim, to);
    }
  }

  // Scores of the share's keys and the highest of each head.
  void score(index_t share) {
    const Task t{row, 0, c.kv_heads, row, 1, first, end, nullptr, 1};
    const index_t from = first + share * each, to = std::min(from + each, end);
    const index_t bytes = c.kv_heads * c.dim * index_t(sizeof(T));
    const T *rows[2][KEYS], *heads[KEYS + LANES];
    for (index_t i = 0; i < all; ++i) store(tops + (share * all + i) * LANES, splat(NEVER));
    const auto locate = [&](index_t key, const T** where) {
      const index_t count = std::min<index_t>(to - key, KEYS);
      if (count > 0) find(c, t, w.keys, key, count, where);
      return count;
    };
    index_t count = 0, next = locate(from, rows[0]);
    Feed{reinterpret_cast<const char* const*>(rows[0]), next, bytes, 1}(1 << 20);
    for (index_t key = from, turn = 0; key < to; key += count, turn ^= 1) {
      count = next;
      next = locate(key + count, rows[turn ^ 1]);
      Feed feed{reinterpret_cast<const char* const*>(rows[turn ^ 1]), std::max<index_t>(next, 0), bytes};
      feed.rate = ceil_div(feed.count * ceil_div(bytes, 64), all * ceil_div(count, LANES / H) * SCORE_LINES);
      for (index_t kv = 0; kv < c.kv_heads; ++kv) {
        for (index_t i = 0; i < count; ++i) heads[i] = rows[turn][i] + kv * c.dim;
        for (index_t i = count; i % (LANES / H); ++i) heads[i] = heads[count - 1];
        for (index_t i = kv * chunks; i < (kv + 1) * chunks; ++i) {
          float block[KEYS * H + LANES];
          score_row<H>(q + i * H * c.dim, c.dim, float(w.scale), heads, count, block, feed);
          for (index_t s = count * H; s % LANES; ++s) block[s] = NEVER;
          float* out = of(i) + (key - first) * H;
          float* best = tops + (share * all + i) * LANES;
          vf top = load<vf>(best);
          for (index_t s = 0; s < count * H; s += LANES) {
            const vf raw = load<vf>(block + s), x = raw != raw ? splat(NEVER) : raw;  // a NaN is no score
            store(block + s, x);
            top = max(x, top);
          }
          store(best, top);
          __builtin_memcpy(out, block, size_t(count * H) * 4);
        }
      }
    }
  }

  // Lane i of a chunk: of all shares, head i % H.
  template <class F>
  void over_shares(float* values, index_t shares, F&& f) {
    for (index_t i = 0; i < all; ++i) {
      vf x = load<vf>(values + i * LANES);
      for (index_t s = 1; s < shares; ++s) x = f(x, load<vf>(values + (s * all + i) * LANES));
      store(values + i * LANES, fold_lanes<H>(x, f));
    }
  }

  // exp(score - highest) in place, and its sums.
  void exponentials(index_t share, float* sums) {
    const index_t from = share * each, to = std::min(from + each, keys);
    for (index_t i = 0; i < all; ++i) {
      const vf top = load<vf>(tops + i * LANES);
      float* x = of(i);
      vf total{};
      index_t s = from * H;
      for (; s + LANES <= to * H; s += LANES) {
        const vf e = exp_below(load<vf>(x + s), top);
        store(x + s, e);
        total += e;
      }
      if (s < to * H) {
        float rest[LANES];
        for (int j = 0; j < LANES; ++j) rest[j] = s + j < to * H ? x[s + j] : NEVER;
        const vf e = exp_below(load<vf>(rest), top);
        store(rest, e);
        __builtin_memcpy(x + s, rest, size_t(to * H - s) * 4);
        total += e;
      }
      store(sums + (share * all + i) * LANES, total);
    }
  }

  // Sums over heads: of shares of the exponentials, or of the scores themselves.
  void vote(index_t share) {
    const index_t from = share * each, to = std::min(from + each, keys);
    for (index_t kv = 0; kv < c.kv_heads; ++kv) {
      float* out = w.out + (row * c.kv_heads + kv) * w.width + first;
      for (index_t i = 0; i < chunks; ++i) {
        float weight[H];
        for (int h = 0; h < H; ++h) {  // heads that the chunk lacks, or without a score, have no vote
          const float total = w.soft ? totals[(kv * chunks + i) * LANES + h] : 1.0f;
          weight[h] = i * H + h < c.group() && total > 0 ? 1 / total : 0.0f;
        }
        const float* x = of(kv * chunks + i);
        for (index_t key = from; key < to; ++key) {
          float sum = i ? out[key] : 0.0f;
          UNROLL for (int h = 0; h < H; ++h) sum += x[key * H + h] * weight[h];
          out[key] = sum;
        }
      }
    }
  }
};

template <class T, int H>
void votes(const Wish& w, const Call& c) {
  const index_t chunks = ceil_div(c.group(), H), all = c.kv_heads * chunks;
  index_t most = 0;
  for (index_t r = 0; r < w.rows; ++r) most = std::max<index_t>(most, w.ends[r] - w.firsts[r]);
  const index_t shares_most = ceil_div(most, LEAST_SHARE);
  float* at = wish_scratch.get<float>(all * (H * c.dim + (most + LANES) * H + 2 * shares_most * LANES) + 64);
  for (index_t r = 0; r < w.rows; ++r) {
    const index_t keys = w.ends[r] - w.firsts[r], each = share_of(keys, w.threads, KEYS);
    Row<T, H> row{w, c, r, w.firsts[r], w.ends[r], chunks, all, keys, each, nullptr, nullptr, nullptr, nullptr};
    for (index_t kv = 0; kv < c.kv_heads; ++kv) {
      float* out = w.out + (r * c.kv_heads + kv) * w.width;
      std::fill(out, out + std::min<index_t>(row.first, w.width), -NEVER);
      std::fill(out + std::min<index_t>(std::max(row.first, row.end), w.width), out + w.width, -NEVER);
    }
    if (row.keys <= 0) continue;
    const index_t shares = ceil_div(keys, each);
    row.q = reinterpret_cast<Query<T>*>(at);
    row.tops = at + all * H * c.dim, row.totals = row.tops + shares * all * LANES;
    row.scores = row.totals + shares * all * LANES;
    row.place_queries();
    const int threads = shares > 1 ? int(w.threads) : 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (index_t s = 0; s < shares; ++s) row.score(s);
    if (w.soft) {
      row.over_shares(row.tops, shares, [](vf a, vf b) { return max(a, b); });
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
      for (index_t s = 0; s < shares; ++s) row.exponentials(s, row.totals);
      row.over_shares(row.totals, shares, [](vf a, vf b) { return a + b; });
    }
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (index_t s = 0; s < shares; ++s) row.vote(s);
  }
}

// ---- the largest

// What weaveinf/ops/select.py packs. scores: [rows, width], of which ends[row] count; out: [rows, capacity].
struct Top {
  const float* scores;
  const int32_t *ends, *wanted;
  int32_t *out, *counts;
  index_t rows, width, capacity, threads;
};

struct Candidate {
  float score;
  int32_t at;
  bool operator<(const Candidate& other) const {  // better ones first
    return score > other.score || (score == other.score && at < other.at);
  }
};

// Positions of the k best of x[0..n), ascending. Scores lie in groups, of `depth` every LANES apart, the last ones
// each for itself. Of the highest of every group the k-th best is a bound that k scores reach: groups below it are
// not looked into.
index_t top_of_row(const float* x, index_t n, index_t k, int32_t* out) {
  static thread_local std::vector<float> highest, sorted;
  static thread_local std::vector<Candidate> found;
  if (k <= 0) return 0;
  if (n <= k) {
    for (index_t i = 0; i < n; ++i) out[i] = int32_t(i);
    return n;
  }
  index_t depth = 1;
  while (depth < 64 && n >= 8 * depth * k) depth *= 2;
  const index_t step = depth * LANES, in_groups = n / step * step, groups = in_groups / depth;
  highest.resize(size_t(groups + n - in_groups));
  float* top = highest.data();
  for (index_t i = 0; i < in_groups; i += step, top += LANES) {
    vf best = splat(NEVER);
    for (index_t j = 0; j < step; j += LANES) best = max(load<vf>(x + i + j), best);  // not a NaN
    store(top, best);
  }
  for (index_t i = in_groups; i < n; ++i) *top++ = x[i] == x[i] ? x[i] : NEVER;
  float least = NEVER;
  if (index_t(highest.size()) > k) {
    sorted = highest;
    std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<float>());
    least = sorted[size_t(k - 1)];
  }
  found.clear();
  const auto consider = [&](index_t i) {
    const float score = x[i] == x[i] ? x[i] : NEVER;
    if (score >= least) found.push_back({score, int32_t(i)});
  };
  for (index_t g = 0; g < groups; ++g) {
    if (highest[size_t(g)] < least) continue;
    const index_t first = g / LANES * step + g % LANES;
    for (index_t j = 0; j < step; j += LANES) consider(first + j);
  }
  for (index_t i = in_groups; i < n; ++i) consider(i);
  std::nth_element(found.begin(), found.begin() + (k - 1), found.end());
  for (index_t i = 0; i < k; ++i) out[i] = found[size_t(i)].at;
  std::sort(out, out + k);
  return k;
}

// What weaveinf/ops/select.py packs. index: [rows, kv_heads, count] of runs of `run` tokens; out: [rows, kv_heads,
// count * run].
struct Places {
  const int32_t *index, *table;
  int32_t* out;
  index_t table_row, rows, kv_heads, count, run, page_size, threads;
};

// What weaveinf/selectors/quest.py packs: of `pages`, the first counts[i] keys [page_size, kv_heads, dim] are there;
// bounds: [.., kv_heads, 2 dim], the largest of each channel and then the least.
struct Bounds {
  const void* keys;
  void* bounds;
  const int64_t *pages, *counts;
  index_t number, kv_heads, dim, page_size, dtype, threads;
};

template <class T>
void bounds_of(const Bounds& b) {
  const index_t width = b.kv_heads * b.dim;
  const int threads = b.number * b.page_size * width > WORTH_A_TEAM ? int(b.threads) : 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (index_t i = 0; i < b.number; ++i) {
    const T* keys = static_cast<const T*>(b.keys) + b.pages[i] * b.page_size * width;
    T* out = static_cast<T*>(b.bounds) + b.pages[i] * 2 * width;
    for (index_t head = 0; head < b.kv_heads; ++head) {
      for (index_t d = 0; d < b.dim; ++d) {
        T most = keys[head * b.dim + d], least = most;
        for (index_t t = 1; t < b.counts[i]; ++t) {
          const T x = keys[t * width + head * b.dim + d];
          most = to_float(x) > to_float(most) ? x : most, least = to_float(x) < to_float(least) ? x : least;
        }
        out[head * 2 * b.dim + d] = most, out[head * 2 * b.dim + b.dim + d] = least;
      }
    }
  }
}

// What weaveinf/selectors/fasa.py packs: the keys' channels (int32 [kv_heads, count]) go to their slots of the pool.
struct Planes {
  const void* keys;
  void* pool;
  const int32_t *channels, *slots;
  index_t key_row, rows, kv_heads, dim, count, item;
};

template <class T>
void planes_of(const Planes& p) {
  for (index_t r = 0; r < p.rows; ++r) {
    if (p.slots[r] < 0) continue;
    const T* keys = static_cast<const T*>(p.keys) + r * p.key_row;
    T* out = static_cast<T*>(p.pool) + p.slots[r] * p.kv_heads * p.count;
    for (index_t i = 0; i < p.kv_heads * p.count; ++i)
      out[i] = p.channels[i] < 0 ? T(0) : keys[i / p.count * p.dim + p.channels[i]];
  }
}

}  // namespace
}  // namespace weave

extern "C" int weave_votes(const void* packed) {
  using namespace weave;
  const auto w = unpack<Wish>(packed);
  const Call c{w.q,     w.keys,  nullptr, nullptr,     w.table,    nullptr, nullptr,     w.q_row, w.q_head,
               0,       0,       w.table_row, w.rows,  w.heads,    w.kv_heads, w.dim, w.page_size, 0,
               w.dtype, w.threads, w.scale};
  with_heads(c.group(), [&](auto heads) {
    if (w.dtype == BFLOAT16)
      votes<bf16, heads>(w, c);
    else
      votes<float, heads>(w, c);
  });
  return 0;
}

extern "C" int weave_top_k(const void* packed) {
  using namespace weave;
  const auto c = unpack<Top>(packed);
  const int threads = c.rows > 1 ? int(c.threads) : 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (index_t r = 0; r < c.rows; ++r) {
    int32_t* out = c.out + r * c.capacity;
    const index_t count = top_of_row(c.scores + r * c.width, std::min<index_t>(c.ends[r], c.width),
                                     std::min<index_t>(c.wanted[r], c.capacity), out);
    c.counts[r] = int32_t(count);
    std::fill(out + count, out + c.capacity, -1);
  }
  return 0;
}

extern "C" int weave_places(const void* packed) {
  using namespace weave;
  const auto c = unpack<Places>(packed);
  const index_t lists = c.rows * c.kv_heads;
  const int threads = lists * c.count * c.run > WORTH_A_TEAM ? int(c.threads) : 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (index_t l = 0; l < lists; ++l) {
    const int32_t* table = c.table + l / c.kv_heads * c.table_row;
    const int32_t heads = int32_t(c.kv_heads), head = int32_t(l % c.kv_heads), page = int32_t(c.page_size);
    const int32_t* from = c.index + l * c.count;
    int32_t* to = c.out + l * c.count * c.run;
    for (index_t i = 0; i < c.count; ++i) {
      const int32_t first = from[i] < 0 ? 0 : from[i] * int32_t(c.run);
      int32_t at = (table[first / page] * page + first % page) * heads + head;
      for (index_t j = 0; j < c.run; ++j, at += heads) *to++ = at;
    }
  }
  return 0;
}

extern "C" int weave_bounds(const void* packed) {
  using namespace weave;
  const auto b = unpack<Bounds>(packed);
  if (b.dtype == BFLOAT16)
    bounds_of<bf16>(b);
  else
    bounds_of<float>(b);
  return 0;
}

extern "C" int weave_planes(const void* packed) {
  using namespace weave;
  const auto p = unpack<Planes>(packed);
  if (p.item == 2)
    planes_of<uint16_t>(p);
  else
    planes_of<uint32_t>(p);
  return 0;
}
