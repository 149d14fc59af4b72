#include "cuda.h"

#include <dlfcn.h>

#include <mutex>

namespace hst_trt {

// The driver's functions, with the types that its documentation gives them.
struct CudaDriver {
  int (*init)(unsigned flags);
  int (*version)(int *);
  int (*error_name)(int, const char **);
  int (*device_count)(int *);
  int (*device_get)(int *, int ordinal);
  int (*device_name)(char *, int length, int);
  int (*device_attribute)(int *, int attribute, int);
  int (*context_retain)(CUctx_st **, int device);
  int (*context_release)(int device);
  int (*context_set)(CUctx_st *);
  int (*memory_info)(size_t *free, size_t *total);
  int (*allocate)(Address *, size_t);
  int (*free)(Address);
  int (*fill)(Address, unsigned char, size_t, CUstream_st *);
  int (*copy)(Address target, Address source, size_t, CUstream_st *);
  int (*upload)(Address, const void *, size_t, CUstream_st *);
  int (*download)(void *, Address, size_t, CUstream_st *);
  int (*stream_create)(CUstream_st **, unsigned flags);
  int (*stream_destroy)(CUstream_st *);
  int (*stream_synchronize)(CUstream_st *);
  int (*capture_begin)(CUstream_st *, int mode);
  int (*capture_end)(CUstream_st *, CUgraph_st **);
  int (*graph_instantiate)(CUgraphExec_st **, CUgraph_st *, unsigned long long flags);
  int (*graph_destroy)(CUgraph_st *);
  int (*graph_launch)(CUgraphExec_st *, CUstream_st *);
  int (*graph_exec_destroy)(CUgraphExec_st *);
  int (*event_create)(CUevent_st **, unsigned flags);
  int (*event_destroy)(CUevent_st *);
  int (*event_record)(CUevent_st *, CUstream_st *);
  int (*event_synchronize)(CUevent_st *);
  int (*event_elapsed)(float *milliseconds, CUevent_st *, CUevent_st *);
  int (*module_load)(CUmod_st **, const void *image);
  int (*module_unload)(CUmod_st *);
  int (*module_function)(CUfunc_st **, CUmod_st *, const char *name);
  int (*launch)(CUfunc_st *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared, CUstream_st *, void **, void **);
};

namespace {

enum { kSuccess = 0, kOutOfMemory = 2, kStubLibrary = 34, kNoDevice = 100, kUnsupportedPtx = 222 };
enum { kMajor = 75, kMinor = 76 };                  // of CUdevice_attribute
enum { kNonBlocking = 1, kThreadLocalCapture = 1 };  // of CUstream_flags, CUstreamCaptureMode

Error no_gpu(const std::string &found) {
  return Error(HST_MISSING, "there is no NVIDIA GPU to run on", found,
               "run on a machine that has one (in a container: with --gpus all), or use a bundle for the CPU: `hst-trt build --gpu cpu`");
}

Error too_old(const CudaDriver &driver, const std::string &lacks) {
  int version = 0;
  if (driver.version) driver.version(&version);
  return Error(HST_INCOMPATIBLE, "the NVIDIA driver is too old",
               "it knows CUDA " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10) + ", and " + lacks, "update the driver");
}

std::string name_of(const CudaDriver &driver, int result) {
  const char *text = nullptr;
  if (driver.error_name(result, &text) != kSuccess || !text) return "CUDA error " + std::to_string(result);
  return text;
}

// Opened once in a process and never closed: TensorRT uses it too.
CudaDriver open_driver() {
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char *why = dlerror();
    throw no_gpu("no NVIDIA driver" + (why ? ": " + std::string(why) : ""));
  }
  CudaDriver driver{};
  const auto find = [&](auto *&function, const char *name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    if (!function) throw too_old(driver, std::string("has no ") + name);
  };
  find(driver.version, "cuDriverGetVersion");
  find(driver.init, "cuInit");
  find(driver.error_name, "cuGetErrorName");
  find(driver.device_count, "cuDeviceGetCount");
  find(driver.device_get, "cuDeviceGet");
  find(driver.device_name, "cuDeviceGetName");
  find(driver.device_attribute, "cuDeviceGetAttribute");
  find(driver.context_retain, "cuDevicePrimaryCtxRetain");
  find(driver.context_release, "cuDevicePrimaryCtxRelease_v2");
  find(driver.context_set, "cuCtxSetCurrent");
  find(driver.memory_info, "cuMemGetInfo_v2");
  find(driver.allocate, "cuMemAlloc_v2");
  find(driver.free, "cuMemFree_v2");
  find(driver.fill, "cuMemsetD8Async");
  find(driver.copy, "cuMemcpyDtoDAsync_v2");
  find(driver.upload, "cuMemcpyHtoDAsync_v2");
  find(driver.download, "cuMemcpyDtoHAsync_v2");
  find(driver.stream_create, "cuStreamCreate");
  find(driver.stream_destroy, "cuStreamDestroy_v2");
  find(driver.stream_synchronize, "cuStreamSynchronize");
  find(driver.capture_begin, "cuStreamBeginCapture_v2");
  find(driver.capture_end, "cuStreamEndCapture");
  find(driver.graph_instantiate, "cuGraphInstantiateWithFlags");
  find(driver.graph_destroy, "cuGraphDestroy");
  find(driver.graph_launch, "cuGraphLaunch");
  find(driver.graph_exec_destroy, "cuGraphExecDestroy");
  find(driver.event_create, "cuEventCreate");
  find(driver.event_destroy, "cuEventDestroy_v2");
  find(driver.event_record, "cuEventRecord");
  find(driver.event_synchronize, "cuEventSynchronize");
  find(driver.event_elapsed, "cuEventElapsedTime");
  find(driver.module_load, "cuModuleLoadData");
  find(driver.module_unload, "cuModuleUnload");
  find(driver.module_function, "cuModuleGetFunction");
  find(driver.launch, "cuLaunchKernel");
  return driver;
}

