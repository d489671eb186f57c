// Ranks of one host meeting in shared memory: barrier, sum of votes, ring of messages, and the seam
// (sum over ranks + residual add + RMSNorm). Plain C ABI for ctypes, which releases the GIL around a call.
//
// One segment is mapped by all ranks. Every rank owns one Line in it: a counter only that rank advances,
// which the others wait on. A rank lives as long as it holds the record lock on byte `rank` of the
// segment's file: the kernel drops it when the process ends, however it ends, also for a zombie and across
// process-id namespaces. Waits spin for a while, then sleep in a futex and look after the peers.
#include <algorithm>
#include <atomic>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "sum_norm.h"

namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a futex waits on the low half of a counter");

// Waking a core that slept, of a virtual machine above all, takes as long as a seam of few rows.
constexpr int64_t kSpinNs = 1'000'000;
constexpr int64_t kCrowdedSpinNs = 50'000;
constexpr int64_t kSleepNs = 50'000'000;

// Results of a call: 0, or kind * 256 + rank. Python turns them into errors.
enum Kind { kDied = 1, kSilent = 2, kDisagree = 3, kBadRows = 4 };
int problem(Kind kind, int rank) { return kind * 256 + rank; }

struct alignas(128) Line {
  std::atomic<uint64_t> value;
  std::atomic<uint64_t> tags[2];  // what this rank believes even and odd meetings to be about
  std::atomic<uint32_t> sleepers;
  std::atomic<uint32_t> blamed;  // 1 + the rank whose death made this rank give up; 0: none
};
static_assert(sizeof(Line) == 128, "Python lays the segment out");

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * int64_t{1'000'000'000} + t.tv_nsec;
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Not FUTEX_PRIVATE: the word is shared between processes.
void futex_wait(std::atomic<uint64_t>* word, uint32_t seen, int64_t ns) {
  timespec t{ns / 1'000'000'000, ns % 1'000'000'000};
  syscall(SYS_futex, word, FUTEX_WAIT, seen, &t, nullptr, 0);
}

}  // namespace

extern "C" {

// Fields are filled and read by comm/segment.py; keep both in step.
struct Group {
  Line* lines;
  Line* blame;  // the lines whose `blamed` counts: the same for all groups of these ranks
  int64_t deadline_ns;  // how long a living peer may be silent
  uint64_t epoch;
  int32_t rank, size, fd, broken;
  int32_t crowded;  // more ranks than cores: spinning only keeps the peer from running
};

}  // extern "C"

