// Names of graphs: hst_trt/tensor_names.py.
#pragma once

namespace hst_trt {

inline constexpr const char *kTextEncoders[] = {"text_encoder", "text_encoder_2", "text_encoder_3"};
inline constexpr const char *kGlue[] = {"join_text", "advance", "pack",  "guide",  "blend",     "correct",
                                        "score",     "select",  "count", "change", "integrate", "finite"};

}  // namespace hst_trt
