// csrc/cuda/ptx.cuh for threads of a CPU: seam.cu compiled with this in its place runs as it is, every CUDA
// thread a thread of the system, so that its arithmetic, its shares and its meetings are tested without a
// GPU. A multicast address is that of nothing; what lies at the same place in all buffers answers to it.
#pragma once

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#ifdef __F16C__
#include <immintrin.h>
#endif

#define DEVICE inline
#define KERNEL(threads)                  \
  constexpr int kThreads = threads;      \
  static void
#define SHARED(type, name, count) type* const name = shared<type>(count)

using u32 = uint32_t;
using u64 = unsigned long long;

struct alignas(16) Vec {
  u32 w[4];
};

struct Barrier {
  explicit Barrier(int count) : count(count) {}
  void arrive_and_wait() {
    const int now = phase;
    if (++here == count) {
      here = 0;
      ++phase;
    }
    while (phase == now) std::this_thread::yield();
  }
  const int count;
  std::atomic<int> here{0}, phase{0};
};

struct Warp {
  Barrier all{32};
  float lanes[32];
};

struct Block {
  explicit Block(int threads) : threads(threads), all(threads), warps(threads / 32), arenas(8) {}
  Barrier& group(int id, int count) {
    std::call_once(made[id], [&] { groups[id] = std::make_unique<Barrier>(count); });
    return *groups[id];
  }
  int threads;
  Barrier all;
  std::vector<Warp> warps;
  std::once_flag made[16], shaped[8];
  std::unique_ptr<Barrier> groups[16];
  std::vector<std::vector<char>> arenas;
  std::atomic<int> refusals[2] = {0, 0};
};

struct Here {
  Block* of;
  int block, blocks, virtual_rank, thread, arena, turn;
};
inline thread_local Here here;

// The ranks whose buffers answer to `multicast`.
struct Switch {
  const char* multicast;
  char* const* buffers;
  int ranks;
};
inline Switch all_ranks;

DEVICE int block() { return here.block; }
DEVICE int blocks() { return here.blocks; }
DEVICE int virtual_rank() { return here.virtual_rank; }
DEVICE int thread() { return here.thread; }

template <class T>
T* shared(int count) {
  const int i = here.arena++;
  std::call_once(here.of->shaped[i], [&] { here.of->arenas[i].assign(count * sizeof(T), char(0xff)); });
  return reinterpret_cast<T*>(here.of->arenas[i].data());
}

// ---- memory -------------------------------------------------------------------------------------------

DEVICE Vec load(const void* p) {
  Vec v;
  std::memcpy(&v, p, 16);
  return v;
}
DEVICE Vec load_constant(const void* p) { return load(p); }
DEVICE void store(void* p, const Vec& v) { std::memcpy(p, &v, 16); }
DEVICE void store_half(void* p, u32 a, u32 b) {
  const u32 both[2] = {a, b};
  std::memcpy(p, both, 8);
}
DEVICE u32 at(const u32* p, std::memory_order order) {
  return std::atomic_ref<u32>(*const_cast<u32*>(p)).load(order);
}
DEVICE u32 load_acquire(const u32* p) { return at(p, std::memory_order_acquire); }
DEVICE u32 load_relaxed(const u32* p) { return at(p, std::memory_order_relaxed); }
DEVICE void store_release(u32* p, u32 v) { std::atomic_ref<u32>(*p).store(v, std::memory_order_release); }
DEVICE void store_relaxed(u32* p, u32 v) { std::atomic_ref<u32>(*p).store(v, std::memory_order_relaxed); }

DEVICE void fence_aliases() {}

template <class F>
void everywhere(const void* p, F&& f) {
  const auto offset = static_cast<const char*>(p) - all_ranks.multicast;
  for (int r = 0; r < all_ranks.ranks; ++r) f(all_ranks.buffers[r] + offset);
}
DEVICE void store_everywhere(void* p, const Vec& v) {
  everywhere(p, [&](char* to) { store(to, v); });
}
DEVICE void store_half_everywhere(void* p, u32 a, u32 b) {
  everywhere(p, [&](char* to) { store_half(to, a, b); });
}
DEVICE void store_float_everywhere(void* p, float f) {
  everywhere(p, [&](char* to) { std::memcpy(to, &f, 4); });
}

