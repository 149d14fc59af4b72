// Sigmas, timesteps and solver steps of a request: hst_trt/schedule.py, whose formulas engines/README.md writes down.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "json.h"

namespace hst_trt {

inline constexpr int64_t kMaxSteps = 1000;  // the length of a request's step table

struct Sampling {
  std::string solver = "euler";               // or "ab2", "dpmpp-2m"
  std::string timestep_spacing = "linspace";  // or "trailing"
  double shift = 0;                           // 0: the pair's own

  void check() const;  // throws Error, HST_REQUEST
};

struct StepTable {
  std::vector<float> timesteps;
  std::vector<float> sigmas;                      // one more, the last one 0
  std::vector<std::array<float, 5>> coefficients;  // a to e of a step
};

struct Scheduler {
  double shift = 1;
  int64_t num_train_timesteps = 1000;

  // A scheduler_config.json. Throws Error, HST_INCOMPATIBLE; std::invalid_argument if it is damaged.
  static Scheduler from_config(const json::Value &config);
  // Throws Error, HST_REQUEST, for a number of steps that it has no sigmas for.
  StepTable table(int64_t steps, const Sampling &sampling) const;
};

}  // namespace hst_trt
