// What a run did: which model computed how much in which stage, and what that saved: hst_trt/stats.py.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "cost.h"
#include "denoise.h"
#include "hst_trt.h"

namespace hst_trt {

// engine_seconds: time inside each engine, empty where steps are replayed as one graph each.
hst_stats run_stats(int64_t num_tokens, const std::vector<StepRecord> &records, const CallCosts &costs, double denoise_seconds,
                    const std::map<std::string, double> &engine_seconds);

}  // namespace hst_trt
