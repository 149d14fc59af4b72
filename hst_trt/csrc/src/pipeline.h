// A bundle as a pipeline: requests checked, plans made, pictures drawn: hst_trt/pipeline.py and hst_trt/arguments.py.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "backend.h"
#include "bundle.h"
#include "codec.h"
#include "cost.h"
#include "denoise.h"
#include "hst_trt.h"
#include "plan.h"
#include "tokenizer.h"
#include "workspace.h"

namespace hst_trt {

// A bundle and its tokenizers. Never changes once opened, so pipelines of any thread share it.
struct Opened {
  Bundle bundle;
  std::vector<Tokenizer> tokenizers;
};

std::shared_ptr<const Opened> open_for_pipelines(const std::string &path, const OnHash &on_hash);

// The loop between two steps, as a callback sees it.
struct LoopView {
  int64_t step, steps;  // the index of the step that is done, and how many the plan has
  double timestep;
  const StepRecord &record;
  size_t latent_count;
  std::function<std::vector<float>()> latents;  // [images, C, h p, w p]
  std::function<void(const float *)> set_latents;
};

enum class Next { kGoOn, kCancel, kStop };

// A request as the C interface takes it, in values of our own.
struct Request {
  std::vector<std::string> prompts, negative_prompts;
  int64_t images_per_prompt = 1;
  int64_t height = 0, width = 0, num_inference_steps = 0;  // 0: the bundle's
  double guidance_scale = -1;                              // negative: the bundle's
  std::vector<uint64_t> seeds;
  const float *latents = nullptr;  // the caller's; null: from seeds
  size_t latent_count = 0;
  PlanRequest plan;  // without steps, tokens and buckets, which the bundle decides
  bool keep_masks = false;
  bool rgb = true, keep_latents = false;  // which results
  std::function<Next(const LoopView &)> on_step_end;
};

struct Result {
  RequestShape shape;
  int64_t height, width;  // pixels
  std::array<int64_t, 4> latent_shape;
  std::vector<uint8_t> pixels;
  std::vector<float> latents;  // [images, C, h p, w p]
  std::vector<uint64_t> seeds;
  std::vector<StepRecord> records;
  double text_seconds = 0, denoise_seconds = 0, vae_seconds = 0;
  std::vector<std::pair<std::string, double>> engine_seconds;
  CallCosts costs;
  hst_stats stats;
  std::vector<std::string> warnings;
};

// The shape of a request. Throws Error, HST_REQUEST.
RequestShape shape_request(const Bundle &bundle, const Request &request);
std::array<int64_t, 4> latent_shape(const PairSpec &spec, const RequestShape &shape);

// The plan of a request. Throws Error, HST_REQUEST.
StitchPlan plan_request(const Bundle &bundle, const Request &request);

// Draws. Not for use by two threads at once. After an error it can be used again.
class Pipeline {
 public:
  // low_memory: free graphs, and the buffers bound to them, as soon as a request no longer needs them.
  Pipeline(std::shared_ptr<const Opened> opened, std::unique_ptr<Backend> backend, bool low_memory);
  Result generate(const Request &request);
  const Bundle &bundle() const { return opened_->bundle; }

 private:
  Result draw(const Request &request, const StitchPlan &plan, const RequestShape &shape);
  std::vector<std::vector<int64_t>> tokens_of(const std::vector<std::string> &texts, std::vector<std::string> &warnings) const;
  Encoder &encoder(int64_t prompts, int64_t rows);
  Workspace &workspace(const RequestShape &shape);
  Decoder &decoder(int64_t h, int64_t w);
  void drop();  // all but the engines

  std::shared_ptr<const Opened> opened_;
  std::unique_ptr<Backend> backend_;
  bool low_memory_;
  std::pair<int64_t, int64_t> encoder_for_, decoder_for_;
  std::unique_ptr<Encoder> encoder_;
  std::unique_ptr<Workspace> workspace_;
  std::unique_ptr<Decoder> decoder_;
};

}  // namespace hst_trt
