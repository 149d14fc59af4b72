// hst-trt-host BUNDLE PROMPT OUT.png [OPTION VALUE ...]: draws a picture from a bundle. A starting point for hosts of your own.
#include <cstdlib>
#include <exception>
#include <functional>
#include <iostream>
#include <map>
#include <string>

#include "arguments.h"
#include "hst_trt.hpp"
#include "png.h"

namespace {

constexpr int kUsage = 2;

constexpr const char *kHelp =
    "Usage: hst-trt-host BUNDLE PROMPT OUT.png [OPTION VALUE ...]\n"
    "\n"
    "Options: --seed, --schedule, --num-inference-steps, --guidance-scale, --negative-prompt, --height, --width, --mask-ratio,\n"
    "--solver, --timestep-spacing, --threads; they mean what they mean for `hst-trt run`.\n"
    "HST_ONNXRUNTIME names ONNX Runtime's shared library.\n";

int run(int count, char **arguments) {
  if (count < 4 || count % 2 != 0) {
    std::cerr << kHelp;
    return kUsage;
  }
  hst::Request request({arguments[2]});
  hst_pipeline_params params = hst::pipeline_params();
  const std::map<std::string, std::function<void(char *)>> options{
      {"--seed", [&](char *value) { request.seeds({static_cast<uint64_t>(std::stoull(value))}); }},
      {"--schedule", [&](char *value) { request->schedule = value; }},
      {"--num-inference-steps", [&](char *value) { request->num_inference_steps = whole(value); }},
      {"--guidance-scale", [&](char *value) { request->guidance_scale = number(value); }},
      {"--negative-prompt", [&](char *value) { request.negative_prompts({value}); }},
      {"--height", [&](char *value) { request->height = whole(value); }},
      {"--width", [&](char *value) { request->width = whole(value); }},
      {"--mask-ratio", [&](char *value) { request->mask_ratio = number(value); }},
      {"--solver", [&](char *value) { request->solver = value; }},
      {"--timestep-spacing", [&](char *value) { request->timestep_spacing = value; }},
      {"--threads", [&](char *value) { params.threads = whole(value); }},
  };
  for (int i = 4; i < count; i += 2) {
    const auto option = options.find(arguments[i]);
    if (option == options.end()) {
      std::cerr << "unknown option " << arguments[i] << "\n\n" << kHelp;
      return kUsage;
    }
    try {
      option->second(arguments[i + 1]);
    } catch (const std::logic_error &) {  // of std::stoi and its like
      std::cerr << arguments[i] << ": " << arguments[i + 1] << " is not a number\n";
      return kUsage;
    }
  }
  request.on_step([](int32_t done, int32_t steps) {
    std::cerr << "\rstep " << done << " of " << steps << (done == steps ? "\n" : "") << std::flush;
    return true;
  });

  const hst::Bundle bundle(arguments[1]);
  const hst::Pipeline pipeline(bundle, params);
  const hst::Result result = pipeline(request);
  write_png(arguments[3], result.rgb(0), result.width(), result.height());

  const hst_times times = result.times();
  std::cerr << "text " << times.text << " s, denoise " << times.denoise << " s, decode " << times.vae << " s\n";
  for (const std::string &warning : result.warnings()) std::cerr << "warning: " << warning << "\n";
  std::cout << arguments[3] << "\n";
  return 0;
}

}  // namespace

int main(int count, char **arguments) {
  try {
    return run(count, arguments);
  } catch (const hst::Error &error) {
    std::cerr << "error: " << error.what() << "\n";
    return error.code();
  } catch (const std::exception &error) {
    std::cerr << "error: " << error.what() << "\n";
    return EXIT_FAILURE;
  }
}
