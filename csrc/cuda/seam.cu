// The seam as one kernel on few SMs: reduce-scatter, residual add, RMSNorm and all-gather (TokenWeave,
// arXiv 2505.11329, section 4.2, whose kernel keeps one row in flight; this one keeps ROWS, and where the
// registers allow it fetches the next ones while these are normalised).
//
// Every rank has a buffer that all ranks map, and owns a contiguous share of the rows. Between two meetings
// of all ranks, a rank reads the others' partial sums of its rows, adds them and the residual, which stays
// with it, normalises, and writes its rows of x to all. MULTIMEM: through the switch, which sums and spreads;
// else through the peers' pointers.
//
// Built for one ELEMENT, RANKS, HIDDEN: by NVRTC where it runs (ops/cuda.py), by nvcc in the tests. Several
// ranks can be run on one GPU, as rows of the grid.
#include <ptx.cuh>

using E = ELEMENT;

constexpr int PER = 16 / E::BYTES;                   // elements of a vector
constexpr int WORD = 4 / E::BYTES;                   // and of a word
constexpr int VECS = HIDDEN * E::BYTES / 16;         // vectors of a row
constexpr int V = (VECS + MAX_THREADS - 1) / MAX_THREADS;  // of a thread
constexpr int LANES = (VECS + V * 32 - 1) / (V * 32) * 32;
constexpr int AT_MOST = MAX_THREADS / LANES < 8 ? MAX_THREADS / LANES : 8;
constexpr int GROUPS = AT_MOST < 1 ? 1 : AT_MOST;    // rows side by side: each has LANES threads
constexpr int THREADS = LANES * GROUPS;
constexpr int WARPS = LANES / 32;
constexpr int PARTS = MULTIMEM ? 1 : RANKS;  // loads that make a vector's sum
// Rows of a group at a time, by the registers that the next ones, these and the weight take; where even one
// row is too much, its vectors are fetched one by one.
template <int rows>
constexpr bool fits = rows * V * (PARTS + 2) + V + FP8 <= 7;
constexpr int ROWS = fits<2> ? 2 : 1;
constexpr bool AHEAD = fits<1>;
constexpr int AT_ONCE = V > 2 ? 2 : 4;  // parts of a vector
constexpr bool HELD = V <= 2;  // the weight, in registers; else it comes from the caches again
constexpr int OUT_BYTES = FP8 ? 1 : E::BYTES;
static_assert(HIDDEN * E::BYTES % 16 == 0, "rows of 16-byte vectors");
static_assert(!FP8 || E::BYTES == 2, "eight values of e4m3 at a time");

// Filled by comm/symmetric.py; keep both in step. Offsets are bytes of a rank's buffer.
struct Call {
  char* buffers[8];
  char* multicast;      // all of them; null without a switch
  const char* weight;   // [HIDDEN]
  const long long* kept;  // indices of the rows that go on; null: all
  u32* epochs[8];       // of each rank that runs here, [blocks] meetings that it has had, at zero first
  u32* failed;          // here: 1 + the rank that did not come; 0
  u32* said;            // the same where the host reads it; behind it, the host's word to wait no more
  u64 patience_ns;
  u64 lasts_ns;         // what a launch takes at least, where it stands for one on other GPUs
  long long partial_at, x_at, scales_at, pads_at, residual_at, old_residual_at;
  int rank;             // of the grid's first row
  int rows, old_rows;   // now, and before `kept`
  int fresh;            // the residual is zero
  float eps, offset, scale;
};

struct Share {
  int first, count;
};

DEVICE Share share_of(int rows, int rank) {
  const int each = rows / RANKS, extra = rows % RANKS;
  return {rank * each + (rank < extra ? rank : extra), each + (rank < extra)};
}

// The rank whose share has this row.
DEVICE int owner_of(int rows, int row) {
  const int each = rows / RANKS, extra = rows % RANKS, border = extra * (each + 1);
  return row < border ? row / (each + 1) : extra + (row - border) / each;
}

// All ranks' blocks of this number come here, or it says who did not. What a rank's threads wrote before is
// seen by all behind it.
DEVICE bool meet(const Call& c, int rank, u32 epoch) {
  if (MULTIMEM) fence_aliases();
  sync_block();
  bool ok = true;
  const int peer = thread();
  if (peer < RANKS && peer != rank) {
    u32* theirs = reinterpret_cast<u32*>(c.buffers[peer] + c.pads_at) + block() * 8 + rank;
    const u32* mine = reinterpret_cast<const u32*>(c.buffers[rank] + c.pads_at) + block() * 8 + peer;
    store_release(theirs, epoch);
    const u64 began = now_ns();
    for (int spins = 1; int(load_acquire(mine) - epoch) < 0; ++spins) {
      if (now_ns() - began > c.patience_ns || (spins % 1024 == 0 && load_acquire(c.said + 1))) {
        store_relaxed(c.failed, 1 + peer);
        store_relaxed(c.said, 1 + peer);
        ok = false;
        break;
      }
      relax();
    }
  }
  ok = all_of_block(ok);
  if (MULTIMEM) fence_aliases();
  return ok;
}

