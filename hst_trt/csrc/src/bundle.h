// A bundle on disk, opened: schema, containment of every path and every file's hash are checked before anything is loaded.
#pragma once

#include <filesystem>
#include <string>

#include "manifest.h"
#include "schedule.h"
#include "spec.h"

namespace hst_trt {

struct Bundle {
  std::filesystem::path path;
  Manifest manifest;
  PairSpec spec;
  Scheduler scheduler;

  std::filesystem::path file(const std::string &name) const { return path / std::filesystem::u8path(name); }
  // A listed file, of which the very bytes that are returned were compared with the manifest. Throws Error, HST_INTEGRITY.
  std::string read(const std::string &name) const;
};

// What the manifest says of its models. Throws std::invalid_argument.
PairSpec pair_spec(const Manifest &manifest);

// Opens a bundle to run it: what a run reads by path is hashed. Throws Error with HST_MISSING, HST_INTEGRITY or HST_INCOMPATIBLE.
Bundle open_bundle(const std::string &path);

}  // namespace hst_trt
