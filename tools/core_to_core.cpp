// How far apart cores 0 and 1 are: the time of a hand-over between them, and how fast one reads what the other has just
// written, against what it has read itself. On processors of several dies it depends on where the system puts the two.
//
//   g++ -std=c++20 -O2 -pthread tools/core_to_core.cpp -o build/core_to_core && build/core_to_core
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

double nanoseconds(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double, std::nano>(end - begin).count();
}

void pin_to(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

// Sum of one word per cache line.
uint64_t read(const std::vector<uint64_t>& words) {
  uint64_t sum = 0;
  for (size_t i = 0; i < words.size(); i += 8) sum += words[i];
  return sum;
}

}  // namespace

int main() {
  constexpr int hand_overs = 200000, rounds = 50;
  alignas(64) std::atomic<int> turn = 0;
  std::vector<uint64_t> words(size_t{512} << 10 >> 3);
  std::thread other([&] {
    pin_to(1);
    for (int i = 0; i < hand_overs; ++i) {
      while (turn.load() != 2 * i + 1) {
      }
      if (i >= hand_overs - rounds)
        for (uint64_t& word : words) word += static_cast<uint64_t>(i);
      turn.store(2 * i + 2);
    }
  });
  pin_to(0);
  double waited = 0, first = 0, again = 0;
  uint64_t sum = 0;
  for (int i = 0; i < hand_overs; ++i) {
    const auto begin = Clock::now();
    turn.store(2 * i + 1);
    while (turn.load() != 2 * i + 2) {
    }
    const auto given = Clock::now();
    if (i < hand_overs - rounds) {
      waited += nanoseconds(begin, given);
      continue;
    }
    sum += read(words);
    const auto once = Clock::now();
    sum += read(words);
    first += nanoseconds(given, once);
    again += nanoseconds(once, Clock::now());
  }
  other.join();
  const double bytes = static_cast<double>(words.size() * 8) * rounds;
  std::printf("hand-over: %.0f ns; reading 512 KiB the other wrote: %.0f GB/s, again: %.0f GB/s%s\n",
              waited / (2.0 * (hand_overs - rounds)), bytes / first, bytes / again, sum ? "" : " ");
}
