// What a pair of models is, as far as running it needs to know: hst_trt/spec.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace hst_trt {

// Upper ends of what shapes are made from: with them no number of elements or bytes passes 63 bits.
inline constexpr int64_t kMaxCount = 65536;  // layers, heads, widths, lengths
inline constexpr int64_t kMaxSide = 16384;   // pixels
inline constexpr int64_t kMaxImages = 1024;

struct TransformerSpec {
  int64_t layers, heads, head_dim, dual_layers, text_width, pooled_width, token_channels, table_side;

  // Rows of the position table for a centred crop of h x w tokens.
  std::vector<int64_t> position_ids(int64_t h, int64_t w) const {
    const int64_t top = (table_side - h) / 2, left = (table_side - w) / 2;
    std::vector<int64_t> ids;
    for (int64_t i = 0; i < h; ++i) {
      for (int64_t j = 0; j < w; ++j) ids.push_back((i + top) * table_side + j + left);
    }
    return ids;
  }
};

struct PairSpec {
  TransformerSpec large, small;
  int64_t latent_channels, patch_size, vae_scale, clip_length, t5_length;

  int64_t text_length() const { return clip_length + t5_length; }
  int64_t token_side() const { return vae_scale * patch_size; }  // pixels
  int64_t max_side() const { return std::min(large.table_side, small.table_side) * token_side(); }
};

}  // namespace hst_trt
