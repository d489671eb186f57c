// y = x W^T + b with W packed once into panels of NR output columns.
//
// float32: [panel][k][NR]; bfloat16: [panel][k/2][NR][2] (pairs of k side by side, k padded to even with a
// zero), which serves widening by shift and mask as well as the dot-product instructions.
// Few rows (decode): one pass over the packed weights, widened in registers; memory speed is the limit.
// Many rows (prefill): blocks that fit the caches, each panel widened once per block of rows.

#include "tile.h"

namespace weave {
namespace {

constexpr index_t KC = 384;        // values of k in a block: a panel's slice stays in the first-level cache
constexpr index_t MC = 192;        // rows in a block: MC * KC floats stay in the second-level cache
constexpr index_t NC = 1024;       // columns in a task, so that its float32 sums stay near
constexpr index_t FEW_ROWS = 16;   // up to here the weights are read once and widened in registers,
constexpr index_t FEW = 1 << 16;   // and up to here in floats of x, which fit the second-level cache
constexpr index_t AHEAD = 1 << 14;  // bytes that memory delivers to a core in about a microsecond

// Row stride of a block of x, as floats or as pairs; not a power of two, to spread over the sets.
template <class A>
constexpr index_t AS = (std::is_same_v<A, float> ? KC : KC / 2) + 16;

thread_local Scratch rows_scratch, sums_scratch, panel_scratch;

struct Weight {
  const void* data;
  index_t n, k;
  template <class W>
  index_t steps() const { return ceil_div(k, W::K); }
  template <class W>
  const typename W::B* panel(index_t p) const {
    return static_cast<const typename W::B*>(data) + p * steps<W>() * NR;
  }
};

struct Output {
  void* data;
  index_t stride, n;
  const void* bias;
  bool bias_half, half;
};

// A finished tile of sums [count][NR]: bias, rounding, and only the columns that exist.
template <class T>
__attribute__((noinline)) void write_rows(const Output& out, index_t row, index_t column, int count,
                                          float* sums) {
  const index_t width = out.n - column < NR ? out.n - column : NR;
  for (int r = 0; r < count; ++r, sums += NR) {
    T* to = static_cast<T*>(out.data) + (row + r) * out.stride + column;
    if (out.bias) {
      for (index_t i = 0; i < width; ++i)
        sums[i] += out.bias_half ? to_float(static_cast<const bf16*>(out.bias)[column + i])
                                 : static_cast<const float*>(out.bias)[column + i];
    }
    if (width == NR) {
      UNROLL for (int v = 0; v < NV; ++v) store_floats(to + v * LANES, load<vf>(sums + v * LANES));
    } else {
      for (index_t i = 0; i < width; ++i) from_float(sums[i], to + i);
    }
  }
}

template <int M>
INLINE void write_rows(const Output& out, index_t row, index_t column, const vf (&acc)[M][NV]) {
  alignas(64) float sums[M * NR];
  UNROLL for (int r = 0; r < M; ++r) {
    UNROLL for (int v = 0; v < NV; ++v) store(sums + r * NR + v * LANES, acc[r][v]);
  }
  if (out.half)
    write_rows<bf16>(out, row, column, M, sums);
  else
    write_rows<float>(out, row, column, M, sums);
}

// Copies k0 to k0 + kc of `rows` rows of x into a block [rows][AS], as float32 or as bfloat16 pairs, a
// missing last k of a pair as zero.
template <class T>
void copy_rows(const T* x, index_t ldx, index_t rows, index_t kc, float* to) {
  for (index_t r = 0; r < rows; ++r, x += ldx, to += AS<float>) {
    index_t i = 0;
    for (; i + LANES <= kc; i += LANES) store(to + i, load_floats(x + i));
    for (; i < kc; ++i) to[i] = to_float(x[i]);
    if (kc & 1) to[kc] = 0;
  }
}

[[maybe_unused]] void copy_rows(const bf16* x, index_t ldx, index_t rows, index_t kc,
                                uint32_t* to) {
  for (index_t r = 0; r < rows; ++r, x += ldx, to += AS<uint32_t>) {
    if (kc & 1) to[kc / 2] = x[kc - 1];
    __builtin_memcpy(to, x, size_t(kc & ~index_t(1)) * 2);
  }
}

// Rows of a group, so that the groups of m rows are even.
struct Groups {
  index_t count, m;
  Groups(index_t rows, index_t most) : count(ceil_div(rows, most)), m(rows) {}
  index_t start(index_t g) const { return part(m, count, g); }
  int size(index_t g) const { return int(start(g + 1) - start(g)); }
};

// Few rows: panels one after another, each for all groups of rows while it is in the cache.
template <class W, class T>
void few_rows(const Weight& w, const T* x, index_t ldx, index_t m, const Output& out, index_t from,
              index_t to) {
  using A = typename W::A;
  const index_t blocks = ceil_div(w.k, KC);
  A* rows = rows_scratch.get<A>(blocks * m * AS<A>);
  for (index_t b = 0; b < blocks; ++b) {
    index_t kc = w.k - b * KC < KC ? w.k - b * KC : KC;
    copy_rows(x + b * KC, ldx, m, kc, rows + b * m * AS<A>);
  }
  const Groups groups(m, most_rows<W>());
  constexpr index_t STEP = NR * sizeof(typename W::B);
  for (index_t p = from; p < to; ++p) {
    // A panel that is passed once is fetched a little ahead; else the next one, a part of it in each pass.
    const char* here = reinterpret_cast<const char*>(w.panel<W>(p));
    const char* next = reinterpret_cast<const char*>(w.panel<W>(p + 1));
    Ahead ahead{groups.count == 1 ? here + AHEAD : next, STEP / groups.count};
    for (index_t g = 0; g < groups.count; ++g) {
      const index_t row = groups.start(g);
      with_rows(groups.size(g), [&](auto size) {
        constexpr int M = size;
        constexpr int P = sets<W>(M);
        vf sums[P][M][NV] = {};
        const A* a = rows + row * AS<A>;
        const typename W::B* panel = w.panel<W>(p);
        for (index_t k = 0; k < w.k; k += KC, a += m * AS<A>, panel += KC / W::K * NR) {
          index_t kc = w.k - k < KC ? w.k - k : KC;
          const index_t steps = ceil_div(kc, W::K);
          multiply<W, M, P>(sums, a, AS<A>, 1, panel, NR, steps, ahead);
          ahead.at += steps * ahead.pace;
        }
        fold<M, P>(sums);
        write_rows<M>(out, row, p * NR, sums[0]);
      });
    }
  }
}

// A panel's slice as the tile wants it: widened once for many rows, or as it lies.
INLINE const float* prepare(const uint32_t* panel, index_t steps, float* to) {
  for (index_t s = 0; s < steps; ++s) {
    UNROLL for (int v = 0; v < NV; ++v) {
      vu pairs = load<vu>(panel + s * NR + v * LANES);
      store(to + 2 * s * NR + v * LANES, even(pairs));
      store(to + (2 * s + 1) * NR + v * LANES, odd(pairs));
    }
  }
  return to;
}

// How k is cut into slices of even size, for blocks that fit the caches.
struct Slices {
  index_t count, size;
  explicit Slices(index_t k) : count(ceil_div(k, KC)), size(round_up(ceil_div(k, count), 2)) {}
};

// Many rows: a block of rows [slice][m][AS] times a chunk of panels, float32 sums kept between the slices.
// W: how the weights lie; I: what the inner tile reads.
template <class W, class I>
void many_rows(const Weight& w, const typename I::A* rows, index_t m, const Output& block_out, index_t from,
               index_t to) {
  using A = typename I::A;
  const index_t kc_even = Slices(w.k).size;
  float* sums = sums_scratch.get<float>(m * (to - from) * NR);
  float* widened = panel_scratch.get<float>(KC * NR + NR);
  const Groups groups(m, MR);
  for (index_t k = 0; k < w.k; k += kc_even, rows += m * AS<A>) {
    const index_t kc = w.k - k < kc_even ? w.k - k : kc_even;
    const bool first = k == 0, last = k + kc == w.k;
    for (index_t p = from; p < to; ++p) {
      const auto* slice = w.panel<W>(p) + k / W::K * NR;
      const typename I::B* b;
      if constexpr (std::is_same_v<W, I>)
        b = slice;
      else
        b = prepare(slice, ceil_div(kc, W::K), widened);
      const index_t steps = std::is_same_v<W, I> ? ceil_div(kc, W::K) : round_up(kc, W::K);
      Ahead ahead{reinterpret_cast<const char*>(slice + w.steps<W>() * NR),
                  index_t(sizeof *slice) * NR * ceil_div(kc, W::K) / (steps * groups.count)};
      for (index_t g = 0; g < groups.count; ++g) {
        const index_t row = groups.start(g);
        with_rows(groups.size(g), [&](auto size) {
          constexpr int M = size;
          vf acc[1][M][NV];
          float* kept = sums + ((p - from) * m + row) * NR;  // tile after tile: no two rows far apart
          UNROLL for (int r = 0; r < M; ++r) {
            UNROLL for (int v = 0; v < NV; ++v)
              acc[0][r][v] = first ? vf{} : load<vf>(kept + r * NR + v * LANES);
          }
          multiply<I, M, 1>(acc, rows + row * AS<A>, AS<A>, 1, b, NR, steps, ahead);
          ahead.at += steps * ahead.pace;
          if (last) {
            write_rows<M>(block_out, row, p * NR, acc[0]);
          } else {
            UNROLL for (int r = 0; r < M; ++r) {
              UNROLL for (int v = 0; v < NV; ++v)
                store(kept + r * NR + v * LANES, acc[0][r][v]);
            }
          }
        });
      }
    }
  }
}

// A product of many rows in tiles, blocks of rows by chunks of panels; how many does not change its bits.
struct Tiles {
  index_t row_blocks, chunks, m, panels;
  Tiles(index_t m, index_t n)
      : row_blocks(ceil_div(m, MC)), chunks(ceil_div(n, NC)), m(m), panels(ceil_div(n, NR)) {}
  index_t count() const { return row_blocks * chunks; }

