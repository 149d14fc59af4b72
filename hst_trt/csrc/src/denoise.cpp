#include "denoise.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "numpy_random.h"

namespace hst_trt {
namespace {

// What the tokens outside the mask follow: the small model, or where the step has none, their last velocity.
void sketch(Workspace &ws, const Step &step) {
  if (step.small) {
    ws.small();
  } else {
    ws.keep_last();
  }
}

// [images, h w], 1 for `tokens` tokens of each image; an image's mask does not depend on how many follow it.
std::vector<uint8_t> random_mask(uint64_t seed, size_t t, const RequestShape &shape, int64_t tokens) {
  const auto n = static_cast<size_t>(shape.tokens()), count = static_cast<size_t>(shape.images) * n;
  const std::vector<double> lots = numpy_uniform(seed, t, count);
  std::vector<uint8_t> mask(count);
  std::vector<size_t> order(n);
  for (size_t image = 0; image < count; image += n) {
    std::iota(order.begin(), order.end(), image);
    std::sort(order.begin(), order.end(), [&lots](size_t a, size_t b) { return lots[a] < lots[b]; });
    for (size_t i = 0; i < static_cast<size_t>(tokens); ++i) mask[order[i]] = 1;
  }
  return mask;
}

// Draws the mask of step t from the predictions of the step before, `fresh` of whose tokens the large model computed.
int64_t redraw(Workspace &ws, const StitchPlan &plan, size_t t, int64_t fresh) {
  const Step &next = plan.steps[t];
  ws.score(fresh);
  const int64_t tokens =
      next.large_tokens == kByThreshold ? bucket_for(static_cast<double>(ws.count()), plan.request.buckets) : next.large_tokens;
  if (plan.mask && plan.mask->random_seed) ws.impose(random_mask(*plan.mask->random_seed, t, ws.shape, tokens));
  if (tokens < plan.request.num_tokens) ws.select(tokens);
  return tokens;
}

}  // namespace

std::vector<StepRecord> denoise(Workspace &ws, StitchPlan plan, bool keep_masks,
                                const std::function<bool(int64_t, const StepRecord &)> &on_step_end) {
  const int64_t n = plan.request.num_tokens;
  const bool looks_back = plan.looks_back();
  std::vector<StepRecord> records;
  std::vector<std::pair<MarkPtr, MarkPtr>> spans;
  std::vector<float> changes;
  int64_t drawn = 0;  // tokens in the mask that the last redraw left
  for (size_t t = 0; t < plan.steps.size(); ++t) {
    const MarkPtr start = ws.mark();
    ws.advance();
    Step step = plan.steps[t];
    const int64_t tokens = step.large_tokens == kByThreshold ? drawn : step.large_tokens;

    if (tokens == n) {
      ws.large();
      if (plan.adaptive && step.stage == Stage::kLarge && t > 0) {
        changes.push_back(ws.change());
        const auto done = static_cast<int64_t>(t) + 1;
        if (plan.may_switch_after(done) && plan.adaptive->fires(changes)) {
          plan = plan.switched_at(done);
          step = plan.steps[t];
        }
      }
      if (step.small || step.redraw) {
        sketch(ws, step);
        ws.compare_all();
      }
    } else if (tokens > 0) {
      sketch(ws, step);
      ws.large_masked(tokens);
      ws.blend(tokens);
    } else if (plan.correction > 0) {
      ws.small();
      ws.correct();
    } else {
      ws.small_alone();
    }

    std::vector<uint8_t> mask;
    if (keep_masks && 0 < tokens && tokens < n) mask = ws.active_mask(tokens);
    if (step.redraw) drawn = redraw(ws, plan, t + 1, tokens);
    ws.integrate();
    if (looks_back) ws.remember();
    const MarkPtr end = ws.mark();
    spans.emplace_back(start, end);
    const double seconds = ws.records() ? std::numeric_limits<double>::quiet_NaN() : ws.elapsed(*start, *end);
    records.push_back({step, tokens, seconds, std::move(mask)});
    if (!on_step_end(static_cast<int64_t>(t), records.back())) break;
  }
  for (size_t t = records.size(); t-- > 0;) {  // the last one first: whoever waits for it waits once
    records[t].seconds = ws.elapsed(*spans[t].first, *spans[t].second);
  }
  return records;
}

}  // namespace hst_trt
