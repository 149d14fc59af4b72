#include "graphs.h"

namespace hst_trt {

void GraphCache::run(const std::string &key, const std::function<void()> &body) {
  Recording *recording = find(key);
  if (!recording) recording = record(key, body);
  if (recording) {
    recording->launch();
    ++counters_.replayed;
  } else {
    body();
    warm_.insert(key);
    ++counters_.plain;
  }
}

void GraphCache::clear() {
  places_.clear();
  kept_.clear();
}

Recording *GraphCache::find(const std::string &key) {
  const auto place = places_.find(key);
  if (place == places_.end()) return nullptr;
  kept_.splice(kept_.end(), kept_, place->second);
  return place->second->recording.get();
}

// The new recording; null where the body has to run plainly.
Recording *GraphCache::record(const std::string &key, const std::function<void()> &body) {
  if (warm_.count(key) == 0 || refused_.count(key) > 0) return nullptr;
  try {
    kept_.push_back({key, capture_(body)});
  } catch (const CaptureError &error) {
    refused_.insert(key);
    if (counters_.fallen_back++ == 0) counters_.why = error.what();
    return nullptr;
  }
  places_[key] = std::prev(kept_.end());
  ++counters_.recorded;
  if (kept_.size() > capacity_) {
    places_.erase(kept_.front().key);
    kept_.pop_front();
    ++counters_.evicted;
  }
  return kept_.back().recording.get();
}

}  // namespace hst_trt
