// manifest.json as plain values: every field that a host needs, checked as engines/README.md says, and nothing that is not in it.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "json.h"

namespace hst_trt {

inline constexpr int64_t kSchemaVersion = 1;

struct FileEntry {
  std::string sha256;
  int64_t bytes;
};

struct Axis {
  std::string name;  // empty where the length is fixed
  int64_t length;
};

struct TensorEntry {
  std::string name, dtype;
  std::vector<Axis> shape;
};

struct GraphEntry {
  std::string path;
  std::vector<std::string> weights;
  std::vector<TensorEntry> inputs, outputs;
};

struct Range {
  int64_t least, most;
};
using Profile = std::map<std::string, Range>;  // by the name of the axis

struct EngineEntry {
  std::string path;
  std::vector<Profile> profiles;
};

struct TokenizerEntry {
  std::string path;
  int64_t length, pad_id;
};

struct TargetEntry {
  std::string name, backend, precision, os, arch, backend_version;
  std::vector<int64_t> sms;  // compute capabilities, 90 for 9.0
};

// What was measured on a machine for one request shape: medians, in seconds.
struct CostsEntry {
  std::string machine, date;
  int64_t threads, images, height, width;  // pixels
  bool guided;
  std::map<int64_t, double> large_seconds;  // by the image tokens that are computed
  double small_seconds, step_seconds;  // of a small call; of the glue of a step with a mask
};

struct Manifest {
  std::string name, created_by, state, scheduler, fingerprint;
  TargetEntry target;
  std::map<std::string, json::Value> model_configs;  // of "large" and "small"
  int64_t vae_scale, t5_length;
  std::vector<TokenizerEntry> tokenizers;
  std::map<std::string, GraphEntry> graphs;
  std::map<std::string, EngineEntry> engines;
  struct {
    int64_t num_inference_steps, height, width;
    double guidance_scale;
  } defaults;
  struct {
    int64_t max_side, max_images;
  } limits;
  std::vector<double> bucket_ratios;
  std::map<std::string, FileEntry> files;
  std::vector<CostsEntry> costs;
};

// Throws std::invalid_argument, which names the field.
Manifest read_manifest(const json::Value &document);

}  // namespace hst_trt
