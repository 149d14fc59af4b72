// The ONNX Runtime backend: its shared library is opened at run time, graphs run on the CPU, calls are bound once.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>

#include "backend.h"

namespace hst_trt {

// graphs: the file of each graph; threads: of a call, 0 for one per physical core; library: path of the shared library, empty for
// the environment's HST_ONNXRUNTIME, else where the system looks. Throws Error, HST_MISSING or HST_INCOMPATIBLE.
std::unique_ptr<Backend> open_ort_backend(std::map<std::string, std::filesystem::path> graphs, int threads, const std::string &library);

}  // namespace hst_trt
