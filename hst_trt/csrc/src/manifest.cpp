#include "manifest.h"

#include <charconv>
#include <iterator>
#include <limits>
#include <set>
#include <stdexcept>

#include "graph_names.h"
#include "spec.h"

namespace hst_trt {
namespace {

constexpr int64_t kNoEnd = std::numeric_limits<int64_t>::max();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

[[noreturn]] void fail(const std::string &field, const std::string &what) { throw std::invalid_argument(field + ": " + what); }

std::string text_of(const json::Value &value, const std::string &field) {
  if (!value.text()) fail(field, "not a text");
  return *value.text();
}

std::string one_of(const json::Value &value, const std::string &field, const std::set<std::string> &known) {
  const std::string text = text_of(value, field);
  if (known.count(text) == 0) fail(field, "an unknown value, " + text);
  return text;
}

int64_t whole_of(const json::Value &value, const std::string &field, int64_t least = -kNoEnd - 1, int64_t most = kNoEnd) {
  if (!value.whole()) fail(field, "not a whole number");
  if (*value.whole() < least) fail(field, "less than " + std::to_string(least));
  if (*value.whole() > most) fail(field, "more than " + std::to_string(most));
  return *value.whole();
}

double number_of(const json::Value &value, const std::string &field, double least = -kInfinity, bool above = false) {
  double number = 0;
  if (!value.number(number)) fail(field, "not a number");
  if (number < least || (above && number <= least)) fail(field, "too small");
  return number;
}

const json::Array &array_of(const json::Value &value, const std::string &field) {
  if (!value.array()) fail(field, "not an array");
  return *value.array();
}

const json::Object &object_of(const json::Value &value, const std::string &field) {
  if (!value.object()) fail(field, "not an object");
  return *value.object();
}

// An object whose fields are all known: each is asked for once, and `done` refuses the rest.
class Fields {
 public:
  Fields(const json::Value &value, std::string path) : members_(object_of(value, path)), path_(std::move(path)) {}

  std::string path(const std::string &key) const { return path_.empty() ? key : path_ + "." + key; }
  bool has(const std::string &key) {
    asked_.insert(key);
    return members_.count(key) > 0;
  }
  const json::Value &get(const std::string &key) {
    if (!has(key)) fail(path(key), "missing");
    return members_.find(key)->second;
  }
  std::string text(const std::string &key) { return text_of(get(key), path(key)); }
  int64_t whole(const std::string &key, int64_t least, int64_t most = kNoEnd) { return whole_of(get(key), path(key), least, most); }
  double number(const std::string &key, double least, bool above = false) { return number_of(get(key), path(key), least, above); }
  void done() const {
    for (const auto &member : members_) {
      if (asked_.count(member.first) == 0) fail(path(member.first), "unknown");
    }
  }

