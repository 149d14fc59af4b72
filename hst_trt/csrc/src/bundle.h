// A bundle on disk, opened: schema, containment of every path and every file's hash are checked before anything is loaded.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <string>

#include "manifest.h"
#include "schedule.h"
#include "spec.h"

namespace hst_trt {

// What tells a file from another one under the same name.
struct FileStamp {
  uint64_t device, inode, bytes;
  int64_t seconds, nanoseconds;  // of the last change

  bool operator==(const FileStamp &o) const {
    return device == o.device && inode == o.inode && bytes == o.bytes && seconds == o.seconds && nanoseconds == o.nanoseconds;
  }
};

struct Bundle {
  std::filesystem::path path;
  Manifest manifest;
  PairSpec spec;
  Scheduler scheduler;
  std::map<std::string, FileStamp> stamps;  // of the files that were hashed, when that was done

  std::filesystem::path file(const std::string &name) const { return path / std::filesystem::u8path(name); }
  // A listed file, of which the very bytes that are returned were compared with the manifest. Throws Error, HST_INTEGRITY.
  std::string read(const std::string &name) const;
  // The file of a graph, if it and its weights are still those that were hashed. Throws Error, HST_INTEGRITY.
  std::filesystem::path graph_file(const std::string &graph) const;
};

// What the manifest says of its models. Throws std::invalid_argument.
PairSpec pair_spec(const Manifest &manifest);

// Told how many bytes were checked, and how many there are: one call at a time, from any of the threads that hash. False cancels.
using OnHash = std::function<bool(uint64_t done, uint64_t total)>;

// Opens a bundle to run it: what a run reads by path is hashed. Throws Error with HST_MISSING, HST_INTEGRITY, HST_INCOMPATIBLE, or
// HST_CANCELLED. on_hash may be empty.
Bundle open_bundle(const std::string &path, const OnHash &on_hash);

}  // namespace hst_trt
