#include "noise.h"

#include <cmath>
#include <random>

namespace hst_trt {
namespace {

constexpr size_t kBlock = 16, kHalf = 8;

// Box and Muller's transform of a block of uniform numbers: the first half gives the radius, the second the angle.
// The functions are taken in double and rounded, so that every machine has the same bits.
void box_muller(const float *uniform, float *normal) {
  for (size_t i = 0; i < kHalf; ++i) {
    const auto log = static_cast<float>(std::log(static_cast<double>(1.0F - uniform[i])));
    const float radius = std::sqrt(-2.0F * log);
    const auto angle = static_cast<double>(static_cast<float>(2.0 * 3.14159265358979323846) * uniform[kHalf + i]);
    normal[i] = radius * static_cast<float>(std::cos(angle));
    normal[kHalf + i] = radius * static_cast<float>(std::sin(angle));
  }
}

}  // namespace

std::vector<float> torch_randn(uint64_t seed, size_t count) {
  std::mt19937 twister(static_cast<uint32_t>(seed));
  const auto draw = [&twister] { return static_cast<float>(twister() & 0xFFFFFFU) * 0x1p-24F; };
  std::vector<float> uniform(count);
  for (float &value : uniform) value = draw();
  std::vector<float> normal(count);
  for (size_t i = 0; i + kBlock <= count; i += kBlock) box_muller(&uniform[i], &normal[i]);
  if (count % kBlock) {  // the last 16 are drawn anew
    float last[kBlock];
    for (float &value : last) value = draw();
    box_muller(last, &normal[count - kBlock]);
  }
  return normal;
}

}  // namespace hst_trt
