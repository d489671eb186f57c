// What is done row by row between the products: norms, rotary embedding, cache writes, activation.
// All arithmetic in float32, rounded once.

#include <cmath>
#include <type_traits>

#include "common.h"
#include "sum_norm.h"

namespace weave {
namespace {

// Calls f(row) for every row, in parallel when there is enough to do.
template <class F>
INLINE void for_rows(index_t rows, index_t width, index_t threads, F&& f) {
#pragma omp parallel for num_threads(int(threads)) schedule(static) if (threads > 1 && rows * width >= WORTH_A_TEAM)
  for (index_t row = 0; row < rows; ++row) f(row);
}

// Element i of a row; whole vectors first, then one by one.
template <class V, class S>
INLINE void along(index_t width, V&& vector, S&& scalar) {
  index_t i = 0;
  for (; i + LANES <= width; i += LANES) vector(i);
  for (; i < width; ++i) scalar(i);
}

// The same, by two vectors.
template <class V, class S>
INLINE void along_two(index_t width, V&& vectors, S&& scalar) {
  index_t i = 0;
  for (; i + 2 * LANES <= width; i += 2 * LANES) vectors(i);
  for (; i < width; ++i) scalar(i);
}

// The sum of a row's squares, in a fixed order.
struct Squares {
  vf a{}, b{};
  float rest = 0;

  INLINE void add(Two v) { a += v.a * v.a, b += v.b * v.b; }
  INLINE void add(float v) { rest += v * v; }
  INLINE float total() const { return sum(a + b) + rest; }
};

// out = x / rms(x) * (weight + offset), for the row's sum of squares.
template <class T>
INLINE void normalise(const T* x, const T* weight, index_t dim, float squares, float eps, float offset, T* out) {
  const float factor = 1.0f / std::sqrt(squares / float(dim) + eps);
  along_two(
      dim,
      [&](index_t i) {
        const Two v = load_two(x + i), w = load_two(weight + i);
        store_two(out + i, {v.a * factor * (w.a + offset), v.b * factor * (w.b + offset)});
      },
      [&](index_t i) { from_float(to_float(x[i]) * factor * (to_float(weight[i]) + offset), out + i); });
}

template <class T>
void rms_norm(const T* x, index_t row_stride, index_t head_stride, const T* weight, T* out,
              index_t out_row, index_t out_head, index_t rows, index_t heads, index_t dim, float eps,
              float offset, index_t threads) {
  for_rows(rows, heads * dim, threads, [&](index_t r) {
    for (index_t h = 0; h < heads; ++h) {
      const T* row = x + r * row_stride + h * head_stride;
      Squares squares;
      along_two(
          dim, [&](index_t i) { squares.add(load_two(row + i)); },
          [&](index_t i) { squares.add(to_float(row[i])); });
      normalise(row, weight, dim, squares.total(), eps, offset, out + r * out_row + h * out_head);
    }
  });
}

// x * scale, rounded: the compiler must not fuse it with the addition that follows, since all seams are to
// have the same residual to the bit.
template <bool SCALED, class F>
INLINE F scaled(F x, float scale) {
  if constexpr (!SCALED) return x;
  F y = x * scale;
  asm("" : "+m"(y));
  return y;
}

template <bool SCALED, class T>
void add_rms_norm(const T* const* partials, index_t count, T* residual, const T* weight, T* out, index_t rows,
                  index_t dim, float eps, float offset, float scale, index_t threads) {
  for_rows(rows, count * dim, threads, [&](index_t r) {
    const index_t at = r * dim;
    T* kept = residual + at;
    Squares squares;
    along_two(
        dim,
        [&](index_t i) {
          Two total = load_two(partials[0] + at + i);
          for (index_t p = 1; p < count; ++p) {
            const Two more = load_two(partials[p] + at + i);
            total = {total.a + more.a, total.b + more.b};
          }
          const Two old = load_two(kept + i);
          squares.add(store_two(kept + i, {old.a + scaled<SCALED>(total.a, scale),
                                           old.b + scaled<SCALED>(total.b, scale)}));
        },
        [&](index_t i) {
          float total = to_float(partials[0][at + i]);
          for (index_t p = 1; p < count; ++p) total += to_float(partials[p][at + i]);
          from_float(to_float(kept[i]) + scaled<SCALED>(total, scale), kept + i);
          squares.add(to_float(kept[i]));
        });
    normalise(kept, weight, dim, squares.total(), eps, offset, out + at);
  });
}

template <class T>
void rope(T* x, index_t row_stride, index_t head_stride, index_t rows, index_t heads, index_t rot_dim,
          const float* cos_sin, const int32_t* positions, index_t threads) {
  const index_t half = rot_dim / 2;
  for_rows(rows, heads * rot_dim, threads, [&](index_t r) {
    const float* cos = cos_sin + index_t(positions[r]) * rot_dim;
    const float* sin = cos + half;
    for (index_t h = 0; h < heads; ++h) {
      T* first = x + r * row_stride + h * head_stride;
      T* second = first + half;
      along(
          half,
          [&](index_t i) {
            vf a = load_floats(first + i), b = load_floats(second + i);
            vf c = load<vf>(cos + i), s = load<vf>(sin + i);
            store_floats(first + i, a * c - b * s);
            store_floats(second + i, b * c + a * s);
          },
          [&](index_t i) {
            float a = to_float(first[i]), b = to_float(second[i]);
            from_float(a * cos[i] - b * sin[i], first + i);
            from_float(b * cos[i] + a * sin[i], second + i);
          });
    }
  });
}

template <class T>
void silu_mul(const T* gate_up, index_t stride, T* out, index_t out_stride, index_t rows, index_t inner,
              index_t threads) {
  for_rows(rows, inner, threads, [&](index_t r) {
    const T* gate = gate_up + r * stride;
    const T* up = gate + inner;
    T* to = out + r * out_stride;
    along_two(
        inner,
        [&](index_t i) {
          const Two g = load_two(gate + i), u = load_two(up + i);
          store_two(to + i, {g.a / (exp(-g.a) + 1.0f) * u.a, g.b / (exp(-g.b) + 1.0f) * u.b});
        },
        [&](index_t i) {
          const float g = to_float(gate[i]);
          from_float(g / (std::exp(-g) + 1.0f) * to_float(up[i]), to + i);
        });
  });
}

}  // namespace
}  // namespace weave

