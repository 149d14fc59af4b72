#include "tensorrt_engine.h"

#include <algorithm>
#include <cctype>

namespace hst_trt {
namespace {

constexpr size_t kLines = 8;

std::string joined(const std::vector<std::string> &parts, const char *between) {
  std::string text;
  for (const std::string &part : parts) text += (text.empty() ? "" : between) + part;
  return text;
}

const std::map<std::string, std::pair<DType, nvinfer1::DataType>> &types() {
  using nvinfer1::DataType;
  static const std::map<std::string, std::pair<DType, DataType>> known{
      {"float32", {DType::kFloat32, DataType::kFLOAT}}, {"float16", {DType::kHalf, DataType::kHALF}},
      {"bfloat16", {DType::kBFloat16, DataType::kBF16}}, {"int64", {DType::kInt64, DataType::kINT64}},
      {"int32", {DType::kInt32, DataType::kINT32}},     {"uint8", {DType::kUint8, DataType::kUINT8}}};
  return known;
}

nvinfer1::Dims dims_of(const Shape &shape) {
  nvinfer1::Dims dims{};
  dims.nbDims = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), dims.d);
  return dims;
}

class BoundCall : public PreparedCall {
 public:
  BoundCall(std::shared_ptr<Context> context, const std::map<std::string, TensorInfo> &inputs,
            const std::map<std::string, TensorInfo> &outputs, const Bindings &bindings)
      : context_(std::move(context)) {
    for (const auto *tensors : {&inputs, &outputs}) {
      for (const auto &tensor : *tensors) {
        const BufferPtr &buffer = bindings.at(tensor.first);
        addresses_[tensor.first] = address_of(*buffer);
        buffers_.push_back(buffer);
      }
    }
  }

  void execute() override { context_->enqueue(addresses_); }

 private:
  std::vector<BufferPtr> buffers_;  // kept alive
  std::shared_ptr<Context> context_;
  std::map<std::string, Address> addresses_;
};

}  // namespace

void ErrorLog::log(Severity severity, const char *text) noexcept {
  if (severity != Severity::kINTERNAL_ERROR && severity != Severity::kERROR) return;
  try {
    const std::lock_guard<std::mutex> lock(guard_);
    lines_.emplace_back(text);
    if (lines_.size() > kLines) lines_.pop_front();
  } catch (...) {  // no memory for a line: the error comes without its reason
  }
}

std::string ErrorLog::take() {
  const std::lock_guard<std::mutex> lock(guard_);
  const std::string text = joined({lines_.begin(), lines_.end()}, "; ");
  lines_.clear();
  return text.empty() ? "TensorRT gave no reason" : text;
}

bool says_out_of_memory(const std::string &text) {
  std::string lower = text;
  std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  for (const char *words : {"out of memory", "outofmemory", "memory allocation", "memoryallocation"}) {
    if (lower.find(words) != std::string::npos) return true;
  }
  return false;
}

std::string text_of(const Shape &shape) {
  std::vector<std::string> lengths;
  for (const int64_t length : shape) lengths.push_back(std::to_string(length));
  return "[" + joined(lengths, ", ") + "]";
}

Context::Context(const CudaDevice &device, std::shared_ptr<nvinfer1::ICudaEngine> engine, std::unique_ptr<nvinfer1::IRuntimeConfig> config,
                 std::unique_ptr<nvinfer1::IExecutionContext> context, int64_t scratch, Fail fail)
    : bytes(static_cast<size_t>(scratch)), device_(device), engine_(std::move(engine)), config_(std::move(config)),
      context_(std::move(context)), fail_(std::move(fail)) {}

Context::~Context() {
  try {
    device_.synchronize();  // it may still be running
  } catch (const Error &) {  // then it is not
  }
}

void Context::use(const Memory *memory) {
  if (bytes > 0) context_->setDeviceMemoryV2(reinterpret_cast<void *>(memory->address), static_cast<int64_t>(memory->size));
}

void Context::enqueue(const std::map<std::string, Address> &addresses) {
  device_.activate();
  for (const auto &tensor : addresses) {
    if (!context_->setTensorAddress(tensor.first.c_str(), reinterpret_cast<void *>(tensor.second))) {
      throw fail_("take the address of " + tensor.first);
    }
  }
  if (device_.capturing() && !capturable_) throw CaptureError("TensorRT says that this context cannot be captured");
  if (!context_->enqueueV3(device_.stream())) throw fail_("run");
#ifdef TRT_MAJOR_RTX
  if (!device_.capturing()) capturable_ = context_->isStreamCapturable(device_.stream());  // known after a plain run
#endif
}

