// Runs seam.cu's grid on threads of the CPU: what a launch does on a GPU.
#include <algorithm>
#include <mutex>

#include "../../../csrc/cuda/seam.cu"

extern "C" void run(const Call* call, int blocks, int rows_of_grid, const int* delays_us) {
  all_ranks = {call->multicast, call->buffers, RANKS};
  std::vector<std::unique_ptr<Block>> all;
  std::vector<std::thread> threads;
  for (int rank = 0; rank < rows_of_grid; ++rank) {
    for (int b = 0; b < blocks; ++b) {
      Block* of = all.emplace_back(std::make_unique<Block>(kThreads)).get();
      for (int t = 0; t < kThreads; ++t)
        threads.emplace_back([=] {
          here = {of, b, blocks, rank, t, 0, 0};
          std::this_thread::sleep_for(std::chrono::microseconds(delays_us[rank * blocks + b]));
          seam(*call);
        });
    }
  }
  for (std::thread& one : threads) one.join();
}

extern "C" int call_bytes() { return sizeof(Call); }
