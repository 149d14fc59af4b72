#include "ort_backend.h"

#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <mutex>
#include <new>
#include <vector>

#include "error.h"
#include "graph_names.h"

namespace hst_trt {
namespace {

// The library, opened once in a process and never closed: its threads and statics do not take it.
struct Runtime {
  const OrtApi *api;
  OrtEnv *env;
  OrtMemoryInfo *memory;
};

[[noreturn]] void fail(const OrtApi &api, OrtStatus *status, const std::string &what) {
  const std::string text = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  if (text.find("bad_alloc") != std::string::npos || text.find("Failed to allocate memory") != std::string::npos) {
    throw Error(HST_RESOURCE, what + " ran out of memory", text, "ask for fewer images at once or a smaller size");
  }
  throw Error(HST_FAILED, "ONNX Runtime could not run " + what, text, "run `hst-trt verify` on the bundle");
}

Runtime open_library(const std::string &path) {
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // the library sends usage data unless told not to before it is loaded
  std::vector<std::string> names{path};
  if (path.empty()) {
    const char *named = std::getenv("HST_ONNXRUNTIME");
    names = named && *named ? std::vector<std::string>{named} : std::vector<std::string>{"libonnxruntime.so.1", "libonnxruntime.so"};
  }
  void *library = nullptr;
  std::string found;
  for (const std::string &name : names) {
    if ((library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) != nullptr) break;
    const char *why = dlerror();
    found += (found.empty() ? "" : "; ") + std::string(why ? why : name.c_str());
  }
  const std::string fix = "pip install onnxruntime, and give its capi/libonnxruntime.so.* as `onnxruntime` or in HST_ONNXRUNTIME";
  if (!library) throw Error(HST_MISSING, "ONNX Runtime's shared library could not be opened", found, fix);
  const auto base = reinterpret_cast<const OrtApiBase *(*)()>(dlsym(library, "OrtGetApiBase"));
  if (!base) throw Error(HST_INCOMPATIBLE, "the library that was given is not ONNX Runtime", names.back(), fix);
  Runtime runtime{base()->GetApi(ORT_API_VERSION), nullptr, nullptr};
  if (!runtime.api) {
    throw Error(HST_INCOMPATIBLE, "ONNX Runtime is too old for this host", std::string("version ") + base()->GetVersionString(), fix);
  }
  const OrtApi &api = *runtime.api;
  if (OrtStatus *status = api.CreateEnv(ORT_LOGGING_LEVEL_ERROR, "hst_trt", &runtime.env)) fail(api, status, "at all");
  if (OrtStatus *status = api.DisableTelemetryEvents(runtime.env)) api.ReleaseStatus(status);
  if (OrtStatus *status = api.CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &runtime.memory)) fail(api, status, "at all");
  return runtime;
}

const Runtime &runtime_of(const std::string &path) {
  static std::mutex guard;
  static auto &opened = *new std::map<std::string, Runtime>;  // never freed, as what it holds
  const std::lock_guard<std::mutex> lock(guard);
  const auto found = opened.find(path);
  return found != opened.end() ? found->second : opened.emplace(path, open_library(path)).first->second;
}

// Owns a handle of the library.
template <typename T>
class Handle {
 public:
  Handle(T *handle, void (*release)(T *)) : handle_(handle), release_(release) {}
  Handle(const Handle &) = delete;
  Handle &operator=(const Handle &) = delete;
  ~Handle() { release_(handle_); }
  T *get() const { return handle_; }

 private:
  T *handle_;
  void (*release_)(T *);
};

constexpr std::pair<ONNXTensorElementDataType, DType> kTypes[] = {
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, DType::kFloat32}, {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, DType::kInt64},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, DType::kInt32},   {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, DType::kUint8},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, DType::kHalf},  {ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, DType::kBFloat16}};

ONNXTensorElementDataType type_of(DType dtype) {
  return std::find_if(std::begin(kTypes), std::end(kTypes), [dtype](const auto &pair) { return pair.second == dtype; })->first;
}

class HostBuffer : public Buffer {
 public:
  HostBuffer(const Runtime &runtime, Shape dims, DType type, std::shared_ptr<void> memory)
      : Buffer(std::move(dims), type), memory_(std::move(memory)), value_(make(runtime), runtime.api->ReleaseValue) {}

  char *data() const { return static_cast<char *>(memory_.get()); }
  const std::shared_ptr<void> &memory() const { return memory_; }
  OrtValue *value() const { return value_.get(); }

 private:
  OrtValue *make(const Runtime &runtime) const {
    OrtValue *value = nullptr;
    OrtStatus *status = runtime.api->CreateTensorWithDataAsOrtValue(runtime.memory, memory_.get(), bytes(), shape.data(), shape.size(),
                                                                    type_of(dtype), &value);
    if (status) fail(*runtime.api, status, "a tensor");
    return value;
  }

  std::shared_ptr<void> memory_;
  Handle<OrtValue> value_;
};

