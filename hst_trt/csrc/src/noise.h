// Start noise that equals torch's for the same seed: hst_trt/noise.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace hst_trt {

// `count` normal numbers, at least 16, as torch.randn draws them on a CPU with a generator of that seed.
std::vector<float> torch_randn(uint64_t seed, size_t count);

}  // namespace hst_trt
