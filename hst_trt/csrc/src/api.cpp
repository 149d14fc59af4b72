// The C interface over the pipeline: handles are checked, every exception becomes an error object.
#include "hst_trt.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <unordered_map>

#include "error.h"
#include "ort_backend.h"
#include "pipeline.h"
#include "tensorrt_backend.h"
#include "unicode.h"

struct hst_error {
  int32_t code;
  std::string message;
};
struct hst_bundle {
  std::shared_ptr<const hst_trt::Opened> opened;
};
struct hst_pipeline {
  hst_trt::Pipeline pipeline;
  std::atomic_flag busy = ATOMIC_FLAG_INIT;
};
struct hst_result {
  hst_trt::Result result;
};

namespace {

using hst_trt::Error;

// All handles that were given out and not freed, so that one that was freed, or is of another kind, is refused and not followed.
class Handles {
 public:
  enum Kind { kBundle, kPipeline, kResult };

  void add(const void *handle, Kind kind) {
    const std::lock_guard<std::mutex> lock(guard_);
    alive_[handle] = kind;
  }
  bool remove(const void *handle, Kind kind) {
    const std::lock_guard<std::mutex> lock(guard_);
    const auto found = alive_.find(handle);
    if (found == alive_.end() || found->second != kind) return false;
    alive_.erase(found);
    return true;
  }
  bool has(const void *handle, Kind kind) {
    const std::lock_guard<std::mutex> lock(guard_);
    const auto found = alive_.find(handle);
    return found != alive_.end() && found->second == kind;
  }
  void need(const void *handle, Kind kind) {
    static constexpr const char *kNames[] = {"bundle", "pipeline", "result"};
    if (!has(handle, kind)) {
      throw Error(HST_REQUEST, std::string("a handle is not that of an open ") + kNames[kind], handle ? "one that was freed, or is of another kind" : "NULL",
                  "use what the library returned, until you free it");
    }
  }

 private:
  std::mutex guard_;
  std::unordered_map<const void *, Kind> alive_;
};

Handles &handles() {
  static auto *all = new Handles;  // never freed: handles may be freed while the process ends
  return *all;
}

hst_error out_of_memory{HST_RESOURCE, "memory ran out"};

hst_error *make_error(int32_t code, const char *message) noexcept {
  try {
    return new hst_error{code, message};
  } catch (...) {
    return &out_of_memory;
  }
}

// Runs what a function of the interface does.
template <typename Body>
hst_error *guarded(Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Error &error) {
    return make_error(error.code(), error.what());
  } catch (const std::bad_alloc &) {
    return make_error(HST_RESOURCE, "memory ran out\nto do: ask for fewer images at once or a smaller size");
  } catch (const std::exception &error) {
    return make_error(HST_INTERNAL, error.what());
  } catch (...) {
    return make_error(HST_INTERNAL, "an unknown exception");
  }
}

void need(bool given, const char *what) {
  if (!given) throw Error(HST_REQUEST, std::string(what) + " is NULL", "", "give one");
}

void check_version(uint32_t size, uint32_t ours, uint32_t version) {
  const uint32_t major = version >> 16, minor = version & 0xFFFF;
  if (major != HST_API_VERSION_MAJOR || minor > HST_API_VERSION_MINOR || size > ours || size < 2 * sizeof(uint32_t)) {
    throw Error(HST_INCOMPATIBLE, "this host was compiled for another version of the library",
                "the host for " + std::to_string(major) + "." + std::to_string(minor) + ", the library is " +
                    std::to_string(HST_API_VERSION_MAJOR) + "." + std::to_string(HST_API_VERSION_MINOR),
                "compile it with the header of this library, or load the library that it was compiled for");
  }
}

// The caller's parameters as ours: fields that an older host does not have keep their defaults.
template <typename T>
T taken(const T *given, hst_error *(*init)(T *, uint32_t, uint32_t), const char *what) {
  need(given != nullptr, what);
  T params;
  init(&params, sizeof params, HST_API_VERSION);
  check_version(given->struct_size, sizeof params, given->api_version);
  std::memcpy(&params, given, given->struct_size);
  return params;
}

