// Prints what the interface does not show, as raw bytes, for the tests to compare with Python's:
//   noise SEED COUNT                                 float32
//   graphs CAPACITY KEYS [REFUSED]                   text: what runs of these keys, a letter each, did; REFUSED cannot be recorded
//   table STEPS SOLVER SPACING SHIFT PAIRS_SHIFT     float32: timesteps, sigmas, coefficients
//   tokenize FILE LENGTH PAD_ID                      int64: for each text how many ids it needs, and its ids; standard input has the
//                                                    texts, each after its bytes in a uint64
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <iterator>
#include <fstream>
#include <stdexcept>
#include <string>

#include "error.h"
#include "graphs.h"
#include "noise.h"
#include "schedule.h"
#include "tokenizer.h"
#include "unicode.h"

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

void tokenize(const char *path, int64_t length, int64_t pad_id) {
  std::ifstream file(path, std::ios::binary);
  const std::string json((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const hst_trt::Tokenizer tokenizer(hst_trt::json::parse(json), length, pad_id);
  uint64_t size = 0;
  while (std::cin.read(reinterpret_cast<char *>(&size), sizeof(size))) {
    std::string text(size, '\0');
    std::cin.read(text.data(), static_cast<std::streamsize>(size));
    if (!hst_trt::unicode::is_valid(text)) throw std::invalid_argument("a text that is not UTF-8");
    const auto encoding = tokenizer(text);
    const auto needed = static_cast<int64_t>(encoding.needed);
    std::fwrite(&needed, sizeof(needed), 1, stdout);
    std::fwrite(encoding.ids.data(), sizeof(int64_t), encoding.ids.size(), stdout);
  }
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
    } else if (what == "tokenize" && count == 5) {
      tokenize(arguments[2], std::atoll(arguments[3]), std::atoll(arguments[4]));
    } else {
      return HST_REQUEST;
    }
  } catch (const hst_trt::Error &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return error.code();
  } catch (const std::invalid_argument &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return HST_INTEGRITY;
  }
  return 0;
}
