#include "pipeline.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <new>
#include <random>
#include <stdexcept>

#include "error.h"
#include "graph_names.h"
#include "json.h"
#include "noise.h"
#include "unicode.h"

namespace hst_trt {
namespace {

// Token rows or columns of a side in pixels.
int64_t token_side(const Bundle &bundle, const char *name, int64_t asked, int64_t preset) {
  const int64_t side = bundle.spec.token_side(), value = asked == 0 ? preset : asked;
  const int64_t longest = std::min(bundle.manifest.limits.max_side, bundle.spec.max_side()) / side * side;
  const std::string text = name + (" " + std::to_string(value));
  if (value > longest) {
    throw Error(HST_REQUEST, text + " is beyond this bundle's limit", "its longest side is " + std::to_string(longest),
                "use " + std::to_string(longest));
  }
  if (value < side || value % side != 0) {
    const int64_t below = std::max(side, value - value % side);
    const std::string above = below + side <= longest ? " or " + std::to_string(below + side) : "";
    throw Error(HST_REQUEST, text + " is not a multiple of " + std::to_string(side), "", "use " + std::to_string(below) + above);
  }
  return value / side;
}

std::pair<int64_t, int64_t> token_grid(const Bundle &bundle, const Request &request) {
  const auto &defaults = bundle.manifest.defaults;
  return {token_side(bundle, "height", request.height, defaults.height), token_side(bundle, "width", request.width, defaults.width)};
}

// The texts of all images' rows: with guidance the negative ones first.
std::vector<std::string> row_texts(const Request &request, bool guided) {
  std::vector<std::string> texts;
  if (guided) {
    for (size_t i = 0; i < request.prompts.size(); ++i) {
      const auto &negatives = request.negative_prompts;
      texts.push_back(negatives.empty() ? "" : negatives[negatives.size() == 1 ? 0 : i]);
    }
  }
  texts.insert(texts.end(), request.prompts.begin(), request.prompts.end());
  std::vector<std::string> rows;
  for (const std::string &text : texts) rows.insert(rows.end(), static_cast<size_t>(request.images_per_prompt), text);
  return rows;
}

void check_texts(const Request &request) {
  if (request.prompts.empty()) throw Error(HST_REQUEST, "there is no prompt", "", "give one or more");
  for (const auto *texts : {&request.prompts, &request.negative_prompts}) {
    for (const std::string &text : *texts) {
      if (!unicode::is_valid(text)) throw Error(HST_REQUEST, "a prompt is not valid Unicode", "", "write it in UTF-8");
    }
  }
  const size_t negatives = request.negative_prompts.size();
  if (negatives > 1 && negatives != request.prompts.size()) {
    throw Error(HST_REQUEST,
                std::to_string(negatives) + " negative prompts were given for " + std::to_string(request.prompts.size()) + " prompts", "",
                "give one, or one for each");
  }
}

int64_t image_count(const Bundle &bundle, const Request &request) {
  if (request.images_per_prompt < 1) {
    throw Error(HST_REQUEST, "images_per_prompt " + std::to_string(request.images_per_prompt) + " is not positive");
  }
  const int64_t limit = bundle.manifest.limits.max_images, prompts = static_cast<int64_t>(request.prompts.size());
  if (prompts > limit || request.images_per_prompt > limit / prompts) {
    throw Error(HST_REQUEST, "more images at once than this bundle draws", "its limit is " + std::to_string(limit), "ask for fewer");
  }
  return prompts * request.images_per_prompt;
}

double guidance_of(const Bundle &bundle, const Request &request) {
  const double scale = request.guidance_scale < 0 ? bundle.manifest.defaults.guidance_scale : request.guidance_scale;
  if (!(scale >= 0 && scale <= 100)) throw Error(HST_REQUEST, "guidance_scale is not a number from 0 to 100", "", "3 to 7 is usual; 1 is off");
  return scale;
}

// Start noise [images, C, h p, w p]; `seeds` gets those that were used.
std::vector<float> start_latents(const Request &request, const PairSpec &spec, const RequestShape &shape, std::vector<uint64_t> &seeds) {
  const auto count = static_cast<size_t>(shape.tokens() * spec.large.token_channels), images = static_cast<size_t>(shape.images);
  if (!request.latents.empty()) {
    if (!request.seeds.empty()) throw Error(HST_REQUEST, "seeds and latents each say what noise to start from", "", "give one of them");
    if (request.latents.size() != count * images) {
      throw Error(HST_REQUEST, std::to_string(request.latents.size()) + " latents were given", "this request needs " + std::to_string(count * images));
    }
    return request.latents;
  }
  seeds = request.seeds;
  if (seeds.empty()) seeds = {std::random_device{}()};
  if (seeds.size() == 1) return torch_randn(seeds[0], count * images);
  if (seeds.size() != images) {
    throw Error(HST_REQUEST, std::to_string(seeds.size()) + " seeds were given for " + std::to_string(images) + " images", "",
                "give one seed for the whole request, or one for each image");
  }
  std::vector<float> noise;
  for (const uint64_t seed : seeds) {
    const std::vector<float> one = torch_randn(seed, count);
    noise.insert(noise.end(), one.begin(), one.end());
  }
  return noise;
}

class Stopwatch {
 public:
  double lap() {
    const auto now = std::chrono::steady_clock::now();
    const std::chrono::duration<double> seconds = now - last_;
    last_ = now;
    return seconds.count();
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace

std::shared_ptr<const Opened> open_for_pipelines(const std::string &path) {
  auto opened = std::make_shared<Opened>();
  opened->bundle = open_bundle(path);
  const Manifest &manifest = opened->bundle.manifest;
  for (const TokenizerEntry &entry : manifest.tokenizers) {
    try {
      opened->tokenizers.emplace_back(json::parse(opened->bundle.read(entry.path)), entry.length, entry.pad_id);
    } catch (const std::invalid_argument &exc) {
      throw Error(HST_INTEGRITY, path + ": " + entry.path + " is not a tokenizer", exc.what(), "build the bundle again");
    }
  }
  return opened;
}

StitchPlan plan_request(const Bundle &bundle, const Request &request) {
  const auto [h, w] = token_grid(bundle, request);
  PlanRequest plan = request.plan;
  plan.num_steps = request.num_inference_steps == 0 ? bundle.manifest.defaults.num_inference_steps : request.num_inference_steps;
  bundle.scheduler.table(plan.num_steps, {});  // refuses numbers of steps it has no sigmas for
  plan.num_tokens = h * w;
  plan.buckets = token_buckets(h * w, bundle.manifest.bucket_ratios);
  return make_plan(plan);
}

Pipeline::Pipeline(std::shared_ptr<const Opened> opened, std::unique_ptr<Backend> backend, bool low_memory)
    : opened_(std::move(opened)), backend_(std::move(backend)), low_memory_(low_memory) {}

Result Pipeline::generate(const Request &request) {
  check_texts(request);
  const Bundle &bundle = opened_->bundle;
  const int64_t images = image_count(bundle, request);
  const double scale = guidance_of(bundle, request);
  const StitchPlan plan = plan_request(bundle, request);
  const auto [h, w] = token_grid(bundle, request);
  try {
    return draw(request, plan, {images, scale > 1, h, w}, scale);
  } catch (const std::bad_alloc &) {
    drop();
    throw;
  } catch (const Error &error) {
    if (error.code() == HST_RESOURCE) drop();
    throw;
  }
}

Result Pipeline::draw(const Request &request, const StitchPlan &plan, const RequestShape &shape, double scale) {
  const PairSpec &spec = opened_->bundle.spec;
  Result result{shape.images, shape.h * spec.token_side(), shape.w * spec.token_side(), shape.h, shape.w, {}, {}, {}, 0, 0, 0, ""};
  const std::vector<float> noise = patchify(start_latents(request, spec, shape, result.seeds).data(), spec, shape.images, shape.h, shape.w);

  const MarkPtr start = backend_->mark();
  std::vector<std::string> different;
  std::vector<int64_t> index;
  for (const std::string &text : row_texts(request, shape.guided)) {
    const auto found = std::find(different.begin(), different.end(), text);
    index.push_back(found - different.begin());
    if (found == different.end()) different.push_back(text);
  }
  std::vector<std::vector<int64_t>> ids;
  for (const Tokenizer &tokenize : opened_->tokenizers) {
    std::vector<int64_t> all;
    for (const std::string &text : different) {
      const std::vector<int64_t> one = tokenize(text).ids;
      all.insert(all.end(), one.begin(), one.end());
    }
    ids.push_back(std::move(all));
  }
  const TextFeatures text = encoder(static_cast<int64_t>(different.size()), static_cast<int64_t>(index.size()))(ids, index);
  result.text_seconds = backend_->elapsed(*start, *backend_->mark());
  if (low_memory_) {
    encoder_.reset();
    for (const char *name : kTextEncoders) backend_->release(name);
  }

  if (plan.uses_small() || plan.adaptive) backend_->engine("small");  // loading is no part of the loop's time
  if (plan.uses_large()) backend_->engine("large");
  Workspace &ws = workspace(shape);
  const auto steps = static_cast<int64_t>(plan.steps.size());
  const StepTable table = opened_->bundle.scheduler.table(steps, plan.request.sampling);
  ws.begin(noise, text, table, scale, plan.mask.value_or(MaskRule{}), plan.correction);
  Stopwatch watch;
  result.records = denoise(ws, plan, request.keep_masks,
                           [&](int64_t done) { return !request.progress || request.progress(done, steps); });
  result.denoise_seconds = watch.lap();
  if (static_cast<int64_t>(result.records.size()) < steps) {
    throw Error(HST_CANCELLED, "the run was cancelled after " + std::to_string(result.records.size()) + " of " + std::to_string(steps) + " steps");
  }
  result.warning = backend_->warning();
  if (!ws.is_finite()) {
    throw Error(HST_NUMERICS, "the denoised latents are not finite, so there is no picture to decode", "",
                "lower the guidance scale, or run `hst-trt verify` on the bundle");
  }
  const std::vector<float> tokens = ws.latents();
  if (low_memory_) {
    workspace_.reset();
    for (const char *name : {"large", "small"}) backend_->release(name);
  }

  watch.lap();
  result.pixels = decoder(shape.h, shape.w)(tokens);
  result.vae_seconds = watch.lap();
  if (low_memory_) {
    decoder_.reset();
    backend_->release("vae_decoder");
  }
  return result;
}

Encoder &Pipeline::encoder(int64_t prompts, int64_t rows) {
  const std::pair<int64_t, int64_t> key{prompts, rows};
  if (!encoder_ || encoder_for_ != key) {
    encoder_.reset();  // freed before the next is made
    encoder_ = std::make_unique<Encoder>(*backend_, opened_->bundle.spec, opened_->tokenizers.size(), prompts, rows);
    encoder_for_ = key;
  }
  return *encoder_;
}

Workspace &Pipeline::workspace(const RequestShape &shape) {
  if (!workspace_ || !(workspace_->shape == shape)) {
    workspace_.reset();
    workspace_ = std::make_unique<Workspace>(*backend_, opened_->bundle.spec, shape);
  }
  return *workspace_;
}

Decoder &Pipeline::decoder(int64_t h, int64_t w) {
  const std::pair<int64_t, int64_t> key{h, w};
  if (!decoder_ || decoder_for_ != key) {
    decoder_.reset();
    decoder_ = std::make_unique<Decoder>(*backend_, opened_->bundle.spec, h, w);
    decoder_for_ = key;
  }
  return *decoder_;
}

void Pipeline::drop() {
  encoder_.reset();
  workspace_.reset();
  decoder_.reset();
}

}  // namespace hst_trt
