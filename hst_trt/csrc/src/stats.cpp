#include "stats.h"

#include <limits>

namespace hst_trt {

hst_stats run_stats(int64_t num_tokens, const std::vector<StepRecord> &records, const CallCosts &costs, double denoise_seconds,
                    const std::map<std::string, double> &engine_seconds) {
  hst_stats stats{};
  stats.num_tokens = num_tokens;
  const auto steps = static_cast<double>(records.size());
  for (const StepRecord &record : records) {
    hst_stage_stats &stage = stats.stages[static_cast<int>(record.step.stage)];
    stage.steps += 1;
    stage.large_calls += record.tokens > 0;
    stage.large_tokens += record.tokens;
    stage.small_calls += record.step.small;
    stage.seconds += record.seconds;
    stats.large_tokens += record.tokens;
    if (record.tokens > 0) stats.large_compute += costs.large(record.tokens);
    if (record.step.small) stats.cost += costs.small;
    if (record.step.redraw || (record.tokens > 0 && record.tokens < num_tokens)) stats.cost += costs.glue;
  }
  stats.cost += stats.large_compute;
  stats.large_compute_saved = 1 - stats.large_compute / steps;
  stats.modelled_speedup = steps / stats.cost;
  stats.overhead = std::numeric_limits<double>::quiet_NaN();
  if (denoise_seconds > 0 && !engine_seconds.empty()) {
    stats.overhead = 1;
    for (const char *model : {"large", "small"}) {
      const auto found = engine_seconds.find(model);
      if (found != engine_seconds.end()) stats.overhead -= found->second / denoise_seconds;
    }
  }
  return stats;
}

}  // namespace hst_trt
