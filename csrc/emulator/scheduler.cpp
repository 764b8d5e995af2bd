// Fibers, and the scheduler that runs the fibers of a block.
//
// A launch hands its blocks to worker threads. A worker runs one block at a time: every fiber in turn, until it waits
// or returns; then it releases the warps and barriers of which everybody has arrived. If nobody can go on, that is a
// deadlock, and the launch fails with the places where the fibers wait.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>
#include <string>
#include <thread>

#include "../cuda/simt.h"

#if defined(CONVLAB_TSAN)
extern "C" {
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void* __tsan_get_current_fiber();
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#define CONVLAB_TSAN_ONLY(...) __VA_ARGS__
#else
#define CONVLAB_TSAN_ONLY(...)
#endif

namespace convlab::emulator {

thread_local Thread* thread = nullptr;
thread_local Block* block = nullptr;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int64_t kMaxDynamicShared = 227 * 1024;  // of one block on sm_90
constexpr size_t kMaxStaticShared = 48 * 1024;

struct Settings {
  std::atomic<unsigned> seed{0};  // 0: in order
  std::atomic<int> workers{2};
  std::atomic<bool> wide{false};  // indices are of 64 bits, however small
} settings;

struct Launch {
  const std::function<void()>* body = nullptr;
  std::mutex mutex;
  std::string error;
  std::atomic<bool> failed{false};
};

struct SharedVariable {
  int key;
  size_t bytes;
  void* memory;
};

// What a worker keeps besides the block it runs.
struct Worker {
  Launch* launch = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<SharedVariable> shared;
  void* stack_pointer = nullptr;  // of the scheduler
  void* sanitizer_fiber = nullptr;
};
thread_local Worker* worker = nullptr;

std::atomic<int64_t> launches{0};
std::string last_error;
std::mutex last_error_mutex;

// NaN in every floating-point type. Not memset, which the sanitizers watch.
void poison(void* memory, size_t bytes) {
  asm volatile("rep stosb" : "+D"(memory), "+c"(bytes) : "a"(0xff) : "memory");
}

struct Stack {
  char* memory;
  void* sanitizer_fiber;  // which takes long to make
};

class Stacks {  // kept between launches
 public:
  Stack take() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        const Stack stack = free_.back();
        free_.pop_back();
        return stack;
      }
    }
    void* memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    void* fiber = nullptr;
    CONVLAB_TSAN_ONLY(fiber = __tsan_create_fiber(0);)
    return {static_cast<char*>(memory), fiber};
  }
  void give(Stack stack) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(stack);
  }

 private:
  std::mutex mutex_;
  std::vector<Stack> free_;
} stacks;

}  // namespace

