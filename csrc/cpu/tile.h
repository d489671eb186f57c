// The inner loop of every matrix product here: M rows times one panel of NR columns, sums in registers.
#pragma once

#include <type_traits>

#include "common.h"

namespace weave {

constexpr int NV = 2;           // vectors to a panel
constexpr int NR = NV * LANES;  // columns of a panel
constexpr int MR = REGISTERS == 32 ? 12 : 6;

// What a panel holds, and how one step of the loop multiplies it with a row. K: values of k in
// a step; STEP: A's in a step; SETS: sets of sums that one step uses.
struct Floats {  // float32 [k][NR]
  using A = float;
  using B = float;
  static constexpr int K = 1, STEP = 1, SETS = 1;
  struct Columns {
    vf b[NV];
  };
  static INLINE Columns columns(const B* b) { return {{load<vf>(b), load<vf>(b + LANES)}}; }
  static INLINE void add(vf (&even_sum)[NV], vf (&)[NV], const A* a, index_t, const Columns& c) {
    UNROLL for (int v = 0; v < NV; ++v) even_sum[v] += *a * c.b[v];
  }
};

struct Pairs {  // bfloat16 [k/2][NR][2], widened in registers
  using A = float;
  using B = uint32_t;
  static constexpr int K = 2, STEP = 2, SETS = 2;
  struct Columns {
    vf even[NV], odd[NV];
  };
  static INLINE Columns columns(const B* b) {
    vu x = load<vu>(b), y = load<vu>(b + LANES);
    return {{even(x), even(y)}, {odd(x), odd(y)}};
  }
  static INLINE void add(vf (&even_sum)[NV], vf (&odd_sum)[NV], const A* a, index_t a_k,
                         const Columns& c) {
    UNROLL for (int v = 0; v < NV; ++v) even_sum[v] += a[0] * c.even[v];
    UNROLL for (int v = 0; v < NV; ++v) odd_sum[v] += a[a_k] * c.odd[v];
  }
};

#if defined(__AVX512BF16__)
INLINE vf dot(vf acc, vu a, vu b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
INLINE vf dot(vf acc, vu a, vu b) {
  return (vf)vbfdotq_f32((float32x4_t)acc, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
#else
INLINE vf dot(vf acc, vu a, vu b) { return acc + even(a) * even(b) + odd(a) * odd(b); }
#endif

struct Dots {  // the panel of Pairs, the rows in bfloat16 too: the hardware's dot product of pairs
  using A = uint32_t;
  using B = uint32_t;
  static constexpr int K = 2, STEP = 1, SETS = 1;
  struct Columns {
    vu b[NV];
  };
  static INLINE Columns columns(const B* b) { return {{load<vu>(b), load<vu>(b + LANES)}}; }
  static INLINE void add(vf (&even_sum)[NV], vf (&)[NV], const A* a, index_t, const Columns& c) {
    UNROLL for (int v = 0; v < NV; ++v) even_sum[v] = dot(even_sum[v], vu{} + *a, c.b[v]);
  }
};

// Memory wanted soon, and how many bytes of it per step. On Zen 4, which alone runs the build with 512-bit dot
// products, steps of up to 4 rows go from load to load so fast that the hardware fetches ahead by itself; it then
// needs the buffers that our fetches would take, of which one line in four is left.
struct Ahead {
  const char* at = nullptr;
  index_t pace = 0;
  template <int M>
  INLINE void fetch(int width) {
    if constexpr (LANES == 16 && HAS_DOT && M <= 4) {
      if ((reinterpret_cast<uintptr_t>(at) & 128) == 0) __builtin_prefetch(at, 0, 2);
    } else {
      for (int i = 0; i < width; i += 64) __builtin_prefetch(at + i, 0, 2);
    }
    at += pace;
  }
};

// acc[p][r] += a[r][k] * b[k] over `steps` steps. P sets of sums are used in turn, so that few rows too
// keep both multipliers busy; the caller adds the sets up. Row r starts at a + r * a_row and its k-th
// value is a_k further (in A's; for Dots a pair counts as one); a step of the panel is b_step B's.
// Meanwhile `ahead` is fetched into the second-level cache at the given pace: memory never idles.
template <class W, int M, int P>
INLINE void multiply(vf (&acc)[P][M][NV], const typename W::A* a, index_t a_row, index_t a_k,
                     const typename W::B* b, index_t b_step, index_t steps, Ahead ahead = {}) {
  constexpr int TURN = P > W::SETS ? P / W::SETS : 1;
  index_t s = 0;
  for (; s + TURN <= steps; s += TURN) {
    UNROLL for (int t = 0; t < TURN; ++t) {
      if (ahead.at) ahead.fetch<M>(int(sizeof *b) * NR);
      auto columns = W::columns(b);
      UNROLL for (int r = 0; r < M; ++r)
        W::add(acc[t * W::SETS % P][r], acc[(t * W::SETS + W::SETS - 1) % P][r], a + r * a_row, a_k,
               columns);
      a += W::STEP * a_k;
      b += b_step;
    }
  }
  for (; s < steps; ++s) {
    auto columns = W::columns(b);
    UNROLL for (int r = 0; r < M; ++r) W::add(acc[0][r], acc[0][r], a + r * a_row, a_k, columns);
    a += W::STEP * a_k;
    b += b_step;
  }
}

// Rows of a tile that leave registers for widening.
template <class W>
constexpr int most_rows() {
  return std::is_same_v<W, Pairs> && REGISTERS == 16 ? MR - 1 : MR;
}

// Sets of sums for M rows: enough chains for two multipliers with a latency of four cycles.
template <class W>
constexpr int sets(int rows) {
  return rows == 1 ? 4 : rows == 2 || (rows == 3 && most_rows<W>() == MR) ? 2 : 1;
}

template <int M, int P>
INLINE void fold(vf (&acc)[P][M][NV]) {
  UNROLL for (int p = 1; p < P; ++p) {
    UNROLL for (int r = 0; r < M; ++r) {
      UNROLL for (int v = 0; v < NV; ++v) acc[0][r][v] += acc[p][r][v];
    }
  }
}

// Calls f with rows (1 to MR) as a compile-time constant.
template <int M = MR, class F>
INLINE void with_rows(int rows, F&& f) {
  if constexpr (M == 1) {
    f(std::integral_constant<int, 1>{});
  } else {
    if (rows == M)
      f(std::integral_constant<int, M>{});
    else
      with_rows<M - 1>(rows, f);
  }
}

}  // namespace weave
