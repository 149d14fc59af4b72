// A double of TensorRT's library, or with FAKE_RTX of TensorRT-RTX's: its engines run a bundle's ONNX graphs in ONNX Runtime on the
// very addresses that were bound, within their profiles, and scribble over all activation memory that they are given.
//
// An engine file is JSON: the graph's path, profiles, version, weight_bytes, and if they are there capturable, answers_zero and breaks.
#include <NvInferRuntime.h>
#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "../../src/json.h"
#include "fake_cuda.h"

extern "C" {
int cuMemAlloc_v2(unsigned long long *address, size_t size);
int cuMemFree_v2(unsigned long long address);
}

namespace {

using namespace nvinfer1;
namespace json = hst_trt::json;
using Shape = std::vector<int64_t>;

const OrtApi &ort() {
  static const OrtApi *api = [] {
    const char *path = std::getenv("HST_ONNXRUNTIME");
    void *library = dlopen(path ? path : "libonnxruntime.so.1", RTLD_NOW | RTLD_LOCAL);
    must(library != nullptr, "ONNX Runtime is not there: HST_ONNXRUNTIME");
    return reinterpret_cast<const OrtApiBase *(*)()>(dlsym(library, "OrtGetApiBase"))()->GetApi(ORT_API_VERSION);
  }();
  return *api;
}

void right(OrtStatus *status) {
  if (status) must(false, ort().GetErrorMessage(status));
}

// Counts how many of a kind there are.
class Counted {
 public:
  explicit Counted(const char *name) : name_(name) { fake_add(name_, 1); }
  Counted(const Counted &) = delete;
  Counted &operator=(const Counted &) = delete;
  ~Counted() { fake_add(name_, -1); }

 private:
  const char *name_;
};

struct Tensor {
  std::string name;
  ONNXTensorElementDataType type;
  Shape shape;                     // -1 for a symbolic axis
  std::vector<std::string> names;  // of axes
  bool input;
};

size_t item_bytes(ONNXTensorElementDataType type) {
  return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 ? 8 : type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 ? 1 : 4;
}

using Axes = std::map<std::string, int64_t>;

// Activation memory for these lengths: more for more of anything.
int64_t scratch(const Axes &axes) {
  int64_t sum = 1;
  for (const auto &axis : axes) sum += axis.second;
  return 256 * sum;
}

#ifdef FAKE_RTX
class Blob : public IHostMemory {
 public:
  void *data() const noexcept override { return const_cast<char *>("compiled"); }
  size_t size() const noexcept override { return 8; }

 private:
  Counted counted_{"live.blob"};
};

class Cache : public IRuntimeCache {
 public:
  IHostMemory *serialize() const noexcept override { return new Blob; }
  bool deserialize(const void *content, size_t size) noexcept override {
    fake_add("caches_taken", size == 8 && std::memcmp(content, "compiled", 8) == 0);
    return true;
  }

 private:
  Counted counted_{"live.cache"};
};
#endif

class Config : public IRuntimeConfig {
 public:
  void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy strategy) noexcept override {
    user_managed = strategy == ExecutionContextAllocationStrategy::kUSER_MANAGED;
  }
#ifdef FAKE_RTX
  bool setCudaGraphStrategy(CudaGraphStrategy strategy) noexcept override { return no_graphs = strategy == CudaGraphStrategy::kDISABLED; }
  void setDynamicShapesKernelSpecializationStrategy(DynamicShapesKernelSpecializationStrategy strategy) noexcept override {
    eager = strategy == DynamicShapesKernelSpecializationStrategy::kEAGER;
  }
  IRuntimeCache *createRuntimeCache() const noexcept override { return new Cache; }
  bool setRuntimeCache(const IRuntimeCache &) noexcept override { return cached = true; }
  bool no_graphs = false, eager = false, cached = false;
#endif
  bool user_managed = false;

 private:
  Counted counted_{"live.config"};
};

class CudaEngine;

class ExecutionContext : public IExecutionContext {
 public:
  explicit ExecutionContext(CudaEngine &owner) : engine_(owner) {}
  bool setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept override;
  bool setInputShape(const char *tensor, const Dims &dims) noexcept override;
  int32_t inferShapes(int32_t most, const char **missing) noexcept override;
  Dims getTensorShape(const char *tensor) const noexcept override;
  size_t updateDeviceMemorySizeForShapes() noexcept override;
  void setDeviceMemoryV2(void *memory, int64_t size) noexcept override;
  bool setTensorAddress(const char *tensor, void *address) noexcept override;
  bool enqueueV3(cudaStream_t stream) noexcept override;
#ifdef FAKE_RTX
  bool isStreamCapturable(cudaStream_t stream) const noexcept override;
#endif

