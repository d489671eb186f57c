// Attention over a paged cache, online softmax over blocks of keys, sums in float32: the call is cut into
// tasks, among them shares of the keys where rows are few and keys are many, whose outcomes are then merged.

#include <utility>
#include <vector>

#include "attention_row.h"
#include "attention_rows.h"

namespace weave {
namespace {

constexpr index_t QUERY_FLOATS = 16384;  // of a task: with their sums they fit the second-level cache
constexpr index_t SHARE_KEYS = 256;      // a share of the keys is not shorter
constexpr index_t SERIAL = 1 << 18;      // multiply-adds that are not worth waking other threads

thread_local Scratch partial_scratch;
thread_local std::vector<Task> tasks;

// Whether the kernel of single rows takes it.
bool single(const Call& c, index_t rows) { return rows == 1 && c.dim % LANES == 0; }

// Makes tasks of at most `most` rows; a sequence's last rows, which read most, come first. Returns the
// multiply-adds of one of the two products.
index_t divide(const Call& c, index_t most) {
  index_t total = 0;
  tasks.clear();
  for (index_t s = 0; s < c.sequences; ++s) {
    const index_t start = c.starts[s], rows = c.starts[s + 1] - start, tiles = ceil_div(rows, most);
    for (index_t i = tiles; i-- > 0;) {
      const index_t row = start + part(rows, tiles, i), behind = start + part(rows, tiles, i + 1);
      const index_t first = c.first(row), end = c.end(behind - 1);
      // A single row reads all heads of a key at once: one after another they lie in memory.
      const index_t heads = single(c, behind - row) ? c.kv_heads : 1;
      for (index_t head = 0; head < c.kv_heads; head += heads)
        tasks.push_back({s, head, heads, row, behind - row, first, end, nullptr, 1});
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
  for (index_t i = 0; i < t.rows * t.heads(c); ++i) {
    float* all = partial + i * (c.dim + 2);
    for (index_t n = 1; n < t.shares; ++n) {
      const float* one = all + n * t.partial_floats(c);
      const float top = all[0] > one[0] ? all[0] : one[0];
      const vf weights = exp_below(vf{all[0], one[0]}, splat(top));
      all[0] = top;
      for (index_t d = 1; d < c.dim + 2; ++d) all[d] = all[d] * weights[0] + one[d] * weights[1];
    }
    emit<T>(c, t, t.row + i / t.heads(c), i % t.heads(c), all[0], all[1], all + 2);
  }
}

template <class T>
void attention(const Call& c) {
  index_t most = QUERY_FLOATS / c.dim / c.group();
  most = most < 1 ? 1 : most;
  const int threads = divide(c, most) > SERIAL ? int(c.threads) : 1;
  // As many tasks as keep all threads busy to the end.
  while (threads > 1 && index_t(tasks.size()) < 4 * threads && most > 1 && most * c.group() > 2 * NR) {
    most = ceil_div(most, 2);
    divide(c, most);
  }
  const bool shared = threads > 1 && index_t(tasks.size()) < 2 * threads;
  const std::vector<Task>* wholes = shared ? &share_keys(c, 2 * threads) : nullptr;
  const std::vector<Task>& all = tasks;  // this thread's
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (size_t i = 0; i < all.size(); ++i) {
    if (single(c, all[i].rows))
      with_heads(c.group(), [&](auto heads) { one_row<heads, T>(c, all[i]); });
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

extern "C" int weave_attention(const void* packed) {
  const auto c = weave::unpack<weave::Call>(packed);
  if (c.dtype == weave::BFLOAT16)
    weave::attention<weave::bf16>(c);
  else
    weave::attention<float>(c);
  return 0;
}
