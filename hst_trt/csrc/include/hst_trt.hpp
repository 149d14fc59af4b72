// RAII over hst_trt.h: handles that free themselves, errors as exceptions. Header only; nothing here crosses the library's border.
#ifndef HST_TRT_HPP
#define HST_TRT_HPP

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
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

class Bundle {
 public:
  explicit Bundle(const std::string &path) : handle_(open(path), &hst_bundle_free) {}
  const hst_bundle *get() const noexcept { return handle_.get(); }
  std::string name() const { return hst_bundle_name(get()); }
  std::string fingerprint() const { return hst_bundle_fingerprint(get()); }

 private:
  static hst_bundle *open(const std::string &path) {
    hst_bundle *bundle = nullptr;
    check(hst_bundle_open(path.c_str(), &bundle));
    return bundle;
  }
  std::unique_ptr<hst_bundle, decltype(&hst_bundle_free)> handle_;
};

// A request with its defaults, and the texts and seeds that it points to. Other fields are set through `->`.
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
  // Called after each step with (done, steps); false cancels. It must not throw.
  Request &on_step(std::function<bool(int32_t, int32_t)> callback) {
    progress_ = std::move(callback);
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
    if (progress_) {
      raw_.progress = [](void *self, int32_t done, int32_t steps) -> int32_t {
        return static_cast<Request *>(self)->progress_(done, steps) ? 0 : 1;
      };
      raw_.progress_context = this;
    }
    return &raw_;
  }

 private:
  hst_request raw_{};
  std::vector<std::string> prompts_, negatives_;
  std::vector<const char *> prompt_pointers_, negative_pointers_;
  std::vector<uint64_t> seeds_;
  std::function<bool(int32_t, int32_t)> progress_;
};

class Result {
 public:
  explicit Result(hst_result *owned) : handle_(owned, &hst_result_free) {}
  const hst_result *get() const noexcept { return handle_.get(); }
  std::size_t images() const { return hst_result_images(get()); }
  int32_t height() const { return hst_result_height(get()); }
  int32_t width() const { return hst_result_width(get()); }
  const uint8_t *rgb(std::size_t image) const { return hst_result_rgb(get(), image); }
  hst_times times() const { return hst_result_times(get()); }
  std::string warning() const { return hst_result_warning(get()); }
  std::vector<uint64_t> seeds() const {
    const uint64_t *first = hst_result_seeds(get());
    return {first, first + hst_result_seed_count(get())};
  }
  std::vector<hst_step> steps() const {
    std::vector<hst_step> records(hst_result_steps(get()));
    for (std::size_t i = 0; i < records.size(); ++i) check(hst_result_step(get(), i, &records[i]));
    return records;
  }

 private:
  std::unique_ptr<hst_result, decltype(&hst_result_free)> handle_;
};

class Pipeline {
 public:
  explicit Pipeline(const Bundle &bundle, int32_t threads = 0) : handle_(create(bundle, threads), &hst_pipeline_free) {}
  hst_pipeline *get() const noexcept { return handle_.get(); }
  Result operator()(Request &request) const {
    hst_result *result = nullptr;
    check(hst_generate(get(), request.get(), &result));
    return Result(result);
  }

 private:
  static hst_pipeline *create(const Bundle &bundle, int32_t threads) {
    hst_pipeline_params params;
    check(HST_PIPELINE_PARAMS_INIT(&params));
    params.threads = threads;
    hst_pipeline *pipeline = nullptr;
    check(hst_pipeline_create(bundle.get(), &params, &pipeline));
    return pipeline;
  }
  std::unique_ptr<hst_pipeline, decltype(&hst_pipeline_free)> handle_;
};

}  // namespace hst
#endif
