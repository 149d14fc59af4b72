#include "bundle.h"

#include <sys/stat.h>
#include <sys/utsname.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <fstream>
#include <iterator>
#include <mutex>
#include <new>
#include <set>
#include <stdexcept>
#include <string_view>
#include <thread>
#include <vector>

#include "error.h"
#include "graph_names.h"
#include "sha256.h"

namespace fs = std::filesystem;

namespace hst_trt {
namespace {

constexpr const char *kBuildAgain = "run `hst-trt build --force` again";

// Whether there is a plain file: opening a pipe would wait for its writer.
bool is_plain(const fs::path &path) {
  std::error_code failed;
  return fs::is_regular_file(path, failed);
}

// The whole file. Throws std::runtime_error.
std::string content_of(const fs::path &path) {
  std::ifstream stream;
  if (is_plain(path)) stream.open(path, std::ios::binary | std::ios::ate);
  const std::streamoff size = stream.is_open() ? static_cast<std::streamoff>(stream.tellg()) : -1;
  if (size < 0) throw std::runtime_error("it cannot be read");
  std::string content(static_cast<size_t>(size), '\0');
  stream.seekg(0);
  if (!stream.read(content.data(), size)) throw std::runtime_error("it cannot be read");
  return content;
}

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
    document = json::parse(content_of(file));
  } catch (const std::bad_alloc &) {
    throw;
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

bool is_inside(const std::string &name) {
  if (name.find_first_of(std::string_view("\\\0", 2)) != std::string::npos) return false;
  for (size_t start = 0, end = 0; end != std::string::npos; start = end + 1) {
    end = name.find('/', start);
    const std::string part = name.substr(start, end - start);
    if (part.empty() || part == "." || part == "..") return false;
  }
  return true;
}

void check_contained(const fs::path &folder, const std::map<std::string, FileEntry> &files) {
  std::error_code failed;
  const fs::path home = fs::canonical(folder, failed);
  for (const auto &file : files) {
    const std::string &name = file.first;
    if (!is_inside(name)) throw Error(HST_INTEGRITY, folder.string() + " names a path outside itself", name, "do not use this bundle");
    const fs::path target = fs::weakly_canonical(home / fs::u8path(name), failed);
    if (failed || std::mismatch(home.begin(), home.end(), target.begin(), target.end()).first != home.end()) {
      throw Error(HST_INTEGRITY, folder.string() + ": " + name + " is a link that leads outside the bundle", "", "do not use this bundle");
    }
  }
}

void check_references(const fs::path &folder, const Manifest &manifest) {
  std::set<std::string> named{manifest.scheduler};
  for (const TokenizerEntry &tokenizer : manifest.tokenizers) named.insert(tokenizer.path);
  for (const auto &graph : manifest.graphs) {
    named.insert(graph.second.path);
    named.insert(graph.second.weights.begin(), graph.second.weights.end());
  }
  for (const auto &engine : manifest.engines) named.insert(engine.second.path);
  for (const std::string &name : named) {
    if (manifest.files.count(name) == 0) {
      throw Error(HST_INTEGRITY, folder.string() + " uses files that its manifest does not list", name, kBuildAgain);
    }
  }
  std::vector<std::string> needed{"large", "small", "vae_decoder"};
  needed.insert(needed.end(), std::begin(kTextEncoders), std::begin(kTextEncoders) + manifest.tokenizers.size());
  for (const std::string &name : needed) {
    if (manifest.graphs.count(name) == 0) throw Error(HST_INTEGRITY, folder.string() + " lacks graphs of its models", name, kBuildAgain);
  }
}

int64_t positive(const json::Value &config, const char *key) {
  const int64_t *value = config[key].whole();
  if (!value || *value < 1 || *value > kMaxCount) {
    throw std::invalid_argument(std::string(key) + " is not a whole number from 1 to " + std::to_string(kMaxCount));
  }
  return *value;
}

int64_t dual_layers(const json::Value &config) {
  const json::Value &layers = config["dual_attention_layers"];
  if (layers.is_null()) return 0;
  const auto is_whole = [](const json::Value &layer) { return layer.whole() != nullptr; };
  if (!layers.array() || !std::all_of(layers.array()->begin(), layers.array()->end(), is_whole)) {
    throw std::invalid_argument("dual_attention_layers are not an array of whole numbers");
  }
  return static_cast<int64_t>(layers.array()->size());
}

TransformerSpec transformer_spec(const Manifest &manifest, const char *model) {
  const auto found = manifest.model_configs.find(model);
  if (found == manifest.model_configs.end()) throw std::invalid_argument(std::string("there is no model ") + model);
  const json::Value &config = found->second;
  const int64_t heads = positive(config, "num_attention_heads"), head_dim = positive(config, "attention_head_dim");
  if (heads * head_dim > kMaxCount) {
    throw std::invalid_argument("num_attention_heads of attention_head_dim are more than " + std::to_string(kMaxCount));
  }
  const int64_t patch = positive(config, "patch_size");
  return {positive(config, "num_layers"), heads, head_dim, dual_layers(config), positive(config, "joint_attention_dim"),
          positive(config, "pooled_projection_dim"), positive(config, "in_channels") * patch * patch,
          positive(config, "pos_embed_max_size")};
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
  for (const auto &engine : manifest.engines) files.erase(engine.second.path);
  for (const auto &graph : manifest.graphs) {
    files.erase(graph.second.path);
    for (const std::string &weights : graph.second.weights) files.erase(weights);
  }
  return files;
}

[[noreturn]] void refuse_unreadable(const Bundle &bundle, const std::string &name) {
  throw Error(HST_INTEGRITY, bundle.path.string() + ": " + name + " is missing or cannot be read", "", kBuildAgain);
}

// Refuses a file that is not the one of the manifest.
void compare(const Bundle &bundle, const std::string &name, uint64_t size, Sha256 &digest) {
  const FileEntry &entry = bundle.manifest.files.at(name);
  const std::string problem = bundle.path.string() + ": " + name + " is not the file that was built";
  if (size != static_cast<uint64_t>(entry.bytes)) {
    throw Error(HST_INTEGRITY, problem, std::to_string(size) + " bytes instead of " + std::to_string(entry.bytes), kBuildAgain);
  }
  if (const std::string found = digest.hex(); found != entry.sha256) throw Error(HST_INTEGRITY, problem, "sha256 " + found, kBuildAgain);
}

FileStamp stamp_of(const fs::path &path) {
  struct stat found {};
  if (stat(path.c_str(), &found) != 0) return {};
  return {static_cast<uint64_t>(found.st_dev), static_cast<uint64_t>(found.st_ino), static_cast<uint64_t>(found.st_size),
          static_cast<int64_t>(found.st_mtim.tv_sec), static_cast<int64_t>(found.st_mtim.tv_nsec)};
}

// Returns the stamp from before the first byte was read. advance: told how many bytes more were read; may throw.
FileStamp verify_file(const Bundle &bundle, const std::string &name, const std::function<void(uint64_t)> &advance) {
  const fs::path path = bundle.file(name);
  const FileStamp stamp = stamp_of(path);
  std::error_code failed;
  const uintmax_t size = fs::file_size(path, failed);
  std::ifstream stream;
  if (is_plain(path)) stream.open(path, std::ios::binary);
  if (failed || !stream.is_open()) refuse_unreadable(bundle, name);
  Sha256 digest;
  if (size == static_cast<uintmax_t>(bundle.manifest.files.at(name).bytes)) {
    std::vector<char> chunk(size_t{1} << 20);
    while (stream.read(chunk.data(), static_cast<std::streamsize>(chunk.size())), stream.gcount() > 0) {
      digest.update(chunk.data(), static_cast<size_t>(stream.gcount()));
      advance(static_cast<uint64_t>(stream.gcount()));
    }
  }
  if (stream.bad()) refuse_unreadable(bundle, name);
  compare(bundle, name, size, digest);
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
        const FileStamp stamp = verify_file(bundle, queue[i].first, advance);
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

PairSpec pair_spec(const Manifest &manifest) {
  PairSpec spec{transformer_spec(manifest, "large"), transformer_spec(manifest, "small"), 0, 0, manifest.vae_scale,
                manifest.tokenizers[0].length, manifest.t5_length};
  const json::Value &config = manifest.model_configs.at("large");
  spec.latent_channels = positive(config, "in_channels");
  spec.patch_size = positive(config, "patch_size");
  return spec;
}

std::string Bundle::read(const std::string &name) const {
  std::string content;
  try {
    content = content_of(file(name));
  } catch (const std::runtime_error &) {
    refuse_unreadable(*this, name);
  }
  Sha256 digest;
  digest.update(content.data(), content.size());
  compare(*this, name, content.size(), digest);
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
  check_contained(bundle.path, bundle.manifest.files);
  check_references(bundle.path, bundle.manifest);
  try {
    bundle.spec = pair_spec(bundle.manifest);
  } catch (const std::invalid_argument &exc) {
    throw Error(HST_INTEGRITY, bundle.path.string() + " does not describe its models", exc.what(), kBuildAgain);
  }
  check_runs_here(bundle.path, bundle.manifest);
  verify_files(bundle, on_hash);
  try {
    bundle.scheduler = Scheduler::from_config(json::parse(bundle.read(bundle.manifest.scheduler)));
  } catch (const std::invalid_argument &exc) {
    throw Error(HST_INTEGRITY, bundle.path.string() + " does not describe its scheduler", exc.what(), kBuildAgain);
  }
  return bundle;
}

}  // namespace hst_trt
