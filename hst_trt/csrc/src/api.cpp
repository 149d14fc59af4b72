// The C interface over the pipeline: handles are checked, every exception becomes an error object.
#include "hst_trt.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

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
struct hst_loop {
  const hst_trt::LoopView &view;
};

namespace {

using hst_trt::Error;

constexpr int32_t kMostThreads = 256;  // ONNX Runtime was seen to hang with 1024

// What was given out and not freed, of one kind, so that a handle that was freed, or is of another kind, is refused and not followed.
// Whoever finds one holds it, so that it may be freed meanwhile. Addresses are kept inverted: a leak checker would take what is
// found here for in use, and tell no host of the handles it forgot.
template <typename T>
class Handles {
 public:
  T *add(std::shared_ptr<T> owner) {
    T *handle = owner.get();
    auto kept = std::make_unique<std::shared_ptr<T>>(std::move(owner));
    const std::lock_guard<std::mutex> lock(guard_);
    alive_[inverted(handle)] = inverted(kept.get());
    kept.release();
    return handle;
  }
  std::shared_ptr<T> find(const T *handle) {
    const std::lock_guard<std::mutex> lock(guard_);
    const auto found = alive_.find(inverted(handle));
    return found == alive_.end() ? nullptr : *owner_at(found->second);
  }
  void remove(const T *handle) {
    std::unique_ptr<std::shared_ptr<T>> owner;  // which ends after the lock
    const std::lock_guard<std::mutex> lock(guard_);
    const auto found = alive_.find(inverted(handle));
    if (found == alive_.end()) return;
    owner.reset(owner_at(found->second));
    alive_.erase(found);
  }

 private:
  static uintptr_t inverted(const void *address) { return ~reinterpret_cast<uintptr_t>(address); }
  static std::shared_ptr<T> *owner_at(uintptr_t inverted) { return reinterpret_cast<std::shared_ptr<T> *>(~inverted); }

