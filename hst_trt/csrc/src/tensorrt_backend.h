// The TensorRT backend: engines of a bundle on one GPU.
#pragma once

#include <memory>

#include "backend.h"
#include "bundle.h"

namespace hst_trt {

// device: which GPU. The bundle must outlive the backend. TensorRT's library is the one that the environment's HST_TENSORRT names, else
// the one of the major version that this library was built for, where the system looks. Throws Error: HST_MISSING without a driver,
// a GPU or TensorRT, or where this library was built without it; HST_INCOMPATIBLE if one of them is not what the engines are for.
std::unique_ptr<Backend> open_tensorrt_backend(const Bundle &bundle, int device);

}  // namespace hst_trt
