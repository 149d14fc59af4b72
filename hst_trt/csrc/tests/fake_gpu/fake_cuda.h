// What the double of TensorRT needs of the double of CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#define FAKE_API __attribute__((visibility("default")))

// Ends the process where a real GPU would corrupt memory in silence.
FAKE_API void must(bool right, const char *what);

// Whether the call that asks is the one that a test wants to fail (`fake_set("fail_at", n)`: the n-th from now on).
FAKE_API bool fails_now();
FAKE_API void fake_enqueue(struct CUstream_st *stream, std::function<void()> operation);
FAKE_API bool fake_capturing();
// That these bytes are within one allocation that is there now.
FAKE_API void fake_check(uintptr_t address, size_t size);

extern "C" {
// Counters and settings by name. `live.X`: how many X there are; used: bytes. Settings: memory, sm, gpus, driver, captures, fail_at.
FAKE_API long fake_get(const char *name);
FAKE_API void fake_set(const char *name, long value);
FAKE_API void fake_add(const char *name, long more);
}
