// RAII over hst_trt.h: handles that free themselves, errors as exceptions. Header only; nothing here crosses the library's border.
#ifndef HST_TRT_HPP
#define HST_TRT_HPP

#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "hst_trt.h"

namespace hst {

class Error : public std::runtime_error {
 public:
  Error(int32_t code, const std::string &message) : std::runtime_error(message), code_(code) {}
  int32_t code() const noexcept { return code_; }  // one of HST_REQUEST ...

 private:
  int32_t code_;
};

// Throws what a function of hst_trt.h returned, and frees it.
inline void check(hst_error *error) {
  if (error == nullptr) return;
  const std::unique_ptr<hst_error, decltype(&hst_error_free)> owner(error, &hst_error_free);
  throw Error(hst_error_code(error), hst_error_message(error));
}

// A host's callbacks may throw: the call is cancelled, and what was thrown goes on from where the call was made.
class Thrown {
 public:
  template <typename Body>
  int32_t guard(Body body) noexcept {
    try {
      return body();
    } catch (...) {
      what_ = std::current_exception();
      return HST_CANCEL;
    }
  }
  // Throws that, else what the function returned.
  void check(hst_error *error) {
    if (!what_) return hst::check(error);
    hst_error_free(error);
    std::rethrow_exception(std::exchange(what_, nullptr));
  }

 private:
  std::exception_ptr what_;
};

class Bundle {
 public:
  // Told how many bytes were checked, and how many there are; false cancels. One call at a time, from threads of the library.
  using OnHash = std::function<bool(uint64_t done, uint64_t total)>;

  explicit Bundle(const std::string &path, const OnHash &on_hash = {}) : handle_(open(path, on_hash), &hst_bundle_free) {}
  const hst_bundle *get() const noexcept { return handle_.get(); }
  std::string name() const { return hst_bundle_name(get()); }
  std::string fingerprint() const { return hst_bundle_fingerprint(get()); }

 private:
  static hst_bundle *open(const std::string &path, const OnHash &on_hash) {
    struct {
      const OnHash &call;
      Thrown thrown;
    } context{on_hash, {}};
    hst_open_params params;
    check(HST_OPEN_PARAMS_INIT(&params));
    if (on_hash) {
      params.on_hash = [](void *raw, uint64_t done, uint64_t total) -> int32_t {
        auto &self = *static_cast<decltype(context) *>(raw);
        return self.thrown.guard([&] { return self.call(done, total) ? HST_GO_ON : HST_CANCEL; });
      };
      params.on_hash_context = &context;
    }
    hst_bundle *bundle = nullptr;
    context.thrown.check(hst_bundle_open_with(path.c_str(), &params, &bundle));
    return bundle;
  }
  std::unique_ptr<hst_bundle, decltype(&hst_bundle_free)> handle_;
};

// What a step callback sees, until it returns.
class Step {
 public:
  explicit Step(const hst_step_event &event) : event_(event) {}
  const hst_step_event *operator->() const noexcept { return &event_; }
  std::vector<float> latents() const {  // [images, C, H/8, W/8]
    std::vector<float> values(event_.latent_count);
    check(hst_loop_latents(event_.loop, values.data(), values.size()));
    return values;
  }
  void set_latents(const std::vector<float> &values) const { check(hst_loop_set_latents(event_.loop, values.data(), values.size())); }

 private:
  const hst_step_event &event_;
};

// A request with its defaults, and the texts, seeds and latents that it points to. Other fields are set through `->`.
class Request {
 public:
  explicit Request(std::vector<std::string> prompts) : prompts_(std::move(prompts)) { check(HST_REQUEST_INIT(&raw_)); }
  hst_request *operator->() noexcept { return &raw_; }

