// One TensorRT engine: which profile fits which shapes, its execution contexts, and the memory they share:
// hst_trt/runtime/trt_engine.py.
//
// There is a context for each set of shapes, because changing the shapes of one would invalidate what was recorded with it; it lives
// as long as a prepared call uses it. Contexts never run at the same time, since there is one stream, so all of them work in one
// arena of activation memory.
#pragma once

#include <NvInferRuntime.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend.h"
#include "cuda.h"
#include "manifest.h"

namespace hst_trt {

// Keeps the last errors that TensorRT logged: it returns null or false and says why only there, on any thread.
class ErrorLog : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char *text) noexcept override;
  std::string take();

 private:
  std::mutex guard_;
  std::deque<std::string> lines_;
};

bool says_out_of_memory(const std::string &text);
std::string text_of(const Shape &shape);

class DeviceBuffer : public Buffer {
 public:
  DeviceBuffer(Shape dims, DType type, std::shared_ptr<Memory> owner) : Buffer(std::move(dims), type), memory(std::move(owner)) {}
  const std::shared_ptr<Memory> memory;
};

inline Address address_of(const Buffer &buffer) { return static_cast<const DeviceBuffer &>(buffer).memory->address; }

// An execution context with its profile and shapes set.
class Context {
 public:
  using Fail = std::function<Error(const std::string &what)>;

  Context(const CudaDevice &device, std::shared_ptr<nvinfer1::ICudaEngine> engine, std::unique_ptr<nvinfer1::IRuntimeConfig> config,
          std::unique_ptr<nvinfer1::IExecutionContext> context, int64_t scratch, Fail fail);
  Context(const Context &) = delete;
  Context &operator=(const Context &) = delete;
  ~Context();

  void use(const Memory *memory);
  void enqueue(const std::map<std::string, Address> &addresses);

  const size_t bytes;  // of activation memory that it needs

 private:
  const CudaDevice &device_;
  std::shared_ptr<nvinfer1::ICudaEngine> engine_;  // outlives what was made from it
  std::unique_ptr<nvinfer1::IRuntimeConfig> config_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  Fail fail_;
  bool capturable_ = true;
};

// Activation memory that all contexts of a stream share. It grows to what the largest of them needs.
class Arena {
 public:
  // on_move: called when it has got another address, which recordings still have in them.
  Arena(CudaDevice &device, std::function<void()> on_move) : device_(device), on_move_(std::move(on_move)) {}

  // Gives a new context its memory. Throws Error, HST_RESOURCE: the arena is as large as before then.
  void admit(const std::shared_ptr<Context> &context);
  void fit();  // gives back what no context needs

 private:
  std::vector<std::shared_ptr<Context>> contexts();
  void resize(size_t size);
  std::shared_ptr<Memory> allocate(size_t size);
  size_t size() const { return memory_ ? memory_->size : 0; }

  CudaDevice &device_;
  std::function<void()> on_move_;
  std::vector<std::weak_ptr<Context>> contexts_;
  std::shared_ptr<Memory> memory_;
};

// A deserialised engine; its weights are on the device once, however many contexts.
class TensorRtEngine : public Engine {
 public:
  using Configure = std::function<void(nvinfer1::IRuntimeConfig &)>;

  // configure: settings for a new context. The rest must outlive it. Throws Error, HST_INTEGRITY: the engine is not the one that the
  // manifest describes.
  TensorRtEngine(std::string name, const GraphEntry &graph, const EngineEntry &entry, std::shared_ptr<nvinfer1::ICudaEngine> engine,
                 CudaDevice &device, Arena &arena, ErrorLog &log, Configure configure);

  const std::map<std::string, TensorInfo> &inputs() const override { return inputs_; }
  const std::map<std::string, TensorInfo> &outputs() const override { return outputs_; }
  std::unique_ptr<PreparedCall> prepare(const Bindings &bindings) override;

 private:
  using Shapes = std::map<std::string, Shape>;  // of the inputs

  void check() const;
  std::shared_ptr<Context> make_context(const Shapes &shapes, const Bindings &bindings);
  std::map<std::string, int64_t> axes(const Shapes &shapes) const;
  int32_t fitting_profile(const std::map<std::string, int64_t> &lengths) const;
  [[noreturn]] void refuse(const std::string &found) const;

  const std::string name_;
  const GraphEntry &graph_;
  const EngineEntry &entry_;
  std::shared_ptr<nvinfer1::ICudaEngine> engine_;
  CudaDevice &device_;
  Arena &arena_;
  Configure configure_;
  Context::Fail fail_;
  std::map<std::string, TensorInfo> inputs_, outputs_;
  std::map<Shapes, std::weak_ptr<Context>> contexts_;
};

}  // namespace hst_trt