void Arena::admit(const std::shared_ptr<Context> &context) {
  resize(std::max(size(), context->bytes));
  contexts_.push_back(context);
  context->use(memory_.get());
}

void Arena::fit() {
  size_t most = 0;
  for (const auto &context : contexts()) most = std::max(most, context->bytes);
  resize(most);
}

// Those that still are.
std::vector<std::shared_ptr<Context>> Arena::contexts() {
  std::vector<std::shared_ptr<Context>> alive;
  for (const auto &context : contexts_) {
    if (auto held = context.lock()) alive.push_back(std::move(held));
  }
  contexts_.assign(alive.begin(), alive.end());
  return alive;
}

void Arena::resize(size_t wanted) {
  if (wanted == size()) return;
  const size_t before = size();
  memory_.reset();  // freed first: there may not be room for both
  std::exception_ptr failure;
  try {
    memory_ = allocate(wanted);
  } catch (const Error &) {
    failure = std::current_exception();
    memory_ = allocate(before);
  }
  for (const auto &context : contexts()) context->use(memory_.get());
  on_move_();
  if (failure) std::rethrow_exception(failure);
}

std::shared_ptr<Memory> Arena::allocate(size_t wanted) {
  return wanted > 0 ? device_.allocate(wanted, "the engines' activation memory") : nullptr;
}

TensorRtEngine::TensorRtEngine(std::string name, const GraphEntry &graph, const EngineEntry &entry,
                               std::shared_ptr<nvinfer1::ICudaEngine> engine, CudaDevice &device, Arena &arena, ErrorLog &log,
                               Configure configure)
    : name_(std::move(name)), graph_(graph), entry_(entry), engine_(std::move(engine)), device_(device), arena_(arena),
      configure_(std::move(configure)) {
  const auto size = static_cast<size_t>(engine_->getDeviceMemorySizeV2());
  fail_ = [called = name_, size, &device, &log](const std::string &what) {
    const std::string found = log.take();
    if (says_out_of_memory(found)) return out_of_gpu_memory("the engine " + called, size, device);
    return Error(HST_FAILED, "the engine " + called + " could not " + what, found,
                 "run `hst-trt verify` on the bundle; if it is whole, report this");
  };
  const auto read = [this](const std::vector<TensorEntry> &entries, std::map<std::string, TensorInfo> &tensors) {
    for (const TensorEntry &tensor : entries) {
      const auto type = types().find(tensor.dtype);
      if (type == types().end()) refuse(tensor.name + " is of a type that no bundle has, " + tensor.dtype);
      Shape shape;
      for (const Axis &axis : tensor.shape) shape.push_back(axis.length);
      tensors[tensor.name] = {type->second.first, shape};
    }
  };
  read(graph_.inputs, inputs_);
  read(graph_.outputs, outputs_);
  check();
}

// That the engine is the one the manifest describes: names, types and number of profiles.
void TensorRtEngine::check() const {
  std::map<std::string, nvinfer1::DataType> expected, found;
  for (const auto *entries : {&graph_.inputs, &graph_.outputs}) {
    for (const TensorEntry &tensor : *entries) expected[tensor.name] = types().at(tensor.dtype).second;
  }
  for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
    const char *tensor = engine_->getIOTensorName(i);
    found[tensor] = engine_->getTensorDataType(tensor);
  }
  std::vector<std::string> different;
  for (const auto &tensor : found) {
    const auto same = expected.find(tensor.first);
    if (same == expected.end() || same->second != tensor.second) different.push_back(tensor.first);
  }
  for (const auto &tensor : expected) {
    if (found.count(tensor.first) == 0) different.push_back(tensor.first);
  }
  if (!different.empty()) refuse(joined(different, ", "));
  const int32_t profiles = engine_->getNbOptimizationProfiles();
  if (static_cast<size_t>(profiles) != entry_.profiles.size()) refuse(std::to_string(profiles) + " profiles");
}

void TensorRtEngine::refuse(const std::string &found) const {
  throw Error(HST_INTEGRITY, "the engine " + name_ + " is not the one its manifest describes", found, "run `hst-trt build --force` again");
}

