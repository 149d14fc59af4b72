// Prints what the interface does not show, as raw bytes, for the tests to compare with Python's:
//   noise SEED COUNT                                 float32
//   graphs CAPACITY KEYS [REFUSED]                   text: what runs of these keys, a letter each, did; REFUSED cannot be recorded
//   table STEPS SOLVER SPACING SHIFT PAIRS_SHIFT     float32: timesteps, sigmas, coefficients
#include <cstdio>
#include <cstdlib>
#include <string>

#include "error.h"
#include "graphs.h"
#include "noise.h"
#include "schedule.h"

namespace {

void put(const float *values, size_t count) { std::fwrite(values, sizeof(float), count, stdout); }

// Prints a key in lower case where it runs plainly, in upper case where it is replayed, and at last what was counted.
void run_graphs(size_t capacity, const std::string &keys, const std::string &refused) {
  struct Replay : hst_trt::Recording {
    explicit Replay(char key) : key_(key) {}
    void launch() override { std::putchar(key_ - 'a' + 'A'); }
    char key_;
  };
  hst_trt::GraphCounters counters;
  bool recording = false;
  char current = 0;
  const auto capture = [&](const std::function<void()> &body) -> std::unique_ptr<hst_trt::Recording> {
    recording = true;
    body();
    recording = false;
    if (refused.find(current) != std::string::npos) throw hst_trt::CaptureError(std::string("not ") + current);
    return std::make_unique<Replay>(current);
  };
  hst_trt::GraphCache cache(capture, counters, capacity);
  for (const char key : keys) {
    current = key;
    if (key == '-') {
      cache.clear();
    } else {
      cache.run({key}, [&] {
        if (!recording) std::putchar(key);
      });
    }
  }
  std::printf(" %d %d %d %d %d %s\n", static_cast<int>(counters.plain), static_cast<int>(counters.recorded), static_cast<int>(counters.replayed),
              static_cast<int>(counters.evicted), static_cast<int>(counters.fallen_back), counters.why.c_str());
}

}  // namespace

int main(int count, char **arguments) {
  const std::string what = count > 1 ? arguments[1] : "";
  try {
    if (what == "noise" && count == 4) {
      const auto noise = hst_trt::torch_randn(std::strtoull(arguments[2], nullptr, 10), std::strtoull(arguments[3], nullptr, 10));
      put(noise.data(), noise.size());
    } else if (what == "graphs" && count >= 4) {
      run_graphs(std::strtoull(arguments[2], nullptr, 10), arguments[3], count > 4 ? arguments[4] : "");
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
