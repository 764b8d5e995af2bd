#include "autotune.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <sstream>

namespace convlab {

namespace {
std::mutex table_mutex;
std::map<std::string, Tuned>& table() {
  static std::map<std::string, Tuned> entries;
  return entries;
}

// Best of three after a warm-up, less where one run is long.
double measure(const c10::function_ref<void(Algorithm)>& run, Algorithm algorithm) {
  using Clock = std::chrono::steady_clock;
  double best = 0, spent = 0;
  for (int repeat = 0; repeat < 4 && (repeat < 2 || spent < 0.3); ++repeat) {
    const auto start = Clock::now();
    run(algorithm);
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    spent += seconds;
    if (repeat == 1 || (repeat > 1 && seconds < best)) best = seconds;
  }
  return best;
}
}  // namespace

std::string tuning_key(const ConvProblem& problem, Layout layout, int threads) {
  constexpr const char* passes[] = {"forward", "backward_input", "backward_weight"};
  constexpr const char* dtypes[] = {"float32", "float64", "bfloat16", "float16"};
  const ConvGeometry& g = problem.geometry;
  std::ostringstream key;
  const auto write = [&](const char* name, const int64_t(&values)[kMaxSpatial]) {
    key << ' ' << name << '=' << values[0] << 'x' << values[1] << 'x' << values[2];
  };
  key << passes[static_cast<int>(problem.pass)] << ' ' << dtypes[static_cast<int>(problem.dtype)] << ' '
      << (layout == Layout::channels_last ? "channels_last" : "channels_first") << " threads=" << threads
      << " batch=" << g.batch << " channels=" << g.in_channels << "->" << g.out_channels << " groups=" << g.groups;
  write("input", g.input);
  write("kernel", g.kernel);
  write("stride", g.stride);
  write("padding", g.padding);
  write("dilation", g.dilation);
  if (problem.packed) key << " packed";
  return key.str();
}

Algorithm autotuned(const ConvProblem& problem, Layout layout, int threads,
                    const c10::function_ref<void(Algorithm)>& run) {
  constexpr double hopeless = 8;
  const std::string key = tuning_key(problem, layout, threads);
  {
    const std::lock_guard lock(table_mutex);
    const auto found = table().find(key);
    if (found != table().end() && eligible(found->second.algorithm, problem, settings()))
      return found->second.algorithm;
  }
  const Algorithm expected = choose_algorithm(problem);
  const double limit = hopeless * estimated_cost(expected, problem);
  Tuned tuned{expected, {}};
  for (int index = 0; index < kAlgorithms; ++index) {
    const auto algorithm = static_cast<Algorithm>(index);
    if (!eligible(algorithm, problem, settings()) || estimated_cost(algorithm, problem) > limit) continue;
    tuned.seconds[algorithm_name(algorithm)] = measure(run, algorithm);
  }
  for (int index = 0; index < kAlgorithms; ++index) {
    const auto algorithm = static_cast<Algorithm>(index);
    const auto found = tuned.seconds.find(algorithm_name(algorithm));
    if (found != tuned.seconds.end() && found->second < tuned.seconds[algorithm_name(tuned.algorithm)])
      tuned.algorithm = algorithm;
  }
  const std::lock_guard lock(table_mutex);
  return table().insert_or_assign(key, tuned).first->second.algorithm;
}

std::map<std::string, Tuned> tuned_table() {
  const std::lock_guard lock(table_mutex);
  return table();
}

void set_tuned_table(std::map<std::string, Tuned> entries) {
  const std::lock_guard lock(table_mutex);
  table() = std::move(entries);
}

}  // namespace convlab
