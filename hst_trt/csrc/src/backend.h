// What a backend must offer: buffers, and engines that run on them: hst_trt/runtime/engine.py. The loop knows nothing else of one.
//
// A call is prepared once for fixed buffers, which fixes every shape and address, and then executed any number of times. Where a
// backend can record what it enqueues, it has a recorder.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "machine.h"

namespace hst_trt {

enum class DType { kFloat32, kInt64, kInt32, kUint8, kHalf, kBFloat16 };

inline size_t item_bytes(DType dtype) {
  switch (dtype) {
    case DType::kInt64:
      return 8;
    case DType::kUint8:
      return 1;
    case DType::kHalf:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat32:
    case DType::kInt32:
      break;
  }
  return 4;
}

using Shape = std::vector<int64_t>;

// Throws std::bad_alloc where there are more than can be counted.
inline int64_t elements(const Shape &shape) {
  int64_t count = 1;
  for (const int64_t length : shape) {
    if (length < 0 || __builtin_mul_overflow(count, length, &count) || count > PTRDIFF_MAX / 8) throw std::bad_alloc();
  }
  return count;
}

// Memory of a fixed shape and type at a fixed address. Only the backend that made it looks inside.
class Buffer {
 public:
  Buffer(Shape dims, DType type) : shape(std::move(dims)), dtype(type) {}
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  virtual ~Buffer() = default;
  size_t bytes() const { return static_cast<size_t>(elements(shape)) * item_bytes(dtype); }

  const Shape shape;
  const DType dtype;
};
using BufferPtr = std::shared_ptr<Buffer>;
using Bindings = std::map<std::string, BufferPtr>;

// An engine bound to buffers, which it keeps alive. Not for use by two threads at once.
class PreparedCall {
 public:
  virtual ~PreparedCall() = default;
  virtual void execute() = 0;
};

struct TensorInfo {
  DType dtype;
  Shape shape;  // -1 for an axis whose length is free
};

// One loaded graph.
class Engine {
 public:
  virtual ~Engine() = default;
  virtual const std::map<std::string, TensorInfo> &inputs() const = 0;
  virtual const std::map<std::string, TensorInfo> &outputs() const = 0;
  // Binds every input and output; more bindings are passed over. An output may share a buffer with an input only for
  // present_* and past_*, which are updated in place.
  virtual std::unique_ptr<PreparedCall> prepare(const Bindings &bindings) = 0;
};

// A point in time: when everything that was executed before is done.
class Mark {
 public:
  virtual ~Mark() = default;
};
using MarkPtr = std::shared_ptr<Mark>;

// Runs bodies of calls, and replays what it recorded of them. It keeps what it recorded only as long as it lives.
class Recorder {
 public:
  virtual ~Recorder() = default;
  // Does what `body` does. `key` must hold everything that decides which calls `body` makes on which buffers: a body that was recorded
  // under an equal key is replayed, and not called.
  virtual void run(const std::string &key, const std::function<void()> &body) = 0;
};

// Not for use by two threads at once. Its functions throw Error.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual Machine machine() const = 0;                   // what computes
  virtual Engine &engine(const std::string &name) = 0;   // loaded on first use and kept
  virtual void release(const std::string &name) = 0;     // calls prepared from it, and recordings with them, must be gone
  virtual std::shared_ptr<Recorder> recorder() = 0;      // a new one; null where calls cannot be recorded
  // What makes runs slower than they have to be, for the user to know; empty for nothing.
  virtual std::string warning() const = 0;
  virtual BufferPtr empty(const Shape &shape, DType dtype) = 0;
  // The first elements of a buffer under another shape, sharing its memory.
  virtual BufferPtr view(const BufferPtr &buffer, const Shape &shape) = 0;
  virtual void write(Buffer &buffer, const void *values) = 0;     // all of it, from the host's memory
  virtual void zero(Buffer &buffer) = 0;
  virtual void read(const Buffer &buffer, void *values) = 0;      // all of it; waits for what was executed before
  virtual void copy(const Buffer &source, Buffer &target) = 0;    // a target of k times the size gets k copies
  // The one-way row move of a mask change, in place (engines/README.md). caches: [R, heads, rows, head_dim]; partner: [B, N];
  // slots below `first` stay as they are; text_rows: for each cache, how many rows stand before slot 0.
  virtual void move_rows(const std::vector<BufferPtr> &caches, const Buffer &partner, int64_t first, const std::vector<int64_t> &text_rows) = 0;
  virtual MarkPtr mark() = 0;
  virtual double elapsed(const Mark &start, const Mark &end) = 0;  // seconds; waits until `end` is reached
};

}  // namespace hst_trt