std::vector<std::string> texts_of(const char *const *texts, size_t count, const char *what) {
  std::vector<std::string> copies;
  need(texts != nullptr || count == 0, what);
  for (size_t i = 0; i < count; ++i) {
    need(texts[i] != nullptr, what);
    copies.emplace_back(texts[i]);
  }
  return copies;
}

std::string text_of(const char *text, const char *what) {
  need(text != nullptr, what);
  return text;
}

hst_trt::Request request_of(const hst_request *given) {
  const hst_request raw = taken(given, &hst_request_init, "the request");
  hst_trt::Request request;
  request.prompts = texts_of(raw.prompts, raw.prompt_count, "a prompt");
  request.negative_prompts = texts_of(raw.negative_prompts, raw.negative_prompt_count, "a negative prompt");
  request.images_per_prompt = raw.images_per_prompt;
  request.height = raw.height;
  request.width = raw.width;
  request.num_inference_steps = raw.num_inference_steps;
  request.guidance_scale = raw.guidance_scale;
  need(raw.seeds != nullptr || raw.seed_count == 0, "the array of seeds");
  if (raw.seed_count > 0) request.seeds.assign(raw.seeds, raw.seeds + raw.seed_count);
  need(raw.latents != nullptr || raw.latent_count == 0, "the array of latents");
  if (raw.latent_count > 0) request.latents.assign(raw.latents, raw.latents + raw.latent_count);
  hst_trt::PlanRequest &plan = request.plan;
  plan.schedule = text_of(raw.schedule, "the schedule");
  plan.sampling = {text_of(raw.solver, "the solver"), text_of(raw.timestep_spacing, "the timestep spacing"), raw.shift};
  if (raw.has_stages) plan.stages = {raw.stages[0], raw.stages[1], raw.stages[2]};
  if (raw.refresh_every != -1) plan.refresh_every = raw.refresh_every;
  plan.correction = raw.correction;
  if (raw.adaptive) plan.adaptive.emplace();
  plan.mask = {raw.mask_ratio, raw.mask_threshold, raw.mask_decay, raw.mask_drift, raw.mask_starvation};
  request.keep_masks = raw.keep_masks != 0;
  if (raw.progress) {
    request.progress = [call = raw.progress, context = raw.progress_context](int64_t done, int64_t steps) {
      return call(context, static_cast<int32_t>(done), static_cast<int32_t>(steps)) == 0;
    };
  }
  return request;
}

hst_step step_of(const hst_trt::Step &step, int64_t tokens, double seconds) {
  return {static_cast<int32_t>(step.stage), static_cast<int32_t>(tokens), step.small, step.redraw, seconds};
}

const hst_trt::Result *result_of(const hst_result *result) {
  return handles().has(result, Handles::kResult) ? &result->result : nullptr;
}

}  // namespace

uint32_t hst_api_version(void) { return HST_API_VERSION; }

int32_t hst_error_code(const hst_error *error) { return error ? error->code : 0; }

const char *hst_error_message(const hst_error *error) { return error ? error->message.c_str() : ""; }

void hst_error_free(hst_error *error) {
  if (error != &out_of_memory) delete error;
}

hst_error *hst_bundle_open(const char *path, hst_bundle **bundle) {
  if (bundle) *bundle = nullptr;
  return guarded([&] {
    need(path != nullptr, "the path");
    need(bundle != nullptr, "the place for the bundle");
    auto owner = std::make_unique<hst_bundle>(hst_bundle{hst_trt::open_for_pipelines(path)});
    handles().add(owner.get(), Handles::kBundle);
    *bundle = owner.release();
  });
}

void hst_bundle_free(hst_bundle *bundle) {
  if (handles().remove(bundle, Handles::kBundle)) delete bundle;
}

const char *hst_bundle_name(const hst_bundle *bundle) {
  return handles().has(bundle, Handles::kBundle) ? bundle->opened->bundle.manifest.name.c_str() : "";
}

const char *hst_bundle_fingerprint(const hst_bundle *bundle) {
  return handles().has(bundle, Handles::kBundle) ? bundle->opened->bundle.manifest.fingerprint.c_str() : "";
}