  // `copied`: the block whose rows this thread has in its scratch memory, -1 at first.
  template <class W, class Wide, class T>
  void multiply(index_t i, const Weight& w, const T* x, index_t ldx, const Output& out,
                index_t& copied) const {
    using A = typename Wide::A;
    const index_t block = i / chunks, chunk = i % chunks;
    const index_t row = part(m, row_blocks, block), count = part(m, row_blocks, block + 1) - row;
    const Slices slices(w.k);
    A* rows = rows_scratch.get<A>(slices.count * count * AS<A>);
    if (block != copied) {
      for (index_t k = 0, s = 0; k < w.k; k += slices.size, ++s)
        copy_rows(x + row * ldx + k, ldx, count, w.k - k < slices.size ? w.k - k : slices.size,
                  rows + s * count * AS<A>);
      copied = block;
    }
    Output to = out;
    to.data = static_cast<char*>(out.data) + row * out.stride * (out.half ? 2 : 4);
    many_rows<W, Wide>(w, rows, count, to, part(panels, chunks, chunk), part(panels, chunks, chunk + 1));
  }
};

// W: the panels' kind. Wide: what a tile of many rows reads (float32 after widening, or the same).
template <class W, class Wide, class T>
void multiply_all(const Weight& w, const T* x, index_t ldx, index_t m, const Output& out, int threads) {
  const index_t panels = ceil_div(w.n, NR);
  if (m <= FEW_ROWS || m * w.k <= FEW) {
    if (m * w.k * w.n < 32 * WORTH_A_TEAM) threads = 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (index_t t = 0; t < threads; ++t)
      few_rows<W>(w, x, ldx, m, out, part(panels, threads, t), part(panels, threads, t + 1));
    return;
  }
  Tiles tiles(m, w.n);
  while (threads > 1 && tiles.count() % threads && tiles.chunks < panels && tiles.chunks < 4 * threads)
    ++tiles.chunks;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    index_t copied = -1;
#pragma omp for schedule(dynamic)
    for (index_t i = 0; i < tiles.count(); ++i) tiles.multiply<W, Wide>(i, w, x, ldx, out, copied);
  }
}

// Takes tiles until the counter, which all helpers share, has passed the last.
template <class W, class Wide, class T>
void take_tiles(int64_t* next, const Weight& w, const T* x, index_t ldx, index_t m, const Output& out,
                int threads) {
  Tiles tiles(m, w.n);  // cut alike on all ranks, and finely: the last tile is waited for
  const index_t wide = 2 * tiles.chunks, fine = ceil_div(8, tiles.row_blocks);
  tiles.chunks = wide > fine ? wide : fine;
  if (tiles.chunks > tiles.panels) tiles.chunks = tiles.panels;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    index_t copied = -1;
    for (;;) {
      const index_t i = index_t(__atomic_fetch_add(next, 1, __ATOMIC_RELAXED));
      if (i >= tiles.count()) break;
      tiles.multiply<W, Wide>(i, w, x, ldx, out, copied);
    }
  }
}

}  // namespace
}  // namespace weave