const CudaDriver &the_driver() {
  static const CudaDriver driver = open_driver();  // tried again if it throws
  return driver;
}

std::string mebibytes(size_t size) {
  char text[32];
  std::snprintf(text, sizeof text, size >= size_t{10} << 20 ? "%.0f MiB" : "%.2f MiB", static_cast<double>(size) / (1 << 20));
  return text;
}

}  // namespace

Error out_of_gpu_memory(const std::string &what, size_t size, const CudaDevice &device) {
  const auto [free, total] = device.memory();
  return Error(HST_RESOURCE, what + " needs " + mebibytes(size) + " of GPU memory, which are not free",
               mebibytes(free) + " of " + mebibytes(total) + " are free",
               "ask for fewer images at once or a smaller size, set low_memory, or end what else uses the GPU");
}

Memory::~Memory() {
  device_.driver_.context_set(device_.context_);
  device_.driver_.free(address);  // waits for what still uses it
}

// A point in the stream.
class CudaEvent : public Mark {
 public:
  explicit CudaEvent(const CudaDevice &device) : device_(device) { device.check(device.driver_.event_create(&handle, 0)); }
  CudaEvent(const CudaEvent &) = delete;
  CudaEvent &operator=(const CudaEvent &) = delete;
  ~CudaEvent() override {
    device_.driver_.context_set(device_.context_);
    device_.driver_.event_destroy(handle);
  }

  CUevent_st *handle = nullptr;

 private:
  const CudaDevice &device_;
};

// A recorded CUDA graph. One that is still running when it is destroyed runs to its end.
class CudaGraph : public Recording {
 public:
  CudaGraph(const CudaDevice &device, CUgraph_st *graph) : device_(device) {
    device.check(device.driver_.graph_instantiate(&handle_, graph, 0));
  }
  CudaGraph(const CudaGraph &) = delete;
  CudaGraph &operator=(const CudaGraph &) = delete;
  ~CudaGraph() override {
    device_.driver_.context_set(device_.context_);
    device_.driver_.graph_exec_destroy(handle_);
  }

  void launch() override { device_.check(device_.driver_.graph_launch(handle_, device_.stream_)); }

 private:
  const CudaDevice &device_;
  CUgraphExec_st *handle_ = nullptr;
};

CudaDevice::CudaDevice(int ordinal) : driver_(the_driver()) {
  const int started = driver_.init(0);
  if (started == kNoDevice) throw no_gpu("there is a driver, but it shows no GPU");
  if (started == kStubLibrary) throw no_gpu("a stub in the place of the NVIDIA driver");
  if (started != kSuccess) throw no_gpu("the NVIDIA driver does not start: " + name_of(driver_, started));
  int count = 0, major = 0, minor = 0;
  check(driver_.device_count(&count));
  if (count < 1) throw no_gpu("there is a driver, but it shows no GPU");
  if (ordinal < 0 || ordinal >= count) {
    throw Error(HST_MISSING, "there is no GPU number " + std::to_string(ordinal), std::to_string(count) + " GPU(s), numbered from 0",
                "give another device");
  }
  check(driver_.device_get(&device_, ordinal));
  char text[256] = "";
  check(driver_.device_name(text, sizeof text - 1, device_));
  name_ = text;
  check(driver_.device_attribute(&major, kMajor, device_));
  check(driver_.device_attribute(&minor, kMinor, device_));
  sm_ = 10 * major + minor;
  try {
    check(driver_.context_retain(&context_, device_));  // the device's primary one, in which TensorRT works too
    activate();
    check(driver_.stream_create(&stream_, kNonBlocking));
  } catch (...) {
    close();
    throw;
  }
}