size_t hst_bundle_tokenizers(const hst_bundle *bundle) {
  return handles().has(bundle, Handles::kBundle) ? bundle->opened->tokenizers.size() : 0;
}

hst_error *hst_bundle_tokenize(const hst_bundle *bundle, size_t index, const char *text, int64_t *ids, size_t capacity, size_t *count,
                               size_t *needed) {
  if (count) *count = 0;
  if (needed) *needed = 0;
  return guarded([&] {
    handles().need(bundle, Handles::kBundle);
    need(text != nullptr, "the text");
    need(ids != nullptr || capacity == 0, "the array of ids");
    need(count != nullptr, "the place for the count");
    const auto &tokenizers = bundle->opened->tokenizers;
    if (index >= tokenizers.size()) {
      throw Error(HST_REQUEST, "there is no tokenizer " + std::to_string(index), "the bundle has " + std::to_string(tokenizers.size()));
    }
    if (!hst_trt::unicode::is_valid(text)) throw Error(HST_REQUEST, "a text is not valid Unicode", "", "write it in UTF-8");
    const auto encoding = tokenizers[index](text);
    std::copy_n(encoding.ids.begin(), std::min(capacity, encoding.ids.size()), ids);
    *count = encoding.ids.size();
    if (needed) *needed = encoding.needed;
  });
}

hst_error *hst_request_init(hst_request *request, uint32_t struct_size, uint32_t api_version) {
  return guarded([&] {
    need(request != nullptr, "the request");
    check_version(struct_size, sizeof(hst_request), api_version);
    hst_request defaults{};
    defaults.struct_size = struct_size;
    defaults.api_version = api_version;
    defaults.images_per_prompt = 1;
    defaults.guidance_scale = -1;
    defaults.schedule = "hybrid";
    defaults.solver = "euler";
    defaults.timestep_spacing = "linspace";
    defaults.refresh_every = -1;
    defaults.mask_ratio = 0.3;
    defaults.mask_decay = 0.9;
    std::memcpy(request, &defaults, struct_size);
  });
}

hst_error *hst_bundle_plan(const hst_bundle *bundle, const hst_request *request, hst_step *steps, size_t capacity, size_t *count) {
  if (count) *count = 0;
  return guarded([&] {
    handles().need(bundle, Handles::kBundle);
    need(steps != nullptr || capacity == 0, "the array of steps");
    need(count != nullptr, "the place for the count");
    const hst_trt::StitchPlan plan = hst_trt::plan_request(bundle->opened->bundle, request_of(request));
    for (size_t t = 0; t < std::min(capacity, plan.steps.size()); ++t) steps[t] = step_of(plan.steps[t], plan.steps[t].large_tokens, 0);
    *count = plan.steps.size();
  });
}

hst_error *hst_pipeline_params_init(hst_pipeline_params *params, uint32_t struct_size, uint32_t api_version) {
  return guarded([&] {
    need(params != nullptr, "the place for the parameters");
    check_version(struct_size, sizeof(hst_pipeline_params), api_version);
    hst_pipeline_params defaults{};
    defaults.struct_size = struct_size;
    defaults.api_version = api_version;
    std::memcpy(params, &defaults, struct_size);
  });
}

hst_error *hst_pipeline_create(const hst_bundle *bundle, const hst_pipeline_params *params, hst_pipeline **pipeline) {
  if (pipeline) *pipeline = nullptr;
  return guarded([&] {
    handles().need(bundle, Handles::kBundle);
    need(pipeline != nullptr, "the place for the pipeline");
    hst_pipeline_params ours;
    hst_pipeline_params_init(&ours, sizeof ours, HST_API_VERSION);
    if (params) ours = taken(params, &hst_pipeline_params_init, "the parameters");
    if (ours.threads < 0) throw Error(HST_REQUEST, "threads " + std::to_string(ours.threads) + " is negative", "", "0 is one for each core");
    const hst_trt::Bundle &opened = bundle->opened->bundle;
    const std::string &backend = opened.manifest.target.backend;
    std::unique_ptr<hst_trt::Backend> runtime;
    if (backend == "onnxruntime") {
      std::map<std::string, std::filesystem::path> graphs;
      for (const auto &graph : opened.manifest.graphs) graphs[graph.first] = opened.file(graph.second.path);
      runtime = hst_trt::open_ort_backend(std::move(graphs), ours.threads, ours.onnxruntime ? ours.onnxruntime : "");
    } else {
      runtime = hst_trt::open_tensorrt_backend(opened, ours.device);
    }
    std::unique_ptr<hst_pipeline> owner(new hst_pipeline{{bundle->opened, std::move(runtime), ours.low_memory != 0}});
    handles().add(owner.get(), Handles::kPipeline);
    *pipeline = owner.release();
  });
}

