// The arithmetic of a seam on a range of rows: partials summed in float32 in rank order, scaled, the
// residual added, rounded once to the model's dtype (the new residual), RMS-normalised in float32, rounded
// once (x). Plain loops over a row that stays in the first-level cache; the compiler vectorises them (at
// -O3: without it they run seven times slower), once for every instruction set named below.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GLIBC__)
#define WEAVEINF_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define WEAVEINF_CLONES
#endif

namespace {

struct RowTask {
  const char* partials[8];
  const int64_t* kept;       // row i of the new residual is row kept[i] of the old; null: row i
  const char* old_residual;  // null: zero
  char* residual;
  char* x;
  const float* weight;  // already widened, the offset added
  int64_t hidden;
  int size;
  float eps, scale;
};

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float v) { return v; }
inline float to_float(BFloat16 v) {
  const uint32_t wide = uint32_t(v.bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}

inline void round_to(float v, float& out) { out = v; }
inline void round_to(float v, BFloat16& out) {  // to nearest, ties to even; a NaN stays a NaN
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = uint16_t(v != v ? 0x7fc0 : rounded);
}

template <typename T>
inline __attribute__((always_inline)) void one_row(const RowTask& t, int64_t row, float* __restrict f) {
  const int64_t n = t.hidden;
  auto partial = [&](int r) { return reinterpret_cast<const T*>(t.partials[r]) + row * n; };
  const T *p = partial(0), *q = partial(1);  // there are two ranks at least
  for (int64_t i = 0; i < n; ++i) f[i] = to_float(p[i]) + to_float(q[i]);
  for (int r = 2; r < t.size; ++r) {
    q = partial(r);
    for (int64_t i = 0; i < n; ++i) f[i] += to_float(q[i]);
  }
  if (t.scale != 1.0f)  // a loop of its own: fused with the next sum it would round once, not twice
    for (int64_t i = 0; i < n; ++i) f[i] *= t.scale;
  T* residual = reinterpret_cast<T*>(t.residual) + row * n;  // may be the old one
  if (t.old_residual != nullptr) {
    const T* old = reinterpret_cast<const T*>(t.old_residual) + (t.kept ? t.kept[row] : row) * n;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      T v;
      round_to(f[i] + to_float(old[i]), v);
      residual[i] = v;
      f[i] = to_float(v);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      T v;
      round_to(f[i], v);
      residual[i] = v;
      f[i] = to_float(v);
    }
  }
  float lanes[32] = {};  // a fixed order of summation, the same on every machine
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    for (int k = 0; k < 32; ++k) lanes[k] += f[i + k] * f[i + k];
  float sum = 0.0f;
  for (; i < n; ++i) sum += f[i] * f[i];
  for (int k = 0; k < 32; ++k) sum += lanes[k];
  const float scale = 1.0f / std::sqrt(sum / float(n) + t.eps);
  T* __restrict x = reinterpret_cast<T*>(t.x) + row * n;
  for (int64_t j = 0; j < n; ++j) round_to(f[j] * scale * t.weight[j], x[j]);
}

WEAVEINF_CLONES void rows_f32(const RowTask& t, int64_t first, int64_t last, float* scratch) {
  for (int64_t row = first; row < last; ++row) one_row<float>(t, row, scratch);
}

WEAVEINF_CLONES void rows_bf16(const RowTask& t, int64_t first, int64_t last, float* scratch) {
  for (int64_t row = first; row < last; ++row) one_row<BFloat16>(t, row, scratch);
}

void widen(const void* weight, bool bf16, int64_t n, float offset, float* out) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = (bf16 ? to_float(static_cast<const BFloat16*>(weight)[i]) : static_cast<const float*>(weight)[i]) +
             offset;
}

}  // namespace