HostBuffer &host(Buffer &buffer) { return static_cast<HostBuffer &>(buffer); }
const HostBuffer &host(const Buffer &buffer) { return static_cast<const HostBuffer &>(buffer); }

class BoundCall : public PreparedCall {
 public:
  BoundCall(const OrtApi &api, std::shared_ptr<Handle<OrtSession>> session, const std::string &name, OrtIoBinding *binding, Bindings buffers)
      : api_(api), session_(std::move(session)), name_(name), binding_(binding, api.ReleaseIoBinding), buffers_(std::move(buffers)) {}

  void execute() override {
    if (OrtStatus *status = api_.RunWithBinding(session_->get(), nullptr, binding_.get())) fail(api_, status, "the graph '" + name_ + "'");
  }

 private:
  const OrtApi &api_;
  std::shared_ptr<Handle<OrtSession>> session_;
  std::string name_;
  Handle<OrtIoBinding> binding_;
  Bindings buffers_;  // kept alive
};

class OrtEngine : public Engine {
 public:
  OrtEngine(const OrtApi &api, std::string name, OrtSession *session)
      : api_(api), name_(std::move(name)), session_(std::make_shared<Handle<OrtSession>>(session, api.ReleaseSession)) {
    inputs_ = read(api_.SessionGetInputCount, api_.SessionGetInputName, api_.SessionGetInputTypeInfo);
    outputs_ = read(api_.SessionGetOutputCount, api_.SessionGetOutputName, api_.SessionGetOutputTypeInfo);
  }

  const std::map<std::string, TensorInfo> &inputs() const override { return inputs_; }
  const std::map<std::string, TensorInfo> &outputs() const override { return outputs_; }

  std::unique_ptr<PreparedCall> prepare(const Bindings &bindings) override {
    OrtIoBinding *binding = nullptr;
    check(api_.CreateIoBinding(session_->get(), &binding));
    auto call = std::make_unique<BoundCall>(api_, session_, name_, binding, bindings);
    for (const auto &input : inputs_) check(api_.BindInput(binding, input.first.c_str(), bound(bindings, input.first)));
    for (const auto &output : outputs_) check(api_.BindOutput(binding, output.first.c_str(), bound(bindings, output.first)));
    return call;
  }

 private:
  void check(OrtStatus *status) const {
    if (status) fail(api_, status, "the graph '" + name_ + "'");
  }

  OrtValue *bound(const Bindings &bindings, const std::string &tensor) const {
    const auto found = bindings.find(tensor);
    if (found == bindings.end()) {
      throw Error(HST_INTEGRITY, "the graph '" + name_ + "' is not the one that its name says", "it has a tensor '" + tensor + "'",
                  "run `hst-trt build --force` again");
    }
    return host(*found->second).value();
  }

  template <typename Count, typename Name, typename Type>
  std::map<std::string, TensorInfo> read(Count count_of, Name name_of, Type type_info_of) const {
    OrtAllocator *allocator = nullptr;
    check(api_.GetAllocatorWithDefaultOptions(&allocator));
    size_t count = 0;
    check(count_of(session_->get(), &count));
    std::map<std::string, TensorInfo> tensors;
    for (size_t i = 0; i < count; ++i) {
      char *text = nullptr;
      check(name_of(session_->get(), i, allocator, &text));
      const std::string name = text;
      check(api_.AllocatorFree(allocator, text));
      OrtTypeInfo *raw = nullptr;
      check(type_info_of(session_->get(), i, &raw));
      const Handle<OrtTypeInfo> info(raw, api_.ReleaseTypeInfo);
      const OrtTensorTypeAndShapeInfo *tensor = nullptr;
      check(api_.CastTypeInfoToTensorInfo(info.get(), &tensor));
      auto type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
      size_t axes = 0;
      if (tensor) {
        check(api_.GetTensorElementType(tensor, &type));
        check(api_.GetDimensionsCount(tensor, &axes));
      }
      const auto *known = std::find_if(std::begin(kTypes), std::end(kTypes), [type](const auto &pair) { return pair.first == type; });
      if (known == std::end(kTypes)) {
        throw Error(HST_INTEGRITY, "the graph '" + name_ + "' has a tensor of a type that no bundle has", name, "run `hst-trt build --force` again");
      }
      Shape shape(axes);
      check(api_.GetDimensions(tensor, shape.data(), axes));
      tensors[name] = {known->second, shape};
    }
    return tensors;
  }

  const OrtApi &api_;
  std::string name_;
  std::shared_ptr<Handle<OrtSession>> session_;
  std::map<std::string, TensorInfo> inputs_, outputs_;
};

// Calls are done when they return, so the time is now.
struct Now : Mark {
  const std::chrono::steady_clock::time_point time = std::chrono::steady_clock::now();
};

class OrtBackend : public Backend {
 public:
  OrtBackend(const Runtime &runtime, std::function<std::filesystem::path(const std::string &)> graph_file, int threads)
      : runtime_(runtime), graph_file_(std::move(graph_file)), threads_(threads) {}

  Machine machine() const override { return cpu(threads_); }