void hst_pipeline_free(hst_pipeline *pipeline) {
  if (handles().remove(pipeline, Handles::kPipeline)) delete pipeline;
}

hst_error *hst_generate(hst_pipeline *pipeline, const hst_request *request, hst_result **result) {
  if (result) *result = nullptr;
  return guarded([&] {
    handles().need(pipeline, Handles::kPipeline);
    need(result != nullptr, "the place for the result");
    const hst_trt::Request ours = request_of(request);
    if (pipeline->busy.test_and_set()) {
      throw Error(HST_REQUEST, "the pipeline is drawing already, in another thread or in the call that asks", "", "make one pipeline a thread");
    }
    struct Release {
      std::atomic_flag &flag;
      ~Release() { flag.clear(); }
    } const release{pipeline->busy};
    auto owner = std::make_unique<hst_result>(hst_result{pipeline->pipeline.generate(ours)});
    handles().add(owner.get(), Handles::kResult);
    *result = owner.release();
  });
}

void hst_result_free(hst_result *result) {
  if (handles().remove(result, Handles::kResult)) delete result;
}

size_t hst_result_images(const hst_result *result) {
  const auto *held = result_of(result);
  return held ? static_cast<size_t>(held->images) : 0;
}

int32_t hst_result_height(const hst_result *result) {
  const auto *held = result_of(result);
  return held ? static_cast<int32_t>(held->height) : 0;
}

int32_t hst_result_width(const hst_result *result) {
  const auto *held = result_of(result);
  return held ? static_cast<int32_t>(held->width) : 0;
}

const uint8_t *hst_result_rgb(const hst_result *result, size_t image) {
  const auto *held = result_of(result);
  if (!held || image >= static_cast<size_t>(held->images)) return nullptr;
  return held->pixels.data() + image * static_cast<size_t>(held->height * held->width * 3);
}

size_t hst_result_seed_count(const hst_result *result) {
  const auto *held = result_of(result);
  return held ? held->seeds.size() : 0;
}

const uint64_t *hst_result_seeds(const hst_result *result) {
  const auto *held = result_of(result);
  return held ? held->seeds.data() : nullptr;
}

size_t hst_result_steps(const hst_result *result) {
  const auto *held = result_of(result);
  return held ? held->records.size() : 0;
}

hst_error *hst_result_step(const hst_result *result, size_t step, hst_step *record) {
  return guarded([&] {
    handles().need(result, Handles::kResult);
    need(record != nullptr, "the place for the record");
    const auto &records = result->result.records;
    if (step >= records.size()) throw Error(HST_REQUEST, "there is no step " + std::to_string(step), "the run had " + std::to_string(records.size()));
    *record = step_of(records[step].step, records[step].tokens, records[step].seconds);
  });
}

const uint8_t *hst_result_mask(const hst_result *result, size_t step, int32_t *height, int32_t *width) {
  const auto *held = result_of(result);
  if (height) *height = held ? static_cast<int32_t>(held->h) : 0;
  if (width) *width = held ? static_cast<int32_t>(held->w) : 0;
  if (!held || step >= held->records.size() || held->records[step].mask.empty()) return nullptr;
  return held->records[step].mask.data();
}

const char *hst_result_warning(const hst_result *result) {
  const auto *held = result_of(result);
  return held ? held->warning.c_str() : "";
}

hst_times hst_result_times(const hst_result *result) {
  const auto *held = result_of(result);
  return held ? hst_times{held->text_seconds, held->denoise_seconds, held->vae_seconds} : hst_times{0, 0, 0};
}
