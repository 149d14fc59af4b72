// A double of the CUDA driver's library on host memory, strict where a real one would corrupt memory in silence.
//
// What is enqueued is executed only when somebody waits, in order; capturing records what is enqueued; fresh and freed memory is full
// of NaN; every access is checked against what is allocated when it is executed. The row-move kernel is the real source, compiled as
// plain C++. One process uses it from one thread at a time.
#include "fake_cuda.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

// -- kernels as plain C++ -------------------------------------------------------------------------------------------------
struct uint4 {
  unsigned x, y, z, w;
};
struct Index {
  int x, y, z;
};
static Index threadIdx, blockIdx, blockDim;
#define __global__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpedantic"
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#include "../../../runtime/row_move.cu"
#pragma GCC diagnostic pop

// -- the device -----------------------------------------------------------------------------------------------------------
namespace {

using Operation = std::function<void()>;
constexpr int kPoison = 0xFF;
enum { kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kNoDevice = 100, kCaptureUnsupported = 900, kLaunchFailed = 719 };

struct Block {
  std::unique_ptr<char[]> bytes;
  size_t size;
};

std::map<std::string, long> &values() {
  static auto *all = new std::map<std::string, long>{{"memory", 1L << 30}, {"sm", 90}, {"gpus", 1}, {"driver", 13000}, {"captures", 1}};
  return *all;
}

std::map<uintptr_t, Block> blocks;
std::deque<Operation> queue;
std::vector<Operation> recorded;
bool capturing = false, spoilt = false;
long used = 0;
bool current = false;  // whether the thread has a context

void drain() {
  while (!queue.empty()) {
    const Operation operation = std::move(queue.front());
    queue.pop_front();
    operation();
  }
}

}  // namespace

struct CUctx_st {};
struct CUstream_st {};
struct CUevent_st {
  bool reached = false;
  std::chrono::steady_clock::time_point time;
};
struct CUgraph_st {
  std::vector<Operation> operations;
};
struct CUgraphExec_st {
  std::vector<Operation> operations;
};
struct CUmod_st {};
struct CUfunc_st {};

void must(bool right, const char *what) {
  if (right) return;
  std::fprintf(stderr, "the double of the GPU: %s\n", what);
  std::abort();
}

bool fails_now() {
  long &left = values()["fail_at"];
  return left > 0 && --left == 0;
}

void fake_check(uintptr_t address, size_t size) {
  auto after = blocks.upper_bound(address);
  must(after != blocks.begin(), "an address that was never allocated");
  --after;
  must(address + size <= after->first + after->second.size, "an access beyond what is allocated");
}

bool fake_capturing() { return capturing; }

static size_t free_memory() { return static_cast<size_t>(values()["memory"] - used); }

void fake_enqueue(CUstream_st *stream, Operation operation) {
  must(stream != nullptr, "work on the default stream");
  must(current, "work on a thread without a context");
  if (capturing) {
    recorded.push_back(std::move(operation));
  } else {
    ++values()["enqueued"];
    queue.push_back(std::move(operation));
  }
}

