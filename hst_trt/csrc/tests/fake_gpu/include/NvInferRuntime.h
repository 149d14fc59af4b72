// What the backend uses of TensorRT's interface, by its names, for tests that have neither its headers nor its library.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "NvInferVersion.h"

namespace nvinfer1 {

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT32 = 3, kUINT8 = 5, kBF16 = 7, kINT64 = 8 };
enum class ExecutionContextAllocationStrategy : int32_t { kSTATIC = 0, kON_PROFILE_CHANGE = 1, kUSER_MANAGED = 2 };

struct Dims {
  int32_t nbDims;
  int64_t d[8];
};

class ILogger {
 public:
  enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
  virtual void log(Severity severity, const char *text) noexcept = 0;

 protected:
  virtual ~ILogger() = default;
};

class IHostMemory {
 public:
  virtual ~IHostMemory() = default;
  virtual void *data() const noexcept = 0;
  virtual size_t size() const noexcept = 0;
};

#ifdef TRT_MAJOR_RTX
enum class CudaGraphStrategy : int32_t { kDISABLED = 0, kWHOLE_GRAPH_CAPTURE = 1 };
enum class DynamicShapesKernelSpecializationStrategy : int32_t { kLAZY = 0, kEAGER = 1, kNONE = 2 };

class IRuntimeCache {
 public:
  virtual ~IRuntimeCache() = default;
  virtual IHostMemory *serialize() const noexcept = 0;
  virtual bool deserialize(const void *content, size_t size) noexcept = 0;
};
#endif

class IRuntimeConfig {
 public:
  virtual ~IRuntimeConfig() = default;
  virtual void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy strategy) noexcept = 0;
#ifdef TRT_MAJOR_RTX
  virtual bool setCudaGraphStrategy(CudaGraphStrategy strategy) noexcept = 0;
  virtual void setDynamicShapesKernelSpecializationStrategy(DynamicShapesKernelSpecializationStrategy strategy) noexcept = 0;
  virtual IRuntimeCache *createRuntimeCache() const noexcept = 0;
  virtual bool setRuntimeCache(const IRuntimeCache &cache) noexcept = 0;
#endif
};

class IExecutionContext {
 public:
  virtual ~IExecutionContext() = default;
  virtual bool setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept = 0;
  virtual bool setInputShape(const char *tensor, const Dims &dims) noexcept = 0;
  virtual int32_t inferShapes(int32_t most, const char **missing) noexcept = 0;
  virtual Dims getTensorShape(const char *tensor) const noexcept = 0;
  virtual size_t updateDeviceMemorySizeForShapes() noexcept = 0;
  virtual void setDeviceMemoryV2(void *memory, int64_t size) noexcept = 0;
  virtual bool setTensorAddress(const char *tensor, void *address) noexcept = 0;
  virtual bool enqueueV3(cudaStream_t stream) noexcept = 0;
#ifdef TRT_MAJOR_RTX
  virtual bool isStreamCapturable(cudaStream_t stream) const noexcept = 0;
#endif
};

class ICudaEngine {
 public:
  virtual ~ICudaEngine() = default;
  virtual int32_t getNbIOTensors() const noexcept = 0;
  virtual const char *getIOTensorName(int32_t index) const noexcept = 0;
  virtual DataType getTensorDataType(const char *tensor) const noexcept = 0;
  virtual int32_t getNbOptimizationProfiles() const noexcept = 0;
  virtual int64_t getDeviceMemorySizeV2() const noexcept = 0;
  virtual IRuntimeConfig *createRuntimeConfig() noexcept = 0;
  virtual IExecutionContext *createExecutionContext(IRuntimeConfig *config) noexcept = 0;
};

class IRuntime {
 public:
  virtual ~IRuntime() = default;
  virtual void setEngineHostCodeAllowed(bool allowed) noexcept = 0;
  virtual ICudaEngine *deserializeCudaEngine(const void *content, size_t size) noexcept = 0;
};

}  // namespace nvinfer1
