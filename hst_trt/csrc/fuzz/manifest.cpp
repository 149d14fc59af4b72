// Any bytes as a manifest.json, and as a scheduler.json: read, or refused with the exceptions that are promised, and nothing else.
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string_view>

#include "bundle.h"
#include "error.h"
#include "json.h"
#include "manifest.h"
#include "schedule.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  hst_trt::json::Value document;
  try {
    document = hst_trt::json::parse({reinterpret_cast<const char *>(data), size});
  } catch (const std::invalid_argument &) {
    return 0;
  }
  try {
    hst_trt::pair_spec(hst_trt::read_manifest(document));
  } catch (const std::invalid_argument &) {
  }
  try {
    const auto scheduler = hst_trt::Scheduler::from_config(document);
    for (const char *solver : {"euler", "ab2", "dpmpp-2m"}) {
      for (const char *spacing : {"linspace", "trailing"}) scheduler.table(3, {solver, spacing, 0});
    }
  } catch (const std::invalid_argument &) {
  } catch (const hst_trt::Error &) {
  }
  return 0;
}
