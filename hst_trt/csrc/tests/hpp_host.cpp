// hst-trt-hpp-host BUNDLE: what hst_trt.hpp adds to the C interface. Prints one line for each thing that is as it should be.
#include <algorithm>
#include <cmath>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "hst_trt.hpp"

namespace {

void expect(bool holds, const std::string &what) {
  if (!holds) throw std::logic_error("not so: " + what);
  std::cout << what << "\n";
}

struct Unlike : std::exception {};  // no std::runtime_error, as a host's own may be

template <typename Body>
bool throws_unlike(Body body) {
  try {
    body();
  } catch (const Unlike &) {
    return true;
  }
  return false;
}

hst::Request small_request() {
  hst::Request request({"a cat"});
  request->num_inference_steps = 3;
  request->outputs = HST_OUTPUT_RGB | HST_OUTPUT_LATENTS;
  return request;
}

void run(const std::string &path) {
  uint64_t checked = 0, all = 1;
  const hst::Bundle bundle(path, [&](uint64_t done, uint64_t total) {
    checked = done;
    all = total;
    return true;
  });
  expect(checked == all, "opening says when all is checked");
  expect(throws_unlike([&] { hst::Bundle(path, [](uint64_t, uint64_t) -> bool { throw Unlike(); }); }), "an exception passes through opening");

  hst_pipeline_params params = hst::pipeline_params();
  params.threads = 1;
  const hst::Pipeline pipeline(bundle, params);
  hst::Request request = small_request();
  request.on_step_end([](const hst::Step &) -> int32_t { throw Unlike(); });
  expect(throws_unlike([&] { pipeline(request); }), "an exception passes through drawing");

  std::vector<float> last;
  request.seeds({5}).on_step_end([&last](const hst::Step &step) {
    last = step.latents();
    return step->step == 1 ? HST_STOP : HST_GO_ON;
  });
  const hst::Result stopped = pipeline(request);
  expect(stopped.steps().size() == 2 && std::equal(last.begin(), last.end(), stopped.latents()), "a stopped run keeps what it has");

  const auto shape = hst::latent_shape(bundle, request);
  expect(static_cast<size_t>(shape[0] * shape[1] * shape[2] * shape[3]) == last.size(), "latents have the shape that was told");
  hst::Request given = small_request();
  given.latents(last);
  given.on_step_end([](const hst::Step &step) {
    std::vector<float> values = step.latents();
    for (float &value : values) value *= 0.5F;
    step.set_latents(values);
    return HST_GO_ON;
  });
  const hst::Result halved = pipeline(given);
  hst::Request plain = small_request();
  const hst::Result whole = pipeline(plain.latents(last));
  expect(!std::equal(last.begin(), last.end(), halved.latents()) && std::abs(halved.latents()[0]) != std::abs(whole.latents()[0]),
         "replaced latents count");

  const hst_stats stats = whole.stats();
  expect(stats.num_tokens > 0 && stats.modelled_speedup > 0 && !whole.engine_seconds().empty(), "a run has figures");
  hst::Request empty({""});
  empty->num_inference_steps = 1;
  expect(pipeline(empty).warnings().size() == 1, "an empty prompt is warned of");
}

}  // namespace

int main(int count, char **arguments) {
  try {
    if (count == 2) run(arguments[1]);
    return count == 2 ? 0 : HST_REQUEST;
  } catch (const std::exception &error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
