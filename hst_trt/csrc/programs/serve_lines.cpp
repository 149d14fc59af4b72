// hst-trt-serve-lines BUNDLE [OPTION VALUE ...]: draws what standard input asks for, a JSON object a line, with several pipelines at
// once, and answers each line with one on standard output, in the order in which pictures are done. docs/embedding.md has the fields.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <functional>
#include <iostream>
#include <map>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "arguments.h"
#include "hst_trt.hpp"
#include "lines.h"
#include "order.h"
#include "png.h"

namespace {

constexpr const char *kHelp =
    "Usage: hst-trt-serve-lines BUNDLE [OPTION VALUE ...] < requests > answers\n"
    "\n"
    "Options: --workers, pictures drawn at once (1); --threads of each (the cores, shared out evenly).\n"
    "A request is a line like {\"prompt\": \"a red apple\", \"output\": \"apple.png\", \"seed\": 7}.\n"
    "HST_ONNXRUNTIME names ONNX Runtime's shared library.\n";

std::string quoted(const std::string &text) {
  std::string out = "\"";
  for (const char c : text) {
    char escaped[8];
    if (c == '"' || c == '\\') {
      out += {'\\', c};
    } else if (static_cast<unsigned char>(c) < 0x20) {
      std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(c));
      out += escaped;
    } else {
      out += c;
    }
  }
  return out + '"';
}

// Draws one line's picture, and returns the answer without its line number.
std::string answer(const hst::Pipeline &pipeline, const std::string &line, const Signals &signals) {
  int code = HST_INTERNAL;
  std::string message;
  try {
    if (line.size() > Lines::kLongest) throw hst::Error(HST_REQUEST, "a line is longer than " + std::to_string(Lines::kLongest) + " bytes");
    Order order = order_of(line);
    order.request.on_step([&signals](int32_t, int32_t) { return !signals.came(); });
    const auto start = std::chrono::steady_clock::now();
    const hst::Result result = pipeline(order.request);
    write_png(order.output, result.rgb(0), result.width(), result.height());
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::string warnings;
    for (const std::string &warning : result.warnings()) warnings += (warnings.empty() ? "" : ", ") + quoted(warning);
    return "\"output\": " + quoted(order.output) + ", \"seed\": " + std::to_string(result.seeds().at(0)) +
           ", \"seconds\": " + std::to_string(seconds.count()) + ", \"warnings\": [" + warnings + "]";
  } catch (const hst::Error &error) {
    code = error.code();
    message = error.what();
  } catch (const std::exception &error) {
    message = error.what();
  }
  return "\"error\": {\"code\": " + std::to_string(code) + ", \"message\": " + quoted(message) + "}";
}

int serve(const std::string &path, int workers, int threads) {
  const Signals signals;
  std::signal(SIGPIPE, SIG_IGN);  // a reader of answers that has gone is found when one is written
  const hst::Bundle bundle(path, [&](uint64_t, uint64_t) { return !signals.came(); });
  const auto cores = static_cast<int>(std::thread::hardware_concurrency());
  hst_pipeline_params params = hst::pipeline_params();
  params.threads = threads > 0 ? threads : std::max(1, cores / workers);
  std::vector<hst::Pipeline> pipelines;
  for (int i = 0; i < workers; ++i) pipelines.emplace_back(bundle, params);
  std::cerr << "ready: " << bundle.name() << ", " << workers << " workers of " << params.threads << " threads\n";

  Lines lines(signals);
  std::mutex writing;
  bool written = true;
  const auto work = [&](const hst::Pipeline &pipeline) {
    std::string line;
    for (size_t number = 0; lines.next(line, number);) {
      if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
      const std::string text = answer(pipeline, line, signals);
      const std::lock_guard<std::mutex> lock(writing);
      std::cout << "{\"line\": " << number << ", " << text << "}\n" << std::flush;
      if (written && !std::cout) {
        written = false;
        kill(getpid(), SIGTERM);  // wakes those who wait for a line
      }
    }
  };
  std::vector<std::thread> running;
  try {
    for (const hst::Pipeline &pipeline : pipelines) running.emplace_back(work, std::cref(pipeline));
  } catch (const std::system_error &error) {
    if (running.empty()) throw;
    std::cerr << "only " << running.size() << " workers could be started: " << error.what() << "\n";
  }
  for (std::thread &thread : running) thread.join();
  if (!written) throw hst::Error(HST_RESOURCE, "answers cannot be written to standard output");
  if (lines.error() != 0) throw hst::Error(HST_REQUEST, "standard input cannot be read: " + std::generic_category().message(lines.error()));
  return signals.came() ? HST_CANCELLED : 0;
}

}  // namespace

int main(int count, char **arguments) {
  int workers = 1, threads = 0;
  const std::map<std::string, int *> options{{"--workers", &workers}, {"--threads", &threads}};
  for (int i = 2; i + 1 < count; i += 2) {
    const auto option = options.find(arguments[i]);
    try {
      if (option != options.end()) *option->second = whole(arguments[i + 1]);
    } catch (const std::logic_error &) {
      workers = 0;
    }
    if (option == options.end()) workers = 0;
  }
  if (count < 2 || count % 2 != 0 || workers < 1 || threads < 0) {
    std::cerr << kHelp;
    return HST_REQUEST;
  }
  try {
    return serve(arguments[1], workers, threads);
  } catch (const hst::Error &error) {
    std::cerr << "error: " << error.what() << "\n";
    return error.code();
  } catch (const std::exception &error) {
    std::cerr << "error: " << error.what() << "\n";
    return HST_INTERNAL;
  }
}
