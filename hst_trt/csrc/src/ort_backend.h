// The ONNX Runtime backend: its shared library is opened at run time, graphs run on the CPU, calls are bound once.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "backend.h"

namespace hst_trt {

// graph_file: the file of a graph, or Error; threads: of a call, 0 for one per physical core; library: path of the shared library, empty for
// the environment's HST_ONNXRUNTIME, else where the system looks. Throws Error, HST_MISSING or HST_INCOMPATIBLE.
std::unique_ptr<Backend> open_ort_backend(std::function<std::filesystem::path(const std::string &name)> graph_file, int threads,
                                          const std::string &library);

}  // namespace hst_trt
