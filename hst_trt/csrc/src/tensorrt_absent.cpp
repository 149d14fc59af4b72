// What stands for the TensorRT backend where the library is built without TensorRT's headers.
#include "error.h"
#include "tensorrt_backend.h"

namespace hst_trt {

std::unique_ptr<Backend> open_tensorrt_backend(const Bundle &bundle, int) {
  throw Error(HST_MISSING, "this library was built without the backend of the bundle", bundle.manifest.target.backend,
              "build it with TENSORRT_ROOT, the folder of that backend's SDK, or use a bundle for a CPU: `hst-trt build --gpu cpu`");
}

}  // namespace hst_trt
