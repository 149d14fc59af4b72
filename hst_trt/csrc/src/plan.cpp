#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <set>

#include "error.h"

namespace hst_trt {
namespace {

constexpr const char *kStageNames[] = {"large", "hybrid", "small"};

std::string shown(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

// To 6 decimals, by way of the decimal text, which is how Python rounds.
double rounded(double value) {
  char text[64];
  std::snprintf(text, sizeof text, "%.6f", value);
  return std::strtod(text, nullptr);
}

std::optional<int64_t> every_of(const PlanRequest &request) {
  return request.schedule == "ras" && !request.refresh_every ? 3 : request.refresh_every;
}

int64_t up(double value) { return static_cast<int64_t>(std::ceil(value)); }

Stages default_stages(const PlanRequest &request) {
  const int64_t n = request.num_steps;
  const std::string &schedule = request.schedule;
  int64_t first = std::min(n, up(0.1 * static_cast<double>(n)));
  int64_t hybrid = std::min(n - first, static_cast<int64_t>(std::nearbyint(0.33 * static_cast<double>(n))));  // halves to even
  if (request.adaptive) {
    first = request.adaptive->bounds(n).second;
    hybrid = std::min(hybrid, n - first);
  }
  if (schedule == "large") return {n, 0, 0};
  if (schedule == "small") return {0, 0, n};
  if (schedule == "ras") {
    // The last step is a full one: after a masked one, the edges of the mask would stay in the picture.
    int64_t masked = std::max<int64_t>(0, n - std::max<int64_t>(2, first));
    masked -= masked % std::max<int64_t>(1, *every_of(request));
    return {n - masked, masked, 0};
  }
  if (schedule == "hybrid") return {first, hybrid, n - first - hybrid};
  if (request.adaptive) return {first, 0, n - first};
  const int64_t large = std::min(n, first + (hybrid + 1) / 2);
  return {large, 0, n - large};
}

std::array<bool, 3> stages_of_schedule(const std::string &schedule) {
  if (schedule == "large") return {true, false, false};
  if (schedule == "small") return {false, false, true};
  if (schedule == "t-stitch" || schedule == "srdiffusion") return {true, false, true};
  if (schedule == "ras") return {true, true, false};
  return {true, true, true};
}

Stages stages_of(const PlanRequest &request) {
  if (!request.stages) return default_stages(request);
  const Stages &stages = *request.stages;
  const int64_t sum = std::accumulate(stages.begin(), stages.end(), int64_t{0});
  if (*std::min_element(stages.begin(), stages.end()) < 0 || sum != request.num_steps) {
    throw Error(HST_REQUEST,
                "stages " + std::to_string(stages[0]) + "," + std::to_string(stages[1]) + "," + std::to_string(stages[2]) + " do not make " +
                    std::to_string(request.num_steps) + " steps",
                "3 numbers that add up to " + std::to_string(sum),
                "give three numbers of large, hybrid and small steps that add up to num_inference_steps");
  }
  const std::array<bool, 3> may = stages_of_schedule(request.schedule);
  for (size_t i = 0; i < 3; ++i) {
    if (stages[i] > 0 && !may[i]) {
      throw Error(HST_REQUEST,
                  "the schedule '" + request.schedule + "' has no " + kStageNames[i] + " stage, but stages ask for " +
                      std::to_string(stages[i]) + " such steps",
                  "", "set that number to 0 or choose the schedule hybrid");
    }
  }
  return stages;
}

using Steps = std::vector<Step>;

Steps repeated(int64_t count, const Step &step) { return Steps(static_cast<size_t>(count), step); }
Steps large_only(const PlanRequest &request, int64_t count) { return repeated(count, {Stage::kLarge, request.num_tokens}); }
Steps small_only(int64_t count) { return repeated(count, {Stage::kSmall, 0, true}); }

Steps joined(Steps first, const Steps &second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

// Which of the masked steps are full large calls.
std::set<int64_t> refreshes(int64_t masked, std::optional<int64_t> every) {
  std::set<int64_t> steps;
  if (!every) {
    if (masked > 8) steps.insert(masked / 2);
  } else if (*every > 0) {
    for (int64_t k = *every - 1; k < masked; k += *every) steps.insert(k);
  }
  return steps;
}

// Full large steps, then masked ones; `small`: the small model draws the unmasked tokens.
Steps masked_run(const PlanRequest &request, int64_t large, int64_t masked, bool small) {
  const int64_t n = request.num_tokens;
  const bool by_ratio = request.mask.threshold == 0;
  const int64_t budget = by_ratio ? bucket_for(request.mask.ratio * static_cast<double>(n), request.buckets) : kByThreshold;
  if (budget == n) return large_only(request, large + masked);  // a mask of everything is no mask
  std::set<int64_t> refreshed = refreshes(masked, every_of(request));
  if (masked > 0 && large == 0) refreshed.insert(0);
  std::vector<int64_t> tokens(static_cast<size_t>(large), n);
  for (int64_t k = 0; k < masked; ++k) tokens.push_back(refreshed.count(k) ? n : budget);
  Steps steps;
  for (size_t t = 0; t < tokens.size(); ++t) {
    const bool redraw = t + 1 < tokens.size() && tokens[t + 1] != n, in_large = static_cast<int64_t>(t) < large;
    const bool needs_small = small && (tokens[t] != n || redraw || (!in_large && request.correction > 0));
    steps.push_back({in_large || !small ? Stage::kLarge : Stage::kHybrid, tokens[t], needs_small, redraw});
  }
  return steps;
}

Steps steps_of(const PlanRequest &request, const Stages &stages) {
  const std::string &schedule = request.schedule;
  if (schedule == "large") return large_only(request, stages[0]);
  if (schedule == "small") return small_only(stages[2]);
  if (schedule == "t-stitch") return joined(small_only(stages[2]), large_only(request, stages[0]));
  if (schedule == "ras") {
    if (stages[1] > 0 && stages[0] < 2) {
      throw Error(HST_REQUEST, "the ras schedule ranks tokens by how much their velocity changes, which needs two full steps first",
                  std::to_string(stages[0]) + " full step(s)", "give stages whose first number is 2 or more");
    }
    return masked_run(request, stages[0], stages[1], false);
  }
  Steps steps = masked_run(request, stages[0], stages[1], true);
  if (request.correction > 0 && stages[2] > 0 && !steps.empty()) steps.back().small = true;  // the small stage adds the last known difference
  return joined(std::move(steps), small_only(stages[2]));
}

}  // namespace

void MaskRule::check() const {
  if (!(ratio > 0 && ratio <= 1)) {
    throw Error(HST_REQUEST, "mask ratio " + shown(ratio) + " is outside (0, 1]", "", "0.2 to 0.5 is usual, 1 is no mask");
  }
  if (!(threshold >= 0 && std::isfinite(threshold))) {
    throw Error(HST_REQUEST, "mask threshold " + shown(threshold) + " is not a positive number", "", "2 is a good start; 0 is none");
  }
  const auto within = [](const char *name, double value, double most) {
    if (!(value >= 0 && value <= most)) {
      throw Error(HST_REQUEST, "mask " + std::string(name) + " " + shown(value) + " is outside [0, " + shown(most) + "]");
    }
  };
  within("decay", decay, 1);
  within("drift", drift, 100);
  within("starvation", starvation, 100);
  if (random_seed && threshold != 0) {
    throw Error(HST_REQUEST, "a random mask has no scores that could exceed a threshold", "", "give a ratio instead");
  }
}

std::pair<int64_t, int64_t> AdaptiveSwitch::bounds(int64_t steps) const {
  constexpr double kEarliest = 0.1, kLatest = 0.6;
  const int64_t first = std::min(steps, std::max<int64_t>(2, up(kEarliest * static_cast<double>(steps))));
  return {first, std::max(first, static_cast<int64_t>(std::floor(kLatest * static_cast<double>(steps))))};
}

bool AdaptiveSwitch::fires(const std::vector<float> &changes) const {
  constexpr double kTolerance = 0.01;
  if (changes.size() < 2) return false;
  const double fall = static_cast<double>(changes[changes.size() - 2]) - static_cast<double>(changes.back());
  return 0 < fall && fall < kTolerance;
}

bool StitchPlan::uses_large() const {
  return std::any_of(steps.begin(), steps.end(), [](const Step &step) { return step.large_tokens != 0; });
}

bool StitchPlan::uses_small() const {
  return std::any_of(steps.begin(), steps.end(), [](const Step &step) { return step.small; });
}

bool StitchPlan::looks_back() const {
  const bool alone = std::any_of(steps.begin(), steps.end(), [](const Step &step) { return step.redraw && !step.small; });
  return adaptive || alone || (mask && mask->drift > 0);
}

bool StitchPlan::may_switch_after(int64_t large_steps) const {
  return adaptive && adaptive->bounds(request.num_steps).first <= large_steps && large_steps < stages_of(request)[0];
}

StitchPlan StitchPlan::switched_at(int64_t large_steps) const {
  PlanRequest rest = request;
  const int64_t hybrid = std::min(stages_of(request)[1], request.num_steps - large_steps);
  rest.stages = {large_steps, hybrid, request.num_steps - large_steps - hybrid};
  rest.adaptive.reset();
  return make_plan(rest);
}

std::vector<int64_t> token_buckets(int64_t num_tokens, const std::vector<double> &ratios) {
  const int64_t grain = num_tokens >= 640 ? 64 : 8;
  std::set<int64_t> counts{num_tokens};
  for (const double ratio : ratios) {
    const int64_t count = up(rounded(ratio * static_cast<double>(num_tokens)));
    counts.insert(std::min(num_tokens, up(static_cast<double>(count) / static_cast<double>(grain)) * grain));
  }
  return {counts.begin(), counts.end()};
}

int64_t bucket_for(double count, const std::vector<int64_t> &buckets) {
  const double wanted = rounded(count);
  const auto found = std::find_if(buckets.begin(), buckets.end(), [wanted](int64_t b) { return static_cast<double>(b) >= wanted; });
  return found == buckets.end() ? buckets.back() : *found;
}

StitchPlan make_plan(const PlanRequest &request) {
  static const std::set<std::string> known{"hybrid", "large", "small", "t-stitch", "srdiffusion", "ras"};
  if (known.count(request.schedule) == 0) {
    throw Error(HST_REQUEST, "unknown schedule '" + request.schedule + "'", "",
                "choose one of hybrid, large, small, t-stitch, srdiffusion, ras");
  }
  request.mask.check();
  request.sampling.check();
  if (!(request.correction >= 0 && request.correction <= 1)) {
    throw Error(HST_REQUEST, "correction " + shown(request.correction) + " is outside [0, 1]", "", "0 is off, 0.9 is a good start");
  }
  if (request.refresh_every && *request.refresh_every < 0) {
    throw Error(HST_REQUEST, "refresh_every " + std::to_string(*request.refresh_every) + " is negative", "", "0 means no refresh");
  }
  if (request.adaptive && request.schedule != "hybrid" && request.schedule != "srdiffusion") {
    throw Error(HST_REQUEST, "the schedule '" + request.schedule + "' has no switch that could be adaptive", "",
                "use hybrid or srdiffusion, or leave the adaptive switch out");
  }
  const Stages stages = stages_of(request);
  if (request.adaptive && stages[0] == request.num_steps) {
    throw Error(HST_REQUEST, "an adaptive switch has no steps to switch to",
                std::to_string(stages[0]) + " large steps of " + std::to_string(request.num_steps));
  }
  StitchPlan plan{steps_of(request, stages), std::nullopt, 0, request.adaptive, request};
  const auto any = [&plan](auto is) { return std::any_of(plan.steps.begin(), plan.steps.end(), is); };
  if (any([&](const Step &s) { return s.large_tokens == kByThreshold || (s.large_tokens > 0 && s.large_tokens < request.num_tokens); })) {
    plan.mask = request.mask;
  }
  const bool compared = any([](const Step &s) { return s.small && s.large_tokens != 0; });  // only then is the difference ever known
  if (compared && any([](const Step &s) { return s.small && s.stage != Stage::kLarge; })) plan.correction = request.correction;
  return plan;
}

}  // namespace hst_trt
