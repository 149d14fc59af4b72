// The version of the double of TensorRT, or with FAKE_RTX of TensorRT-RTX: one that there is not, so that neither its hosts open the
// real library, nor real hosts this one.
#pragma once

#ifdef FAKE_RTX
#define TRT_MAJOR_RTX 1
#define NV_TENSORRT_MAJOR TRT_MAJOR_RTX
#define NV_TENSORRT_MINOR 99
#else
#define NV_TENSORRT_MAJOR 11
#define NV_TENSORRT_MINOR 99
#endif
#define NV_TENSORRT_PATCH 0
#define NV_TENSORRT_BUILD 1
#define NV_TENSORRT_VERSION (NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH)
