// Random numbers that equal numpy's for the same seeds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace hst_trt {

// The first `count` numbers in [0, 1) of numpy.random.default_rng((seed, stream)).random().
std::vector<double> numpy_uniform(uint64_t seed, uint64_t stream, size_t count);

}  // namespace hst_trt