using namespace weave;

extern "C" index_t weave_packed_bytes(index_t n, index_t k, index_t dtype) {
  return round_up(n, NR) * (dtype == BFLOAT16 ? round_up(k, 2) * 2 : k * 4);
}

struct Pack {
  const void* weight;
  index_t ld, n, k, dtype;
  void* packed;
  index_t threads;
};

// weight [n, k] with row stride ld -> panels. Columns past n are zero.
extern "C" int weave_pack(const void* packed) {
  const auto c = unpack<Pack>(packed);
  const index_t width = c.dtype == BFLOAT16 ? 2 : 1, steps = ceil_div(c.k, width);
#pragma omp parallel for num_threads(int(c.threads)) if (c.threads > 1)
  for (index_t p = 0; p < ceil_div(c.n, NR); ++p) {
    for (index_t s = 0; s < steps; ++s) {
      for (index_t i = 0; i < NR * width; ++i) {
        const index_t row = p * NR + i / width, column = s * width + i % width;
        const index_t to = (p * steps + s) * NR * width + i, from = row * c.ld + column;
        const bool exists = row < c.n && column < c.k;
        if (c.dtype == BFLOAT16)
          static_cast<bf16*>(c.packed)[to] = exists ? static_cast<const bf16*>(c.weight)[from] : 0;
        else
          static_cast<float*>(c.packed)[to] = exists ? static_cast<const float*>(c.weight)[from] : 0;
      }
    }
  }
  return 0;
}