// ---- elements -----------------------------------------------------------------------------------------

// What the switch returns: sums in float32, rounded to the element's type.
template <class E>
Vec reduced(const void* p) {
  Vec sum;
  for (int w = 0; w < 4; ++w) {
    float total[2] = {}, one[2];
    everywhere(p, [&](char* from) {
      E::unpack(load(from).w[w], one);
      for (int e = 0; e < 4 / E::BYTES; ++e) total[e] += one[e];
    });
    sum.w[w] = E::pack(total);
  }
  return sum;
}

struct Float32 {
  static constexpr int BYTES = 4;
  static void unpack(u32 w, float* f) { std::memcpy(f, &w, 4); }
  static u32 pack(const float* f) {
    u32 w;
    std::memcpy(&w, f, 4);
    return w;
  }
  static Vec reduce(const void* p) { return reduced<Float32>(p); }
};

struct BFloat16 {
  static constexpr int BYTES = 2;
  static void unpack(u32 w, float* f) {
    const u32 both[2] = {w << 16, w & 0xffff0000u};
    std::memcpy(f, both, 8);
  }
  static u32 pack(const float* f) {
    u32 w[2];
    std::memcpy(w, f, 8);
    for (u32& one : w) one = (one + 0x7fff + (one >> 16 & 1)) >> 16;  // finite, to the nearest, ties to even
    return w[0] | w[1] << 16;
  }
  static Vec reduce(const void* p) { return reduced<BFloat16>(p); }
};

#ifdef __F16C__
struct Float16 {
  static constexpr int BYTES = 2;
  static void unpack(u32 w, float* f) { f[0] = _cvtsh_ss(w & 0xffff), f[1] = _cvtsh_ss(w >> 16); }
  static u32 pack(const float* f) { return u32(_cvtss_sh(f[0], 0)) | u32(_cvtss_sh(f[1], 0)) << 16; }
  static Vec reduce(const void* p) { return reduced<Float16>(p); }
};
#endif

inline float e4m3(int code) {  // 0 to 126, ascending
  const int exponent = code >> 3, mantissa = code & 7;
  return exponent ? std::ldexp(1 + mantissa / 8.0f, exponent - 7) : std::ldexp(mantissa / 8.0f, -6);
}
DEVICE u32 pack_e4m3(const float* f) {
  u32 w = 0;
  for (int i = 0; i < 4; ++i) {
    const float size = std::min(std::fabs(f[i]), 448.0f);
    int code = 0;
    while (code < 126 && e4m3(code + 1) <= size) ++code;
    if (code < 126) {
      const float below = size - e4m3(code), above = e4m3(code + 1) - size;
      code += above < below || (above == below && code & 1);
    }
    w |= u32(code | (std::signbit(f[i]) ? 128 : 0)) << 8 * i;
  }
  return w;
}

// ---- threads ------------------------------------------------------------------------------------------

DEVICE void sync_block() { here.of->all.arrive_and_wait(); }
DEVICE bool all_of_block(bool ok) {
  std::atomic<int>& refusals = here.of->refusals[here.turn ^= 1];
  if (!ok) ++refusals;
  sync_block();
  const bool all = refusals == 0;
  sync_block();
  refusals = 0;
  return all;
}
DEVICE void sync_group(int id, int count) { here.of->group(id, count).arrive_and_wait(); }
DEVICE float from_lane(float f, int lane_mask) {
  Warp& warp = here.of->warps[here.thread / 32];
  warp.lanes[here.thread % 32] = f;
  warp.all.arrive_and_wait();
  const float got = warp.lanes[here.thread % 32 ^ lane_mask];
  warp.all.arrive_and_wait();
  return got;
}
DEVICE void relax() { std::this_thread::yield(); }
DEVICE u64 now_ns() { return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1); }
DEVICE float inverse_root(float f) { return 1 / std::sqrt(f); }
