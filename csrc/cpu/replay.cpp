// Calls that were kept, made again one after another with nothing in between (weaveinf/ops/tape.py).

#include "common.h"

using namespace weave;

struct Kept {
  int (*kernel)(const void* packed);
  const void* packed;
};

struct Replay {
  const Kept* calls;
  index_t count;
};

// The first result that is not 0, which ends it, or 0.
extern "C" int weave_replay(const void* packed) {
  const auto c = unpack<Replay>(packed);
  for (index_t i = 0; i < c.count; ++i)
    if (const int code = c.calls[i].kernel(c.calls[i].packed)) return code;
  return 0;
}