using namespace weave;

// Calls f with a null pointer of the element type.
template <class F>
static void with_type(index_t dtype, F&& f) {
  if (dtype == BFLOAT16)
    f(static_cast<bf16*>(nullptr));
  else
    f(static_cast<float*>(nullptr));
}

struct Norm {
  const void* x;
  index_t row_stride, head_stride;
  const void* weight;
  void* out;
  index_t out_row, out_head, rows, heads, dim;
  double eps, offset;
  index_t dtype, threads;
};

// x, out [rows, heads, dim], the last dim contiguous, strides in elements; weight [dim].
extern "C" int weave_rms_norm(const void* packed) {
  const auto c = unpack<Norm>(packed);
  with_type(c.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    rms_norm(static_cast<const T*>(c.x), c.row_stride, c.head_stride, static_cast<const T*>(c.weight),
             static_cast<T*>(c.out), c.out_row, c.out_head, c.rows, c.heads, c.dim, float(c.eps),
             float(c.offset), c.threads);
  });
  return 0;
}

// partials: `count` pointers to contiguous [rows, dim]; residual, out: contiguous [rows, dim].
extern "C" int weave_add_rms_norm(const void* packed) {
  const auto c = unpack<SumNorm>(packed);
  const void* partials = static_cast<const char*>(packed) + sizeof c;
  with_type(c.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = c.scale == 1 ? add_rms_norm<false, T> : add_rms_norm<true, T>;
    run(static_cast<const T* const*>(partials), c.count, static_cast<T*>(c.residual),
        static_cast<const T*>(c.weight), static_cast<T*>(c.out), c.rows, c.dim, float(c.eps), float(c.offset),
        float(c.scale), c.threads);
  });
  return 0;
}

struct Zero {
  void* x;
  index_t bytes;
};

extern "C" int weave_zero(const void* packed) {
  const auto c = unpack<Zero>(packed);
  __builtin_memset(c.x, 0, size_t(c.bytes));
  return 0;
}

struct Embed {
  const int64_t* ids;
  const char* table;
  char* out;
  index_t rows, first, count, bytes, threads;
};

// out [rows]: rows of `bytes` bytes of the table, which holds the ids first to first + count - 1; zeros for
// other ids.
extern "C" int weave_embed(const void* packed) {
  const auto c = unpack<Embed>(packed);
  for_rows(c.rows, c.bytes, c.threads, [&](index_t r) {
    const index_t id = c.ids[r] - c.first;
    if (id >= 0 && id < c.count)
      __builtin_memcpy(c.out + r * c.bytes, c.table + id * c.bytes, size_t(c.bytes));
    else
      __builtin_memset(c.out + r * c.bytes, 0, size_t(c.bytes));
  });
  return 0;
}

struct Rope {
  void* x;
  index_t row_stride, head_stride, rows, heads, rot_dim;
  const float* cos_sin;
  const int32_t* positions;
  index_t dtype, threads;
};

// x [rows, heads, >= rot_dim] in place; cos_sin [positions, rot_dim].
extern "C" int weave_rope(const void* packed) {
  const auto c = unpack<Rope>(packed);
  with_type(c.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    rope(static_cast<T*>(c.x), c.row_stride, c.head_stride, c.rows, c.heads, c.rot_dim, c.cos_sin, c.positions,
         c.threads);
  });
  return 0;
}

struct WriteKv {
  const char* k;
  index_t k_stride;
  const char* v;
  index_t v_stride;
  char *keys, *values;
  const int32_t* slots;
  index_t rows, bytes, threads;
};

// k, v: rows of `bytes` bytes, their strides in bytes; pools: slots of `bytes` bytes.
extern "C" int weave_write_kv(const void* packed) {
  const auto c = unpack<WriteKv>(packed);
  for_rows(c.rows, c.bytes, c.threads, [&](index_t r) {
    if (c.slots[r] < 0) return;
    const index_t at = c.slots[r] * c.bytes;
    __builtin_memcpy(c.keys + at, c.k + r * c.k_stride, size_t(c.bytes));
    __builtin_memcpy(c.values + at, c.v + r * c.v_stride, size_t(c.bytes));
  });
  return 0;
}

struct SiluMul {
  const void* gate_up;
  index_t stride;
  void* out;
  index_t out_stride, rows, inner, dtype, threads;
};

// gate_up [rows, 2 * inner], out [rows, inner]; strides in elements.
extern "C" int weave_silu_mul(const void* packed) {
  const auto c = unpack<SiluMul>(packed);
  with_type(c.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    silu_mul(static_cast<const T*>(c.gate_up), c.stride, static_cast<T*>(c.out), c.out_stride, c.rows, c.inner,
             c.threads);
  });
  return 0;
}
