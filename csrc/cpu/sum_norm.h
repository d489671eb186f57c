// The call of weave_add_rms_norm, which the seams of shm.cpp and streams.cpp make too.
#pragma once

#include <cstddef>

// `count` pointers to partial sums follow it in memory.
struct SumNorm {
  std::ptrdiff_t count;
  void* residual;
  const void* weight;
  void* out;
  std::ptrdiff_t rows, dim;
  double eps, offset, scale;
  std::ptrdiff_t dtype, threads;
};
