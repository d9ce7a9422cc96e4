// Small kernels that are right, and the same kernels with one bug each: what the emulator must catch.
#pragma once

#include <string>
#include <vector>

namespace sparsenet::emulator {

struct PlantedParams {
  const float* input;
  float* output;
  int count;
};

std::vector<std::string> planted_names();
void run_planted(const std::string& name, const PlantedParams& params);

} // namespace sparsenet::emulator