// Saves the callee's registers on this stack, and goes on where `to` saved them.
extern "C" void convlab_switch_stack(void** save, void* to);
asm(R"(
.text
.type convlab_switch_stack,@function
.hidden convlab_switch_stack
.globl convlab_switch_stack
convlab_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace {

CONVLAB_TSAN_ONLY(char block_begins; char block_ends;)

void to_scheduler() {
  CONVLAB_TSAN_ONLY(__tsan_switch_to_fiber(worker->sanitizer_fiber, 1);)
  convlab_switch_stack(&thread->stack_pointer, worker->stack_pointer);
}

void to_thread(Thread* next) {
  thread = next;
  CONVLAB_TSAN_ONLY(__tsan_switch_to_fiber(next->sanitizer_fiber, 1);)
  convlab_switch_stack(&worker->stack_pointer, next->stack_pointer);
}

void thread_main() {
  CONVLAB_TSAN_ONLY(__tsan_acquire(&block_begins);)
  (*worker->launch->body)();
  CONVLAB_TSAN_ONLY(__tsan_release(&block_ends);)
  thread->state = State::done;
  to_scheduler();
  std::abort();  // nobody resumes a thread that is done
}

void begin(Thread* next) {
  const Stack stack = stacks.take();
  next->stack = stack.memory;
  next->sanitizer_fiber = stack.sanitizer_fiber;
  void** top = reinterpret_cast<void**>(next->stack + kStackBytes) - 2;
  *top = reinterpret_cast<void*>(&thread_main);
  next->stack_pointer = top - 6;
}

void end(Thread& thread) {
  if (!thread.stack) return;
  stacks.give({thread.stack, thread.sanitizer_fiber});
  thread.stack = nullptr;
}

std::string place(const Thread* where) {
  char text[128];
  std::snprintf(text, sizeof text, " in block (%u, %u, %u)", block->index.x, block->index.y, block->index.z);
  std::string result = text;
  if (where) {
    std::snprintf(text, sizeof text, ", thread (%u, %u, %u)", where->index.x, where->index.y, where->index.z);
    result += text;
  }
  return result;
}

void report(const std::string& message) {
  const std::lock_guard<std::mutex> lock(worker->launch->mutex);
  if (worker->launch->error.empty()) worker->launch->error = message;
  worker->launch->failed = true;
}

// Each group of waiting threads once, with the first of its members.
std::string who_waits() {
  std::string text;
  const Thread* previous = nullptr;
  int shown = 0;
  for (const Thread& t : worker->threads) {
    if (t.state != State::at_block_barrier && t.state != State::at_warp_barrier) continue;
    if (previous && previous->state == t.state && previous->site == t.site && previous->mask == t.mask) continue;
    previous = &t;
    if (++shown > 8) break;
    char line[160];
    std::snprintf(line, sizeof line, "\n  from thread (%u, %u, %u): at a %s on line %d", t.index.x, t.index.y,
                  t.index.z, t.state == State::at_block_barrier ? "block barrier" : "warp collective", t.site);
    text += line;
  }
  return text;
}

// Lets go the lanes of one warp whose collective is complete. Returns whether there were any.
bool release_warp(Thread* lanes, int count) {
  bool any = false;
  for (int i = 0; i < count; ++i) {
    if (lanes[i].state != State::at_warp_barrier) continue;
    const uint32_t mask = lanes[i].mask, present = count == kWarp ? ~0u : (1u << count) - 1;
    if (!(mask >> i & 1)) {
      report("a lane calls a collective whose mask leaves it out," + place(&lanes[i]));
      return false;
    }
    uint32_t arrived = 0;
    for (int j = 0; j < count; ++j)
      if (lanes[j].state == State::at_warp_barrier && lanes[j].mask == mask && lanes[j].site == lanes[i].site)
        arrived |= 1u << j;
    if ((arrived & mask) != (mask & present)) continue;
    for (int j = 0; j < count; ++j)
      if (mask >> j & 1 && lanes[j].state == State::at_warp_barrier) lanes[j].state = State::ready;
    any = true;
  }
  return any;
}

// Lets go everybody if all threads of the block have arrived at one barrier.
bool release_block() {
  const Thread* first = nullptr;
  for (const Thread& t : worker->threads) {
    if (t.state != State::at_block_barrier) return false;
    if (first && first->site != t.site) {
      report("threads meet at different block barriers" + place(nullptr) + who_waits());
      return false;
    }
    first = &t;
  }
  for (Thread& t : worker->threads) t.state = State::ready;
  return true;
}

void run_block(std::mt19937* random) {
  const int count = static_cast<int>(worker->threads.size()), warps = (count + kWarp - 1) / kWarp;
  std::vector<int> order(static_cast<size_t>(warps));
  for (int i = 0; i < warps; ++i) order[static_cast<size_t>(i)] = i;
  while (!worker->launch->failed) {
    if (random) std::shuffle(order.begin(), order.end(), *random);
    for (const int warp : order) {
      Thread* lanes = &worker->threads[static_cast<size_t>(warp * kWarp)];
      const int width = std::min(kWarp, count - warp * kWarp);
      const int rotation = random ? static_cast<int>((*random)() % static_cast<unsigned>(width)) : 0;
      do {
        for (int i = 0; i < width; ++i) {
          Thread* next = &lanes[(i + rotation) % width];
          if (next->state != State::ready) continue;
          if (!next->stack) begin(next);
          to_thread(next);
          if (next->state == State::done) end(*next);
          if (worker->launch->failed) return;
        }
      } while (release_warp(lanes, width));
      if (worker->launch->failed) return;
    }
    const bool all_done = std::all_of(worker->threads.begin(), worker->threads.end(),
                                      [](const Thread& t) { return t.state == State::done; });
    if (all_done) return;
    if (!release_block() && !worker->launch->failed) report("deadlock" + place(nullptr) + who_waits());
  }
}

void prepare_block(dim3 grid, dim3 threads, int64_t index) {
  block->index.x = static_cast<unsigned>(index % grid.x);
  block->index.y = static_cast<unsigned>(index / grid.x % grid.y);
  block->index.z = static_cast<unsigned>(index / grid.x / grid.y);
  poison(block->dynamic, static_cast<size_t>(block->dynamic_bytes));
  for (const auto& variable : worker->shared) poison(variable.memory, variable.bytes);
  for (size_t i = 0; i < worker->threads.size(); ++i) {
    Thread& t = worker->threads[i];
    const unsigned n = static_cast<unsigned>(i);
    t.index.x = n % threads.x;
    t.index.y = n / threads.x % threads.y;
    t.index.z = n / threads.x / threads.y;
    t.lane = static_cast<int>(i % kWarp);
    t.warp = &worker->warps[i / kWarp];
    t.state = State::ready;
    t.exchanges = t.block_meetings = t.warp_meetings = 0;
    t.copies.clear();
  }
}

void work(Launch& launch, dim3 grid, dim3 threads, int64_t shared_bytes, const std::vector<int64_t>& order,
          std::atomic<size_t>& next) {
  Worker self;
  Block current;
  worker = &self;
  block = &current;
  self.launch = &launch;
  CONVLAB_TSAN_ONLY(self.sanitizer_fiber = __tsan_get_current_fiber();)
  const size_t count = static_cast<size_t>(threads.x) * threads.y * threads.z;
  self.threads.resize(count);
  self.warps.resize((count + kWarp - 1) / kWarp);
  current.threads = threads;
  current.blocks = grid;
  current.dynamic_bytes = shared_bytes;
  current.dynamic =
      static_cast<unsigned char*>(std::aligned_alloc(1024, static_cast<size_t>(shared_bytes + 2047) / 1024 * 1024));
  const unsigned seed = settings.seed;
  std::mt19937 random(seed);
  for (size_t k; !launch.failed && (k = next++) < order.size();) {
    prepare_block(grid, threads, order[k]);
    CONVLAB_TSAN_ONLY(__tsan_release(&block_begins);)
    run_block(seed ? &random : nullptr);
    CONVLAB_TSAN_ONLY(__tsan_acquire(&block_ends);)
    for (Thread& t : self.threads) end(t);
  }
  std::free(current.dynamic);
  for (const auto& variable : self.shared) std::free(variable.memory);
  worker = nullptr;
  block = nullptr;
  thread = nullptr;
}

void wait(State state, uint32_t mask, int site, [[maybe_unused]] void* meeting) {
  thread->mask = mask;
  thread->site = site;
  thread->state = state;
  CONVLAB_TSAN_ONLY(__tsan_release(meeting);)
  to_scheduler();
  CONVLAB_TSAN_ONLY(__tsan_acquire(meeting);)
}

}  // namespace

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  report(text + place(thread));
  thread->state = State::done;
  to_scheduler();
  std::abort();  // nobody resumes a thread that has failed
}

