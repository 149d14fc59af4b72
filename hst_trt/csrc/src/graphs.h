// Recordings of what a body of calls enqueues, kept by key: hst_trt/runtime/graphs.py.
//
// A body runs plainly the first time, which prepares and warms up whatever it touches, is recorded the second time, and is replayed
// from then on. What cannot be recorded keeps running plainly: slower, with the same result.
#pragma once

#include <cstddef>
#include <exception>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "backend.h"

namespace hst_trt {

// A body could not be recorded; nothing of it was executed.
class CaptureError : public std::exception {
 public:
  explicit CaptureError(std::string why) : why_(std::move(why)) {}
  const char *what() const noexcept override { return why_.c_str(); }

 private:
  std::string why_;
};

// What was recorded. It is freed with the object.
class Recording {
 public:
  virtual ~Recording() = default;
  virtual void launch() = 0;  // enqueues it all
};

// What a backend's caches did: `plain` counts bodies that ran as they are, `fallen_back` keys that never will otherwise.
struct GraphCounters {
  int64_t plain = 0, recorded = 0, replayed = 0, evicted = 0, fallen_back = 0;
  std::string why;  // the first could not be recorded
};

using Capture = std::function<std::unique_ptr<Recording>(const std::function<void()> &body)>;

class GraphCache : public Recorder {
 public:
  static constexpr size_t kCapacity = 64;  // a plan needs 4 to 6, a threshold mask two more for each bucket

  // counters: shared by the caches of a backend. The recording used longest ago goes first.
  GraphCache(Capture capture, GraphCounters &counters, size_t capacity = kCapacity)
      : capture_(std::move(capture)), counters_(counters), capacity_(capacity) {}

  void run(const std::string &key, const std::function<void()> &body) override;
  // Drops all recordings, because an address in them is no longer valid. Bodies stay warm: they are recorded anew.
  void clear();

 private:
  struct Kept {
    std::string key;
    std::unique_ptr<Recording> recording;
  };

  Recording *find(const std::string &key);
  Recording *record(const std::string &key, const std::function<void()> &body);

  Capture capture_;
  GraphCounters &counters_;
  size_t capacity_;
  std::list<Kept> kept_;  // the one used last stands last
  std::map<std::string, std::list<Kept>::iterator> places_;
  std::set<std::string> warm_, refused_;
};

}  // namespace hst_trt
