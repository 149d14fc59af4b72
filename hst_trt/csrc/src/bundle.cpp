#include "bundle.h"

#include <sys/stat.h>
#include <sys/utsname.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <fstream>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "error.h"
#include "graph_names.h"
#include "sha256.h"

namespace fs = std::filesystem;

namespace hst_trt {
namespace {

constexpr const char *kBuildAgain = "run `hst-trt build --force` again";

Manifest manifest_of(const fs::path &folder) {
  std::error_code ignored;
  if (!fs::is_directory(folder, ignored)) {
    throw Error(HST_MISSING, "there is no bundle at " + folder.string(), "", "run `hst-trt build` to make one");
  }
  const fs::path file = folder / "manifest.json";
  if (!fs::exists(fs::symlink_status(file, ignored))) {
    throw Error(HST_INTEGRITY, folder.string() + " is not a complete bundle: it has no manifest.json", "",
                "give the folder of a bundle, or run `hst-trt build` to make one");
  }
  json::Value document;
  try {
    document = json::parse(read_file(file));
  } catch (const std::exception &exc) {
    throw Error(HST_INTEGRITY, file.string() + " cannot be read", exc.what(), "run `hst-trt build` again");
  }
  if (const int64_t *version = document["schema_version"].whole(); version && *version > kSchemaVersion) {
    throw Error(HST_INCOMPATIBLE, folder.string() + " was written by a newer hst_trt",
                "bundle schema " + std::to_string(*version) + ", this version reads up to " + std::to_string(kSchemaVersion),
                "upgrade hst_trt, or build the bundle again with this version");
  }
  try {
    return read_manifest(document);
  } catch (const std::invalid_argument &exc) {
    throw Error(HST_INTEGRITY, file.string() + " is not a valid manifest", exc.what(), "run `hst-trt build` again");
  }
}

void check_contained(const fs::path &folder, const std::string &name) {
  const fs::path path = fs::u8path(name);
  bool inside = !path.is_absolute() && name.find('\\') == std::string::npos && name.find('\0') == std::string::npos;
  bool any = false;
  for (const fs::path &part : path) {
    inside = inside && part != "..";
    any = any || (part != "." && !part.empty());
  }
  if (!inside || !any) throw Error(HST_INTEGRITY, folder.string() + " names a path outside itself", name, "do not use this bundle");
  std::error_code failed;
  const fs::path home = fs::canonical(folder, failed), target = fs::weakly_canonical(folder / path, failed);
  const auto differs = std::mismatch(home.begin(), home.end(), target.begin(), target.end());
  if (failed || differs.first != home.end()) {
    throw Error(HST_INTEGRITY, folder.string() + ": " + name + " is a link that leads outside the bundle", "", "do not use this bundle");
  }
}

void check_references(const fs::path &folder, const Manifest &manifest) {
  std::set<std::string> named{manifest.scheduler};
  for (const TokenizerEntry &tokenizer : manifest.tokenizers) named.insert(tokenizer.path);
  for (const auto &graph : manifest.graphs) {
    named.insert(graph.second.path);
    named.insert(graph.second.weights.begin(), graph.second.weights.end());
  }
  for (const auto &engine : manifest.engines) named.insert(engine.second);
  for (const std::string &name : named) {
    if (manifest.files.count(name) == 0) {
      throw Error(HST_INTEGRITY, folder.string() + " uses files that its manifest does not list", name, kBuildAgain);
    }
  }
}

int64_t positive(const json::Value &config, const char *key) {
  const int64_t *value = config[key].whole();
  if (!value || *value < 1 || *value > 1 << 20) throw std::invalid_argument(std::string(key) + " is not a positive whole number");
  return *value;
}

TransformerSpec transformer_spec(const Manifest &manifest, const char *model) {
  const auto found = manifest.model_configs.find(model);
  if (found == manifest.model_configs.end()) throw std::invalid_argument(std::string("there is no model ") + model);
  const json::Value &config = found->second;
  const json::Array *dual = config["dual_attention_layers"].array();
  const int64_t patch = positive(config, "patch_size");
  return {positive(config, "num_layers"), positive(config, "num_attention_heads"), positive(config, "attention_head_dim"),
          dual ? static_cast<int64_t>(dual->size()) : 0, positive(config, "joint_attention_dim"),
          positive(config, "pooled_projection_dim"), positive(config, "in_channels") * patch * patch,
          positive(config, "pos_embed_max_size")};
}

PairSpec pair_spec(const Manifest &manifest) {
  PairSpec spec{transformer_spec(manifest, "large"), transformer_spec(manifest, "small"), 0, 0, manifest.vae_scale,
                manifest.tokenizers[0].length, manifest.t5_length};
  const json::Value &config = manifest.model_configs.at("large");
  spec.latent_channels = positive(config, "in_channels");
  spec.patch_size = positive(config, "patch_size");
  return spec;
}

void check_runs_here(const fs::path &folder, const Manifest &manifest) {
  std::string missing;
  for (const char *name : kGlue) {
    if (manifest.graphs.count(name) == 0) missing += (missing.empty() ? "" : ", ") + std::string(name);
  }
  if (!missing.empty()) {
    throw Error(HST_INCOMPATIBLE, folder.string() + " was made by an older hst_trt", manifest.created_by + "; it lacks the graphs " + missing,
                "build it again: `hst-trt build --gpu " + manifest.target.name + "`");
  }
  if (manifest.state != "complete") {
    throw Error(HST_INCOMPATIBLE, folder.string() + " holds graphs only, it was not built for " + manifest.target.name + " yet", "",
                "run `hst-trt build --gpu " + manifest.target.name + "` for the same pair; for a CPU, `hst-trt build --gpu cpu`");
  }
  utsname here{};
  uname(&here);
  if (manifest.target.backend != "onnxruntime" && (manifest.target.os != "linux" || manifest.target.arch != here.machine)) {
    throw Error(HST_INCOMPATIBLE, "the engines of " + folder.string() + " are for another system",
                manifest.target.os + " on " + manifest.target.arch, "build them on a machine like this one: `hst-trt build`");
  }
}

// All files for ONNX Runtime; without graphs, weights and engines for TensorRT, which hashes engines as it loads them.
std::map<std::string, FileEntry> read_by_path(const Manifest &manifest) {
  std::map<std::string, FileEntry> files = manifest.files;
  if (manifest.target.backend == "onnxruntime") return files;
  for (const auto &engine : manifest.engines) files.erase(engine.second);
  for (const auto &graph : manifest.graphs) {
    files.erase(graph.second.path);
    for (const std::string &weights : graph.second.weights) files.erase(weights);
  }
  return files;
}

FileStamp stamp_of(const fs::path &path) {
  struct stat found {};
  if (stat(path.c_str(), &found) != 0) return {};
  return {static_cast<uint64_t>(found.st_dev), static_cast<uint64_t>(found.st_ino), static_cast<uint64_t>(found.st_size),
          static_cast<int64_t>(found.st_mtim.tv_sec), static_cast<int64_t>(found.st_mtim.tv_nsec)};
}

// Returns the stamp from before the first byte was read. advance: told how many bytes more were read; may throw.
FileStamp verify_file(const Bundle &bundle, const std::string &name, const FileEntry &entry, const std::function<void(uint64_t)> &advance) {
  const fs::path path = bundle.file(name);
  const FileStamp stamp = stamp_of(path);
  const std::string where = bundle.path.string() + ": " + name;
  std::error_code failed;
  const bool regular = fs::is_regular_file(path, failed);
  const auto size = regular ? fs::file_size(path, failed) : 0;
  std::ifstream stream(path, std::ios::binary);
  if (failed || !regular || !stream) {
    throw Error(HST_INTEGRITY, where + " is missing or cannot be read", failed ? failed.message() : "", kBuildAgain);
  }
  const std::string changed = where + " is not the file that was built";
  if (size != static_cast<uintmax_t>(entry.bytes)) {
    throw Error(HST_INTEGRITY, changed, std::to_string(size) + " bytes instead of " + std::to_string(entry.bytes), kBuildAgain);
  }
  Sha256 digest;
  std::vector<char> chunk(size_t{1} << 20);
  while (stream.read(chunk.data(), static_cast<std::streamsize>(chunk.size())), stream.gcount() > 0) {
    digest.update(chunk.data(), static_cast<size_t>(stream.gcount()));
    advance(static_cast<uint64_t>(stream.gcount()));
  }
  if (stream.bad()) throw Error(HST_INTEGRITY, where + " is missing or cannot be read", "", kBuildAgain);
  if (const std::string found = digest.hex(); found != entry.sha256) throw Error(HST_INTEGRITY, changed, "sha256 " + found, kBuildAgain);
  return stamp;
}

// Hashes files in parallel, and keeps their stamps; the first error wins.
void verify_files(Bundle &bundle, const OnHash &on_hash) {
  const auto files = read_by_path(bundle.manifest);
  std::vector<std::pair<std::string, FileEntry>> queue(files.begin(), files.end());
  std::sort(queue.begin(), queue.end(), [](const auto &a, const auto &b) { return a.second.bytes > b.second.bytes; });
  std::atomic<size_t> next{0};
  std::exception_ptr first;
  std::mutex guard;
  uint64_t done = 0, total = 0;
  for (const auto &file : queue) total += static_cast<uint64_t>(file.second.bytes);
  bool cancelled = false;
  const auto advance = [&](uint64_t bytes) {
    const std::lock_guard<std::mutex> lock(guard);
    done += bytes;
    cancelled = cancelled || (on_hash && !on_hash(done, total));
    if (cancelled) throw Error(HST_CANCELLED, "the check of " + bundle.path.string() + " was cancelled");
  };
  const auto work = [&] {
    for (size_t i = next++; i < queue.size(); i = next++) {
      try {
        const FileStamp stamp = verify_file(bundle, queue[i].first, queue[i].second, advance);
        const std::lock_guard<std::mutex> lock(guard);
        bundle.stamps[queue[i].first] = stamp;
      } catch (...) {
        const std::lock_guard<std::mutex> lock(guard);
        if (!first) first = std::current_exception();
        next = queue.size();
      }
    }
  };
  std::vector<std::thread> helpers;
  const size_t wanted = std::min<size_t>({8, std::max(1U, std::thread::hardware_concurrency()), queue.size()});
  try {
    while (helpers.size() + 1 < wanted) helpers.emplace_back(work);
  } catch (const std::system_error &) {  // no more threads: this one does the rest
  }
  work();
  for (std::thread &helper : helpers) helper.join();
  if (first) std::rethrow_exception(first);
}

}  // namespace

std::string read_file(const fs::path &path) {
  std::ifstream stream(path, std::ios::binary | std::ios::ate);
  const std::streamoff size = stream ? static_cast<std::streamoff>(stream.tellg()) : -1;
  std::error_code failed;
  if (size < 0 || !fs::is_regular_file(path, failed)) throw std::runtime_error(path.string() + " cannot be read");
  std::string content(static_cast<size_t>(size), '\0');
  stream.seekg(0);
  if (!stream.read(content.data(), size)) throw std::runtime_error(path.string() + " cannot be read");
  return content;
}

fs::path Bundle::graph_file(const std::string &graph) const {
  const auto entry = manifest.graphs.find(graph);
  if (entry == manifest.graphs.end()) throw Error(HST_INTEGRITY, "the bundle has no graph '" + graph + "'", "", kBuildAgain);
  std::vector<std::string> names = entry->second.weights;
  names.push_back(entry->second.path);
  for (const std::string &name : names) {
    if (!(stamps.at(name) == stamp_of(file(name)))) {
      throw Error(HST_INTEGRITY, path.string() + ": " + name + " has changed since the bundle was opened", "", "open the bundle again");
    }
  }
  return file(entry->second.path);
}

Bundle open_bundle(const std::string &path, const OnHash &on_hash) {
  Bundle bundle{fs::u8path(path), {}, {}, {}, {}};
  bundle.manifest = manifest_of(bundle.path);
  for (const auto &file : bundle.manifest.files) check_contained(bundle.path, file.first);
  check_references(bundle.path, bundle.manifest);
  try {
    bundle.spec = pair_spec(bundle.manifest);
    bundle.scheduler = Scheduler::from_config(json::parse(read_file(bundle.file(bundle.manifest.scheduler))));
  } catch (const Error &) {
    throw;
  } catch (const std::exception &exc) {
    throw Error(HST_INTEGRITY, bundle.path.string() + " does not describe its models or its scheduler", exc.what(), kBuildAgain);
  }
  check_runs_here(bundle.path, bundle.manifest);
  verify_files(bundle, on_hash);
  return bundle;
}

}  // namespace hst_trt
