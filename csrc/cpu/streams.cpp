// The sums of collective seams over TCP: a thread moves rows between this rank and its peers, adds and
// normalises what has come, and sends that back, chunk by chunk (comm/collective.py says what and why).
// The thread that computes lends it moments of its core, so there is no Python in it.
//
// Python's own path (comm/progress.py) moves the same bytes in the same order, one seam after another; here a
// seam starts when the network has all that the one before it sends.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <linux/sockios.h>
#include <mutex>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <vector>

#include "sum_norm.h"

namespace {

using Clock = std::chrono::steady_clock;
double seconds(Clock::time_point t) { return std::chrono::duration<double>(t.time_since_epoch()).count(); }

constexpr int kUnsent = 1;  // even a few bytes would wait behind all that another seam sends

enum Kind : int64_t { kFine, kDied, kSilent, kLeft };

struct Problem {
  int64_t kind = kFine, rank = 0, error = 0;  // error: errno, or -1 where the peer closed the connection
};

struct Slice {
  char* data;
  int64_t bytes;
};

// A chunk of every rank's share: its sum and norm (SumNorm and its pointers, null where this rank has no rows),
// followed in the plan by a Way for each peer. All is laid out by comm/collective.py.
struct Way {
  Slice partial, inbox, mine, theirs;
};
struct Chunk {
  const SumNorm* norm;
  const Way* ways() const { return reinterpret_cast<const Way*>(this + 1); }
};
struct Peer {
  int64_t fd, rank;
};
struct Plan {
  int64_t peers, chunks;
  const Peer* peer() const { return reinterpret_cast<const Peer*>(this + 1); }
  const Chunk* chunk(int64_t i) const {
    const size_t size = sizeof(Chunk) + size_t(peers) * sizeof(Way);
    return reinterpret_cast<const Chunk*>(reinterpret_cast<const char*>(peer() + peers) + size_t(i) * size);
  }
};

// Both directions of a connection. Slices leave and come in the order in which they were posted.
struct Stream {
  struct Queue {
    std::deque<Slice> slices;
    int64_t posted = 0, done = 0;
    void post(Slice slice) {
      if (!slice.bytes) return;
      slices.push_back(slice);
      ++posted;
    }
  };
  int fd;
  Queue out, into;
  bool draining = false;
  int64_t enough = 0;  // bytes that must have come before the kernel wakes the thread

  // Passes on what can be at once; errno, or -1 where the peer has closed the connection.
  template <class Some>
  int pass_on(Queue& queue, Some some) {
    while (!queue.slices.empty()) {
      Slice& head = queue.slices.front();
      const ssize_t count = some(head);
      if (count == 0) return -1;
      if (count < 0) {
        if (errno == EINTR) continue;
        return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : errno;
      }
      head.data += count;
      head.bytes -= count;
      if (head.bytes) continue;
      queue.slices.pop_front();
      ++queue.done;
    }
    return 0;
  }
  int send() {
    return pass_on(out, [&](const Slice& s) { return ::send(fd, s.data, size_t(s.bytes), MSG_NOSIGNAL); });
  }
  int receive() {
    return pass_on(into, [&](const Slice& s) { return ::recv(fd, s.data, size_t(s.bytes), 0); });
  }
  bool idle() const { return out.slices.empty() && into.slices.empty(); }
  // Whether the system has passed on all that it took; until it has, that is waited for, too.
  bool drained() {
    int unsent = 0;
    ioctl(fd, SIOCOUTQNSD, &unsent);
    drain(unsent >= kUnsent);
    return !draining;
  }
  void drain(bool wanted) {
    if (wanted == draining) return;
    draining = wanted;
    const int most = draining ? 2 * kUnsent : 0;  // below half of it the stream is writable; 0: no limit
    setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &most, sizeof most);
  }
  short wants() {
    if (!into.slices.empty() && into.slices.front().bytes != enough) {
      enough = into.slices.front().bytes;
      const int bytes = int(enough);
      setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &bytes, sizeof bytes);
      // A peer whose connection was idle may send little before it hears of that, which could take 40 ms.
      const int now = 1;
      setsockopt(fd, IPPROTO_TCP, TCP_QUICKACK, &now, sizeof now);
    }
    return short((into.slices.empty() ? 0 : POLLIN) | (out.slices.empty() && !draining ? 0 : POLLOUT));
  }
};

struct Job {
  const Plan* plan;  // null: Python's turn
  int (*kernel)(const void* packed);
  const void* weight;
  double eps, offset, scale;

  std::vector<Stream*> streams;   // of the plan's peers
  std::vector<int64_t> came, go;  // of each: slices received that are needed now, and sent that are at the end
  int64_t chunk = 0;
  Clock::time_point began, ended, deadline;
  Problem problem;
  bool over = false;

  bool ending() const { return chunk == plan->chunks; }
};

struct Engine {
  int bell, ear;  // a pair of sockets: a byte says that the queue has grown; a closed bell, that all ends
  std::mutex mutex;
  std::condition_variable settled;
  std::deque<Job*> queue;
  Problem failure;  // after which nothing runs
  // The thread's own:
  std::deque<std::unique_ptr<Stream>> streams;
  std::vector<Job*> active;