namespace {

bool lives(const Group* g, int rank) {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return fcntl(g->fd, F_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

int first_dead(const Group* g) {
  for (int r = 0; r < g->size; ++r)
    if (r != g->rank && !lives(g, r)) return r;
  return -1;
}

// A rank that left because of another's death is not the one to name.
int culprit(Group* g, int dead) {
  if (const uint32_t named = g->blame[dead].blamed.load()) dead = int(named) - 1;
  g->blame[g->rank].blamed.store(uint32_t(dead) + 1);
  return dead;
}

void publish(Line& line, uint64_t value) {
  line.value.store(value, std::memory_order_seq_cst);
  if (line.sleepers.load(std::memory_order_seq_cst) != 0)
    syscall(SYS_futex, &line.value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// Waits until rank's counter has reached `value`. A peer that finished its part and left is no reason to
// fail: the counter is looked at once more after a death was seen.
int await(Group* g, int rank, uint64_t value, int64_t patience_ns) {
  Line& line = g->lines[rank];
  auto there = [&] { return line.value.load(std::memory_order_acquire) >= value; };
  if (there()) return 0;
  const int64_t begin = now_ns(), spin = g->crowded ? kCrowdedSpinNs : kSpinNs;
  for (int64_t i = 1; now_ns() - begin < spin; ++i) {
    for (int k = 0; k < 16; ++k) {
      if (there()) return 0;
      relax();
    }
    // On a busy machine the peer may be waiting for this very core.
    if (g->crowded || i % 4 == 0) sched_yield();
  }
  for (;;) {
    const int64_t left = patience_ns - (now_ns() - begin);
    line.sleepers.fetch_add(1, std::memory_order_seq_cst);
    const uint64_t seen = line.value.load(std::memory_order_seq_cst);
    if (seen < value && left > 0) futex_wait(&line.value, uint32_t(seen), std::min(left, kSleepNs));
    line.sleepers.fetch_sub(1, std::memory_order_seq_cst);
    if (there()) return 0;
    const int dead = first_dead(g);
    if (there()) return 0;
    if (dead >= 0) return problem(kDied, culprit(g, dead));
    if (left <= 0) return problem(kSilent, rank);
  }
}

void arrive(Group* g, uint64_t tag) {
  Line& line = g->lines[g->rank];
  ++g->epoch;
  line.tags[g->epoch & 1].store(tag, std::memory_order_relaxed);
  publish(line, g->epoch);
}

int await_all(Group* g) {
  for (int r = 0; r < g->size; ++r) {
    if (r == g->rank) continue;
    if (int code = await(g, r, g->epoch, g->deadline_ns)) return g->broken = code;
  }
  return 0;
}

// Arrive and wait, and see that all ranks came for the same thing. (A peer is one meeting ahead at most.)
int meet(Group* g, uint64_t tag) {
  if (g->broken) return g->broken;
  arrive(g, tag);
  if (int code = await_all(g)) return code;
  for (int r = 0; r < g->size; ++r)
    if (g->lines[r].tags[g->epoch & 1].load(std::memory_order_relaxed) != tag)
      return g->broken = problem(kDisagree, r);
  return 0;
}

}  // namespace

extern "C" {

int weaveinf_look(Group* g) {
  const int dead = first_dead(g);
  return dead < 0 ? 0 : problem(kDied, culprit(g, dead));
}

int weaveinf_meet(Group* g, uint64_t tag) { return meet(g, tag); }

// Half a meeting: arrive, waiting for nobody; or wait until one rank has arrived.
int weaveinf_arrive(Group* g) {
  if (!g->broken) arrive(g, 0);
  return g->broken;
}

int weaveinf_await(Group* g, int rank) { return await(g, rank, g->epoch, g->deadline_ns); }

// ---- votes: slots[2][size][chunk] floats; two slots, so one meeting a chunk is enough -----------------

struct Votes {
  Group group;
  float* slots;
  int64_t chunk;
};

int weaveinf_votes_sum(Votes* v, const float* in, float* out, int64_t n) {
  Group* g = &v->group;
  int64_t done = 0;
  do {
    const int64_t m = std::min(v->chunk, n - done);
    float* half = v->slots + (g->epoch & 1) * g->size * v->chunk;
    std::memcpy(half + g->rank * v->chunk, in + done, m * sizeof(float));
    if (int code = meet(g, uint64_t(n))) return code;
    std::memcpy(out + done, half, m * sizeof(float));
    for (int r = 1; r < g->size; ++r) {
      const float* theirs = half + r * v->chunk;
      for (int64_t i = 0; i < m; ++i) out[done + i] += theirs[i];
    }
    done += m;
  } while (done < n);
  return 0;
}

// ---- channel: a ring of int64 words written by rank 0; a message is its length and its words ----------

struct Channel {
  Group group;
  int64_t* ring;
  int64_t words;
  uint64_t at;  // words written (rank 0) or taken (others)
};

int weaveinf_channel_send(Channel* c, const int64_t* data, int64_t n) {
  Group* g = &c->group;
  if (g->broken) return g->broken;
  // Before the message, not after it: who has got a farewell may be gone by then.
  if (int dead = g->size > 1 ? first_dead(g) : -1; dead > 0) return g->broken = problem(kDied, culprit(g, dead));
  for (int64_t sent = -1; sent < n;) {  // -1 is the length
    for (int r = 1; r < g->size; ++r)
      if (c->at >= uint64_t(c->words))
        if (int code = await(g, r, c->at - c->words + 1, g->deadline_ns)) return g->broken = code;
    uint64_t taken = c->at;
    for (int r = 1; r < g->size; ++r)
      taken = std::min(taken, g->lines[r].value.load(std::memory_order_acquire));
    int64_t room = c->words - int64_t(c->at - taken);
    if (sent < 0) c->ring[c->at++ % c->words] = n, ++sent, --room;
    while (room > 0 && sent < n) {
      const int64_t from = c->at % c->words;
      const int64_t m = std::min({room, n - sent, c->words - from});
      std::memcpy(c->ring + from, data + sent, m * sizeof(int64_t));
      c->at += m, sent += m, room -= m;
    }
    publish(g->lines[0], c->at);
  }
  return 0;
}

// The length of the next message in *n. kSilent after patience_ns: nothing wrong, nothing there.
int weaveinf_channel_length(Channel* c, int64_t patience_ns, int64_t* n) {
  Group* g = &c->group;
  if (int code = await(g, 0, c->at + 1, patience_ns)) return code;
  *n = c->ring[c->at++ % c->words];
  publish(g->lines[g->rank], c->at);
  return 0;
}

int weaveinf_channel_take(Channel* c, int64_t* out, int64_t n) {
  Group* g = &c->group;
  for (int64_t got = 0; got < n;) {
    if (int code = await(g, 0, c->at + 1, g->deadline_ns)) return code;
    const int64_t ready = int64_t(g->lines[0].value.load(std::memory_order_acquire) - c->at);
    const int64_t from = c->at % c->words;
    const int64_t m = std::min({ready, n - got, c->words - from});
    std::memcpy(out + got, c->ring + from, m * sizeof(int64_t));
    c->at += m, got += m;
    publish(g->lines[g->rank], c->at);
  }
  return 0;
}

// ---- seam -----------------------------------------------------------------------------------------------

// All ranks write their partial sums, meet, compute each its share of the rows of residual and x, and meet.
// (That every rank computed few rows itself, behind one meeting, was slower even for one row.)
struct Seam {
  Group group;
  int (*norm)(const void* packed);  // weave_add_rms_norm of the build that all ranks chose
  char* partials;   // [size][max_rows][hidden]
  char* residuals;  // [2][max_rows][hidden], the second for steps that drop rows
  char* x;          // [max_rows][hidden]
  int64_t max_rows, hidden, rows;
  int32_t dtype, item, threads;  // the code of the elements' dtype, and their size in bytes
  int32_t side;                  // which of residuals holds the residual
  int32_t fresh;                 // the residual is zero and lies nowhere yet
};

// The three calls of a seam take their arguments packed, as kernels do (common.h).
struct SeamOpen {
  Seam* seam;
  int64_t rows;
};

int weaveinf_seam_open(const SeamOpen* c) {
  c->seam->rows = c->rows;
  c->seam->fresh = 1;
  return 0;
}

struct SeamStart {
  Seam* seam;
  const int64_t* kept;
  int64_t rows;
  const void* weight;  // [hidden], of the seam's dtype
  double eps, offset, scale;
};

// weaveinf_seam_finish must be called before x is read and partials are written.
int weaveinf_seam_start(const SeamStart* c) {
  Seam* s = c->seam;
  Group* g = &s->group;
  const int64_t* kept = c->kept;
  const int64_t n = c->rows;
  for (int64_t i = 0; kept != nullptr && i < n; ++i)
    if (kept[i] >= s->rows || kept[i] < (i ? kept[i - 1] + 1 : 0)) return problem(kBadRows, g->rank);
  if (int code = meet(g, uint64_t(n))) return code;

  const int64_t row = s->hidden * s->item, plane = s->max_rows * row;
  const int64_t base_rows = n / g->size, extra = n % g->size;
  const int64_t first = g->rank * base_rows + std::min<int64_t>(g->rank, extra);
  const int64_t count = base_rows + (g->rank < extra);
  const char* old = s->residuals + s->side * plane;
  if (kept != nullptr) s->side = 1 - s->side;
  char* residual = s->residuals + s->side * plane + first * row;
  if (s->fresh)
    std::memset(residual, 0, count * row);
  else if (kept != nullptr)
    for (int64_t i = 0; i < count; ++i) std::memcpy(residual + i * row, old + kept[first + i] * row, row);
  struct {
    SumNorm norm;
    const void* partials[8];
  } sum{{g->size, residual, c->weight, s->x + first * row, count, s->hidden, c->eps, c->offset, c->scale,
         s->dtype, s->threads}, {}};
  for (int r = 0; r < g->size; ++r) sum.partials[r] = s->partials + r * plane + first * row;
  s->norm(&sum);

  s->rows = n, s->fresh = 0;
  arrive(g, uint64_t(n));
  return 0;
}

int weaveinf_seam_finish(Seam* const* c) { return await_all(&(*c)->group); }

}  // extern "C"
