// All buffers and prepared calls of one request shape, and the verbs that the denoising loop is written in: hst_trt/workspace.py, and
// of hst_trt/buffers.py the segments: where a backend can replay what it enqueued, verbs are gathered until the host wants to read,
// write or measure, and then run as one segment, which is replayed when the same verbs come again.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend.h"
#include "plan.h"
#include "schedule.h"
#include "spec.h"

namespace hst_trt {

// What decides the size of every buffer.
struct RequestShape {
  int64_t images;
  bool guided;
  int64_t h, w;  // token rows and columns

  int64_t rows() const { return images * (guided ? 2 : 1); }  // of the transformers; negatives first
  int64_t tokens() const { return h * w; }
  bool operator==(const RequestShape &o) const { return images == o.images && guided == o.guided && h == o.h && w == o.w; }
};

struct TextFeatures {
  BufferPtr encoder_hidden_states, pooled_projections;
};

// Owns the loop's state, in token order but for the large model's cache. Not for use by two threads at once.
class Workspace {
 public:
  Workspace(Backend &backend, const PairSpec &spec, const RequestShape &shape);

  const RequestShape shape;

  // Writes a request into the buffers. latents: start noise as tokens [images, N, C].
  void begin(const std::vector<float> &latents, const TextFeatures &text, const StepTable &table, double guidance_scale, const MaskRule &mask,
             double correction);

  MarkPtr mark();  // the moment when every verb so far is done; ends the segment, does not wait
  double elapsed(const Mark &start, const Mark &end) { return backend_.elapsed(start, end); }
  bool records() const { return recorder_ != nullptr; }  // where not, a verb is done when it returns

  void advance();                     // timestep and weights become those of the next step
  void small();                       // sketch = v_S(x)
  void small_alone();                 // velocity = v_S(x), where nothing is compared with it
  void large();                       // velocity = v_L(x), all tokens; the whole cache is rewritten
  void large_masked(int64_t tokens);  // refined = v_L(x) of the active tokens; their rows of the cache are rewritten
  void blend(int64_t tokens);         // velocity = sketch + D outside the mask, refined inside it
  void compare_all();                 // D = velocity - sketch on all tokens
  void correct();                     // velocity = sketch + D
  void keep_last();                   // sketch = the last step's velocity
  void score(int64_t tokens);         // scores, priority and ranks, `tokens` of them fresh
  int64_t count();                    // the most tokens of any image whose priority exceeds the threshold
  void select(int64_t tokens);        // the best-ranked tokens become active; cache rows of those that leave are kept
  float change();                     // how much the velocity moved since the last step
  void integrate();                   // the solver's step
  void remember();                    // velocity and sketch become the last ones

  std::vector<float> latents();  // as tokens [images, N, C]; this, what is set, the two below, `count` and `change` wait for the device
  void set_latents(const std::vector<float> &tokens);
  bool is_finite();
  std::vector<uint8_t> active_mask(int64_t tokens);  // [images, h, w], 1 inside
  // Makes the next `select` choose the tokens of `mask` [images, h w], 1 inside, whatever their scores.
  void impose(const std::vector<uint8_t> &mask);

  // Time inside each engine since `begin`, by name; empty where segments are replayed.
  const std::map<std::string, double> &seconds() const { return seconds_; }

 private:
  struct Binding {  // a buffer, or the first elements of one under another shape
    Binding(const char *whole) : name(whole) {}
    Binding(std::string whole) : name(std::move(whole)) {}
    Binding(std::string whole, Shape view) : name(std::move(whole)), shape(std::move(view)) {}
    std::string name;
    Shape shape;
  };
  using Slots = std::vector<std::pair<std::string, Binding>>;

  // A verb's body may only enqueue work on the buffers, the same for equal names.
  void verb(const std::string &name, std::function<void()> body);
  void flush();  // runs what was gathered
  template <typename T>
  std::vector<T> read(const std::string &name);
  void write(const std::string &name, const void *values);
  void make(const std::string &name, const Shape &dims, DType dtype) { buffers_[name] = backend_.empty(dims, dtype); }
  Buffer &buffer(const std::string &name) { return *buffers_.at(name); }
  void write_number(const char *name, double value);
  void copy(const char *source, const char *target) { backend_.copy(buffer(source), buffer(target)); }
  void call(const std::string &graph, const Slots &slots);
  void velocity(const std::string &model, int64_t tokens, const char *result);
  void make_caches();

  Backend &backend_;
  const PairSpec spec_;
  std::map<std::string, BufferPtr> buffers_;
  std::map<std::string, std::unique_ptr<PreparedCall>> prepared_;
  std::shared_ptr<Recorder> recorder_;  // null: verbs run at once
  std::vector<std::pair<std::string, std::function<void()>>> gathered_;
  bool running_ = false;  // a verb that is used by a verb is part of it
  std::vector<std::string> caches_;
  std::map<std::string, double> seconds_;
};

}  // namespace hst_trt
