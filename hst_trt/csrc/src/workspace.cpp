#include "workspace.h"

#include <algorithm>
#include <numeric>

namespace hst_trt {

Workspace::Workspace(Backend &backend, const PairSpec &spec, const RequestShape &asked)
    : shape(asked), backend_(backend), spec_(spec), recorder_(backend.recorder()) {
  const int64_t b = shape.images, n = shape.tokens(), c = spec.large.token_channels, r = shape.rows();
  for (const char *name : {"latents", "next_latents", "history", "next_history", "velocity", "last_velocity", "sketch", "last_sketch",
                           "refined", "difference", "next_difference"}) {
    make(name, {b, n, c}, DType::kFloat32);
  }
  for (const char *name : {"held", "next_held"}) make(name, {b, n}, DType::kFloat32);
  for (const char *name : {"all_tokens", "hidden_tokens", "row_velocity"}) make(name, {r, n, c}, DType::kFloat32);
  for (const char *name : {"pos_ids", "large_pos_ids", "small_pos_ids"}) make(name, {r, n}, DType::kInt64);
  for (const char *name : {"identity", "order", "next_order", "partner", "active", "ranks"}) make(name, {b, n}, DType::kInt64);
  for (const char *name : {"scores", "next_scores", "age", "next_age", "priority"}) make(name, {b, shape.h, shape.w}, DType::kFloat32);
  for (const char *name : {"guidance_scale", "correction", "score_decay", "drift", "starvation", "threshold", "change"}) {
    make(name, {1}, DType::kFloat32);
  }
  make("timesteps", {kMaxSteps}, DType::kFloat32);
  make("coefficients", {kMaxSteps, 5}, DType::kFloat32);
  make("weights", {5}, DType::kFloat32);
  make("step", {1}, DType::kInt64);
  make("next_step", {1}, DType::kInt64);
  make("timestep", {r}, DType::kFloat32);
  make("encoder_hidden_states", {r, spec.text_length(), spec.large.text_width}, DType::kFloat32);
  make("pooled_projections", {r, spec.large.pooled_width}, DType::kFloat32);
  make("row_index", {r}, DType::kInt64);
  make("slots", {n}, DType::kInt64);
  make("large_pos_table", {n}, DType::kInt64);
  make("counts", {b}, DType::kInt64);
  make("finite", {1}, DType::kInt32);

  std::vector<int64_t> numbers(static_cast<size_t>(n));
  std::iota(numbers.begin(), numbers.end(), 0);
  write("slots", numbers.data());
  copy("slots", "identity");
  std::vector<int64_t> images;
  for (int64_t row = 0; row < r; ++row) images.push_back(row % b);
  write("row_index", images.data());
  write("large_pos_table", spec.small.position_ids(shape.h, shape.w).data());
  copy("large_pos_table", "small_pos_ids");
  write("large_pos_table", spec.large.position_ids(shape.h, shape.w).data());
  copy("large_pos_table", "large_pos_ids");
}

void Workspace::begin(const std::vector<float> &latents, const TextFeatures &text, const StepTable &table, double guidance_scale,
                      const MaskRule &mask, double correction) {
  gathered_.clear();  // verbs that were not run because something went wrong
  seconds_.clear();
  set_latents(latents);
  std::vector<float> timesteps = table.timesteps;
  timesteps.resize(kMaxSteps);
  write("timesteps", timesteps.data());
  auto coefficients = table.coefficients;
  coefficients.resize(kMaxSteps);
  write("coefficients", coefficients.data());
  backend_.copy(*text.encoder_hidden_states, buffer("encoder_hidden_states"));
  backend_.copy(*text.pooled_projections, buffer("pooled_projections"));
  for (const char *name : {"step", "history", "held", "difference", "scores", "age", "last_velocity", "last_sketch"}) backend_.zero(buffer(name));
  write_number("guidance_scale", guidance_scale);
  write_number("correction", correction);
  write_number("score_decay", mask.decay);
  write_number("drift", mask.drift);
  write_number("starvation", mask.starvation);
  write_number("threshold", mask.threshold);
}

MarkPtr Workspace::mark() {
  flush();
  return backend_.mark();
}

void Workspace::advance() {
  verb("advance", [this] {
    call("advance", {{"timesteps", "timesteps"}, {"coefficients", "coefficients"}, {"step", "step"}, {"row_index", "row_index"},
                     {"timestep", "timestep"}, {"weights", "weights"}, {"next_step", "next_step"}});
    copy("next_step", "step");
  });
}

void Workspace::small() {
  verb("small", [this] { velocity("small", shape.tokens(), "sketch"); });
}

void Workspace::small_alone() {
  verb("small_alone", [this] { velocity("small", shape.tokens(), "velocity"); });
}

void Workspace::large() {
  verb("large", [this] {
    copy("identity", "order");
    velocity("large", shape.tokens(), "velocity");
  });
}

void Workspace::large_masked(int64_t tokens) {
  verb("large_masked " + std::to_string(tokens), [this, tokens] { velocity("large", tokens, "refined"); });
}

void Workspace::blend(int64_t tokens) {
  verb("blend " + std::to_string(tokens), [this, tokens] {
    call("blend", {{"sketch", "sketch"}, {"refined", {"refined", {shape.images, tokens, spec_.large.token_channels}}},
                   {"active", {"active", {shape.images, tokens}}}, {"difference", "difference"}, {"decay", "correction"},
                   {"velocity", "velocity"}, {"next_difference", "next_difference"}});
    copy("next_difference", "difference");
  });
}

void Workspace::compare_all() {
  verb("compare_all", [this] {
    copy("velocity", "refined");
    copy("identity", "active");
    blend(shape.tokens());
  });
}

void Workspace::correct() {
  verb("correct", [this] {
    call("correct", {{"sketch", "sketch"}, {"difference", "difference"}, {"decay", "correction"}, {"velocity", "velocity"},
                     {"next_difference", "next_difference"}});
    copy("next_difference", "difference");
  });
}

void Workspace::keep_last() {
  verb("keep_last", [this] { copy("last_velocity", "sketch"); });
}

void Workspace::score(int64_t tokens) {
  verb("score " + std::to_string(tokens), [this, tokens] {
    call("score", {{"difference", "difference"}, {"active", {"active", {shape.images, tokens}}}, {"sketch", "sketch"},
                   {"last_sketch", "last_sketch"}, {"scores", "scores"}, {"age", "age"}, {"decay", "score_decay"}, {"drift", "drift"},
                   {"starvation", "starvation"}, {"next_scores", "next_scores"}, {"next_age", "next_age"}, {"priority", "priority"},
                   {"ranks", "ranks"}});
    copy("next_scores", "scores");
    copy("next_age", "age");
  });
}

int64_t Workspace::count() {
  verb("count", [this] {
    call("count", {{"priority", "priority"}, {"ranks", "ranks"}, {"threshold", "threshold"}, {"counts", "counts"}});
  });
  const auto counts = read<int64_t>("counts");
  return *std::max_element(counts.begin(), counts.end());
}

void Workspace::select(int64_t tokens) {
  verb("select " + std::to_string(tokens), [this, tokens] {
    call("select", {{"ranks", "ranks"}, {"order", "order"}, {"slots", {"slots", {tokens}}}, {"next_order", "next_order"},
                    {"partner", "partner"}, {"active", {"active", {shape.images, tokens}}}});
    copy("next_order", "order");
    std::vector<BufferPtr> caches;
    std::vector<int64_t> text_rows;
    for (size_t i = 0; i < caches_.size(); ++i) {
      caches.push_back(buffers_.at(caches_[i]));
      text_rows.push_back(static_cast<int64_t>(i) < 2 * spec_.large.layers ? spec_.text_length() : 0);
    }
    backend_.move_rows(caches, buffer("partner"), tokens, text_rows);
  });
}

float Workspace::change() {
  verb("change", [this] {
    call("change", {{"velocity", "velocity"}, {"last_velocity", "last_velocity"}, {"change", "change"}});
  });
  return read<float>("change")[0];
}

void Workspace::integrate() {
  verb("integrate", [this] {
    call("integrate", {{"latents", "latents"}, {"velocity", "velocity"}, {"last_velocity", "last_velocity"}, {"history", "history"},
                       {"held", "held"}, {"weights", "weights"}, {"next_latents", "next_latents"}, {"next_history", "next_history"},
                       {"next_held", "next_held"}});
    copy("next_latents", "latents");
    copy("next_history", "history");
    copy("next_held", "held");
  });
}

void Workspace::remember() {
  verb("remember", [this] {
    copy("velocity", "last_velocity");
    copy("sketch", "last_sketch");
  });
}

std::vector<float> Workspace::latents() { return read<float>("latents"); }

void Workspace::set_latents(const std::vector<float> &tokens) { write("latents", tokens.data()); }

bool Workspace::is_finite() {
  verb("finite", [this] { call("finite", {{"latents", "latents"}, {"finite", "finite"}}); });
  return read<int32_t>("finite")[0] != 0;
}

std::vector<uint8_t> Workspace::active_mask(int64_t tokens) {
  const int64_t n = shape.tokens();
  const auto active = read<int64_t>("active");
  std::vector<uint8_t> mask(active.size());
  for (int64_t i = 0; i < shape.images * tokens; ++i) {  // the active tokens of all images stand together at the front
    mask[static_cast<size_t>(i / tokens * n + active[static_cast<size_t>(i)])] = 1;
  }
  return mask;
}

void Workspace::impose(const std::vector<uint8_t> &mask) {
  const auto n = static_cast<size_t>(shape.tokens());
  std::vector<int64_t> ranks(mask.size());
  for (size_t image = 0; image < mask.size(); image += n) {
    int64_t rank = 0;
    for (const bool inside : {true, false}) {
      for (size_t token = image; token < image + n; ++token) {
        if ((mask[token] != 0) == inside) ranks[token] = rank++;
      }
    }
  }
  write("ranks", ranks.data());
}

void Workspace::verb(const std::string &name, std::function<void()> body) {
  if (!recorder_ || running_) {
    body();
  } else {
    gathered_.emplace_back(name, std::move(body));
  }
}

void Workspace::flush() {
  if (gathered_.empty()) return;
  const auto segment = std::move(gathered_);
  gathered_.clear();
  std::string key;
  for (const auto &item : segment) key += item.first + "; ";
  recorder_->run(key, [this, &segment] {
    const struct Running {
      explicit Running(bool &flag) : flag_(flag) { flag_ = true; }
      ~Running() { flag_ = false; }
      bool &flag_;
    } running(running_);
    for (const auto &item : segment) item.second();
  });
}

template <typename T>
std::vector<T> Workspace::read(const std::string &name) {
  flush();
  const Buffer &source = buffer(name);
  std::vector<T> values(static_cast<size_t>(elements(source.shape)));
  backend_.read(source, values.data());
  return values;
}

void Workspace::write(const std::string &name, const void *values) {
  flush();
  backend_.write(buffer(name), values);
}

void Workspace::write_number(const char *name, double value) {
  const auto number = static_cast<float>(value);
  write(name, &number);
}

// Executes a graph on buffers, preparing the call on first use.
void Workspace::call(const std::string &graph, const Slots &slots) {
  std::string key = graph;
  for (const auto &slot : slots) {
    key += ' ' + slot.second.name;
    for (const int64_t length : slot.second.shape) key += ',' + std::to_string(length);
  }
  auto &call = prepared_[key];
  if (!call) {
    Bindings bindings;
    for (const auto &slot : slots) {
      const BufferPtr &whole = buffers_.at(slot.second.name);
      bindings[slot.first] = slot.second.shape.empty() ? whole : backend_.view(whole, slot.second.shape);
    }
    call = backend_.engine(graph).prepare(bindings);
  }
  if (recorder_) return call->execute();
  const MarkPtr start = backend_.mark();
  call->execute();
  seconds_[graph] += backend_.elapsed(*start, *backend_.mark());
}

// One guided transformer call on all tokens or on the active ones. A full call takes the latents themselves, once for each half of
// a guided batch, and its positions never change.
void Workspace::velocity(const std::string &model, int64_t tokens, const char *result) {
  const int64_t images = shape.images, rows = shape.rows(), channels = spec_.large.token_channels;
  Binding hidden("all_tokens"), positions(model + "_pos_ids");
  if (tokens == shape.tokens()) {
    copy("latents", "all_tokens");
  } else {
    hidden = Binding("hidden_tokens", {rows, tokens, channels});
    positions = Binding("pos_ids", {rows, tokens});
    call("pack", {{"latents", "latents"}, {"token_ids", {"active", {images, tokens}}}, {"row_index", "row_index"},
                  {"pos_table", "large_pos_table"}, {"hidden_tokens", hidden}, {"pos_ids", positions}});
  }
  const Binding target(result, {images, tokens, channels});
  const Binding made = shape.guided ? Binding("row_velocity", {rows, tokens, channels}) : target;
  Slots slots{{"hidden_tokens", hidden}, {"pos_ids", positions}, {"timestep", "timestep"}, {"encoder_hidden_states", "encoder_hidden_states"},
              {"pooled_projections", "pooled_projections"}, {"velocity", made}};
  if (model == "large") {
    make_caches();
    for (const std::string &cache : caches_) {
      slots.push_back({cache, cache});
      slots.push_back({"present" + cache.substr(4), cache});
    }
  }
  if (backend_.engine(model).inputs().count("token_slots") > 0) slots.push_back({"token_slots", "slots"});
  call(model, slots);
  if (shape.guided) call("guide", {{"row_velocity", made}, {"guidance_scale", "guidance_scale"}, {"velocity", target}});
}

// The large model's cache, made on first use: requests without that model need none.
void Workspace::make_caches() {
  if (!caches_.empty()) return;
  const TransformerSpec &large = spec_.large;
  std::map<std::string, BufferPtr> made;
  std::vector<std::string> names;
  for (int64_t i = 0; i < large.layers + large.dual_layers; ++i) {
    for (const char *kind : {"past_k_", "past_v_"}) {
      const std::string name = kind + std::to_string(i);
      const auto &inputs = backend_.engine("large").inputs();
      const auto info = inputs.find(name);
      const bool fixed = info != inputs.end() && info->second.shape.size() == 4 && info->second.shape[2] > 0;
      const int64_t length = fixed ? info->second.shape[2] : shape.tokens() + (i < large.layers ? spec_.text_length() : 0);
      made[name] = backend_.empty({shape.rows(), large.heads, length, large.head_dim}, info != inputs.end() ? info->second.dtype : DType::kFloat32);
      names.push_back(name);
    }
  }
  buffers_.insert(made.begin(), made.end());
  caches_ = names;
}

}  // namespace hst_trt
