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
};

// Opens a bundle to run it: what a run reads by path is hashed. Throws Error with HST_MISSING, HST_INTEGRITY or HST_INCOMPATIBLE.
Bundle open_bundle(const std::string &path);

// The whole file. Throws std::runtime_error.
std::string read_file(const std::filesystem::path &path);

}  // namespace hst_trt