  Stream* stream(int fd) {
    for (auto& one : streams)
      if (one->fd == fd) return one.get();
    streams.emplace_back(new Stream{fd, {}, {}});
    return streams.back().get();
  }

  void settle(Job* job, Problem problem) {
    std::lock_guard<std::mutex> lock(mutex);
    job->problem = problem;
    job->ended = Clock::now();
    job->over = true;
    settled.notify_all();
  }

  // What is queued will not run, nor will anything more.
  void refuse(Problem problem) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!failure.kind) failure = problem;
    for (Job* job : queue) {
      if (job->plan) {
        job->problem = failure;
        job->over = true;
      } else {
        delete job;
      }
    }
    queue.clear();
    settled.notify_all();
  }

  Problem start(Job* job, std::chrono::nanoseconds silence) {
    const Plan& plan = *job->plan;
    job->began = Clock::now();
    job->deadline = job->began + silence;
    for (int64_t p = 0; p < plan.peers; ++p) {
      Stream* s = stream(int(plan.peer()[p].fd));
      if (s->into.slices.empty()) s->enough = 0;  // Python may have used it, or it is another connection now
      job->streams.push_back(s);
      job->came.push_back(s->into.posted);
      for (int64_t c = 0; c < plan.chunks; ++c) {
        s->out.post(plan.chunk(c)->ways()[p].partial);
        s->into.post(plan.chunk(c)->ways()[p].inbox);
      }
      for (int64_t c = 0; c < plan.chunks; ++c) s->into.post(plan.chunk(c)->ways()[p].theirs);
      job->go.push_back(s->out.posted);
      if (const int error = s->send()) return {kDied, plan.peer()[p].rank, error};
    }
    if (plan.chunks) need(job, 0, &Way::inbox);
    return {};
  }

  // What the job waits for now: this too, from the peers that send some of it.
  void need(Job* job, int64_t chunk, Slice Way::*what) {
    for (int64_t p = 0; p < job->plan->peers; ++p)
      job->came[p] += (job->plan->chunk(chunk)->ways()[p].*what).bytes > 0;
  }

  // The peer whose rows the job's next chunk, or its end, waits for; -1: it waits for nobody.
  int64_t waits_for(const Job* job) const {
    for (int64_t p = 0; p < job->plan->peers; ++p) {
      const Stream& s = *job->streams[p];
      if (s.into.done < job->came[p] || (job->ending() && s.out.done < job->go[p])) return p;
    }
    return -1;
  }

  // Whether the network has all that an ending job sends; if not, the thread is woken when it has.
  bool has_sent(const Job* job) {
    bool all = true;
    for (int64_t p = 0; p < job->plan->peers; ++p)
      if (job->streams[p]->out.done < job->go[p] || !job->streams[p]->drained()) all = false;
    return all;
  }

  Problem advance(Job* job, std::chrono::nanoseconds silence) {
    const Plan& plan = *job->plan;
    while (!job->ending() && waits_for(job) < 0) {
      const Chunk& chunk = *plan.chunk(job->chunk);
      if (chunk.norm) add_and_norm(job, *chunk.norm);
      for (int64_t p = 0; p < plan.peers; ++p) {
        Stream* s = job->streams[p];
        s->out.post(chunk.ways()[p].mine);
        job->go[p] = s->out.posted;
        if (const int error = s->send()) return {kDied, plan.peer()[p].rank, error};
      }
      job->deadline = Clock::now() + silence;
      if (++job->chunk < plan.chunks) {
        need(job, job->chunk, &Way::inbox);
      } else {
        for (int64_t c = 0; c < plan.chunks; ++c) need(job, c, &Way::theirs);
      }
    }
    return {};
  }

  void add_and_norm(const Job* job, const SumNorm& norm) {
    std::vector<char> packed(sizeof norm + size_t(norm.count) * sizeof(void*));
    __builtin_memcpy(packed.data(), &norm, packed.size());
    SumNorm& call = *reinterpret_cast<SumNorm*>(packed.data());
    call.weight = job->weight;
    call.eps = job->eps, call.offset = job->offset, call.scale = job->scale;
    job->kernel(packed.data());
  }

  // Waits until something can be moved, or the bell rings, and moves it.
  Problem move() {
    std::vector<pollfd> polled{{ear, POLLIN, 0}};
    std::vector<Stream*> busy;
    for (auto& s : streams) {
      if (const short wanted = s->wants()) {
        polled.push_back({s->fd, wanted, 0});
        busy.push_back(s.get());
      }
    }
    int ms = -1;
    if (!active.empty()) {
      const auto left = active[0]->deadline - Clock::now();
      ms = int(std::max<int64_t>(0, std::chrono::ceil<std::chrono::milliseconds>(left).count()));
    }
    const int ready = poll(polled.data(), polled.size(), ms);
    if (!active.empty() && Clock::now() >= active[0]->deadline) {
      const int64_t p = waits_for(active[0]);
      return {kSilent, active[0]->plan->peer()[p < 0 ? 0 : p].rank};
    }
    if (ready <= 0) return {};
    for (size_t i = 0; i < busy.size(); ++i) {
      if (!polled[i + 1].revents) continue;
      int error = busy[i]->send();
      if (!error) error = busy[i]->receive();
      if (!error && busy[i]->idle() && (polled[i + 1].revents & (POLLERR | POLLHUP | POLLNVAL))) error = -1;
      if (error) return {kDied, rank_of(busy[i]), error};
    }
    char rung[256];
    if (polled[0].revents && recv(ear, rung, sizeof rung, MSG_DONTWAIT) == 0) return {kLeft};
    return {};
  }

  int64_t rank_of(const Stream* stream) const {
    for (const Job* job : active)
      for (size_t p = 0; p < job->streams.size(); ++p)
        if (job->streams[p] == stream) return job->plan->peer()[p].rank;
    return 0;
  }

  // The next of the queue, if it may start: when the one before it has sent all, or they would share the network,
  // and the older one, which is waited for sooner, would end later. Python's turn: when all before it are over.
  Job* next() {
    if (!active.empty() && !active.back()->ending()) return nullptr;
    std::lock_guard<std::mutex> lock(mutex);
    if (queue.empty() || (!queue.front()->plan && !active.empty())) return nullptr;
    if (!active.empty() && !has_sent(active.back())) return nullptr;
    Job* job = queue.front();
    queue.pop_front();
    return job;
  }

  // Until it is Python's turn, or something is wrong.
  Problem run(std::chrono::nanoseconds silence) {
    for (;;) {
      for (size_t i = 0; i < active.size();) {
        Job* job = active[i];
        if (const Problem problem = advance(job, silence); problem.kind) return problem;
        if (job->ending() && waits_for(job) < 0) {
          active.erase(active.begin() + std::ptrdiff_t(i));
          for (Stream* s : job->streams) s->drain(false);
          settle(job, {});
        } else {
          ++i;
        }
      }
      Problem problem;
      if (Job* job = next()) {
        if (!job->plan) {
          delete job;
          return {};
        }
        active.push_back(job);
        problem = start(job, silence);
      } else {
        problem = move();
      }
      if (problem.kind) return problem;
    }
  }
};

}  // namespace