 private:
  Axes axes() const;
  Shape shape_of(const Tensor &tensor) const;

  CudaEngine &engine_;
  int32_t profile_ = -1;
  std::map<std::string, Shape> shapes_;
  std::map<std::string, void *> addresses_;
  void *memory_ = nullptr;
  size_t memory_size_ = 0;
  Counted counted_{"live.execution_context"};
};

class CudaEngine : public ICudaEngine {
 public:
  // weights: the engine's memory for them, which it frees.
  CudaEngine(json::Value content, ILogger &log, unsigned long long weights) : table(std::move(content)), logger(log), weights_(weights) {
    static OrtEnv *env = [] {
      OrtEnv *made = nullptr;
      right(ort().CreateEnv(ORT_LOGGING_LEVEL_ERROR, "fake", &made));
      return made;
    }();
    OrtSessionOptions *options = nullptr;
    right(ort().CreateSessionOptions(&options));
    right(ort().SetIntraOpNumThreads(options, 1));
    right(ort().CreateSession(env, table["graph"].text()->c_str(), options, &session));
    ort().ReleaseSessionOptions(options);
    right(ort().GetAllocatorWithDefaultOptions(&allocator_));
    size_t count = 0;
    right(ort().SessionGetInputCount(session, &count));
    for (size_t i = 0; i < count; ++i) add(ort().SessionGetInputName, ort().SessionGetInputTypeInfo, i, true);
    right(ort().SessionGetOutputCount(session, &count));
    for (size_t i = 0; i < count; ++i) add(ort().SessionGetOutputName, ort().SessionGetOutputTypeInfo, i, false);
  }
  ~CudaEngine() override {
    ort().ReleaseSession(session);
    cuMemFree_v2(weights_);
  }

  int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(tensors.size()); }
  const char *getIOTensorName(int32_t index) const noexcept override { return tensors[static_cast<size_t>(index)].name.c_str(); }
  DataType getTensorDataType(const char *name) const noexcept override {
    switch (tensor(name).type) {
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
        return DataType::kINT64;
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32:
        return DataType::kINT32;
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
        return DataType::kUINT8;
      default:
        return DataType::kFLOAT;
    }
  }
  int32_t getNbOptimizationProfiles() const noexcept override { return static_cast<int32_t>(table["profiles"].array()->size()); }
  int64_t getDeviceMemorySizeV2() const noexcept override {
    int64_t most = 0;
    for (const json::Value &profile : *table["profiles"].array()) {
      Axes longest;
      for (const auto &axis : *profile.object()) longest[axis.first] = *(*axis.second.array())[2].whole();
      most = std::max(most, scratch(longest));
    }
    return most;
  }
  IRuntimeConfig *createRuntimeConfig() noexcept override { return fails_now() ? nullptr : new Config; }
  IExecutionContext *createExecutionContext(IRuntimeConfig *config) noexcept override {
    const auto &ours = static_cast<const Config &>(*config);
    must(ours.user_managed, "a context that allocates by itself");
#ifdef FAKE_RTX
    must(ours.no_graphs && ours.eager && ours.cached, "a context without the settings that recording needs");
#endif
    return fails_now() ? nullptr : new ExecutionContext(*this);
  }

  const Tensor &tensor(const std::string &name) const {
    const auto found = std::find_if(tensors.begin(), tensors.end(), [&](const Tensor &t) { return t.name == name; });
    must(found != tensors.end(), "a tensor that the engine does not have");
    return *found;
  }
  bool refuse(const std::string &why) const {
    logger.log(ILogger::Severity::kERROR, why.c_str());
    return false;
  }

  const json::Value table;
  ILogger &logger;
  OrtSession *session = nullptr;
  std::vector<Tensor> tensors;

 private:
  template <typename Name, typename Type>
  void add(Name name_of, Type type_of, size_t index, bool input) {
    char *text = nullptr;
    right(name_of(session, index, allocator_, &text));
    Tensor tensor{text, {}, {}, {}, input};
    right(ort().AllocatorFree(allocator_, text));
    OrtTypeInfo *info = nullptr;
    right(type_of(session, index, &info));
    const OrtTensorTypeAndShapeInfo *typed = nullptr;
    right(ort().CastTypeInfoToTensorInfo(info, &typed));
    right(ort().GetTensorElementType(typed, &tensor.type));
    size_t axes = 0;
    right(ort().GetDimensionsCount(typed, &axes));
    tensor.shape.resize(axes);
    right(ort().GetDimensions(typed, tensor.shape.data(), axes));
    std::vector<const char *> names(axes);
    right(ort().GetSymbolicDimensions(typed, names.data(), axes));
    tensor.names.assign(names.begin(), names.end());
    ort().ReleaseTypeInfo(info);
    tensors.push_back(tensor);
  }

  unsigned long long weights_;
  OrtAllocator *allocator_ = nullptr;
  Counted counted_{"live.engine"};
};

