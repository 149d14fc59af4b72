// The two ends of the loop: token ids to text features, and denoised tokens to pixels: hst_trt/codec.py.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "backend.h"
#include "spec.h"
#include "workspace.h"

namespace hst_trt {

// The text encoders bound for a number of different prompts and of transformer rows.
class Encoder {
 public:
  Encoder(Backend &backend, const PairSpec &spec, size_t encoders, int64_t prompts, int64_t rows);
  // ids: for each encoder [prompts, length]; index: the prompt of each row. The features are overwritten by the next call.
  TextFeatures operator()(const std::vector<std::vector<int64_t>> &ids, const std::vector<int64_t> &index);

 private:
  Backend &backend_;
  std::vector<BufferPtr> ids_;
  BufferPtr index_;
  TextFeatures features_;
  std::vector<std::unique_ptr<PreparedCall>> calls_;
};

// The VAE decoder bound for images of h x w tokens; one image at a time, to bound the memory.
class Decoder {
 public:
  Decoder(Backend &backend, const PairSpec &spec, int64_t h, int64_t w);
  // Pixels [images, H, W, 3] of tokens [images, h w, C].
  std::vector<uint8_t> operator()(const std::vector<float> &tokens);

 private:
  Backend &backend_;
  BufferPtr latent_, image_;
  std::unique_ptr<PreparedCall> call_;
};

// Latents [images, C, h p, w p] to tokens [images, h w, C p p], each token's values in (C, p, p) order.
std::vector<float> patchify(const float *latents, const PairSpec &spec, int64_t images, int64_t h, int64_t w);
// The inverse of `patchify`.
std::vector<float> unpatchify(const float *tokens, const PairSpec &spec, int64_t images, int64_t h, int64_t w);

}  // namespace hst_trt