struct Linear {
  const void* panels;
  index_t n, k, dtype;
  const void* x;
  index_t ldx, m;
  const void* bias;
  void* out;
  index_t ldo, out_dtype, threads;
};

// out [m, n] = x [m, k] W^T + bias. x and bias have the weight's dtype.
extern "C" int weave_linear(const void* packed) {
  const auto c = unpack<Linear>(packed);
  const Weight w{c.panels, c.n, c.k};
  const Output to{c.out, c.ldo, c.n, c.bias, c.dtype == BFLOAT16, c.out_dtype == BFLOAT16};
  if (c.dtype == FLOAT32)
    multiply_all<Floats, Floats>(w, static_cast<const float*>(c.x), c.ldx, c.m, to, int(c.threads));
  else if constexpr (HAS_DOT)
    multiply_all<Dots, Dots>(w, static_cast<const bf16*>(c.x), c.ldx, c.m, to, int(c.threads));
  else
    multiply_all<Pairs, Floats>(w, static_cast<const bf16*>(c.x), c.ldx, c.m, to, int(c.threads));
  return 0;
}

struct LinearTiles {
  int64_t* next;
  const void* panels;
  index_t n, k, dtype;
  const void* x;
  index_t m;
  void* out;
  index_t ldo, threads;
};

// The tiles that are left of a product of many rows, x [m, k] dense: `next` counts those that were taken, by
// this process or by others that share its memory.
extern "C" int weave_linear_tiles(const void* packed) {
  const auto c = unpack<LinearTiles>(packed);
  const Weight w{c.panels, c.n, c.k};
  const Output to{c.out, c.ldo, c.n, nullptr, false, c.dtype == BFLOAT16};
  if (c.dtype == FLOAT32)
    take_tiles<Floats, Floats>(c.next, w, static_cast<const float*>(c.x), c.k, c.m, to, int(c.threads));
  else if constexpr (HAS_DOT)
    take_tiles<Dots, Dots>(c.next, w, static_cast<const bf16*>(c.x), c.k, c.m, to, int(c.threads));
  else
    take_tiles<Pairs, Floats>(c.next, w, static_cast<const bf16*>(c.x), c.k, c.m, to, int(c.threads));
  return 0;
}
