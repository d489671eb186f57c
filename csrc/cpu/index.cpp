// The lightning indexer's scores (weaveinf/ops/index.py): the sum over heads of weight * relu(query . key).

#include <algorithm>

#include "attention_row.h"

namespace weave {
namespace {

// What weaveinf/ops/index.py packs, in its order; strides in elements. Keys are of the queries' dtype, or
// eight-bit floats that `scales` belong to. out: [rows, width], of which the first ends[row] are filled.
struct Indexing {
  const void *q, *keys;
  float* out;
  const float *weights, *scales;
  const int32_t *table, *ends;
  index_t q_row, q_head, table_row, rows, heads, dim, page_size, width, dtype, threads;
};

constexpr index_t BLOCK = 32;  // keys that all heads meet before the next ones

thread_local Scratch index_scratch;

struct EightBits {  // what each byte of e4m3 stands for
  float of[256];
  EightBits() {
    for (int i = 0; i < 256; ++i) {
      const int exponent = i >> 3 & 15, fraction = i & 7;
      const float size = __builtin_ldexpf(float(exponent ? 8 + fraction : fraction), exponent ? exponent - 10 : -9);
      of[i] = (i & 127) == 127 ? __builtin_nanf("") : i & 128 ? -size : size;
    }
  }
};
const EightBits eight_bits;

// A row's scores of the keys `from` to `to`.
template <class T, int H, bool EIGHT>
void score_share(const Indexing& x, const Call& c, index_t row, index_t from, index_t to) {
  const Task t{row, 0, 1, row, 1, from, to, nullptr, 1};
  const index_t chunks = ceil_div(x.heads, H), size = H * x.dim;
  float* weights = index_scratch.get<float>(chunks * (size + LANES) + (EIGHT ? BLOCK * x.dim : 0));
  float *places = weights + chunks * LANES, *wide = places + chunks * size;
  auto* q = reinterpret_cast<Query<T>*>(places);
  __builtin_memset(weights, 0, size_t(wide - weights) * 4);  // the last chunk may lack heads
  for (index_t head = 0; head < x.heads; ++head) {
    place_query(query<T>(c, t, row, head), x.dim, q + head * x.dim);
    for (int lane = int(head % H); lane < LANES; lane += H)
      weights[head / H * LANES + lane] = x.weights[row * x.heads + head];
  }
  const T* keys[BLOCK + LANES];
  const uint8_t* bytes[BLOCK];
  float products[BLOCK * H + LANES], sums[BLOCK * H + LANES], scales[BLOCK];
  Feed none{nullptr, 0, 0};
  for (index_t key = from; key < to; key += BLOCK) {
    const index_t count = std::min<index_t>(to - key, BLOCK);
    if constexpr (EIGHT) {
      find(c, t, x.keys, key, count, bytes);
      for (index_t i = 0; i < count; ++i) {
        for (index_t d = 0; d < x.dim; ++d) wide[i * x.dim + d] = eight_bits.of[bytes[i][d]];
        keys[i] = wide + i * x.dim;
        scales[i] = x.scales[(bytes[i] - static_cast<const uint8_t*>(x.keys)) / x.dim];
      }
    } else {
      find(c, t, x.keys, key, count, keys);
    }
    for (index_t i = count; i % (LANES / H); ++i) keys[i] = keys[count - 1];
    for (index_t s = 0; s < count * H; s += LANES) store(sums + s, vf{});
    for (index_t i = 0; i < chunks; ++i) {
      score_row<H>(q + i * size, x.dim, 1, keys, count, products, none);
      const vf weight = load<vf>(weights + i * LANES);
      for (index_t s = 0; s < count * H; s += LANES) {
        const vf product = load<vf>(products + s);
        store(sums + s, load<vf>(sums + s) + weight * (product < vf{} ? vf{} : product));  // a NaN stays
      }
    }
    for (index_t i = 0; i < count; ++i) {
      float sum = 0;
      UNROLL for (int h = 0; h < H; ++h) sum += sums[i * H + h];
      x.out[row * x.width + key + i] = EIGHT ? sum * scales[i] : sum;
    }
  }
}

template <class T, int H, bool EIGHT>
void index_scores(const Indexing& x, const Call& c) {
  index_t most = 0;
  for (index_t r = 0; r < x.rows; ++r) most = std::max<index_t>(most, x.ends[r]);
  const index_t each = share_of(most, x.threads, BLOCK), tasks = ceil_div(most, each) * x.rows;
  const int threads = tasks > 1 ? int(x.threads) : 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (index_t i = 0; i < tasks; ++i) {  // all rows meet the keys of a share while these are in the cache
    const index_t row = i % x.rows, from = i / x.rows * each, to = std::min<index_t>(from + each, x.ends[row]);
    if (from < to) score_share<T, H, EIGHT>(x, c, row, from, to);
  }
}

}  // namespace
}  // namespace weave

extern "C" int weave_index(const void* packed) {
  using namespace weave;
  const auto x = unpack<Indexing>(packed);
  const Call c{x.q,     x.keys, nullptr, nullptr,     x.table, nullptr, nullptr, x.q_row, x.q_head,
               0,       0,      x.table_row, x.rows,  x.heads, 1,       x.dim,   x.page_size, 0,
               x.dtype, x.threads, 1.0};
  with_heads(x.heads, [&](auto heads) {
    if (x.scales)
      index_scores<float, heads, true>(x, c);
    else if (x.dtype == BFLOAT16)
      index_scores<bf16, heads, false>(x, c);
    else
      index_scores<float, heads, false>(x, c);
  });
  return 0;
}