  Request &negative_prompts(std::vector<std::string> texts) {
    negatives_ = std::move(texts);
    return *this;
  }
  Request &seeds(std::vector<uint64_t> seeds) {
    seeds_ = std::move(seeds);
    return *this;
  }
  // Start noise instead of seeds, [images, C, H/8, W/8]; see `latent_shape`.
  Request &latents(std::vector<float> values) {
    latents_ = std::move(values);
    return *this;
  }
  // Called after each step with (done, steps); false cancels.
  Request &on_step(std::function<bool(int32_t, int32_t)> callback) {
    return on_step_end([call = std::move(callback)](const Step &step) { return call(step->step + 1, step->steps) ? HST_GO_ON : HST_CANCEL; });
  }
  // Called after each step; returns HST_GO_ON, HST_CANCEL or HST_STOP.
  Request &on_step_end(std::function<int32_t(const Step &)> callback) {
    step_end_ = std::move(callback);
    return *this;
  }
  // Valid until the request is changed or gone.
  const hst_request *get() {
    const auto point = [](const std::vector<std::string> &texts, std::vector<const char *> &to) {
      to.clear();
      for (const std::string &text : texts) to.push_back(text.c_str());
    };
    point(prompts_, prompt_pointers_);
    point(negatives_, negative_pointers_);
    raw_.prompts = prompt_pointers_.data();
    raw_.prompt_count = prompt_pointers_.size();
    raw_.negative_prompts = negative_pointers_.data();
    raw_.negative_prompt_count = negative_pointers_.size();
    raw_.seeds = seeds_.data();
    raw_.seed_count = seeds_.size();
    raw_.latents = latents_.empty() ? nullptr : latents_.data();
    raw_.latent_count = latents_.size();
    if (step_end_) {
      raw_.on_step_end = [](void *raw, const hst_step_event *event) -> int32_t {
        auto &self = *static_cast<Request *>(raw);
        return self.thrown_.guard([&] { return self.step_end_(Step(*event)); });
      };
      raw_.on_step_end_context = this;
    }
    return &raw_;
  }

 private:
  friend class Pipeline;

  hst_request raw_{};
  std::vector<std::string> prompts_, negatives_;
  std::vector<const char *> prompt_pointers_, negative_pointers_;
  std::vector<uint64_t> seeds_;
  std::vector<float> latents_;
  std::function<int32_t(const Step &)> step_end_;
  Thrown thrown_;
};

// The shape of a request's latents, [images, C, H/8, W/8].
inline std::array<int64_t, 4> latent_shape(const Bundle &bundle, Request &request) {
  std::array<int64_t, 4> shape{};
  check(hst_bundle_latent_shape(bundle.get(), request.get(), shape.data()));
  return shape;
}

class Result {
 public:
  explicit Result(hst_result *owned) : handle_(owned, &hst_result_free) {}
  const hst_result *get() const noexcept { return handle_.get(); }
  std::size_t images() const { return hst_result_images(get()); }
  int32_t height() const { return hst_result_height(get()); }
  int32_t width() const { return hst_result_width(get()); }
  const uint8_t *rgb(std::size_t image) const { return hst_result_rgb(get(), image); }
  const float *latents() const { return hst_result_latents(get(), nullptr); }
  hst_times times() const { return hst_result_times(get()); }
  hst_stats stats() const {
    hst_stats figures;
    check(HST_RESULT_STATS(get(), &figures));
    return figures;
  }
  std::vector<uint64_t> seeds() const {
    const uint64_t *first = hst_result_seeds(get());
    return {first, first + hst_result_seed_count(get())};
  }
  std::vector<hst_step> steps() const {
    std::vector<hst_step> records(hst_result_steps(get()));
    for (std::size_t i = 0; i < records.size(); ++i) check(hst_result_step(get(), i, &records[i]));
    return records;
  }
  std::map<std::string, double> engine_seconds() const {
    std::map<std::string, double> engines;
    double seconds = 0;
    for (std::size_t i = 0; const char *name = hst_result_engine(get(), i, &seconds); ++i) engines[name] = seconds;
    return engines;
  }
  std::vector<std::string> warnings() const {
    std::vector<std::string> texts;
    for (std::size_t i = 0; const char *text = hst_result_warning(get(), i); ++i) texts.emplace_back(text);
    return texts;
  }

 private:
  std::unique_ptr<hst_result, decltype(&hst_result_free)> handle_;
};

// The defaults of a pipeline, to be changed.
inline hst_pipeline_params pipeline_params() {
  hst_pipeline_params params;
  check(HST_PIPELINE_PARAMS_INIT(&params));
  return params;
}

class Pipeline {
 public:
  explicit Pipeline(const Bundle &bundle, const hst_pipeline_params &params = pipeline_params())
      : handle_(create(bundle, params), &hst_pipeline_free) {}
  hst_pipeline *get() const noexcept { return handle_.get(); }
  Result operator()(Request &request) const {
    hst_result *result = nullptr;
    request.thrown_.check(hst_generate(get(), request.get(), &result));
    return Result(result);
  }

 private:
  static hst_pipeline *create(const Bundle &bundle, const hst_pipeline_params &params) {
    hst_pipeline *pipeline = nullptr;
    check(hst_pipeline_create(bundle.get(), &params, &pipeline));
    return pipeline;
  }
  std::unique_ptr<hst_pipeline, decltype(&hst_pipeline_free)> handle_;
};

}  // namespace hst
#endif
