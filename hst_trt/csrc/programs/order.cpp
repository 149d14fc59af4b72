#include "order.h"

#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <stdexcept>
#include <system_error>

namespace json = hst_trt::json;

namespace {

[[noreturn]] void refuse(const std::string &why) { throw hst::Error(HST_REQUEST, why); }

const std::string &text_of(const std::string &key, const json::Value &value) {
  if (!value.text()) refuse(key + " is not a text");
  if (value.text()->find('\0') != std::string::npos) refuse(key + " has a NUL in it");
  return *value.text();
}

int64_t whole_of(const std::string &key, const json::Value &value, int64_t most = std::numeric_limits<int32_t>::max()) {
  if (!value.whole() || *value.whole() < 0 || *value.whole() > most) {
    refuse(key + " is not a whole number from 0 to " + std::to_string(most));
  }
  return *value.whole();
}

double number_of(const std::string &key, const json::Value &value) {
  double number = 0;
  if (!value.number(number)) refuse(key + " is not a number");
  return number;
}

using Set = std::function<void(hst::Request &, const std::string &key, const json::Value &)>;

Set text(const char *hst_request::*field) {
  return [field](hst::Request &request, const std::string &key, const json::Value &value) { request.operator->()->*field = text_of(key, value).c_str(); };
}

Set whole(int32_t hst_request::*field) {
  return [field](hst::Request &request, const std::string &key, const json::Value &value) {
    request.operator->()->*field = static_cast<int32_t>(whole_of(key, value));
  };
}

Set number(double hst_request::*field) {
  return [field](hst::Request &request, const std::string &key, const json::Value &value) { request.operator->()->*field = number_of(key, value); };
}

const std::map<std::string, Set> &settings() {
  static const auto &all = *new std::map<std::string, Set>{
      {"negative_prompt", [](hst::Request &request, const std::string &key, const json::Value &value) { request.negative_prompts({text_of(key, value)}); }},
      {"seed",
       [](hst::Request &request, const std::string &key, const json::Value &value) {
         request.seeds({static_cast<uint64_t>(whole_of(key, value, std::numeric_limits<int64_t>::max()))});
       }},
      {"height", whole(&hst_request::height)},
      {"width", whole(&hst_request::width)},
      {"num_inference_steps", whole(&hst_request::num_inference_steps)},
      {"guidance_scale", number(&hst_request::guidance_scale)},
      {"schedule", text(&hst_request::schedule)},
      {"stages",
       [](hst::Request &request, const std::string &key, const json::Value &value) {
         const auto *counts = value.array();
         if (!counts || counts->size() != 3) refuse(key + " are not three numbers of steps: large, hybrid, small");
         request->has_stages = 1;
         for (size_t i = 0; i < 3; ++i) request->stages[i] = static_cast<int32_t>(whole_of(key, (*counts)[i]));
       }},
      {"mask_ratio", number(&hst_request::mask_ratio)},
      {"refresh_every", whole(&hst_request::refresh_every)},
      {"correction", number(&hst_request::correction)},
      {"solver", text(&hst_request::solver)},
      {"timestep_spacing", text(&hst_request::timestep_spacing)},
      {"shift", number(&hst_request::shift)},
  };
  return all;
}

}  // namespace

Order order_of(const std::string &line) {
  json::Value fields;
  try {
    fields = json::parse(line);
  } catch (const std::invalid_argument &error) {
    refuse(std::string("a line is not JSON: ") + error.what());
  }
  if (!fields.object()) refuse("a line is not a JSON object");
  Order order{fields, text_of("output", fields["output"]), hst::Request({text_of("prompt", fields["prompt"])})};
  for (const auto &field : *fields.object()) {
    if (field.first == "prompt" || field.first == "output") continue;
    const auto found = settings().find(field.first);
    if (found == settings().end()) refuse("unknown field " + field.first);
    found->second(order.request, field.first, field.second);
  }
  const auto folder = std::filesystem::u8path(order.output).parent_path();
  std::error_code ignored;
  if (!folder.empty() && !std::filesystem::is_directory(folder, ignored)) refuse("there is no folder " + folder.u8string() + " for the output");
  return order;
}
