// TensorRT-RTX's settings, and its runtime cache: kernels that it compiled on this machine, kept for the next process:
// hst_trt/runtime/rtx_cache.py, with which the file is shared. TensorRT has neither.
//
// TensorRT-RTX checks by itself that a cache is for this GPU, driver and version, and takes none that is not.
#pragma once

#include <NvInferRuntime.h>

#include <filesystem>
#include <memory>
#include <string>

#include "cuda.h"

namespace hst_trt {

#ifdef TRT_MAJOR_RTX

// One cache for all contexts of a backend; written to disk when the backend is gone.
class RtxCache {
 public:
  RtxCache(const CudaDevice &device, const std::string &version);
  RtxCache(const RtxCache &) = delete;
  RtxCache &operator=(const RtxCache &) = delete;
  ~RtxCache();

  // What a context needs: the cache, and that TensorRT-RTX records no graphs within ours, nor exchanges kernels after they are recorded.
  void configure(nvinfer1::IRuntimeConfig &config);

 private:
  void save() const;

  std::filesystem::path path_;
  std::unique_ptr<nvinfer1::IRuntimeCache> cache_;
};

#else

struct RtxCache {
  RtxCache(const CudaDevice &, const std::string &) {}
  void configure(nvinfer1::IRuntimeConfig &) {}
};

#endif

}  // namespace hst_trt
