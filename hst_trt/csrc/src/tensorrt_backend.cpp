// The TensorRT backend: engines of a bundle on one GPU, for TensorRT and TensorRT-RTX alike: hst_trt/runtime/tensorrt.py.
//
// Which of the two it is, is decided by the headers that it is compiled with: their classes have the same names and other layouts.
// Everything is enqueued on one stream. Engines are native code, so the very bytes that were hashed are deserialised, and code in
// them that would run on the host is refused.
#include "tensorrt_backend.h"

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <future>
#include <mutex>
#include <new>

#include "cuda.h"
#include "error.h"
#include "graphs.h"
#include "sha256.h"
#include "tensorrt_engine.h"
#include "tensorrt_rtx_cache.h"

namespace hst_trt {
namespace {

#ifdef TRT_MAJOR_RTX
constexpr const char *kBackend = "tensorrt-rtx", *kProduct = "TensorRT-RTX", *kLibrary = "libtensorrt_rtx.so.";
#else
constexpr const char *kBackend = "tensorrt", *kProduct = "TensorRT", *kLibrary = "libnvinfer.so.";
#endif

constexpr const char *kRowMove =
#include "row_move.inc"
    ;
constexpr int64_t kWarps = 8;  // of a block, a slot each: most slots stay where they are, and their warp is done at once
constexpr int64_t kUnit = 16;  // bytes that a lane moves at a time

struct Library {
  void *(*create_runtime)(void *logger, int32_t version);
  std::string version;  // in full, as a manifest has it
};

// Opened once in a process and never closed: its threads and statics do not take it.
Library open_library() {
  const char *named = std::getenv("HST_TENSORRT");
  const std::string name = named && *named ? named : kLibrary + std::to_string(NV_TENSORRT_MAJOR);
  const std::string fix = "install " + std::string(kProduct) + ", and give the path of its " + kLibrary + std::to_string(NV_TENSORRT_MAJOR) +
                          " in HST_TENSORRT";
  void *library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char *why = dlerror();
    throw Error(HST_MISSING, std::string(kProduct) + "'s shared library could not be opened", why ? why : name, fix);
  }
  const auto symbol = [&](const char *called) {
    void *found = dlsym(library, called);
    if (!found) throw Error(HST_INCOMPATIBLE, "the library that was given is not " + std::string(kProduct), name + " has no " + called, fix);
    return found;
  };
  int32_t numbers[4];
  const char *parts[] = {"getInferLibMajorVersion", "getInferLibMinorVersion", "getInferLibPatchVersion", "getInferLibBuildVersion"};
  std::string version;
  for (int i = 0; i < 4; ++i) {
    numbers[i] = reinterpret_cast<int32_t (*)()>(symbol(parts[i]))();
    version += (i > 0 ? "." : "") + std::to_string(numbers[i]);
  }
  // Its interface is virtual functions, whose places in their tables have changed between minor versions.
  if (numbers[0] != NV_TENSORRT_MAJOR || numbers[1] != NV_TENSORRT_MINOR) {
    const std::string ours = std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR);
    throw Error(HST_INCOMPATIBLE, "this library was built for another version of " + std::string(kProduct),
                name + " is " + version + ", the headers were those of " + ours,
                "install " + std::string(kProduct) + " " + ours + ", or build this library with the headers of " + version);
  }
  return {reinterpret_cast<void *(*)(void *, int32_t)>(symbol("createInferRuntime_INTERNAL")), version};
}

const Library &the_library() {
  static const Library library = open_library();  // tried again if it throws
  return library;
}

void check_fits(const Bundle &bundle, const CudaDevice &device, const std::string &version) {
  const TargetEntry &target = bundle.manifest.target;
  const auto dotted = [](int64_t sm) { return std::to_string(sm / 10) + "." + std::to_string(sm % 10); };
  if (std::find(target.sms.begin(), target.sms.end(), device.sm()) == target.sms.end()) {
    std::string theirs;
    for (const int64_t sm : target.sms) theirs += (theirs.empty() ? "" : ", ") + dotted(sm);
    throw Error(HST_INCOMPATIBLE, "the engines of " + bundle.path.string() + " are for another GPU",
                device.name() + " has compute capability " + dotted(device.sm()) + ", they are for " + theirs,
                "build a bundle for this one: `hst-trt build --gpu auto`");
  }
  if (version != target.backend_version) {
    throw Error(HST_INCOMPATIBLE, "the engines of " + bundle.path.string() + " were built by another " + target.backend,
                version + " is installed, they are of " + target.backend_version,
                "install " + target.backend_version + ", or build them again: `hst-trt build --gpu " + target.name + " --force`");
  }
}