DEVICE float plus(float a, float b) { return a + b; }
DEVICE float larger(float a, float b) { return a > b ? a : b; }

DEVICE void accumulate(float (&total)[PER], const Vec& v) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float one[WORD];
    E::unpack(v.w[w], one);
#pragma unroll
    for (int e = 0; e < WORD; ++e) total[w * WORD + e] += one[e];
  }
}

struct Fetched {
  Vec parts[PARTS];
  Vec residual;
};

// A group of LANES threads and where it is.
struct Group {
  const Call& c;
  int rank, number, lane;
  Share share;

  DEVICE int row(int batch, int i) const {
    return ((batch * blocks() + block()) * GROUPS + number) * ROWS + i;
  }
  DEVICE bool has(int row, int v) const { return row < share.count && lane + v * LANES < VECS; }
  DEVICE long long at(long long row, int v) const { return (row * VECS + lane + v * LANES) * 16; }

  DEVICE const char* old_residual(int row) const {
    if (!c.kept) return c.buffers[rank] + c.residual_at + (long long)row * VECS * 16;
    const int old = int(c.kept[share.first + row]), owner = owner_of(c.old_rows, old);
    const long long local = old - share_of(c.old_rows, owner).first;
    return c.buffers[owner] + c.old_residual_at + local * VECS * 16;
  }

  DEVICE Vec part(int p, int row, int v) const {
    const long long from = c.partial_at + at(share.first + row, v);
#if MULTIMEM
    return E::reduce(c.multicast + from);
#else
    return load(c.buffers[p] + from);
#endif
  }
  DEVICE Vec residual(int row, int v) const {
    return c.fresh ? Vec{} : load(old_residual(row) + at(0, v));
  }

  DEVICE Fetched fetch(int row, int v) const {
    Fetched f = {};
    if (!has(row, v)) return f;
#pragma unroll
    for (int p = 0; p < PARTS; ++p) f.parts[p] = part(p, row, v);
    f.residual = residual(row, v);
    return f;
  }

  // The new residual, rounded: of what was fetched, or of what is fetched now.
  DEVICE Vec add(const Fetched& f) const {
    float total[PER] = {};
#pragma unroll
    for (int p = 0; p < PARTS; ++p) accumulate(total, f.parts[p]);
    return round_sum(total, f.residual);
  }
  DEVICE Vec add(int row, int v) const {
    float total[PER] = {};
    if (!has(row, v)) return Vec{};
#pragma unroll AT_ONCE
    for (int p = 0; p < PARTS; ++p) accumulate(total, part(p, row, v));
    return round_sum(total, residual(row, v));
  }
  DEVICE Vec round_sum(float (&total)[PER], const Vec& residual) const {
#pragma unroll
    for (int e = 0; e < PER; ++e) total[e] *= c.scale;
    accumulate(total, residual);
    Vec sum;
#pragma unroll
    for (int w = 0; w < 4; ++w) sum.w[w] = E::pack(total + w * WORD);
    return sum;
  }

  // Sums or maxima over the group's threads, the same in each of them. `turn` alternates.
  template <class F>
  DEVICE void fold(float (&values)[ROWS], float* scratch, int turn, F f) const {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) values[i] = f(values[i], from_lane(values[i], mask));
    }
    if (WARPS == 1) return;
    float* here = scratch + (turn * GROUPS + number) * ROWS * WARPS;
    if (lane % 32 == 0) {
#pragma unroll
      for (int i = 0; i < ROWS; ++i) here[i * WARPS + lane / 32] = values[i];
    }
    sync_group(1 + number, LANES);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      values[i] = here[i * WARPS + (lane % 32 < WARPS ? lane % 32 : 0)];
      if (lane % 32 >= WARPS) values[i] = f(0.0f, 0.0f);
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) values[i] = f(values[i], from_lane(values[i], mask));
    }
  }

  DEVICE void spread(long long to, const Vec& v) const {
#if MULTIMEM
    store_everywhere(c.multicast + to, v);
#else
#pragma unroll
    for (int p = 0; p < RANKS; ++p) store(c.buffers[p] + to, v);
#endif
  }
  DEVICE void spread_half(long long to, u32 a, u32 b) const {
#if MULTIMEM
    store_half_everywhere(c.multicast + to, a, b);
#else
#pragma unroll
    for (int p = 0; p < RANKS; ++p) store_half(c.buffers[p] + to, a, b);
#endif
  }
  DEVICE void spread_scale(int row, float scale) const {
    const long long to = c.scales_at + (share.first + row) * 4ll;
#if MULTIMEM
    store_float_everywhere(c.multicast + to, scale);
#else
#pragma unroll
    for (int p = 0; p < RANKS; ++p) *reinterpret_cast<float*>(c.buffers[p] + to) = scale;
#endif
  }
};

