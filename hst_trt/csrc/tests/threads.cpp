// Four pipelines of one bundle that draw at once, while the bundle is used in other ways: for the thread sanitizer and the leak check.
//   hst-trt-threads BUNDLE [race|leak]     ONNX Runtime's library from HST_ONNXRUNTIME
// With "race" or "leak" it does what the checks must find.
#include <cstdint>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "hst_trt.h"

namespace {

constexpr size_t kPipelines = 4;

std::string planted;
int steps_drawn = 0;  // by all threads, without a lock, if a race is planted

void check(hst_error *error) {
  if (!error) return;
  const std::string message = hst_error_message(error);
  hst_error_free(error);
  throw std::runtime_error(message);
}

std::vector<uint8_t> draw(hst_pipeline *pipeline, uint64_t seed) {
  hst_request request;
  check(HST_REQUEST_INIT(&request));
  const char *prompts[] = {"a penguin on the sea"};
  request.prompts = prompts;
  request.prompt_count = 1;
  request.seeds = &seed;
  request.seed_count = 1;
  request.num_inference_steps = 4;
  request.keep_masks = 1;
  request.progress = [](void *, int32_t, int32_t) -> int32_t {
    if (planted == "race") ++steps_drawn;
    return 0;
  };
  hst_result *result = nullptr;
  check(hst_generate(pipeline, &request, &result));
  const uint8_t *pixels = hst_result_rgb(result, 0);
  const auto size = static_cast<size_t>(hst_result_height(result)) * static_cast<size_t>(hst_result_width(result)) * 3;
  std::vector<uint8_t> image(pixels, pixels + size);
  hst_result_free(result);
  return image;
}

// With one thread a call: a pool of ONNX Runtime's waits in ways that the thread sanitizer cannot see.
hst_pipeline *create(const hst_bundle *bundle) {
  hst_pipeline_params params;
  check(HST_PIPELINE_PARAMS_INIT(&params));
  params.threads = 1;
  hst_pipeline *pipeline = nullptr;
  check(hst_pipeline_create(bundle, &params, &pipeline));
  return pipeline;
}

// What a host may do with one bundle in many threads, and with pipelines of its own.
void work(const char *path, const hst_bundle *bundle, uint64_t seed, std::vector<uint8_t> &image, std::exception_ptr &failed) {
  try {
    hst_pipeline *pipeline = create(bundle);
    image = draw(pipeline, seed);
    hst_pipeline_free(pipeline);
    for (size_t index = 0; index < hst_bundle_tokenizers(bundle); ++index) {
      int64_t ids[8];
      size_t count = 0;
      check(hst_bundle_tokenize(bundle, index, "an apple, 3 caf\u00e9s", ids, 8, &count, nullptr));
    }
    hst_request request;
    check(HST_REQUEST_INIT(&request));
    size_t steps = 0;
    check(hst_bundle_plan(bundle, &request, nullptr, 0, &steps));
    hst_bundle *own = nullptr;
    check(hst_bundle_open(path, &own));
    hst_bundle_free(own);
    hst_error *error = hst_bundle_open("/nowhere", &own);
    if (planted != "leak") hst_error_free(error);
  } catch (...) {
    failed = std::current_exception();
  }
}

}  // namespace

int main(int count, char **arguments) {
  if (count < 2) return HST_REQUEST;
  if (count > 2) planted = arguments[2];
  try {
    hst_bundle *bundle = nullptr;
    check(hst_bundle_open(arguments[1], &bundle));
    std::vector<std::vector<uint8_t>> together(kPipelines);
    std::vector<std::exception_ptr> failed(kPipelines);
    std::vector<std::thread> threads;
    for (size_t i = 0; i < kPipelines; ++i) {
      threads.emplace_back([&, i] { work(arguments[1], bundle, i, together[i], failed[i]); });
    }
    for (std::thread &thread : threads) thread.join();
    for (const std::exception_ptr &error : failed) {
      if (error) std::rethrow_exception(error);
    }
    hst_pipeline *pipeline = create(bundle);
    hst_bundle_free(bundle);  // the pipeline keeps what it needs
    for (size_t i = 0; i < kPipelines; ++i) {
      if (draw(pipeline, i) != together[i]) throw std::runtime_error("a pipeline draws another picture when others draw, too");
    }
    hst_pipeline_free(pipeline);
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  std::printf("%zu pipelines drew at once what one draws alone\n", kPipelines);
  return 0;
}
