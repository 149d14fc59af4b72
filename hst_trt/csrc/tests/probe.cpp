// Prints what the interface does not show, as raw bytes, for the tests to compare with Python's:
//   noise SEED COUNT                                 float32
//   table STEPS SOLVER SPACING SHIFT PAIRS_SHIFT     float32: timesteps, sigmas, coefficients
#include <cstdio>
#include <cstdlib>
#include <string>

#include "error.h"
#include "noise.h"
#include "schedule.h"

namespace {

void put(const float *values, size_t count) { std::fwrite(values, sizeof(float), count, stdout); }

}  // namespace

int main(int count, char **arguments) {
  const std::string what = count > 1 ? arguments[1] : "";
  try {
    if (what == "noise" && count == 4) {
      const auto noise = hst_trt::torch_randn(std::strtoull(arguments[2], nullptr, 10), std::strtoull(arguments[3], nullptr, 10));
      put(noise.data(), noise.size());
    } else if (what == "table" && count == 7) {
      hst_trt::Scheduler scheduler;
      scheduler.shift = std::atof(arguments[6]);
      const auto table = scheduler.table(std::atoi(arguments[2]), {arguments[3], arguments[4], std::atof(arguments[5])});
      put(table.timesteps.data(), table.timesteps.size());
      put(table.sigmas.data(), table.sigmas.size());
      for (const auto &row : table.coefficients) put(row.data(), row.size());
    } else {
      return HST_REQUEST;
    }
  } catch (const hst_trt::Error &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return error.code();
  }
  return 0;
}