KERNEL(THREADS) seam(const Call c) {
  SHARED(float, scratch, 4 * GROUPS * ROWS * WARPS);
  SHARED(u32, meetings, 1);
  SHARED(u64, began, 1);  // no registers are left for it
  const int rank = c.rank + virtual_rank();
  const Group g{c, rank, thread() / LANES, thread() % LANES, share_of(c.rows, rank)};
  if (thread() == 0) meetings[0] = load_relaxed(c.epochs[rank] + block()), began[0] = now_ns();
  if (!all_of_block(thread() != 0 || load_relaxed(c.failed) == 0)) return;
  const u32 epoch = meetings[0];
  if (!meet(c, rank, epoch + 1)) return;

  Vec weight[V];
#pragma unroll
  for (int v = 0; v < V; ++v) weight[v] = HELD && g.has(0, v) ? load_constant(c.weight + g.at(0, v)) : Vec{};
  char* const residual = c.buffers[rank] + c.residual_at;
  Fetched next[ROWS][V] = {};
  const auto fetch = [&](int batch) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
#pragma unroll
      for (int v = 0; v < V; ++v) next[i][v] = g.fetch(g.row(batch, i), v);
    }
  };
  if (AHEAD) fetch(0);
  for (int batch = 0; g.row(batch, 0) < g.share.count; ++batch) {
    Vec rounded[ROWS][V];
    float squares[ROWS] = {};
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int r = g.row(batch, i);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        rounded[i][v] = AHEAD ? g.add(next[i][v]) : g.add(r, v);
        if (g.has(r, v)) store(residual + g.at(r, v), rounded[i][v]);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          float f[WORD];
          E::unpack(rounded[i][v].w[w], f);
#pragma unroll
          for (int e = 0; e < WORD; ++e) squares[i] += f[e] * f[e];
        }
      }
    }
    if (AHEAD) fetch(batch + 1);
    g.fold(squares, scratch, batch & 1, plus);

    // y[] of a vector: normalised, not yet rounded.
    const auto normalise = [&](int i, int v, float factor, float (&y)[PER]) {
      const Vec scale = HELD || !g.has(0, v) ? weight[v] : load_constant(c.weight + g.at(0, v));
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float by[WORD];
        E::unpack(rounded[i][v].w[w], y + w * WORD);
        E::unpack(scale.w[w], by);
#pragma unroll
        for (int e = 0; e < WORD; ++e) y[w * WORD + e] *= factor * (by[e] + c.offset);
      }
    };
    float most[ROWS] = {};
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      squares[i] = inverse_root(squares[i] / HIDDEN + c.eps);
      if constexpr (FP8) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          float y[PER];
          normalise(i, v, squares[i], y);
#pragma unroll
          for (int e = 0; e < PER; ++e) most[i] = larger(most[i], y[e] < 0 ? -y[e] : y[e]);
        }
      }
    }
    if constexpr (FP8) g.fold(most, scratch + 2 * GROUPS * ROWS * WARPS, batch & 1, larger);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int r = g.row(batch, i);
      const float scale = most[i] > 0 ? most[i] / 448 : 1;
      if (FP8 && g.lane == 0 && r < g.share.count) g.spread_scale(r, scale);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (!g.has(r, v)) continue;
        float y[PER];
        normalise(i, v, squares[i] / scale, y);
        const long long to = c.x_at + g.at(g.share.first + r, v) / E::BYTES * OUT_BYTES;
        if constexpr (FP8) {
          g.spread_half(to, pack_e4m3(y), pack_e4m3(y + PER - 4));
        } else {
          Vec out;
#pragma unroll
          for (int w = 0; w < 4; ++w) out.w[w] = E::pack(y + w * WORD);
          g.spread(to, out);
        }
      }
    }
  }
  if (meet(c, rank, epoch + 2) && thread() == 0) store_relaxed(c.epochs[rank] + block(), epoch + 2);
  if (c.lasts_ns) {
    while (thread() == 0 && now_ns() - began[0] < c.lasts_ns) relax();
    sync_block();  // with all its registers, so that nothing else runs here
  }
}
