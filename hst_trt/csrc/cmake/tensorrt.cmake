# The TensorRT backend, for the TensorRT or TensorRT-RTX whose headers TENSORRT_ROOT has. Which of them, and which version, is theirs.
set(TENSORRT_ROOT "$ENV{TENSORRT_ROOT}" CACHE PATH "the SDK of TensorRT or TensorRT-RTX; empty: bundles for a CPU only")

set(tensorrt_sources cuda.cpp tensorrt_backend.cpp tensorrt_engine.cpp tensorrt_rtx_cache.cpp)

# Objects of the backend, compiled with the headers of a folder.
function(add_tensorrt_backend target headers)
  list(TRANSFORM tensorrt_sources PREPEND ${PROJECT_SOURCE_DIR}/src/)
  add_library(${target} OBJECT ${tensorrt_sources})
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/include)
  target_include_directories(${target} SYSTEM PRIVATE ${headers} ${PROJECT_SOURCE_DIR}/src/cuda_types)
endfunction()

if(TENSORRT_ROOT)
  find_path(tensorrt_headers NvInferRuntime.h PATHS ${TENSORRT_ROOT} PATH_SUFFIXES include include/${CMAKE_LIBRARY_ARCHITECTURE}
    NO_DEFAULT_PATH NO_CACHE REQUIRED)
  message(STATUS "TensorRT backend with the headers of ${tensorrt_headers}")
  add_tensorrt_backend(hst_trt_tensorrt ${tensorrt_headers})
else()
  message(STATUS "no TensorRT backend: TENSORRT_ROOT is not set")
  add_library(hst_trt_tensorrt OBJECT src/tensorrt_absent.cpp)
  target_include_directories(hst_trt_tensorrt PRIVATE include)
endif()
