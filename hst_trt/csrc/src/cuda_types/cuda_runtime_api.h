// The two names that TensorRT's headers take from CUDA's, so that no CUDA toolkit is needed to build.
#pragma once

typedef struct CUstream_st *cudaStream_t;
typedef struct CUevent_st *cudaEvent_t;
