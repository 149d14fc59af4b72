// The stitched denoising loop: hst_trt/denoise.py. What a step does is said by its Step, so every schedule runs through this one loop.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "plan.h"
#include "workspace.h"

namespace hst_trt {

// What a step did, and the mask it used, if kept.
struct StepRecord {
  Step step;
  int64_t tokens;  // that the large model computed
  double seconds;  // not a number until the loop has ended, where asking would make the host wait
  std::vector<uint8_t> mask;  // [images, h, w]
};

// Runs a plan over the request that the workspace holds, whose latents it leaves denoised. on_step_end gets the index of the step
// and what it did, and ends the loop early by returning false.
std::vector<StepRecord> denoise(Workspace &ws, StitchPlan plan, bool keep_masks,
                                const std::function<bool(int64_t, const StepRecord &)> &on_step_end);

}  // namespace hst_trt
