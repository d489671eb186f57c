// Holds units of a GPU until a time is over, for benchmarks that stand for other GPUs (commands/emulate.py).
#include <ptx.cuh>

struct Call {
  u64* since;  // when it began, on the GPU's clock
  u64 ns;      // how long it must last
  int begins;  // only notes that it begins now
};

// A block as large as a seam's, with shared memory besides, so that no product's block runs beside it.
constexpr int WORDS = 11 * 1024;

KERNEL(1024) pace(const Call c) {
  SHARED(u32, taken, WORDS);
  if (c.begins) {
    if (block() == 0 && thread() == 0) *c.since = now_ns();
    return;
  }
  for (int i = thread(); i < WORDS; i += 1024) taken[i] = u32(c.ns);
  sync_block();
  if (thread() == 0) {
    const u64 began = *c.since + (taken[WORDS - 1] != u32(c.ns));
    while (now_ns() - began < c.ns) relax();
  }
}