 private:
  const json::Object &members_;
  std::string path_;
  std::set<std::string> asked_;
};

std::vector<std::string> texts_of(const json::Value &value, const std::string &field) {
  std::vector<std::string> texts;
  for (const json::Value &item : array_of(value, field)) texts.push_back(text_of(item, field));
  return texts;
}

std::vector<TensorEntry> read_tensors(const json::Value &value, const std::string &field) {
  std::vector<TensorEntry> tensors;
  for (const json::Value &item : array_of(value, field)) {
    Fields fields(item, field);
    TensorEntry tensor{fields.text("name"), fields.text("dtype"), {}};
    for (const json::Value &axis : array_of(fields.get("shape"), fields.path("shape"))) {
      if (!axis.whole() && !axis.text()) fail(fields.path("shape"), "neither a number nor a name");
      tensor.shape.push_back(axis.whole() ? Axis{"", *axis.whole()} : Axis{*axis.text(), -1});
    }
    fields.done();
    tensors.push_back(std::move(tensor));
  }
  return tensors;
}

GraphEntry read_graph(const json::Value &value, const std::string &path) {
  Fields fields(value, path);
  GraphEntry graph{fields.text("path"), {}, {}, {}};
  if (fields.has("weights")) graph.weights = texts_of(fields.get("weights"), fields.path("weights"));
  graph.inputs = read_tensors(fields.get("inputs"), fields.path("inputs"));
  graph.outputs = read_tensors(fields.get("outputs"), fields.path("outputs"));
  if (fields.has("worst_error") && !fields.get("worst_error").is_null()) fields.number("worst_error", -kInfinity);
  fields.done();
  return graph;
}

EngineEntry read_engine(const json::Value &value, const std::string &path) {
  Fields fields(value, path);
  EngineEntry engine;
  const json::Array &profiles = array_of(fields.get("profiles"), fields.path("profiles"));
  if (profiles.empty()) fail(fields.path("profiles"), "none");
  for (const json::Value &item : profiles) {
    Fields profile(item, fields.path("profiles"));
    Profile ranges;
    for (const auto &axis : object_of(profile.get("axes"), profile.path("axes"))) {
      const json::Array &lengths = array_of(axis.second, profile.path("axes"));
      if (lengths.size() != 3) fail(profile.path("axes"), "not three lengths");
      for (const json::Value &length : lengths) whole_of(length, profile.path("axes"));
      ranges[axis.first] = {*lengths[0].whole(), *lengths[2].whole()};
    }
    profile.done();
    engine.profiles.push_back(std::move(ranges));
  }
  if (fields.has("activation_bytes") && !fields.get("activation_bytes").is_null()) {
    whole_of(fields.get("activation_bytes"), fields.path("activation_bytes"));
  }
  one_of(fields.get("read_back"), fields.path("read_back"), {"network", "engine"});
  fields.number("seconds", 0);
  engine.path = fields.text("path");
  fields.done();
  return engine;
}

CostsEntry read_costs(const json::Value &value, const std::string &path) {
  Fields fields(value, path);
  CostsEntry costs{};
  costs.machine = fields.text("machine");
  fields.text("backend_version");
  costs.date = fields.text("date");
  costs.threads = fields.whole("threads", 0);
  costs.images = fields.whole("images", 1);
  costs.height = fields.whole("height", 1);
  costs.width = fields.whole("width", 1);
  const bool *guided = fields.get("guided").boolean();
  if (!guided) fail(fields.path("guided"), "neither true nor false");
  costs.guided = *guided;
  costs.small_seconds = fields.number("small_seconds", 0, true);
  costs.step_seconds = fields.number("step_seconds", 0, true);
  for (const char *key : {"text_seconds", "vae_seconds"}) fields.number(key, 0, true);
  const json::Object &large = object_of(fields.get("large_seconds"), fields.path("large_seconds"));
  if (large.empty()) fail(fields.path("large_seconds"), "none");
  for (const auto &entry : large) {
    int64_t tokens = 0;
    const char *last = entry.first.data() + entry.first.size();
    const auto end = std::from_chars(entry.first.data(), last, tokens);
    if (end.ec != std::errc() || end.ptr != last || tokens < 1 || entry.first[0] == '0') fail(fields.path("large_seconds"), "not a number of tokens");
    costs.large_seconds[tokens] = number_of(entry.second, fields.path("large_seconds"), 0, true);
  }
  fields.done();
  return costs;
}

void check_distances(Fields &fields) {
  for (const char *key : {"latents", "features"}) fields.number(key, 0, true);
}

void check_calibration(const json::Value &value, const std::string &path) {
  Fields fields(value, path);
  for (const char *key : {"height", "width", "prompts", "baseline_steps", "converged_steps"}) fields.whole(key, 1);
  if (fields.has("further_prompts")) fields.whole("further_prompts", 0);
  if (fields.has("further_hash")) fields.text("further_hash");
  for (const char *key : {"prompts_hash", "date"}) fields.text(key);
  fields.number("guidance_scale", 0);
  for (const json::Value &item : array_of(fields.get("schedules"), fields.path("schedules"))) {
    Fields schedule(item, fields.path("schedules"));
    const json::Array &stages = array_of(schedule.get("stages"), schedule.path("stages"));
    if (stages.size() != 3) fail(schedule.path("stages"), "not three numbers");
    for (const json::Value &stage : stages) whole_of(stage, schedule.path("stages"));
    one_of(schedule.get("solver"), schedule.path("solver"), {"euler", "ab2", "dpmpp-2m"});
    if (!schedule.get("shift").is_null()) schedule.number("shift", 0, true);
    if (schedule.number("ratio", 0) >= 1) fail(schedule.path("ratio"), "not below 1");
    if (schedule.number("correction", 0) > 1) fail(schedule.path("correction"), "above 1");
    schedule.whole("refresh", 0);
    if (!schedule.get("ras").boolean()) fail(schedule.path("ras"), "neither true nor false");
    check_distances(schedule);
    if (schedule.has("confirmed") && !schedule.get("confirmed").is_null()) {
      Fields confirmed(schedule.get("confirmed"), schedule.path("confirmed"));
      check_distances(confirmed);
      confirmed.done();
    }
    schedule.done();
  }
  fields.done();
}

TargetEntry read_target(const json::Value &value) {
  Fields fields(value, "target");
  TargetEntry target{fields.text("name"), one_of(fields.get("backend"), "target.backend", {"onnxruntime", "tensorrt", "tensorrt-rtx"}),
                     one_of(fields.get("precision"), "target.precision", {"float32", "float16", "bfloat16"}), fields.text("os"),
                     fields.text("arch"), fields.text("backend_version"), {}};
  if (fields.has("sms")) {
    for (const json::Value &sm : array_of(fields.get("sms"), "target.sms")) target.sms.push_back(whole_of(sm, "target.sms"));
  }
  fields.done();
  return target;
}

FileEntry read_file_entry(const json::Value &value, const std::string &path) {
  Fields fields(value, path);
  FileEntry file{fields.text("sha256"), fields.whole("bytes", 0)};
  if (file.sha256.size() != 64 || file.sha256.find_first_not_of("0123456789abcdef") != std::string::npos) {
    fail(fields.path("sha256"), "not 64 hex digits");
  }
  fields.done();
  return file;
}

}  // namespace

Manifest read_manifest(const json::Value &document) {
  Fields fields(document, "");
  Manifest manifest{};
  fields.whole("schema_version", 1);
  manifest.name = fields.text("name");
  manifest.created_by = fields.text("created_by");
  fields.text("created");
  manifest.state = one_of(fields.get("state"), "state", {"graphs", "complete"});
  manifest.target = read_target(fields.get("target"));
  fields.text("recipe");
  for (const auto &item : object_of(fields.get("models"), "models")) {
    Fields model(item.second, "models." + item.first);
    model.text("source");
    model.text("component");
    if (!model.get("revision").is_null()) model.text("revision");
    object_of(model.get("config"), model.path("config"));
    manifest.model_configs[item.first] = model.get("config");
    model.done();
  }
  manifest.vae_scale = fields.whole("vae_scale", 1, kMaxCount);
  manifest.t5_length = fields.whole("t5_length", 0, kMaxCount);
  for (const json::Value &item : array_of(fields.get("tokenizers"), "tokenizers")) {
    Fields tokenizer(item, "tokenizers");
    manifest.tokenizers.push_back({tokenizer.text("path"), tokenizer.whole("length", 1, kMaxCount), tokenizer.whole("pad_id", 0)});
    tokenizer.done();
  }
  if (manifest.tokenizers.empty()) fail("tokenizers", "none");
  if (manifest.tokenizers.size() > std::size(kTextEncoders)) fail("tokenizers", "more than there are text encoders");
  manifest.scheduler = fields.text("scheduler");
  for (const auto &item : object_of(fields.get("graphs"), "graphs")) {
    manifest.graphs[item.first] = read_graph(item.second, "graphs." + item.first);
  }
  if (fields.has("engines")) {
    for (const auto &item : object_of(fields.get("engines"), "engines")) {
      manifest.engines[item.first] = read_engine(item.second, "engines." + item.first);
    }
  }
  Fields defaults(fields.get("defaults"), "defaults");
  manifest.defaults = {defaults.whole("num_inference_steps", 1, kMaxCount), defaults.whole("height", 1, kMaxSide),
                       defaults.whole("width", 1, kMaxSide), defaults.number("guidance_scale", 0)};
  defaults.done();
  Fields limits(fields.get("limits"), "limits");
  manifest.limits = {limits.whole("max_side", 1, kMaxSide), limits.whole("max_images", 1, kMaxImages)};
  limits.done();
  for (const json::Value &ratio : array_of(fields.get("bucket_ratios"), "bucket_ratios")) {
    manifest.bucket_ratios.push_back(number_of(ratio, "bucket_ratios", 0, true));
    if (manifest.bucket_ratios.back() > 1) fail("bucket_ratios", "above 1");
  }
  for (const auto &item : object_of(fields.get("files"), "files")) {
    manifest.files[item.first] = read_file_entry(item.second, "files." + item.first);
  }
  for (const auto &item : object_of(fields.get("parts"), "parts")) {
    Fields part(item.second, "parts." + item.first);
    part.text("inputs");
    if (part.has("files")) texts_of(part.get("files"), part.path("files"));
    part.done();
  }
  if (fields.has("costs")) {
    for (const json::Value &item : array_of(fields.get("costs"), "costs")) manifest.costs.push_back(read_costs(item, "costs"));
  }
  if (fields.has("calibrations")) {
    for (const json::Value &item : array_of(fields.get("calibrations"), "calibrations")) check_calibration(item, "calibrations");
  }
  manifest.fingerprint = fields.text("fingerprint");
  fields.done();
  return manifest;
}

}  // namespace hst_trt