// Meetings alternate between two tokens: who leaves late must not see what those who left early did since.
void wait_for_block(int site) {
  wait(State::at_block_barrier, 0, site, reinterpret_cast<char*>(block) + (thread->block_meetings++ & 1));
}
void wait_for_warp(uint32_t mask, int site) {
  wait(State::at_warp_barrier, mask, site, reinterpret_cast<char*>(thread->warp) + (thread->warp_meetings++ & 1));
}

void* shared_variable(int key, size_t bytes) {
  size_t total = bytes;
  for (const auto& variable : worker->shared) {
    if (variable.key == key && variable.bytes == bytes) return variable.memory;
    total += variable.bytes;
  }
  if (total > kMaxStaticShared)
    fail("%zu bytes of static shared memory, of which there are %zu", total, kMaxStaticShared);
  void* memory = std::aligned_alloc(128, (bytes + 127) / 128 * 128);
  poison(memory, bytes);
  worker->shared.push_back({key, bytes, memory});
  return memory;
}

const char* error_text(int code) {
  static thread_local std::string text;
  const std::lock_guard<std::mutex> lock(last_error_mutex);
  text = code == 0 ? "no error" : code == 1 ? "invalid value" : last_error;
  return text.c_str();
}

int run(dim3 grid, dim3 threads, int64_t shared_bytes, const std::function<void()>& body) {
  constexpr int kInvalidConfiguration = 9, kLaunchFailure = 719;  // as CUDA numbers them
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  const int64_t per_block = static_cast<int64_t>(threads.x) * threads.y * threads.z;
  const bool valid = blocks > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 && per_block > 0 &&
                     per_block <= 1024 && threads.z <= 64 && shared_bytes >= 0 && shared_bytes <= kMaxDynamicShared;
  if (!valid) {
    const std::lock_guard<std::mutex> lock(last_error_mutex);
    last_error = "invalid configuration: grid (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
                 std::to_string(grid.z) + "), block (" + std::to_string(threads.x) + ", " + std::to_string(threads.y) +
                 ", " + std::to_string(threads.z) + "), " + std::to_string(shared_bytes) + " bytes of shared memory";
    return kInvalidConfiguration;
  }
  ++launches;
  std::vector<int64_t> order(static_cast<size_t>(blocks));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  if (settings.seed) std::shuffle(order.begin(), order.end(), std::mt19937(settings.seed));
  Launch launch;
  launch.body = &body;
  std::atomic<size_t> next{0};
  const auto task = [&] { work(launch, grid, threads, shared_bytes, order, next); };
  std::vector<std::thread> helpers;
  int64_t workers = std::min<int64_t>(settings.workers, blocks);
  if (blocks * per_block < 4096) workers = 1;  // not worth a thread
  CONVLAB_TSAN_ONLY(workers = 1;)
  for (int64_t i = 1; i < workers; ++i) helpers.emplace_back(task);
  task();
  for (auto& helper : helpers) helper.join();
  if (!launch.failed) return 0;
  const std::lock_guard<std::mutex> lock(last_error_mutex);
  last_error = launch.error;
  return kLaunchFailure;
}

}  // namespace convlab::emulator

namespace convlab::cuda {

int64_t narrow_indices() { return emulator::settings.wide ? 0 : std::numeric_limits<int32_t>::max() / 2; }

}  // namespace convlab::cuda

// seed 0 runs threads in order; any other shuffles them, differently for every seed.
extern "C" CONVLAB_EXPORT void convlab_emulator_configure(unsigned seed, int workers) {
  convlab::emulator::settings.seed = seed;
  convlab::emulator::settings.workers = workers;
}

// Whether kernels that count in 32 bits where that is enough count in 64.
extern "C" CONVLAB_EXPORT void convlab_emulator_widen_indices(bool wide) { convlab::emulator::settings.wide = wide; }

// How many kernels have run.
extern "C" CONVLAB_EXPORT int64_t convlab_emulator_launches() { return convlab::emulator::launches; }