// The file's bytes, hashed while they are read; what is returned is what was hashed.
std::unique_ptr<char[]> read_checked(const Bundle &bundle, const std::string &name, const FileEntry &entry) {
  constexpr int64_t kChunk = int64_t{16} << 20;
  const std::string where = bundle.path.string() + ": " + name, fix = "run `hst-trt build --force` again";
  std::ifstream stream(bundle.file(name), std::ios::binary | std::ios::ate);
  const int64_t size = stream ? static_cast<int64_t>(stream.tellg()) : -1;
  if (size < 0) throw Error(HST_INTEGRITY, where + " is missing or cannot be read", "", fix);
  const std::string changed = where + " is not the file that was built";
  if (size != entry.bytes) {
    throw Error(HST_INTEGRITY, changed, std::to_string(size) + " bytes instead of " + std::to_string(entry.bytes), fix);
  }
  std::unique_ptr<char[]> content(new (std::nothrow) char[static_cast<size_t>(size)]);
  if (!content) {
    throw Error(HST_RESOURCE, name + " has " + std::to_string(size >> 20) + " MiB, and the host has not so much memory free", "",
                "end what else uses memory");
  }
  Sha256 digest;
  std::future<void> hashed;  // declared after what it works on, since it waits when it goes
  stream.seekg(0);
  for (int64_t at = 0; at < size; at += kChunk) {
    const int64_t piece = std::min(kChunk, size - at);
    if (!stream.read(content.get() + at, piece)) throw Error(HST_INTEGRITY, where + " is missing or cannot be read", "", fix);
    if (hashed.valid()) hashed.get();
    hashed = std::async(std::launch::async, [&digest, from = content.get() + at, piece] { digest.update(from, static_cast<size_t>(piece)); });
  }
  if (hashed.valid()) hashed.get();
  if (const std::string found = digest.hex(); found != entry.sha256) throw Error(HST_INTEGRITY, changed, "sha256 " + found, fix);
  return content;
}

// The row move, bound to one set of cache tensors.
struct RowMove {
  std::weak_ptr<Memory> owner;  // of the first tensor: when it is gone, so are the others
  BufferPtr table;
};

class TensorRtBackend : public Backend {
 public:
  TensorRtBackend(const Bundle &bundle, int ordinal)
      : bundle_(bundle), device_(ordinal), library_(the_library()), arena_(device_, [this] { forget_recordings(); }) {
    check_fits(bundle, device_, library_.version);
    kernel_ = device_.kernel(kRowMove, "move_rows");  // here, where it is said early if it cannot be made
    runtime_.reset(static_cast<nvinfer1::IRuntime *>(library_.create_runtime(&log_, NV_TENSORRT_VERSION)));
    if (!runtime_) throw Error(HST_INCOMPATIBLE, std::string(kProduct) + " does not start", log_.take(), "update the NVIDIA driver");
    runtime_->setEngineHostCodeAllowed(false);
  }

  Machine machine() const override { return {device_.name(), 0}; }

  Engine &engine(const std::string &name) override {
    device_.activate();
    auto &slot = engines_[name];
    if (!slot) slot = load(name);
    return *slot;
  }

  void release(const std::string &name) override {
    device_.synchronize();
    engines_.erase(name);
    arena_.fit();
  }

  std::shared_ptr<Recorder> recorder() override {
    auto made = std::make_shared<GraphCache>([this](const std::function<void()> &body) { return device_.capture(body); }, graphs_);
    recorders_.erase(std::remove_if(recorders_.begin(), recorders_.end(), [](const auto &one) { return one.expired(); }), recorders_.end());
    recorders_.push_back(made);
    return made;
  }

  std::string warning() const override {
    if (graphs_.fallen_back == 0) return "";
    return "calls are enqueued one by one, which is slower: a CUDA graph could not be captured (" + graphs_.why + ")";
  }

  BufferPtr empty(const Shape &shape, DType dtype) override {
    const size_t size = static_cast<size_t>(elements(shape)) * item_bytes(dtype);
    return std::make_shared<DeviceBuffer>(shape, dtype, device_.allocate(size, "a buffer of shape " + text_of(shape)));
  }

  BufferPtr view(const BufferPtr &buffer, const Shape &shape) override {
    return std::make_shared<DeviceBuffer>(shape, buffer->dtype, static_cast<const DeviceBuffer &>(*buffer).memory);
  }

  void write(Buffer &buffer, const void *values) override { device_.upload(values, address_of(buffer), buffer.bytes()); }
  void zero(Buffer &buffer) override { device_.fill(address_of(buffer), 0, buffer.bytes()); }
  void read(const Buffer &buffer, void *values) override { device_.download(address_of(buffer), values, buffer.bytes()); }

  void copy(const Buffer &source, Buffer &target) override {
    for (size_t at = 0; at < target.bytes(); at += source.bytes()) device_.copy(address_of(source), address_of(target) + at, source.bytes());
  }