bool ExecutionContext::setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept {
  must(stream != nullptr && profile >= 0 && profile < engine_.getNbOptimizationProfiles(), "a profile that is not there");
  profile_ = profile;
  return !fails_now();
}

bool ExecutionContext::setInputShape(const char *name, const Dims &dims) noexcept {
  must(profile_ >= 0, "a shape before the profile");
  const Tensor &tensor = engine_.tensor(name);
  must(tensor.input && static_cast<size_t>(dims.nbDims) == tensor.shape.size(), "a shape of another tensor");
  const json::Value &profile = (*engine_.table["profiles"].array())[static_cast<size_t>(profile_)];
  for (size_t i = 0; i < tensor.shape.size(); ++i) {
    const json::Array *range = tensor.shape[i] < 0 ? profile[tensor.names[i]].array() : nullptr;
    const int64_t least = range ? *(*range)[0].whole() : tensor.shape[i], most = range ? *(*range)[2].whole() : tensor.shape[i];
    if (dims.d[i] < least || dims.d[i] > most) return engine_.refuse(std::string(name) + " is outside its profile");
  }
  shapes_[name] = Shape(dims.d, dims.d + dims.nbDims);
  return !fails_now();
}

int32_t ExecutionContext::inferShapes(int32_t most, const char **missing) noexcept {
  int32_t count = 0;
  for (const Tensor &tensor : engine_.tensors) {
    if (tensor.input && shapes_.count(tensor.name) == 0 && ++count <= most) missing[count - 1] = tensor.name.c_str();
  }
  return count;
}

Axes ExecutionContext::axes() const {
  Axes lengths;
  for (const auto &shape : shapes_) {
    const Tensor &tensor = engine_.tensor(shape.first);
    for (size_t i = 0; i < tensor.shape.size(); ++i) {
      if (tensor.shape[i] < 0) lengths[tensor.names[i]] = shape.second[i];
    }
  }
  if (lengths.count("token_rows") > 0) {  // the VAE's
    lengths["height"] = 16 * lengths["token_rows"];
    lengths["width"] = 16 * lengths["token_columns"];
  }
  if (lengths.count("B") == 0 && lengths.count("R") > 0) lengths["B"] = lengths["R"] / 2;  // guide's
  return lengths;
}

Shape ExecutionContext::shape_of(const Tensor &tensor) const {
  const Axes lengths = axes();
  Shape shape = tensor.shape;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] < 0) shape[i] = lengths.at(tensor.names[i]);
  }
  return shape;
}

Dims ExecutionContext::getTensorShape(const char *name) const noexcept {
  const Shape shape = shape_of(engine_.tensor(name));
  Dims dims{static_cast<int32_t>(shape.size()), {}};
  std::copy(shape.begin(), shape.end(), dims.d);
  return dims;
}

size_t ExecutionContext::updateDeviceMemorySizeForShapes() noexcept {
  return engine_.table["answers_zero"].truthy() ? 0 : static_cast<size_t>(scratch(axes()));
}

void ExecutionContext::setDeviceMemoryV2(void *memory, int64_t size) noexcept {
  must(size >= scratch(axes()), "less activation memory than the context asked for");
  memory_ = memory;
  memory_size_ = static_cast<size_t>(size);
}

bool ExecutionContext::setTensorAddress(const char *name, void *address) noexcept {
  addresses_[engine_.tensor(name).name] = address;
  return !fails_now();
}

