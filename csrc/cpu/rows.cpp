// What is done row by row between the products: norms, rotary embedding, cache writes, activation.
// All arithmetic in float32, rounded once.

#include <cmath>
#include <type_traits>

#include "common.h"

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

template <class T>
INLINE void normalise(const T* x, const T* weight, index_t dim, float eps, float offset, T* out) {
  vf squares{};
  float rest = 0;
  along(
      dim,
      [&](index_t i) {
        vf v = load_floats(x + i);
        squares += v * v;
      },
      [&](index_t i) { rest += to_float(x[i]) * to_float(x[i]); });
  const float factor = 1.0f / std::sqrt((sum(squares) + rest) / float(dim) + eps);
  along(
      dim,
      [&](index_t i) {
        store_floats(out + i, load_floats(x + i) * factor * (load_floats(weight + i) + offset));
      },
      [&](index_t i) {
        from_float(to_float(x[i]) * factor * (to_float(weight[i]) + offset), out + i);
      });
}

template <class T>
void rms_norm(const T* x, index_t row_stride, index_t head_stride, const T* weight, T* out,
              index_t out_row, index_t out_head, index_t rows, index_t heads, index_t dim, float eps,
              float offset, index_t threads) {
  for_rows(rows, heads * dim, threads, [&](index_t r) {
    for (index_t h = 0; h < heads; ++h)
      normalise(x + r * row_stride + h * head_stride, weight, dim, eps, offset,
                out + r * out_row + h * out_head);
  });
}

// x * scale, rounded: the compiler must not fuse it with the addition that follows, since all seams are to
// have the same residual to the bit.
INLINE vf scaled(vf x, float scale) {
  vf y = x * scale;
  if (scale != 1.0f) asm("" : "+m"(y));
  return y;
}

template <class T>
void add_rms_norm(const void* const* partials, index_t count, T* residual, const T* weight, T* out,
                  index_t rows, index_t dim, float eps, float offset, float scale, index_t threads) {
  for_rows(rows, count * dim, threads, [&](index_t r) {
    T* kept = residual + r * dim;
    along(
        dim,
        [&](index_t i) {
          vf total = load_floats(static_cast<const T*>(partials[0]) + r * dim + i);
          for (index_t p = 1; p < count; ++p)
            total += load_floats(static_cast<const T*>(partials[p]) + r * dim + i);
          store_floats(kept + i, load_floats(kept + i) + scaled(total, scale));
        },
        [&](index_t i) {
          float total = to_float(static_cast<const T*>(partials[0])[r * dim + i]);
          for (index_t p = 1; p < count; ++p)
            total += to_float(static_cast<const T*>(partials[p])[r * dim + i]);
          from_float(to_float(kept[i]) + scaled(splat(total), scale)[0], kept + i);
        });
    normalise(kept, weight, dim, eps, offset, out + r * dim);
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
    along(
        inner,
        [&](index_t i) {
          vf g = load_floats(gate + i);
          store_floats(to + i, g / (exp(-g) + 1.0f) * load_floats(up + i));
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

// x, out [rows, heads, dim], the last dim contiguous, strides in elements; weight [dim].
extern "C" void weave_rms_norm(const void* x, index_t row_stride, index_t head_stride, const void* weight,
                               void* out, index_t out_row, index_t out_head, index_t rows, index_t heads,
                               index_t dim, float eps, float offset, index_t dtype, index_t threads) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    rms_norm(static_cast<const T*>(x), row_stride, head_stride, static_cast<const T*>(weight),
             static_cast<T*>(out), out_row, out_head, rows, heads, dim, eps, offset, threads);
  });
}

// partials: `count` pointers to contiguous [rows, dim]; residual, out: contiguous [rows, dim].
extern "C" void weave_add_rms_norm(const void* partials, index_t count, void* residual, const void* weight,
                                   void* out, index_t rows, index_t dim, float eps, float offset,
                                   float scale, index_t dtype, index_t threads) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    add_rms_norm(static_cast<const void* const*>(partials), count, static_cast<T*>(residual),
                 static_cast<const T*>(weight), static_cast<T*>(out), rows, dim, eps, offset, scale,
                 threads);
  });
}

// x [rows, heads, >= rot_dim] in place; cos_sin [positions, rot_dim].
extern "C" void weave_rope(void* x, index_t row_stride, index_t head_stride, index_t rows, index_t heads,
                           index_t rot_dim, const float* cos_sin, const int32_t* positions, index_t dtype,
                           index_t threads) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    rope(static_cast<T*>(x), row_stride, head_stride, rows, heads, rot_dim, cos_sin, positions, threads);
  });
}

// k, v: rows of `bytes` bytes, their strides in bytes; pools: slots of `bytes` bytes.
extern "C" void weave_write_kv(const char* k, index_t k_stride, const char* v, index_t v_stride, char* keys,
                               char* values, const int32_t* slots, index_t rows, index_t bytes,
                               index_t threads) {
  for_rows(rows, bytes, threads, [&](index_t r) {
    if (slots[r] < 0) return;
    __builtin_memcpy(keys + slots[r] * bytes, k + r * k_stride, size_t(bytes));
    __builtin_memcpy(values + slots[r] * bytes, v + r * v_stride, size_t(bytes));
  });
}

// gate_up [rows, 2 * inner], out [rows, inner]; strides in elements.
extern "C" void weave_silu_mul(const void* gate_up, index_t stride, void* out, index_t out_stride,
                               index_t rows, index_t inner, index_t dtype, index_t threads) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    silu_mul(static_cast<const T*>(gate_up), stride, static_cast<T*>(out), out_stride, rows, inner, threads);
  });
}