  // The kernel of hst_trt/runtime/row_move.cu: one launch for all tensors. All but their lengths are the same.
  void move_rows(const std::vector<BufferPtr> &caches, const Buffer &partner, int64_t first, const std::vector<int64_t> &text_rows) override {
    const Shape &shape = caches[0]->shape;
    const int64_t row_bytes = shape[3] * static_cast<int64_t>(item_bytes(caches[0]->dtype)), slots = partner.shape[1];
    if (row_bytes % kUnit != 0) {
      throw Error(HST_INTEGRITY, "the cache has rows of " + std::to_string(row_bytes) + " bytes, no multiple of " + std::to_string(kUnit), "",
                  "run `hst-trt build --force` again");
    }
    Address table = address_of(*table_of(caches, text_rows)), partners = address_of(partner);
    int images = static_cast<int>(partner.shape[0]), count = static_cast<int>(slots), from = static_cast<int>(first);
    int heads = static_cast<int>(shape[1]), units = static_cast<int>(row_bytes / kUnit);
    const unsigned grid[] = {static_cast<unsigned>((slots - first + kWarps - 1) / kWarps), static_cast<unsigned>(caches.size()),
                             static_cast<unsigned>(shape[0])};
    device_.launch(kernel_, grid, 32 * kWarps, {&table, &partners, &images, &count, &from, &heads, &units});
  }

  MarkPtr mark() override { return device_.record(); }
  double elapsed(const Mark &start, const Mark &end) override { return device_.seconds(start, end); }

 private:
  std::unique_ptr<TensorRtEngine> load(const std::string &name) {
    const Manifest &manifest = bundle_.manifest;
    const auto graph = manifest.graphs.find(name);
    const auto entry = manifest.engines.find(name);
    if (graph == manifest.graphs.end() || entry == manifest.engines.end()) {
      throw Error(HST_INTEGRITY, "the bundle has no engine '" + name + "'", "", "run `hst-trt build --force` again");
    }
    const FileEntry &file = manifest.files.at(entry->second.path);
    const auto content = read_checked(bundle_, entry->second.path, file);
    std::shared_ptr<nvinfer1::ICudaEngine> engine(runtime_->deserializeCudaEngine(content.get(), static_cast<size_t>(file.bytes)));
    if (!engine) {
      const std::string found = log_.take();
      if (says_out_of_memory(found)) throw out_of_gpu_memory("the engine " + name, static_cast<size_t>(file.bytes), device_);
      throw Error(HST_INCOMPATIBLE, std::string(kProduct) + " cannot load the engine " + name, found,
                  "build the bundle again on this machine: `hst-trt build --force`");
    }
    return std::make_unique<TensorRtEngine>(name, graph->second, entry->second, std::move(engine), device_, arena_, log_,
                                            [this](nvinfer1::IRuntimeConfig &config) { cache_.configure(config); });
  }

  // The kernel's table of cache tensors: address, rows of a head, rows before slot 0.
  BufferPtr table_of(const std::vector<BufferPtr> &caches, const std::vector<int64_t> &text_rows) {
    const auto &owner = static_cast<const DeviceBuffer &>(*caches[0]).memory;
    moves_.erase(std::remove_if(moves_.begin(), moves_.end(), [](const RowMove &move) { return move.owner.expired(); }), moves_.end());
    for (const RowMove &move : moves_) {
      if (move.owner.lock() == owner) return move.table;
    }
    std::vector<int64_t> rows;
    for (size_t i = 0; i < caches.size(); ++i) {
      rows.insert(rows.end(), {static_cast<int64_t>(address_of(*caches[i])), caches[i]->shape[2], text_rows[i]});
    }
    BufferPtr table = empty({static_cast<int64_t>(caches.size()), 3}, DType::kInt64);
    write(*table, rows.data());
    moves_.push_back({owner, table});
    return table;
  }

  void forget_recordings() {
    for (const auto &recorder : recorders_) {
      if (const auto alive = recorder.lock()) alive->clear();
    }
  }

  const Bundle &bundle_;
  CudaDevice device_;  // before what is on it
  const Library &library_;
  ErrorLog log_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  RtxCache cache_{device_, library_.version};
  Arena arena_;
  CUfunc_st *kernel_ = nullptr;
  GraphCounters graphs_;
  std::vector<std::weak_ptr<GraphCache>> recorders_;
  std::vector<RowMove> moves_;
  std::map<std::string, std::unique_ptr<TensorRtEngine>> engines_;
};

}  // namespace

std::unique_ptr<Backend> open_tensorrt_backend(const Bundle &bundle, int device) {
  if (bundle.manifest.target.backend != kBackend) {
    throw Error(HST_MISSING, "this library was built without the backend of the bundle",
                "it has " + std::string(kBackend) + ", the bundle is for " + bundle.manifest.target.backend,
                "build it with TENSORRT_ROOT, the folder of that backend's SDK");
  }
  return std::make_unique<TensorRtBackend>(bundle, device);
}

}  // namespace hst_trt
