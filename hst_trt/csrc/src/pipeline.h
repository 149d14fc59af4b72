// A bundle as a pipeline: requests checked, plans made, pictures drawn: hst_trt/pipeline.py and hst_trt/arguments.py.
#pragma once

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
#include "denoise.h"
#include "plan.h"
#include "tokenizer.h"
#include "workspace.h"

namespace hst_trt {

// A bundle and its tokenizers. Never changes once opened, so pipelines of any thread share it.
struct Opened {
  Bundle bundle;
  std::vector<Tokenizer> tokenizers;
};

std::shared_ptr<const Opened> open_for_pipelines(const std::string &path);

// A request as the C interface takes it, in values of our own.
struct Request {
  std::vector<std::string> prompts, negative_prompts;
  int64_t images_per_prompt = 1;
  int64_t height = 0, width = 0, num_inference_steps = 0;  // 0: the bundle's
  double guidance_scale = -1;                              // negative: the bundle's
  std::vector<uint64_t> seeds;
  std::vector<float> latents;
  PlanRequest plan;  // without steps, tokens and buckets, which the bundle decides
  bool keep_masks = false;
  std::function<bool(int64_t done, int64_t steps)> progress;  // false cancels
};

struct Result {
  int64_t images, height, width, h, w;
  std::vector<uint8_t> pixels;
  std::vector<uint64_t> seeds;
  std::vector<StepRecord> records;
  double text_seconds, denoise_seconds, vae_seconds;
  std::string warning;
};

// The plan of a request. Throws Error, HST_REQUEST.
StitchPlan plan_request(const Bundle &bundle, const Request &request);

// Draws. Not for use by two threads at once. After an error it can be used again.
class Pipeline {
 public:
  // low_memory: free graphs, and the buffers bound to them, as soon as a request no longer needs them.
  Pipeline(std::shared_ptr<const Opened> opened, std::unique_ptr<Backend> backend, bool low_memory);
  Result generate(const Request &request);

 private:
  Result draw(const Request &request, const StitchPlan &plan, const RequestShape &shape, double scale);
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
