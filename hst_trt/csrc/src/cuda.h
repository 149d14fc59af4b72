// A thin layer over the CUDA driver's library, opened at run time: one device, one stream, and errors that say what to do:
// hst_trt/runtime/cuda.py.
//
// Everything is enqueued on one stream of our own, so nothing needs to be ordered by hand, and the stream can be captured. Of CUDA's
// own headers none is needed: the few functions are declared here, and have not changed since CUDA 11.4.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend.h"
#include "error.h"
#include "graphs.h"

// CUDA's own names for its handles, which TensorRT's interface shares.
struct CUctx_st;
struct CUstream_st;
struct CUevent_st;
struct CUgraph_st;
struct CUgraphExec_st;
struct CUmod_st;
struct CUfunc_st;

namespace hst_trt {

class CudaDevice;
struct CudaDriver;

using Address = unsigned long long;  // CUdeviceptr

// Bytes on the device, aligned to 256, freed with the object.
class Memory {
 public:
  Memory(CudaDevice &device, Address where, size_t length) : address(where), size(length), device_(device) {}
  Memory(const Memory &) = delete;
  Memory &operator=(const Memory &) = delete;
  ~Memory();

  const Address address;
  const size_t size;

 private:
  CudaDevice &device_;
};

// One GPU and one stream on it. What it made must be gone before it. Used by one thread at a time, which may change.
class CudaDevice {
 public:
  // Throws Error: HST_MISSING without a driver or such a GPU, HST_INCOMPATIBLE if the driver is too old.
  explicit CudaDevice(int ordinal);
  CudaDevice(const CudaDevice &) = delete;
  CudaDevice &operator=(const CudaDevice &) = delete;
  ~CudaDevice();

  const std::string &name() const { return name_; }
  int64_t sm() const { return sm_; }  // compute capability, 90 for 9.0
  CUstream_st *stream() const { return stream_; }
  bool capturing() const { return capturing_; }
  void activate() const;  // for the calling thread: CUDA has a current device for each. Everything below does it

  // What it holds is undefined. what: what it is for. Throws Error, HST_RESOURCE.
  std::shared_ptr<Memory> allocate(size_t size, const std::string &what);
  void fill(Address target, uint8_t byte, size_t size) const;
  void copy(Address source, Address target, size_t size) const;
  // These two wait, so that the host's memory may be of any kind and change right after.
  void upload(const void *source, Address target, size_t size) const;
  void download(Address source, void *target, size_t size) const;
  void synchronize() const;
  std::pair<size_t, size_t> memory() const;  // bytes that are free and that there are

  MarkPtr record() const;
  double seconds(const Mark &start, const Mark &end) const;  // waits for the end

  // Records what `body` enqueues, without executing it. Throws CaptureError if something in it cannot be recorded, or failed.
  std::unique_ptr<Recording> capture(const std::function<void()> &body);

  CUfunc_st *kernel(const char *ptx, const char *kernel_name);
  // Enqueues blocks of `block` threads. arguments: a pointer to each argument's value.
  void launch(CUfunc_st *kernel, const unsigned (&grid)[3], unsigned block, std::vector<void *> arguments) const;

 private:
  friend class Memory;
  friend class CudaEvent;
  friend class CudaGraph;

  void check(int result) const;
  void close() noexcept;

  const CudaDriver &driver_;
  int device_ = 0;
  std::string name_;
  int64_t sm_ = 0;
  CUctx_st *context_ = nullptr;
  CUstream_st *stream_ = nullptr;
  std::vector<CUmod_st *> modules_;
  bool capturing_ = false;
};

// The error to throw where `size` bytes of GPU memory for `what` are not free.
Error out_of_gpu_memory(const std::string &what, size_t size, const CudaDevice &device);

}  // namespace hst_trt