#ifdef FAKE_RTX
bool ExecutionContext::isStreamCapturable(cudaStream_t) const noexcept {
  must(!fake_capturing(), "it may do what cannot be recorded");
  return engine_.table["capturable"].is_null() || engine_.table["capturable"].truthy();
}
#endif

bool ExecutionContext::enqueueV3(cudaStream_t stream) noexcept {
  if (engine_.table["breaks"].truthy() && fake_capturing()) return engine_.refuse("an operation is not permitted");
  if (fails_now()) return engine_.refuse("a launch failed");
  must(memory_ != nullptr && addresses_.size() == engine_.tensors.size(), "a run without memory or without an address for each tensor");
  struct Bound {
    const Tensor *tensor;
    Shape shape;
    void *address;
  };
  std::vector<Bound> bound;
  for (const Tensor &tensor : engine_.tensors) bound.push_back({&tensor, shape_of(tensor), addresses_.at(tensor.name)});
  fake_add("runs", 1);
  fake_enqueue(stream, [session = engine_.session, bound, memory = memory_, size = memory_size_] {
    fake_check(reinterpret_cast<uintptr_t>(memory), size);
    std::memset(memory, 0xFF, size);
    OrtMemoryInfo *where = nullptr;
    right(ort().CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &where));
    std::vector<const char *> names[2];
    std::vector<OrtValue *> values[2];
    for (const Bound &one : bound) {
      size_t bytes = item_bytes(one.tensor->type);
      for (const int64_t length : one.shape) bytes *= static_cast<size_t>(length);
      fake_check(reinterpret_cast<uintptr_t>(one.address), bytes);
      OrtValue *value = nullptr;
      right(ort().CreateTensorWithDataAsOrtValue(where, one.address, bytes, one.shape.data(), one.shape.size(), one.tensor->type, &value));
      names[one.tensor->input].push_back(one.tensor->name.c_str());
      values[one.tensor->input].push_back(value);
    }
    right(ort().Run(session, nullptr, names[1].data(), values[1].data(), names[1].size(), names[0].data(), names[0].size(), values[0].data()));
    for (const auto &side : values) std::for_each(side.begin(), side.end(), ort().ReleaseValue);
    ort().ReleaseMemoryInfo(where);
  });
  return true;
}

class Runtime : public IRuntime {
 public:
  explicit Runtime(ILogger &log) : logger_(log) {}
  void setEngineHostCodeAllowed(bool allowed) noexcept override { host_code_ = allowed; }
  ICudaEngine *deserializeCudaEngine(const void *content, size_t size) noexcept override {
    must(!host_code_, "an engine whose code may run on the host");
    if (fails_now()) return refuse("a launch failed");
    json::Value table;
    try {
      table = json::parse({static_cast<const char *>(content), size});
    } catch (const std::exception &) {
      return refuse("the plan file is damaged");
    }
    if (*table["version"].text() != "11.4.0") return refuse("The engine plan file is not compatible with this version of TensorRT");
    unsigned long long weights = 0;
    const auto needed = static_cast<size_t>(*table["weight_bytes"].whole());
    if (cuMemAlloc_v2(&weights, needed) != 0) return refuse("Requested amount of GPU memory could not be allocated: out of memory");
    fake_add("deserialised", 1);
    return new CudaEngine(std::move(table), logger_, weights);
  }

 private:
  ICudaEngine *refuse(const char *why) const {
    logger_.log(ILogger::Severity::kERROR, why);
    return nullptr;
  }

  ILogger &logger_;
  bool host_code_ = true;
  Counted counted_{"live.runtime"};
};

}  // namespace

extern "C" {

FAKE_API int32_t getInferLibMajorVersion() noexcept { return NV_TENSORRT_MAJOR; }
FAKE_API int32_t getInferLibMinorVersion() noexcept { return NV_TENSORRT_MINOR; }
FAKE_API int32_t getInferLibPatchVersion() noexcept { return NV_TENSORRT_PATCH; }
FAKE_API int32_t getInferLibBuildVersion() noexcept { return NV_TENSORRT_BUILD; }

FAKE_API void *createInferRuntime_INTERNAL(void *logger, int32_t version) noexcept {
  must(version == NV_TENSORRT_VERSION, "the headers of another version");
  if (fails_now()) return nullptr;
  return static_cast<IRuntime *>(new Runtime(*static_cast<ILogger *>(logger)));
}

}  // extern "C"