extern "C" {

long fake_get(const char *name) {
  if (std::strcmp(name, "used") == 0) return used;
  return values()[name];
}
void fake_set(const char *name, long value) { values()[name] = value; }
void fake_add(const char *name, long more) { values()[name] += more; }

#define FALLIBLE \
  if (fails_now()) return kLaunchFailed

FAKE_API int cuInit(unsigned) {
  FALLIBLE;
  return values()["gpus"] > 0 ? kSuccess : kNoDevice;
}

FAKE_API int cuDriverGetVersion(int *version) {
  *version = static_cast<int>(values()["driver"]);
  return kSuccess;
}

FAKE_API int cuGetErrorName(int error, const char **name) {
  static const std::map<int, const char *> names{{kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
                                                 {kCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
                                                 {kLaunchFailed, "CUDA_ERROR_LAUNCH_FAILED"}};
  const auto found = names.find(error);
  *name = found == names.end() ? nullptr : found->second;
  return found == names.end() ? kInvalidValue : kSuccess;
}

FAKE_API int cuDeviceGetCount(int *count) {
  FALLIBLE;
  *count = static_cast<int>(values()["gpus"]);
  return kSuccess;
}

FAKE_API int cuDeviceGet(int *device, int ordinal) {
  FALLIBLE;
  *device = ordinal;
  return kSuccess;
}

FAKE_API int cuDeviceGetName(char *name, int length, int) {
  FALLIBLE;
  std::snprintf(name, static_cast<size_t>(length), "Fake GPU");
  return kSuccess;
}

FAKE_API int cuDeviceGetAttribute(int *value, int attribute, int) {
  FALLIBLE;
  const long sm = values()["sm"];
  must(attribute == 75 || attribute == 76, "another attribute than the compute capability");
  *value = static_cast<int>(attribute == 75 ? sm / 10 : sm % 10);
  return kSuccess;
}

FAKE_API int cuDevicePrimaryCtxRetain(CUctx_st **context, int) {
  FALLIBLE;
  static CUctx_st only;
  ++values()["live.context"];
  *context = &only;
  return kSuccess;
}

FAKE_API int cuDevicePrimaryCtxRelease_v2(int) {
  must(--values()["live.context"] >= 0, "a context released too often");
  return kSuccess;
}

FAKE_API int cuCtxSetCurrent(CUctx_st *context) {
  current = context != nullptr && values()["live.context"] > 0;
  return kSuccess;
}

FAKE_API int cuMemGetInfo_v2(size_t *free, size_t *total) {
  *free = free_memory();
  *total = static_cast<size_t>(values()["memory"]);
  return kSuccess;
}

FAKE_API int cuMemAlloc_v2(unsigned long long *address, size_t size) {
  must(!capturing, "an allocation would spoil the capture");
  must(current && size > 0, "an allocation without a context or without a size");
  if (fails_now() || size > free_memory()) return kOutOfMemory;
  Block block{std::make_unique<char[]>(size + 256), size};
  std::memset(block.bytes.get(), kPoison, size + 256);
  const uintptr_t start = reinterpret_cast<uintptr_t>(block.bytes.get());
  const uintptr_t aligned = (start + 255) / 256 * 256;
  blocks[aligned] = std::move(block);
  used += static_cast<long>(size);
  ++values()["live.memory"];
  ++values()["allocated"];
  *address = aligned;
  return kSuccess;
}

FAKE_API int cuMemFree_v2(unsigned long long address) {
  must(!capturing, "freeing would spoil the capture");
  drain();
  const auto block = blocks.find(static_cast<uintptr_t>(address));
  must(block != blocks.end(), "memory freed that was not allocated");
  used -= static_cast<long>(block->second.size);
  std::memset(reinterpret_cast<void *>(block->first), kPoison, block->second.size);
  blocks.erase(block);
  --values()["live.memory"];
  return kSuccess;
}

FAKE_API int cuMemsetD8Async(unsigned long long target, unsigned char byte, size_t size, CUstream_st *stream) {
  FALLIBLE;
  fake_enqueue(stream, [=] {
    fake_check(static_cast<uintptr_t>(target), size);
    std::memset(reinterpret_cast<void *>(target), byte, size);
  });
  return kSuccess;
}

FAKE_API int cuMemcpyDtoDAsync_v2(unsigned long long target, unsigned long long source, size_t size, CUstream_st *stream) {
  FALLIBLE;
  fake_enqueue(stream, [=] {
    fake_check(static_cast<uintptr_t>(source), size);
    fake_check(static_cast<uintptr_t>(target), size);
    must(source + size <= target || target + size <= source, "source and target of a copy overlap");
    std::memcpy(reinterpret_cast<void *>(target), reinterpret_cast<const void *>(source), size);
  });
  return kSuccess;
}

FAKE_API int cuMemcpyHtoDAsync_v2(unsigned long long target, const void *source, size_t size, CUstream_st *stream) {
  FALLIBLE;
  must(!capturing, "what the host writes would be recorded once and for all");
  ++values()["uploads"];
  fake_enqueue(stream, [=] {
    fake_check(static_cast<uintptr_t>(target), size);
    std::memcpy(reinterpret_cast<void *>(target), source, size);
  });
  return kSuccess;
}

FAKE_API int cuMemcpyDtoHAsync_v2(void *target, unsigned long long source, size_t size, CUstream_st *stream) {
  FALLIBLE;
  must(!capturing, "a read would be recorded once and for all");
  fake_enqueue(stream, [=] {
    fake_check(static_cast<uintptr_t>(source), size);
    std::memcpy(target, reinterpret_cast<const void *>(source), size);
  });
  return kSuccess;
}

FAKE_API int cuStreamCreate(CUstream_st **stream, unsigned flags) {
  FALLIBLE;
  must(flags == 1, "a stream that waits for the default one");
  ++values()["live.stream"];
  *stream = new CUstream_st;
  return kSuccess;
}

FAKE_API int cuStreamDestroy_v2(CUstream_st *stream) {
  drain();
  --values()["live.stream"];
  delete stream;
  return kSuccess;
}

FAKE_API int cuStreamSynchronize(CUstream_st *) {
  if (capturing) {
    spoilt = true;
    return kCaptureUnsupported;
  }
  ++values()["waits"];
  drain();
  return fails_now() ? kLaunchFailed : kSuccess;
}

FAKE_API int cuStreamBeginCapture_v2(CUstream_st *, int mode) {
  FALLIBLE;
  must(!capturing, "a capture within a capture");
  must(mode == 1, "a capture that forbids calls of other threads");
  if (values()["captures"] == 0) return kCaptureUnsupported;
  capturing = true;
  spoilt = false;
  recorded.clear();
  return kSuccess;
}

FAKE_API int cuStreamEndCapture(CUstream_st *, CUgraph_st **graph) {
  must(capturing, "the end of a capture that never began");
  capturing = false;
  *graph = nullptr;
  if (spoilt || fails_now()) return kCaptureUnsupported;
  ++values()["live.graph"];
  *graph = new CUgraph_st{std::move(recorded)};
  return kSuccess;
}

FAKE_API int cuGraphInstantiateWithFlags(CUgraphExec_st **exec, CUgraph_st *graph, unsigned long long) {
  if (!graph) return kInvalidValue;
  FALLIBLE;
  ++values()["live.recording"];
  ++values()["recorded"];
  *exec = new CUgraphExec_st{graph->operations};
  return kSuccess;
}

FAKE_API int cuGraphDestroy(CUgraph_st *graph) {
  --values()["live.graph"];
  delete graph;
  return kSuccess;
}

FAKE_API int cuGraphLaunch(CUgraphExec_st *exec, CUstream_st *stream) {
  must(!capturing && stream && current, "a launch within a capture, on the default stream or without a context");
  FALLIBLE;
  ++values()["launches"];
  queue.insert(queue.end(), exec->operations.begin(), exec->operations.end());
  return kSuccess;
}

FAKE_API int cuGraphExecDestroy(CUgraphExec_st *exec) {
  --values()["live.recording"];
  delete exec;
  return kSuccess;
}

FAKE_API int cuEventCreate(CUevent_st **event, unsigned) {
  FALLIBLE;
  ++values()["live.event"];
  *event = new CUevent_st;
  return kSuccess;
}

FAKE_API int cuEventDestroy_v2(CUevent_st *event) {
  if (!event->reached) drain();
  --values()["live.event"];
  delete event;
  return kSuccess;
}

FAKE_API int cuEventRecord(CUevent_st *event, CUstream_st *stream) {
  FALLIBLE;
  fake_enqueue(stream, [=] {
    event->reached = true;
    event->time = std::chrono::steady_clock::now();
  });
  return kSuccess;
}

FAKE_API int cuEventSynchronize(CUevent_st *event) {
  FALLIBLE;
  if (!event->reached) {
    ++values()["event_waits"];
    drain();
  }
  must(event->reached, "waiting for an event that was not recorded");
  return kSuccess;
}

FAKE_API int cuEventElapsedTime(float *milliseconds, CUevent_st *start, CUevent_st *end) {
  must(start->reached && end->reached, "time between events that are not reached");
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return kSuccess;
}

FAKE_API int cuModuleLoadData(CUmod_st **module, const void *image) {
  FALLIBLE;
  must(std::strncmp(static_cast<const char *>(image), "\n.version 6.3\n.target sm_75\n", 28) == 0, "an image that is not the row move's PTX");
  ++values()["live.module"];
  *module = new CUmod_st;
  return kSuccess;
}

FAKE_API int cuModuleUnload(CUmod_st *module) {
  --values()["live.module"];
  delete module;
  return kSuccess;
}

FAKE_API int cuModuleGetFunction(CUfunc_st **function, CUmod_st *, const char *name) {
  FALLIBLE;
  must(std::strcmp(name, "move_rows") == 0, "another kernel than the row move");
  static CUfunc_st only;
  *function = &only;
  return kSuccess;
}

FAKE_API int cuLaunchKernel(CUfunc_st *, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned,
                            CUstream_st *stream, void **arguments, void **) {
  FALLIBLE;
  must(gx > 0 && gy > 0 && gz > 0 && by == 1 && bz == 1, "an empty grid, or blocks that the kernel does not expect");
  const auto pointer = [&](int i) { return *static_cast<unsigned long long *>(arguments[i]); };
  const auto number = [&](int i) { return *static_cast<int *>(arguments[i]); };
  const auto *tensors = reinterpret_cast<const CacheTensor *>(pointer(0));
  const auto *partner = reinterpret_cast<const long long *>(pointer(1));
  const int images = number(2), slots = number(3), first = number(4), heads = number(5), units = number(6);
  fake_enqueue(stream, [=] {
    fake_check(reinterpret_cast<uintptr_t>(tensors), gy * sizeof(CacheTensor));
    fake_check(reinterpret_cast<uintptr_t>(partner), static_cast<size_t>(images * slots) * sizeof(long long));
    for (unsigned tensor = 0; tensor < gy; ++tensor) {
      fake_check(reinterpret_cast<uintptr_t>(tensors[tensor].base), gz * static_cast<size_t>(heads * tensors[tensor].length * units) * sizeof(uint4));
    }
    blockDim = {static_cast<int>(bx), 1, 1};
    for (unsigned z = 0; z < gz; ++z) {
      for (unsigned y = 0; y < gy; ++y) {
        for (unsigned x = 0; x < gx; ++x) {
          for (unsigned t = 0; t < bx; ++t) {
            blockIdx = {static_cast<int>(x), static_cast<int>(y), static_cast<int>(z)};
            threadIdx = {static_cast<int>(t), 0, 0};
            move_rows(tensors, partner, images, slots, first, heads, units);
          }
        }
      }
    }
  });
  ++values()["moves"];
  return kSuccess;
}

}  // extern "C"
