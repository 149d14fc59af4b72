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
#include "stats.h"
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

// Start noise as tokens; `seeds` gets those that were used.
std::vector<float> start_tokens(const Request &request, const PairSpec &spec, const RequestShape &shape, std::vector<uint64_t> &seeds) {
  const auto count = static_cast<size_t>(shape.tokens() * spec.large.token_channels), images = static_cast<size_t>(shape.images);
  const auto tokens = [&](const float *latents) { return patchify(latents, spec, shape.images, shape.h, shape.w); };
  if (request.latents) {
    if (!request.seeds.empty()) throw Error(HST_REQUEST, "seeds and latents each say what noise to start from", "", "give one of them");
    if (request.latent_count != count * images) {
      throw Error(HST_REQUEST, std::to_string(request.latent_count) + " latents were given", "this request needs " + std::to_string(count * images));
    }
    return tokens(request.latents);
  }
  seeds = request.seeds;
  if (seeds.empty()) seeds = {std::random_device{}()};
  if (seeds.size() == 1) return tokens(torch_randn(seeds[0], count * images).data());
  if (seeds.size() != images) {
    throw Error(HST_REQUEST, std::to_string(seeds.size()) + " seeds were given for " + std::to_string(images) + " images", "",
                "give one seed for the whole request, or one for each image");
  }
  std::vector<float> noise;
  for (const uint64_t seed : seeds) {
    const std::vector<float> one = torch_randn(seed, count);
    noise.insert(noise.end(), one.begin(), one.end());
  }
  return tokens(noise.data());
}

bool is_blank(const std::string &text) {
  const std::u32string points = unicode::decode(text);
  return std::all_of(points.begin(), points.end(), [](char32_t point) { return unicode::is_space(point); });
}

// About the part of a text that its tokenizer cuts off: the longest beginning that would fit alone is left out.
std::string cut_off(const Tokenizer &tokenize, const std::string &text, size_t length) {
  const std::u32string points = unicode::decode(text);
  size_t fits = 0, too_long = points.size();
  while (too_long - fits > 1) {
    const size_t middle = fits + (too_long - fits) / 2;
    (tokenize(unicode::encode(points.substr(0, middle))).needed <= length ? fits : too_long) = middle;
  }
  return unicode::encode(points.substr(fits));
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

std::shared_ptr<const Opened> open_for_pipelines(const std::string &path, const OnHash &on_hash) {
  auto opened = std::make_shared<Opened>();
  opened->bundle = open_bundle(path, on_hash);
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

RequestShape shape_request(const Bundle &bundle, const Request &request) {
  check_texts(request);
  const int64_t images = image_count(bundle, request);
  const auto [h, w] = token_grid(bundle, request);
  return {images, guidance_of(bundle, request) > 1, h, w};
}

std::array<int64_t, 4> latent_shape(const PairSpec &spec, const RequestShape &shape) {
  return {shape.images, spec.latent_channels, shape.h * spec.patch_size, shape.w * spec.patch_size};
}

Result Pipeline::generate(const Request &request) {
  const RequestShape shape = shape_request(opened_->bundle, request);
  const StitchPlan plan = plan_request(opened_->bundle, request);
  try {
    return draw(request, plan, shape);
  } catch (const std::bad_alloc &) {
    drop();
    throw;
  } catch (const Error &error) {
    if (error.code() == HST_RESOURCE) drop();
    throw;
  }
}

Result Pipeline::draw(const Request &request, const StitchPlan &plan, const RequestShape &shape) {
  const PairSpec &spec = opened_->bundle.spec;
  Result result{};
  result.shape = shape;
  result.height = shape.h * spec.token_side();
  result.width = shape.w * spec.token_side();
  result.latent_shape = latent_shape(spec, shape);
  const std::vector<float> noise = start_tokens(request, spec, shape, result.seeds);

  if (std::any_of(request.prompts.begin(), request.prompts.end(), is_blank)) {
    result.warnings.push_back("a prompt is empty: its picture will show whatever the models draw without one");
  }
  const MarkPtr start = backend_->mark();
  std::vector<std::string> different;
  std::vector<int64_t> index;
  for (const std::string &text : row_texts(request, shape.guided)) {
    const auto found = std::find(different.begin(), different.end(), text);
    index.push_back(found - different.begin());
    if (found == different.end()) different.push_back(text);
  }
  const std::vector<std::vector<int64_t>> ids = tokens_of(different, result.warnings);
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
  ws.begin(noise, text, table, guidance_of(opened_->bundle, request), plan.mask.value_or(MaskRule{}), plan.correction);
  Next next = Next::kGoOn;
  const auto on_step_end = [&](int64_t t, const StepRecord &record) {
    if (!request.on_step_end) return true;
    next = request.on_step_end({t, steps, static_cast<double>(table.timesteps[static_cast<size_t>(t)]), record, noise.size(),
                                [&] { return unpatchify(ws.latents().data(), spec, shape.images, shape.h, shape.w); },
                                [&](const float *latents) { ws.set_latents(patchify(latents, spec, shape.images, shape.h, shape.w)); }});
    return next == Next::kGoOn;
  };
  Stopwatch watch;
  result.records = denoise(ws, plan, request.keep_masks, on_step_end);
  result.denoise_seconds = watch.lap();
  if (next == Next::kCancel) {
    throw Error(HST_CANCELLED, "the run was cancelled after " + std::to_string(result.records.size()) + " of " + std::to_string(steps) + " steps");
  }
  if (const std::string slower = backend_->warning(); !slower.empty()) result.warnings.push_back(slower);
  if (!ws.is_finite()) {
    throw Error(HST_NUMERICS, "the denoised latents are not finite, so there is no picture to decode", "",
                "lower the guidance scale, or run `hst-trt verify` on the bundle");
  }
  const std::vector<float> tokens = ws.latents();
  result.engine_seconds.assign(ws.seconds().begin(), ws.seconds().end());
  result.costs = call_costs(opened_->bundle, shape, backend_->machine());
  result.stats = run_stats(shape.tokens(), result.records, result.costs, result.denoise_seconds, ws.seconds());
  if (low_memory_) {
    workspace_.reset();
    for (const char *name : {"large", "small"}) backend_->release(name);
  }

  if (request.keep_latents) result.latents = unpatchify(tokens.data(), spec, shape.images, shape.h, shape.w);
  if (!request.rgb) return result;
  watch.lap();
  result.pixels = decoder(shape.h, shape.w)(tokens);
  result.vae_seconds = watch.lap();
  if (low_memory_) {
    decoder_.reset();
    backend_->release("vae_decoder");
  }
  return result;
}

// The tokens of each text for every encoder, and what of the texts they leave out.
std::vector<std::vector<int64_t>> Pipeline::tokens_of(const std::vector<std::string> &texts, std::vector<std::string> &warnings) const {
  std::vector<std::vector<int64_t>> ids;
  for (size_t i = 0; i < opened_->tokenizers.size(); ++i) {
    const Tokenizer &tokenize = opened_->tokenizers[i];
    std::vector<int64_t> all;
    for (const std::string &text : texts) {
      const Tokenizer::Encoding one = tokenize(text);
      all.insert(all.end(), one.ids.begin(), one.ids.end());
      if (one.needed <= one.ids.size()) continue;
      const std::string name = std::filesystem::path(opened_->bundle.manifest.tokenizers[i].path).stem().string();
      warnings.push_back("the prompt is too long for the " + std::to_string(one.ids.size()) + " tokens of " + name + "; this part was cut off: '" +
                         cut_off(tokenize, text, one.ids.size()) + "'");
    }
    ids.push_back(std::move(all));
  }
  return ids;
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