  std::mutex guard_;
  std::unordered_map<uintptr_t, uintptr_t> alive_;
};

template <typename T>
Handles<T> &handles() {
  static auto *all = new Handles<T>;  // never freed: handles may be freed while the process ends
  return *all;
}

template <typename T>
std::shared_ptr<T> need_handle(const T *handle, const char *kind) {
  auto found = handles<T>().find(handle);
  if (!found) {
    throw Error(HST_REQUEST, std::string("a handle is not that of an open ") + kind, handle ? "one that was freed, or is of another kind" : "NULL",
                "use what the library returned, until you free it");
  }
  return found;
}

hst_error out_of_memory{HST_RESOURCE, "memory ran out"};

hst_error *make_error(int32_t code, const char *message) noexcept {
  try {
    return handles<hst_error>().add(std::make_shared<hst_error>(hst_error{code, message}));
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
  } catch (const std::length_error &) {
    return make_error(HST_RESOURCE, "more memory is needed than can be addressed\nto do: ask for fewer images at once or a smaller size");
  } catch (const std::exception &error) {
    return make_error(HST_INTERNAL, error.what());
  } catch (...) {
    return make_error(HST_INTERNAL, "an unknown exception");
  }
}

// What a function that returns no error reads from a handle; `otherwise` where there is nothing to read.
template <typename T, typename Value, typename Body>
Value read(const T *handle, Value otherwise, Body body) noexcept {
  try {
    const std::shared_ptr<T> found = handles<T>().find(handle);
    return found ? body(*found) : otherwise;
  } catch (...) {
    return otherwise;
  }
}

void need(bool given, const char *what) {
  if (!given) throw Error(HST_REQUEST, std::string(what) + " is NULL", "", "give one");
}

// How large a struct was in each minor version, from the first one that had it.
struct Sizes {
  uint32_t since;
  std::vector<size_t> sizes;
};
template <typename T>
Sizes sizes_of();
template <>
Sizes sizes_of<hst_request>() {
  return {0, {offsetof(hst_request, outputs), sizeof(hst_request)}};
}
template <>
Sizes sizes_of<hst_pipeline_params>() {
  return {0, {sizeof(hst_pipeline_params), sizeof(hst_pipeline_params)}};
}
template <>
Sizes sizes_of<hst_open_params>() {
  return {1, {sizeof(hst_open_params)}};
}
static_assert(HST_API_VERSION_MINOR == 1, "add the sizes of this minor version's structs");

template <typename T>
void check_version(uint32_t size, uint32_t version) {
  const uint32_t major = version >> 16, minor = version & 0xFFFF;
  const Sizes known = sizes_of<T>();
  if (major != HST_API_VERSION_MAJOR || minor > HST_API_VERSION_MINOR || minor < known.since || size != known.sizes[minor - known.since]) {
    throw Error(HST_INCOMPATIBLE, "this host was compiled for another version of the library, or did not set up a struct by its init function",
                "version " + std::to_string(major) + "." + std::to_string(minor) + " with " + std::to_string(size) + " bytes, the library is " +
                    std::to_string(HST_API_VERSION_MAJOR) + "." + std::to_string(HST_API_VERSION_MINOR),
                "compile it with the header of this library, or load the library that it was compiled for");
  }
}

// Fills in the defaults of what the caller has room for.
template <typename T>
hst_error *init(T *params, T defaults, uint32_t size, uint32_t version) {
  return guarded([&] {
    need(params != nullptr, "the struct to fill in");
    check_version<T>(size, version);
    defaults.struct_size = size;
    defaults.api_version = version;
    std::memcpy(params, &defaults, size);
  });
}

// The caller's parameters as ours: fields that an older host does not have keep their defaults.
template <typename T>
T taken(const T *given, T defaults) {
  check_version<T>(given->struct_size, given->api_version);
  std::memcpy(&defaults, given, given->struct_size);
  return defaults;
}

hst_request default_request() {
  hst_request request{};
  request.images_per_prompt = 1;
  request.guidance_scale = -1;
  request.schedule = "hybrid";
  request.solver = "euler";
  request.timestep_spacing = "linspace";
  request.refresh_every = -1;
  request.mask_ratio = 0.3;
  request.mask_decay = 0.9;
  request.outputs = HST_OUTPUT_RGB;
  return request;
}

// A count beyond the most that can be used is refused before anything is read: it may be no count at all.
void check_count(const void *values, size_t count, int64_t most, const char *what) {
  need(values != nullptr || count == 0, what);
  if (count > static_cast<size_t>(most)) {
    throw Error(HST_REQUEST, std::to_string(count) + " values were given for " + what, "this bundle draws at most " + std::to_string(most) + " images at once",
                "ask for fewer");
  }
}

std::vector<std::string> texts_of(const char *const *texts, size_t count, int64_t most, const char *what) {
  std::vector<std::string> copies;
  check_count(texts, count, most, what);
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

hst_trt::Next answer(int32_t code) {
  return code == HST_GO_ON ? hst_trt::Next::kGoOn : code == HST_STOP ? hst_trt::Next::kStop : hst_trt::Next::kCancel;
}

hst_step step_of(const hst_trt::Step &step, int64_t tokens, double seconds) {
  return {static_cast<int32_t>(step.stage), static_cast<int32_t>(tokens), step.small, step.redraw, seconds};
}

hst_trt::Next call_back(const hst_request &raw, const hst_trt::LoopView &view) {
  const auto step = static_cast<int32_t>(view.step), steps = static_cast<int32_t>(view.steps);
  if (raw.progress && raw.progress(raw.progress_context, step + 1, steps) != 0) return hst_trt::Next::kCancel;
  if (!raw.on_step_end) return hst_trt::Next::kGoOn;
  struct Registered {  // for the time of the callback
    hst_loop *loop;
    ~Registered() { handles<hst_loop>().remove(loop); }
  } const registered{handles<hst_loop>().add(std::make_shared<hst_loop>(hst_loop{view}))};
  const hst_step done = step_of(view.record.step, view.record.tokens, view.record.seconds);
  const hst_step_event event{sizeof event, step, steps, view.timestep, done, registered.loop, view.latent_count};
  return answer(raw.on_step_end(raw.on_step_end_context, &event));
}

hst_trt::Request request_of(const hst_trt::Bundle &bundle, const hst_request *given) {
  need(given != nullptr, "the request");
  const hst_request raw = taken(given, default_request());
  const int64_t most = bundle.manifest.limits.max_images;
  hst_trt::Request request;
  request.prompts = texts_of(raw.prompts, raw.prompt_count, most, "the prompts");
  request.negative_prompts = texts_of(raw.negative_prompts, raw.negative_prompt_count, most, "the negative prompts");
  request.images_per_prompt = raw.images_per_prompt;
  request.height = raw.height;
  request.width = raw.width;
  request.num_inference_steps = raw.num_inference_steps;
  request.guidance_scale = raw.guidance_scale;
  check_count(raw.seeds, raw.seed_count, most, "the seeds");
  if (raw.seed_count > 0) request.seeds.assign(raw.seeds, raw.seeds + raw.seed_count);
  need(raw.latents != nullptr || raw.latent_count == 0, "the array of latents");
  request.latents = raw.latent_count > 0 ? raw.latents : nullptr;
  request.latent_count = raw.latent_count;
  hst_trt::PlanRequest &plan = request.plan;
  plan.schedule = text_of(raw.schedule, "the schedule");
  plan.sampling = {text_of(raw.solver, "the solver"), text_of(raw.timestep_spacing, "the timestep spacing"), raw.shift};
  if (raw.has_stages) plan.stages = {raw.stages[0], raw.stages[1], raw.stages[2]};
  if (raw.refresh_every != -1) plan.refresh_every = raw.refresh_every;
  plan.correction = raw.correction;
  if (raw.adaptive) plan.adaptive.emplace();
  plan.mask.ratio = raw.mask_ratio;
  plan.mask.threshold = raw.mask_threshold;
  plan.mask.decay = raw.mask_decay;
  plan.mask.drift = raw.mask_drift;
  plan.mask.starvation = raw.mask_starvation;
  if (raw.has_mask_seed) plan.mask.random_seed = raw.mask_seed;
  request.keep_masks = raw.keep_masks != 0;
  if (raw.outputs < HST_OUTPUT_RGB || raw.outputs > (HST_OUTPUT_RGB | HST_OUTPUT_LATENTS)) {
    throw Error(HST_REQUEST, "outputs " + std::to_string(raw.outputs) + " are unknown", "", "use HST_OUTPUT_RGB, HST_OUTPUT_LATENTS, or their sum");
  }
  request.rgb = (raw.outputs & HST_OUTPUT_RGB) != 0;
  request.keep_latents = (raw.outputs & HST_OUTPUT_LATENTS) != 0;
  if (raw.progress || raw.on_step_end) request.on_step_end = [raw](const hst_trt::LoopView &view) { return call_back(raw, view); };
  return request;
}

std::shared_ptr<hst_loop> need_loop(const hst_loop *loop, const float *latents, size_t count) {
  auto held = handles<hst_loop>().find(loop);
  if (!held) throw Error(HST_REQUEST, "this is no loop in a step callback", "", "use the event's loop until the callback returns");
  need(latents != nullptr, "the array of latents");
  if (count != held->view.latent_count) {
    throw Error(HST_REQUEST, std::to_string(count) + " latents were given", "this request has " + std::to_string(held->view.latent_count));
  }
  return held;
}

}  // namespace

uint32_t hst_api_version(void) { return HST_API_VERSION; }

int32_t hst_error_code(const hst_error *error) {
  if (error == nullptr || error == &out_of_memory) return error ? out_of_memory.code : 0;
  return read(error, int32_t{HST_REQUEST}, [](const hst_error &found) { return found.code; });
}

const char *hst_error_message(const hst_error *error) {
  if (error == nullptr || error == &out_of_memory) return error ? out_of_memory.message.c_str() : "";
  return read(error, "this error was freed", [](const hst_error &found) { return found.message.c_str(); });
}

void hst_error_free(hst_error *error) { handles<hst_error>().remove(error); }

hst_error *hst_open_params_init(hst_open_params *params, uint32_t struct_size, uint32_t api_version) {
  return init(params, hst_open_params{}, struct_size, api_version);
}

hst_error *hst_bundle_open(const char *path, hst_bundle **bundle) { return hst_bundle_open_with(path, nullptr, bundle); }

hst_error *hst_bundle_open_with(const char *path, const hst_open_params *params, hst_bundle **bundle) {
  if (bundle) *bundle = nullptr;
  return guarded([&] {
    need(path != nullptr, "the path");
    need(bundle != nullptr, "the place for the bundle");
    const hst_open_params ours = params ? taken(params, hst_open_params{}) : hst_open_params{};
    hst_trt::OnHash on_hash;
    if (ours.on_hash) on_hash = [&ours](uint64_t done, uint64_t total) { return ours.on_hash(ours.on_hash_context, done, total) == 0; };
    *bundle = handles<hst_bundle>().add(std::make_shared<hst_bundle>(hst_bundle{hst_trt::open_for_pipelines(path, on_hash)}));
  });
}

void hst_bundle_free(hst_bundle *bundle) { handles<hst_bundle>().remove(bundle); }

const char *hst_bundle_name(const hst_bundle *bundle) {
  return read(bundle, "", [](const hst_bundle &held) { return held.opened->bundle.manifest.name.c_str(); });
}

const char *hst_bundle_fingerprint(const hst_bundle *bundle) {
  return read(bundle, "", [](const hst_bundle &held) { return held.opened->bundle.manifest.fingerprint.c_str(); });
}

size_t hst_bundle_tokenizers(const hst_bundle *bundle) {
  return read(bundle, size_t{0}, [](const hst_bundle &held) { return held.opened->tokenizers.size(); });
}

hst_error *hst_bundle_tokenize(const hst_bundle *bundle, size_t index, const char *text, int64_t *ids, size_t capacity, size_t *count,
                               size_t *needed) {
  if (count) *count = 0;
  if (needed) *needed = 0;
  return guarded([&] {
    const auto held = need_handle(bundle, "bundle");
    need(text != nullptr, "the text");
    need(ids != nullptr || capacity == 0, "the array of ids");
    need(count != nullptr, "the place for the count");
    const auto &tokenizers = held->opened->tokenizers;
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
  return init(request, default_request(), struct_size, api_version);
}

hst_error *hst_bundle_plan(const hst_bundle *bundle, const hst_request *request, hst_step *steps, size_t capacity, size_t *count) {
  if (count) *count = 0;
  return guarded([&] {
    const auto held = need_handle(bundle, "bundle");
    need(steps != nullptr || capacity == 0, "the array of steps");
    need(count != nullptr, "the place for the count");
    const hst_trt::StitchPlan plan = hst_trt::plan_request(held->opened->bundle, request_of(held->opened->bundle, request));
    for (size_t t = 0; t < std::min(capacity, plan.steps.size()); ++t) steps[t] = step_of(plan.steps[t], plan.steps[t].large_tokens, 0);
    *count = plan.steps.size();
  });
}

hst_error *hst_bundle_latent_shape(const hst_bundle *bundle, const hst_request *request, int64_t shape[4]) {
  if (shape) std::fill_n(shape, 4, 0);
  return guarded([&] {
    const auto held = need_handle(bundle, "bundle");
    need(shape != nullptr, "the place for the shape");
    const hst_trt::Bundle &opened = held->opened->bundle;
    const auto found = hst_trt::latent_shape(opened.spec, hst_trt::shape_request(opened, request_of(opened, request)));
    std::copy(found.begin(), found.end(), shape);
  });
}

hst_error *hst_pipeline_params_init(hst_pipeline_params *params, uint32_t struct_size, uint32_t api_version) {
  return init(params, hst_pipeline_params{}, struct_size, api_version);
}

hst_error *hst_pipeline_create(const hst_bundle *bundle, const hst_pipeline_params *params, hst_pipeline **pipeline) {
  if (pipeline) *pipeline = nullptr;
  return guarded([&] {
    const auto held = need_handle(bundle, "bundle");
    need(pipeline != nullptr, "the place for the pipeline");
    const hst_pipeline_params ours = params ? taken(params, hst_pipeline_params{}) : hst_pipeline_params{};
    if (ours.threads < 0 || ours.threads > kMostThreads) {
      throw Error(HST_REQUEST, "threads " + std::to_string(ours.threads) + " is outside 0 to " + std::to_string(kMostThreads), "", "0 is one for each core");
    }
    std::unique_ptr<hst_trt::Backend> runtime;
    if (held->opened->bundle.manifest.target.backend == "onnxruntime") {
      const auto graph_file = [shared = held->opened](const std::string &name) { return shared->bundle.graph_file(name); };
      runtime = hst_trt::open_ort_backend(graph_file, ours.threads, ours.onnxruntime ? ours.onnxruntime : "");
    } else {
      runtime = hst_trt::open_tensorrt_backend(held->opened->bundle, ours.device);
    }
    std::shared_ptr<hst_pipeline> owner(new hst_pipeline{{held->opened, std::move(runtime), ours.low_memory != 0}});
    *pipeline = handles<hst_pipeline>().add(std::move(owner));
  });
}

void hst_pipeline_free(hst_pipeline *pipeline) { handles<hst_pipeline>().remove(pipeline); }

hst_error *hst_generate(hst_pipeline *pipeline, const hst_request *request, hst_result **result) {
  if (result) *result = nullptr;
  return guarded([&] {
    const auto held = need_handle(pipeline, "pipeline");
    need(result != nullptr, "the place for the result");
    const hst_trt::Request ours = request_of(held->pipeline.bundle(), request);
    if (held->busy.test_and_set()) {
      throw Error(HST_REQUEST, "the pipeline is drawing already, in another thread or in the call that asks", "", "make one pipeline a thread");
    }
    struct Release {
      std::atomic_flag &flag;
      ~Release() { flag.clear(); }
    } const release{held->busy};
    *result = handles<hst_result>().add(std::make_shared<hst_result>(hst_result{held->pipeline.generate(ours)}));
  });
}

hst_error *hst_loop_latents(const hst_loop *loop, float *latents, size_t count) {
  return guarded([&] {
    const auto held = need_loop(loop, latents, count);
    const std::vector<float> values = held->view.latents();
    std::copy(values.begin(), values.end(), latents);
  });
}

hst_error *hst_loop_set_latents(hst_loop *loop, const float *latents, size_t count) {
  return guarded([&] { need_loop(loop, latents, count)->view.set_latents(latents); });
}

void hst_result_free(hst_result *result) { handles<hst_result>().remove(result); }

size_t hst_result_images(const hst_result *result) {
  return read(result, size_t{0}, [](const hst_result &held) { return static_cast<size_t>(held.result.shape.images); });
}

int32_t hst_result_height(const hst_result *result) {
  return read(result, int32_t{0}, [](const hst_result &held) { return static_cast<int32_t>(held.result.height); });
}

int32_t hst_result_width(const hst_result *result) {
  return read(result, int32_t{0}, [](const hst_result &held) { return static_cast<int32_t>(held.result.width); });
}

const uint8_t *hst_result_rgb(const hst_result *result, size_t image) {
  return read(result, static_cast<const uint8_t *>(nullptr), [image](const hst_result &held) -> const uint8_t * {
    const auto &pixels = held.result.pixels;
    const auto images = static_cast<size_t>(held.result.shape.images);
    return image < images && !pixels.empty() ? pixels.data() + image * (pixels.size() / images) : nullptr;
  });
}

const float *hst_result_latents(const hst_result *result, int64_t shape[4]) {
  if (shape) std::fill_n(shape, 4, 0);
  return read(result, static_cast<const float *>(nullptr), [shape](const hst_result &held) -> const float * {
    if (held.result.latents.empty()) return nullptr;
    if (shape) std::copy(held.result.latent_shape.begin(), held.result.latent_shape.end(), shape);
    return held.result.latents.data();
  });
}

size_t hst_result_seed_count(const hst_result *result) {
  return read(result, size_t{0}, [](const hst_result &held) { return held.result.seeds.size(); });
}

const uint64_t *hst_result_seeds(const hst_result *result) {
  return read(result, static_cast<const uint64_t *>(nullptr), [](const hst_result &held) { return held.result.seeds.data(); });
}

size_t hst_result_steps(const hst_result *result) {
  return read(result, size_t{0}, [](const hst_result &held) { return held.result.records.size(); });
}

hst_error *hst_result_step(const hst_result *result, size_t step, hst_step *record) {
  return guarded([&] {
    const auto held = need_handle(result, "result");
    need(record != nullptr, "the place for the record");
    *record = {};
    const auto &records = held->result.records;
    if (step >= records.size()) throw Error(HST_REQUEST, "there is no step " + std::to_string(step), "the run had " + std::to_string(records.size()));
    *record = step_of(records[step].step, records[step].tokens, records[step].seconds);
  });
}

const uint8_t *hst_result_mask(const hst_result *result, size_t step, int32_t *height, int32_t *width) {
  if (height) *height = 0;
  if (width) *width = 0;
  return read(result, static_cast<const uint8_t *>(nullptr), [&](const hst_result &held) -> const uint8_t * {
    if (height) *height = static_cast<int32_t>(held.result.shape.h);
    if (width) *width = static_cast<int32_t>(held.result.shape.w);
    const auto &records = held.result.records;
    return step < records.size() && !records[step].mask.empty() ? records[step].mask.data() : nullptr;
  });
}

hst_times hst_result_times(const hst_result *result) {
  return read(result, hst_times{0, 0, 0}, [](const hst_result &held) {
    return hst_times{held.result.text_seconds, held.result.denoise_seconds, held.result.vae_seconds};
  });
}

hst_error *hst_result_stats(const hst_result *result, hst_stats *stats, uint32_t struct_size) {
  return guarded([&] {
    const auto held = need_handle(result, "result");
    need(stats != nullptr, "the place for the figures");
    if (struct_size != sizeof(hst_stats)) {
      throw Error(HST_INCOMPATIBLE, "this host's hst_stats is not the library's",
                  std::to_string(struct_size) + " bytes instead of " + std::to_string(sizeof(hst_stats)),
                  "compile it with the header of this library, or load the library that it was compiled for");
    }
    *stats = held->result.stats;
  });
}

const char *hst_result_cost_source(const hst_result *result) {
  return read(result, "", [](const hst_result &held) { return held.result.costs.source.c_str(); });
}

size_t hst_result_engines(const hst_result *result) {
  return read(result, size_t{0}, [](const hst_result &held) { return held.result.engine_seconds.size(); });
}

const char *hst_result_engine(const hst_result *result, size_t index, double *seconds) {
  if (seconds) *seconds = 0;
  return read(result, static_cast<const char *>(nullptr), [&](const hst_result &held) -> const char * {
    if (index >= held.result.engine_seconds.size()) return nullptr;
    const auto &engine = held.result.engine_seconds[index];
    if (seconds) *seconds = engine.second;
    return engine.first.c_str();
  });
}

size_t hst_result_warnings(const hst_result *result) {
  return read(result, size_t{0}, [](const hst_result &held) { return held.result.warnings.size(); });
}

const char *hst_result_warning(const hst_result *result, size_t index) {
  return read(result, static_cast<const char *>(nullptr), [index](const hst_result &held) -> const char * {
    return index < held.result.warnings.size() ? held.result.warnings[index].c_str() : nullptr;
  });
}