extern "C" {

// Fields are read by comm/progress.py; keep both in step.
struct Outcome {
  double began, ended;
  Problem problem;
};

// bell, ear: a pair of connected sockets, the bell not blocking. Both outlive the thread that runs it.
Engine* weaveinf_streams(int bell, int ear) {
  auto* engine = new Engine;
  engine->bell = bell;
  engine->ear = ear;
  return engine;
}

// Nobody may use it or its jobs any more.
int weaveinf_streams_free(Engine* engine) {
  delete engine;
  return 0;
}

// Queues a sum over the ranks by a plan; what that and `weight` point to must outlive it. Without a plan: Python's
// turn, and nothing to wait for.
Job* weaveinf_streams_submit(Engine* engine, const void* plan, void* kernel, const void* weight, double eps,
                             double offset, double scale) {
  auto* job = new Job{};
  job->plan = static_cast<const Plan*>(plan);
  job->kernel = reinterpret_cast<int (*)(const void*)>(kernel);
  job->weight = weight;
  job->eps = eps, job->offset = offset, job->scale = scale;
  {
    std::lock_guard<std::mutex> lock(engine->mutex);
    if (engine->failure.kind) {
      if (!plan) {
        delete job;
        return nullptr;
      }
      job->problem = engine->failure;
      job->over = true;
      return job;
    }
    engine->queue.push_back(job);
  }
  send(engine->bell, ".", 1, MSG_DONTWAIT | MSG_NOSIGNAL);  // full: it rings already
  return job;
}

// Returns 0 when a job is over, once for each job, or 1 after a moment, so that Python can look after signals.
int weaveinf_streams_wait(Engine* engine, Job* job, Outcome* outcome) {
  {
    std::unique_lock<std::mutex> lock(engine->mutex);
    if (!engine->settled.wait_for(lock, std::chrono::milliseconds(200), [&] { return job->over; })) return 1;
  }
  *outcome = {seconds(job->began), seconds(job->ended), job->problem};
  delete job;
  return 0;
}

// What the thread runs: returns when it is Python's turn, or with the problem after which nothing runs.
int weaveinf_streams_run(Engine* engine, int64_t silence_ns, Outcome* outcome) {
  outcome->problem = engine->run(std::chrono::nanoseconds(silence_ns));
  if (!outcome->problem.kind) return 0;
  {
    std::lock_guard<std::mutex> lock(engine->mutex);
    if (engine->failure.kind) outcome->problem = engine->failure;  // of which this one comes
  }
  for (Job* job : engine->active) engine->settle(job, outcome->problem);
  engine->active.clear();
  engine->refuse(outcome->problem);
  return 0;
}

// What is queued will not run, nor will anything more; what is under way ends when the bell is closed.
int weaveinf_streams_refuse(Engine* engine) {
  engine->refuse({kLeft});
  return 0;
}

}  // extern "C"
