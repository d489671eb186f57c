// What seam.cu asks of a Hopper GPU, an instruction or two each. Needs no header of CUDA's, so that NVRTC
// compiles it wherever it is; tests/comm/cuda has the same for threads of a CPU.
#pragma once

#define DEVICE __device__ __forceinline__
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)
#define SHARED(type, name, count) __shared__ type name[count]

using u32 = unsigned int;
using u64 = unsigned long long;

struct alignas(16) Vec {
  u32 w[4];
};

DEVICE int block() { return blockIdx.x; }
DEVICE int blocks() { return gridDim.x; }
DEVICE int virtual_rank() { return blockIdx.y; }
DEVICE int thread() { return threadIdx.x; }

// ---- memory -------------------------------------------------------------------------------------------

// Weak accesses of 16 bytes, here or at a peer's; whoever else writes there is behind a meeting.
DEVICE Vec load(const void* p) {
  Vec v;
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p)
               : "memory");
  return v;
}
// What nobody writes while the kernel runs.
DEVICE Vec load_constant(const void* p) {
  Vec v;
  asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
      : "l"(p));
  return v;
}
DEVICE void store(void* p, const Vec& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]),
               "r"(v.w[3])
               : "memory");
}
DEVICE void store_half(void* p, u32 a, u32 b) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(a), "r"(b) : "memory");
}

DEVICE u32 load_acquire(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DEVICE void store_release(u32* p, u32 v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
DEVICE u32 load_relaxed(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DEVICE void store_relaxed(u32* p, u32 v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Between accesses to the same bytes by a rank's own address and by the switch's.
DEVICE void fence_aliases() { asm volatile("fence.proxy.alias;" ::: "memory"); }

// ---- elements -----------------------------------------------------------------------------------------

// A vector's sum over all ranks, through the switch.
#define REDUCE(elements)                                                                                \
  DEVICE static Vec reduce(const void* p) {                                                             \
    Vec v;                                                                                              \
    asm volatile("multimem.ld_reduce.relaxed.sys.global.add." elements " {%0, %1, %2, %3}, [%4];"       \
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])                               \
                 : "l"(p)                                                                               \
                 : "memory");                                                                           \
    return v;                                                                                           \
  }

struct Float32 {
  static constexpr int BYTES = 4;
  DEVICE static void unpack(u32 w, float* f) { f[0] = __uint_as_float(w); }
  DEVICE static u32 pack(const float* f) { return __float_as_uint(f[0]); }
  REDUCE("v4.f32")
};

struct BFloat16 {
  static constexpr int BYTES = 2;
  DEVICE static void unpack(u32 w, float* f) {
    f[0] = __uint_as_float(w << 16), f[1] = __uint_as_float(w & 0xffff0000u);
  }
  DEVICE static u32 pack(const float* f) {
    u32 w;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(f[1]), "f"(f[0]));
    return w;
  }
  REDUCE("acc::f32.v4.bf16x2")
};

struct Float16 {
  static constexpr int BYTES = 2;
  DEVICE static void unpack(u32 w, float* f) {
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(f[0]), "=f"(f[1])
        : "r"(w));
  }
  DEVICE static u32 pack(const float* f) {
    u32 w;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(f[1]), "f"(f[0]));
    return w;
  }
  REDUCE("acc::f32.v4.f16x2")
};

// Four values as e4m3, saturated at 448.
DEVICE u32 pack_e4m3(const float* f) {
  u32 w;
  asm("{.reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, %2, %1; cvt.rn.satfinite.e4m3x2.f32 b, %4, %3;"
      " mov.b32 %0, {a, b};}"
      : "=r"(w)
      : "f"(f[0]), "f"(f[1]), "f"(f[2]), "f"(f[3]));
  return w;
}

// Every rank's copy at once, through the switch.
DEVICE void store_everywhere(void* p, const Vec& v) {
  asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.w[0]),
               "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
               : "memory");
}
DEVICE void store_half_everywhere(void* p, u32 a, u32 b) {
  asm volatile("multimem.st.relaxed.sys.global.v2.f32 [%0], {%1, %2};" ::"l"(p), "r"(a), "r"(b) : "memory");
}
DEVICE void store_float_everywhere(void* p, float f) {
  asm volatile("multimem.st.relaxed.sys.global.f32 [%0], %1;" ::"l"(p), "f"(f) : "memory");
}

// ---- threads ------------------------------------------------------------------------------------------

DEVICE void sync_block() { __syncthreads(); }
DEVICE bool all_of_block(bool ok) { return __syncthreads_and(ok); }
// `count` threads, whole warps, at their own barrier: 1 to 15.
DEVICE void sync_group(int barrier, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}
DEVICE float from_lane(float f, int lane_mask) { return __shfl_xor_sync(0xffffffffu, f, lane_mask); }
DEVICE void relax() { __nanosleep(20); }

DEVICE u64 now_ns() {
  u64 t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

DEVICE float inverse_root(float f) { return rsqrtf(f); }