std::unique_ptr<PreparedCall> TensorRtEngine::prepare(const Bindings &bindings) {
  Shapes shapes;
  for (const auto *tensors : {&inputs_, &outputs_}) {
    for (const auto &tensor : *tensors) {
      const auto bound = bindings.find(tensor.first);
      if (bound == bindings.end() || bound->second->dtype != tensor.second.dtype) refuse("its tensor " + tensor.first);
      if (tensors == &inputs_) shapes[tensor.first] = bound->second->shape;
    }
  }
  auto context = contexts_[shapes].lock();
  if (!context) {
    context = make_context(shapes, bindings);
    for (auto kept = contexts_.begin(); kept != contexts_.end();) kept = kept->second.expired() ? contexts_.erase(kept) : std::next(kept);
    contexts_[shapes] = context;
  }
  return std::make_unique<BoundCall>(std::move(context), inputs_, outputs_, bindings);
}

std::shared_ptr<Context> TensorRtEngine::make_context(const Shapes &shapes, const Bindings &bindings) {
  const int32_t profile = fitting_profile(axes(shapes));
  device_.activate();
  std::unique_ptr<nvinfer1::IRuntimeConfig> config(engine_->createRuntimeConfig());
  if (!config) throw fail_("make a context");
  config->setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
  configure_(*config);
  std::unique_ptr<nvinfer1::IExecutionContext> context(engine_->createExecutionContext(config.get()));
  if (!context || !context->setOptimizationProfileAsync(profile, device_.stream())) throw fail_("make a context");
  for (const auto &input : shapes) {
    if (!context->setInputShape(input.first.c_str(), dims_of(input.second))) {
      throw fail_("take " + input.first + " of shape " + text_of(input.second));
    }
  }
  const char *missing = nullptr;
  if (context->inferShapes(1, &missing) != 0) throw fail_("infer the shape of " + std::string(missing ? missing : "its tensors"));
  for (const auto &output : outputs_) {
    const nvinfer1::Dims dims = context->getTensorShape(output.first.c_str());
    const Shape shape(dims.d, dims.d + std::max(dims.nbDims, 0));
    if (shape != bindings.at(output.first)->shape) {
      refuse("it gives " + output.first + " as " + text_of(shape) + ", not " + text_of(bindings.at(output.first)->shape));
    }
  }
  // 0 is an answer for shapes that need nothing and for a question that failed, but a context whose engine may need memory runs with
  // none at all only if its engine never needs any.
  auto scratch = static_cast<int64_t>(context->updateDeviceMemorySizeForShapes());
  if (scratch == 0) scratch = engine_->getDeviceMemorySizeV2();
  auto made = std::make_shared<Context>(device_, engine_, std::move(config), std::move(context), scratch, fail_);
  arena_.admit(made);
  return made;
}

// The length of each symbolic axis.
std::map<std::string, int64_t> TensorRtEngine::axes(const Shapes &shapes) const {
  std::map<std::string, int64_t> lengths;
  for (const TensorEntry &tensor : graph_.inputs) {
    const Shape &shape = shapes.at(tensor.name);
    bool fits = shape.size() == tensor.shape.size();
    for (size_t i = 0; fits && i < shape.size(); ++i) {
      const Axis &axis = tensor.shape[i];
      fits = shape[i] == (axis.name.empty() ? axis.length : lengths.emplace(axis.name, shape[i]).first->second);
    }
    if (!fits) refuse("its input " + tensor.name + " does not take " + text_of(shape));
  }
  return lengths;
}

// The first profile that takes these lengths: pinned ones stand before ranges.
int32_t TensorRtEngine::fitting_profile(const std::map<std::string, int64_t> &lengths) const {
  for (size_t i = 0; i < entry_.profiles.size(); ++i) {
    const Profile &profile = entry_.profiles[i];
    if (std::all_of(lengths.begin(), lengths.end(), [&profile](const auto &axis) {
          const auto range = profile.find(axis.first);
          return range != profile.end() && range->second.least <= axis.second && axis.second <= range->second.most;
        })) {
      return static_cast<int32_t>(i);
    }
  }
  std::vector<std::string> asked, there;
  for (const auto &axis : lengths) asked.push_back(axis.first + " = " + std::to_string(axis.second));
  for (const Profile &profile : entry_.profiles) {
    std::vector<std::string> ranges;
    for (const auto &axis : profile) {
      const auto [least, most] = axis.second;
      ranges.push_back(axis.first + " = " + std::to_string(least) + (least == most ? "" : " .. " + std::to_string(most)));
    }
    there.push_back(joined(ranges, ", "));
  }
  throw Error(HST_INCOMPATIBLE, "the engine " + name_ + " has no profile for " + joined(asked, ", "), joined(there, "; "),
              "ask for a size and a number of images that the bundle was built for, or build one for these: `hst-trt build`");
}

}  // namespace hst_trt