CudaDevice::~CudaDevice() { close(); }

void CudaDevice::close() noexcept {
  if (!context_) return;
  driver_.context_set(context_);
  if (stream_) {
    driver_.stream_synchronize(stream_);
    for (CUmod_st *module : modules_) driver_.module_unload(module);
    driver_.stream_destroy(stream_);
  }
  driver_.context_release(device_);
}

void CudaDevice::activate() const { check(driver_.context_set(context_)); }

std::shared_ptr<Memory> CudaDevice::allocate(size_t size, const std::string &what) {
  activate();
  Address address = 0;
  const int result = driver_.allocate(&address, size > 0 ? size : 1);
  if (result == kOutOfMemory) throw out_of_gpu_memory(what, size, *this);
  check(result);
  try {
    return std::make_shared<Memory>(*this, address, size);
  } catch (...) {
    driver_.free(address);
    throw;
  }
}

void CudaDevice::fill(Address target, uint8_t byte, size_t size) const {
  activate();
  check(driver_.fill(target, byte, size, stream_));
}

void CudaDevice::copy(Address source, Address target, size_t size) const {
  activate();
  check(driver_.copy(target, source, size, stream_));
}

void CudaDevice::upload(const void *source, Address target, size_t size) const {
  activate();
  check(driver_.upload(target, source, size, stream_));
  synchronize();
}

void CudaDevice::download(Address source, void *target, size_t size) const {
  activate();
  check(driver_.download(target, source, size, stream_));
  synchronize();
}

void CudaDevice::synchronize() const {
  activate();
  check(driver_.stream_synchronize(stream_));
}

std::pair<size_t, size_t> CudaDevice::memory() const {
  activate();
  size_t free = 0, total = 0;
  check(driver_.memory_info(&free, &total));
  return {free, total};
}

MarkPtr CudaDevice::record() const {
  activate();
  auto event = std::make_shared<CudaEvent>(*this);
  check(driver_.event_record(event->handle, stream_));
  return event;
}

double CudaDevice::seconds(const Mark &start, const Mark &end) const {
  activate();
  CUevent_st *last = static_cast<const CudaEvent &>(end).handle;
  check(driver_.event_synchronize(last));
  float milliseconds = 0;
  check(driver_.event_elapsed(&milliseconds, static_cast<const CudaEvent &>(start).handle, last));
  return static_cast<double>(milliseconds) / 1e3;
}

std::unique_ptr<Recording> CudaDevice::capture(const std::function<void()> &body) {
  activate();
  if (const int result = driver_.capture_begin(stream_, kThreadLocalCapture)) throw CaptureError(name_of(driver_, result));
  CUgraph_st *graph = nullptr;
  std::exception_ptr failure;
  capturing_ = true;
  try {
    body();
  } catch (...) {
    failure = std::current_exception();
  }
  capturing_ = false;
  const int ended = driver_.capture_end(stream_, &graph);  // whatever happened: else the stream would stay as it is
  const std::unique_ptr<CUgraph_st, int (*)(CUgraph_st *)> owner(graph, driver_.graph_destroy);
  try {
    if (failure) std::rethrow_exception(failure);
    check(ended);
    return std::make_unique<CudaGraph>(*this, graph);
  } catch (const Error &error) {
    throw CaptureError(error.what());
  }
}

CUfunc_st *CudaDevice::kernel(const char *ptx, const char *kernel_name) {
  activate();
  modules_.reserve(modules_.size() + 1);
  CUmod_st *module = nullptr;
  const int result = driver_.module_load(&module, ptx);
  if (result == kUnsupportedPtx) throw too_old(driver_, "cannot compile a kernel for it");
  check(result);
  modules_.push_back(module);
  CUfunc_st *function = nullptr;
  check(driver_.module_function(&function, module, kernel_name));
  return function;
}

void CudaDevice::launch(CUfunc_st *kernel, const unsigned (&grid)[3], unsigned block, std::vector<void *> arguments) const {
  activate();
  check(driver_.launch(kernel, grid[0], grid[1], grid[2], block, 1, 1, 0, stream_, arguments.data(), nullptr));
}

void CudaDevice::check(int result) const {
  if (result == kSuccess) return;
  if (result == kOutOfMemory) {
    throw Error(HST_RESOURCE, "CUDA has no memory left, on the GPU or of the host's that it can use directly", "",
                "ask for fewer images at once or a smaller size, or set low_memory");
  }
  throw Error(HST_FAILED, "the GPU stopped with an error", name_of(driver_, result),
              "run `hst-trt verify` on the bundle; if it is whole, report this");
}

}  // namespace hst_trt
