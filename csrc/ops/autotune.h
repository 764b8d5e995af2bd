// What measuring found: the fastest algorithm of each convolution met so far. The table lives as long as the process;
// `torch_convlab.backends` keeps it in a file between processes.
#pragma once
#include <c10/util/FunctionRef.h>

#include <map>
#include <string>
#include <vector>

#include "../algorithm_choice.h"

namespace convlab {

struct Tuned {
  Algorithm algorithm;
  std::map<std::string, double> seconds;  // best time of each algorithm tried
};

// The problem in words: everything that its time depends on.
std::string tuning_key(const ConvProblem& problem, Layout layout, int threads);

// The fastest eligible algorithm: known, or found now by calling run(algorithm) for each a few times. Algorithms that
// are expected to take over 8 times as long as the best are not tried.
Algorithm autotuned(const ConvProblem& problem, Layout layout, int threads,
                    const c10::function_ref<void(Algorithm)>& run);

std::map<std::string, Tuned> tuned_table();
void set_tuned_table(std::map<std::string, Tuned> table);

}  // namespace convlab