  Engine &engine(const std::string &name) override {
    auto &slot = engines_[name];
    if (!slot) slot = load(name);
    return *slot;
  }

  void release(const std::string &name) override { engines_.erase(name); }
  std::shared_ptr<Recorder> recorder() override { return nullptr; }
  std::string warning() const override { return ""; }

  BufferPtr empty(const Shape &shape, DType dtype) override {
    constexpr size_t kAlignment = 64;
    const size_t size = static_cast<size_t>(elements(shape)) * item_bytes(dtype);
    const size_t whole = std::max(kAlignment, (size + kAlignment - 1) / kAlignment * kAlignment);
    void *memory = std::aligned_alloc(kAlignment, whole);
    if (!memory) {
      throw Error(HST_RESOURCE, "a buffer of " + std::to_string(size >> 20) + " MiB is not free", "",
                  "ask for fewer images at once or a smaller size");
    }
    const std::shared_ptr<void> owner(memory, std::free);
    std::memset(memory, 0, whole);
    return std::make_shared<HostBuffer>(runtime_, shape, dtype, owner);
  }

  BufferPtr view(const BufferPtr &buffer, const Shape &shape) override {
    return std::make_shared<HostBuffer>(runtime_, shape, buffer->dtype, host(*buffer).memory());
  }

  void write(Buffer &buffer, const void *values) override { std::memcpy(host(buffer).data(), values, buffer.bytes()); }
  void zero(Buffer &buffer) override { std::memset(host(buffer).data(), 0, buffer.bytes()); }
  void read(const Buffer &buffer, void *values) override { std::memcpy(values, host(buffer).data(), buffer.bytes()); }

  void copy(const Buffer &source, Buffer &target) override {
    for (size_t at = 0; at < target.bytes(); at += source.bytes()) std::memcpy(host(target).data() + at, host(source).data(), source.bytes());
  }

  void move_rows(const std::vector<BufferPtr> &caches, const Buffer &partner, int64_t first, const std::vector<int64_t> &text_rows) override {
    const int64_t images = partner.shape[0], slots = partner.shape[1];
    const auto *partners = reinterpret_cast<const int64_t *>(host(partner).data());
    for (int64_t image = 0; image < images; ++image) {
      const int64_t *from = partners + image * slots;
      for (size_t c = 0; c < caches.size(); ++c) {
        const Shape &shape = caches[c]->shape;
        const size_t row = static_cast<size_t>(shape[3]) * item_bytes(caches[c]->dtype);
        for (int64_t r = image; r < shape[0]; r += images) {  // the image's negative and positive row
          for (int64_t head = 0; head < shape[1]; ++head) {
            char *rows = host(*caches[c]).data() + static_cast<size_t>((r * shape[1] + head) * shape[2] + text_rows[c]) * row;
            for (int64_t slot = first; slot < slots; ++slot) {
              if (from[slot] != slot) std::memcpy(rows + static_cast<size_t>(slot) * row, rows + static_cast<size_t>(from[slot]) * row, row);
            }
          }
        }
      }
    }
  }

  MarkPtr mark() override { return std::make_shared<Now>(); }
  double elapsed(const Mark &start, const Mark &end) override {
    return std::chrono::duration<double>(static_cast<const Now &>(end).time - static_cast<const Now &>(start).time).count();
  }

 private:
  std::unique_ptr<OrtEngine> load(const std::string &name) const {
    const OrtApi &api = *runtime_.api;
    const std::string what = "the graph '" + name + "'";
    const auto check = [&](OrtStatus *status) {
      if (status) fail(api, status, what);
    };
    const std::filesystem::path file = graph_file_(name);
    OrtSessionOptions *raw = nullptr;
    check(api.CreateSessionOptions(&raw));
    const Handle<OrtSessionOptions> options(raw, api.ReleaseSessionOptions);
    const bool glue = std::find(std::begin(kGlue), std::end(kGlue), name) != std::end(kGlue);
    check(api.SetIntraOpNumThreads(raw, glue ? 1 : threads_));
    check(api.SetInterOpNumThreads(raw, 1));
    check(api.SetSessionLogSeverityLevel(raw, ORT_LOGGING_LEVEL_ERROR));
    // Idle workers must not spin: the sessions of a step take turns, and would steal each other's cores.
    check(api.AddSessionConfigEntry(raw, "session.intra_op.allow_spinning", "0"));
    OrtSession *session = nullptr;
    check(api.CreateSession(runtime_.env, file.c_str(), raw, &session));
    return std::make_unique<OrtEngine>(api, name, session);
  }

  const Runtime &runtime_;
  std::function<std::filesystem::path(const std::string &)> graph_file_;
  int threads_;
  std::map<std::string, std::unique_ptr<OrtEngine>> engines_;
};

}  // namespace

std::unique_ptr<Backend> open_ort_backend(std::function<std::filesystem::path(const std::string &name)> graph_file, int threads,
                                          const std::string &library) {
  return std::make_unique<OrtBackend>(runtime_of(library), std::move(graph_file), threads);
}

}  // namespace hst_trt
