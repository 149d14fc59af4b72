#include "codec.h"

#include "error.h"
#include "graph_names.h"

namespace hst_trt {
namespace {

// The length of a tensor's last axis, which its graph fixes.
int64_t last_axis(const std::map<std::string, TensorInfo> &tensors, const std::string &name) {
  const auto found = tensors.find(name);
  if (found == tensors.end() || found->second.shape.empty() || found->second.shape.back() < 1) {
    throw Error(HST_INTEGRITY, "a text encoder of the bundle has no tensor '" + name + "' of a fixed width", "", "run `hst-trt build --force` again");
  }
  return found->second.shape.back();
}

// Where each value of the tokens [images, h w, C p p] lies in the latents.
std::vector<size_t> latent_places(const PairSpec &spec, int64_t images, int64_t h, int64_t w) {
  const int64_t p = spec.patch_size, c = spec.latent_channels;
  std::vector<size_t> places;
  places.reserve(static_cast<size_t>(images * h * w * c * p * p));
  for (int64_t token = 0; token < images * h * w; ++token) {
    const int64_t image = token / (h * w), i = token / w % h, j = token % w;
    for (int64_t channel = 0; channel < c; ++channel) {
      for (int64_t y = 0; y < p; ++y) {
        for (int64_t x = 0; x < p; ++x) {
          places.push_back(static_cast<size_t>(((image * c + channel) * h * p + i * p + y) * w * p + j * p + x));
        }
      }
    }
  }
  return places;
}

}  // namespace

Encoder::Encoder(Backend &backend, const PairSpec &spec, size_t encoders, int64_t prompts, int64_t rows) : backend_(backend) {
  index_ = backend.empty({rows}, DType::kInt64);
  features_ = {backend.empty({rows, spec.text_length(), spec.large.text_width}, DType::kFloat32),
               backend.empty({rows, spec.large.pooled_width}, DType::kFloat32)};
  Bindings joined{{"prompt_index", index_}, {"encoder_hidden_states", features_.encoder_hidden_states},
                  {"pooled_projections", features_.pooled_projections}};
  for (size_t i = 0; i < encoders; ++i) {
    Engine &engine = backend.engine(kTextEncoders[i]);
    const std::string number = std::to_string(i + 1);
    const int64_t length = last_axis(engine.inputs(), "input_ids");
    const BufferPtr ids = backend.empty({prompts, length}, DType::kInt64);
    const BufferPtr hidden = backend.empty({prompts, length, last_axis(engine.outputs(), "hidden_states")}, DType::kFloat32);
    Bindings bindings{{"input_ids", ids}, {"hidden_states", hidden}};
    joined["hidden_" + number] = hidden;
    if (engine.outputs().count("text_embeds") > 0) {
      bindings["text_embeds"] = joined["embeds_" + number] = backend.empty({prompts, last_axis(engine.outputs(), "text_embeds")}, DType::kFloat32);
    }
    ids_.push_back(ids);
    calls_.push_back(engine.prepare(bindings));
  }
  calls_.push_back(backend.engine("join_text").prepare(joined));
}

TextFeatures Encoder::operator()(const std::vector<std::vector<int64_t>> &ids, const std::vector<int64_t> &index) {
  backend_.write(*index_, index.data());
  for (size_t i = 0; i < ids_.size(); ++i) {
    if (static_cast<int64_t>(ids[i].size()) != elements(ids_[i]->shape)) {
      throw Error(HST_INTEGRITY, "a text encoder of the bundle takes another number of tokens than its tokenizer gives", "",
                  "run `hst-trt build --force` again");
    }
    backend_.write(*ids_[i], ids[i].data());
  }
  for (const auto &call : calls_) call->execute();
  return features_;
}

Decoder::Decoder(Backend &backend, const PairSpec &spec, int64_t h, int64_t w) : backend_(backend) {
  latent_ = backend.empty({1, h, w, spec.large.token_channels}, DType::kFloat32);
  image_ = backend.empty({1, h * spec.token_side(), w * spec.token_side(), 3}, DType::kUint8);
  call_ = backend.engine("vae_decoder").prepare({{"latent_tokens", latent_}, {"image", image_}});
}

std::vector<uint8_t> Decoder::operator()(const std::vector<float> &tokens) {
  const auto size = static_cast<size_t>(elements(latent_->shape));
  std::vector<uint8_t> pixels(tokens.size() / size * image_->bytes());
  for (size_t i = 0; i * size < tokens.size(); ++i) {
    backend_.write(*latent_, tokens.data() + i * size);
    call_->execute();
    backend_.read(*image_, pixels.data() + i * image_->bytes());
  }
  return pixels;
}

std::vector<float> patchify(const float *latents, const PairSpec &spec, int64_t images, int64_t h, int64_t w) {
  const std::vector<size_t> places = latent_places(spec, images, h, w);
  std::vector<float> tokens(places.size());
  for (size_t i = 0; i < places.size(); ++i) tokens[i] = latents[places[i]];
  return tokens;
}

std::vector<float> unpatchify(const float *tokens, const PairSpec &spec, int64_t images, int64_t h, int64_t w) {
  const std::vector<size_t> places = latent_places(spec, images, h, w);
  std::vector<float> latents(places.size());
  for (size_t i = 0; i < places.size(); ++i) latents[places[i]] = tokens[i];
  return latents;
}

}  // namespace hst_trt
