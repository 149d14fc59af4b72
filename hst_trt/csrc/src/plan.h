// Stitch plans: what happens at each denoising step, decided before the first one wherever that is possible: hst_trt/plan.py.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "schedule.h"

namespace hst_trt {

enum class Stage { kLarge, kHybrid, kSmall };

inline constexpr int64_t kByThreshold = -1;

struct Step {
  Stage stage;
  int64_t large_tokens;  // 0, a bucket, all, or kByThreshold
  bool small = false;
  bool redraw = false;  // whether the mask of the next step is drawn from this one's predictions
};

struct MaskRule {
  double ratio = 0.3, threshold = 0;  // threshold 0: by the ratio
  double decay = 0.9, drift = 0, starvation = 0;
  std::optional<uint64_t> random_seed;  // a control: masks are drawn at random, whatever the scores

  void check() const;  // throws Error, HST_REQUEST
};

// SRDiffusion's rule for leaving the large stage.
struct AdaptiveSwitch {
  std::pair<int64_t, int64_t> bounds(int64_t steps) const;  // the fewest and the most large steps
  bool fires(const std::vector<float> &changes) const;
};

using Stages = std::array<int64_t, 3>;

struct PlanRequest {
  std::string schedule = "hybrid";
  int64_t num_steps, num_tokens;
  std::vector<int64_t> buckets;  // ascending, the last one all tokens
  std::optional<Stages> stages;
  MaskRule mask;
  std::optional<int64_t> refresh_every;
  double correction = 0;
  std::optional<AdaptiveSwitch> adaptive;
  Sampling sampling;
};

struct StitchPlan {
  std::vector<Step> steps;
  std::optional<MaskRule> mask;  // if any step is masked
  double correction;
  std::optional<AdaptiveSwitch> adaptive;
  PlanRequest request;

  bool uses_large() const;
  bool uses_small() const;
  // Whether some step needs the predictions of the one before.
  bool looks_back() const;
  bool may_switch_after(int64_t large_steps) const;
  StitchPlan switched_at(int64_t large_steps) const;
};

std::vector<int64_t> token_buckets(int64_t num_tokens, const std::vector<double> &ratios);
int64_t bucket_for(double count, const std::vector<int64_t> &buckets);

// Throws Error, HST_REQUEST.
StitchPlan make_plan(const PlanRequest &request);

}  // namespace hst_trt
