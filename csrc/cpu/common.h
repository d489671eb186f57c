// What all kernels share: vectors of this build's width (GCC's vector extensions, which clang has too),
// bfloat16 conversion, exp, and per-thread scratch memory. One source serves every instruction set; the
// compiler flags of the build (setup.py) decide.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 64")

namespace weave {

using index_t = std::ptrdiff_t;
using bf16 = uint16_t;

#if defined(WEAVE_LANES)  // wider than the machine: tests the AVX-512 shapes anywhere
constexpr int LANES = WEAVE_LANES;
#elif defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// Architectural vector registers: how large a tile of sums stays in registers.
#if defined(__AVX512F__) || defined(__aarch64__) || defined(WEAVE_LANES)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

// Hardware dot products of bfloat16 pairs (two products added to each float32 lane).
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) || defined(WEAVE_DOT)
constexpr bool HAS_DOT = true;
#else
constexpr bool HAS_DOT = false;
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

enum Dtype : index_t { FLOAT32 = 0, BFLOAT16 = 1 };

// A kernel takes one pointer, to its arguments as weaveinf/ops packs them: fields of 8 bytes in the order of a
// struct here. It returns 0; a seam's calls (shm.cpp, streams.cpp), or what went wrong. So a call can be kept and made again
// (replay.cpp).
template <class Call>
INLINE Call unpack(const void* packed) {
  Call call;
  __builtin_memcpy(&call, packed, sizeof call);
  return call;
}

template <class V>
INLINE V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
INLINE void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

INLINE vf splat(float x) { return vf{} + x; }

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

// Rounds to nearest even; a NaN stays one.
INLINE void from_float(float x, float* out) { *out = x; }
INLINE void from_float(float x, bf16* out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  *out = x != x ? 0x7fc0 : bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE vf load_floats(const float* p) { return load<vf>(p); }
INLINE vf load_floats(const bf16* p) {
  return (vf)(__builtin_convertvector(load<vh>(p), vu) << 16);
}

// The float32 bits of v rounded to bfloat16, to nearest even; a NaN stays one.
INLINE vu round_bits(vf v) {
  vu bits = (vu)v;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  return v != v ? vu{} + 0x7fc00000u : rounded;
}

INLINE void store_floats(float* p, vf v) { store(p, v); }
INLINE void store_floats(bf16* p, vf v) { store(p, __builtin_convertvector(round_bits(v) >> 16, vh)); }

// The even and the odd elements of 2 * LANES bfloat16 values: two integer operations, no shuffle.
INLINE vf even(vu pairs) { return (vf)(pairs << 16); }
INLINE vf odd(vu pairs) { return (vf)(pairs & 0xffff0000u); }

// 2 * LANES elements for what treats all alike: of bfloat16 the even and the odd ones.
struct Two {
  vf a, b;
};

INLINE Two load_two(const float* p) { return {load<vf>(p), load<vf>(p + LANES)}; }
INLINE Two load_two(const bf16* p) {
  const vu pairs = load<vu>(p);
  return {even(pairs), odd(pairs)};
}

// Stores them rounded; what was stored.
INLINE Two store_two(float* p, Two v) {
  store(p, v.a);
  store(p + LANES, v.b);
  return v;
}
INLINE Two store_two(bf16* p, Two v) {
  const vu a = round_bits(v.a), b = round_bits(v.b);
  store(p, a >> 16 | b);
  return {(vf)a, (vf)b};
}

INLINE vf max(vf a, vf b) { return a > b ? a : b; }

// exp within 2 units in the last place; exactly 0 below -87 (masked scores), NaN stays NaN.
INLINE vf exp(vf x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const vf clamped = x > 88.0f ? splat(88.0f) : x;  // what lies below -87 is replaced in the end
  vf biased = clamped * 1.44269504f + shift;
  vf n = biased - shift;
  vf r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  vu exponent = ((vu)biased - 0x4b400000u + 127u) << 23;
  vf y = p * (vf)exponent;
  return x < -87.0f ? vf{} : y;
}

// log within 2 units in the last place, of positive normal numbers.
INLINE vf log(vf x) {
  const vi bits = (vi)x;
  vi e = (bits >> 23) - 126;
  vf m = (vf)((bits & 0x007fffff) | 0x3f000000);  // x = m * 2^e, m in [1/2, 1)
  const vi small = m < 0.707106781f;
  e += small;  // -1 where true
  m = (small ? m + m : m) - 1.0f;
  const vf n = __builtin_convertvector(e, vf), z = m * m;
  vf p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const vf y = p * m * z - n * 2.12194440e-4f - z * 0.5f;
  return m + y + n * 0.693359375f;
}

INLINE float sum(vf v) {
  float lanes[LANES], total = 0;
  store(lanes, v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  total = lanes[0];
  return total;
}

// Memory that a thread keeps for its next call.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  template <class T>
  T* get(index_t count) {
    size_t bytes = (count * sizeof(T) + 4095) & ~size_t(4095);
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(4096, bytes);
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

constexpr index_t WORTH_A_TEAM = 1 << 15;  // elements below which waking threads costs more

INLINE index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }
INLINE index_t round_up(index_t a, index_t b) { return ceil_div(a, b) * b; }

// Part i of n of `count` things, as even as can be.
INLINE index_t part(index_t count, index_t n, index_t i) { return count * i / n; }

}  // namespace weave
