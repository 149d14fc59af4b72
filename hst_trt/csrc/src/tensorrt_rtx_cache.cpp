#include "tensorrt_rtx_cache.h"

#ifdef TRT_MAJOR_RTX

#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <iterator>

namespace fs = std::filesystem;

namespace hst_trt {
namespace {

fs::path user_cache() {
  const char *cache = std::getenv("XDG_CACHE_HOME"), *home = std::getenv("HOME");
  return (cache && *cache ? fs::path(cache) : fs::path(home ? home : "") / ".cache") / "hst_trt";
}

}  // namespace

RtxCache::RtxCache(const CudaDevice &device, const std::string &version)
    : path_(user_cache() / ("tensorrt-rtx-" + version + "-sm" + std::to_string(device.sm()) + ".cache")) {}

RtxCache::~RtxCache() {
  try {
    save();
  } catch (const std::exception &) {  // the kernels are compiled again next time
  }
}

void RtxCache::configure(nvinfer1::IRuntimeConfig &config) {
  config.setCudaGraphStrategy(nvinfer1::CudaGraphStrategy::kDISABLED);
  config.setDynamicShapesKernelSpecializationStrategy(nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
  if (!cache_) {
    cache_.reset(config.createRuntimeCache());
    if (!cache_) return;
    std::ifstream file(path_, std::ios::binary);
    const std::string content(std::istreambuf_iterator<char>(file), {});
    if (!content.empty()) cache_->deserialize(content.data(), content.size());
  }
  config.setRuntimeCache(*cache_);
}

void RtxCache::save() const {
  if (!cache_) return;
  const std::unique_ptr<nvinfer1::IHostMemory> content(cache_->serialize());
  if (!content) return;
  if (fs::create_directories(path_.parent_path())) fs::permissions(path_.parent_path(), fs::perms::owner_all);
  const fs::path beside = path_.string() + "." + std::to_string(getpid());
  std::ofstream file(beside, std::ios::binary);
  file.write(static_cast<const char *>(content->data()), static_cast<std::streamsize>(content->size()));
  file.close();
  std::error_code failed;
  if (file) fs::rename(beside, path_, failed);
  if (!file || failed) fs::remove(beside, failed);
}

}  // namespace hst_trt

#endif
