#include "cost.h"

#include <algorithm>
#include <vector>

#include "plan.h"

namespace hst_trt {
namespace {

// FLOPs that ONNX Runtime would do in the time that reading one byte of weights adds to a call on a CPU.
constexpr double kFlopsPerWeightByte = 12;

// FLOPs that it would do in the time of the glue of a step with a mask.
constexpr double kGlueFlops = 1.6e8;

struct Layers {
  double rows, weights;  // rows of an image that a linear layer runs over
};

std::vector<Layers> linear_layers(const TransformerSpec &spec, double computed, double text) {
  const auto d = static_cast<double>(spec.heads * spec.head_dim), layers = static_cast<double>(spec.layers);
  const auto dual = static_cast<double>(spec.dual_layers), channels = static_cast<double>(spec.token_channels);
  const auto text_width = static_cast<double>(spec.text_width), pooled_width = static_cast<double>(spec.pooled_width);
  const double image = 12 * d * d * layers + 4 * d * d * dual + 2 * channels * d;       // q, k, v, out, feed-forward
  const double of_text = 12 * d * d * (layers - 1) + 2 * d * d + text_width * d;        // the last block takes keys and values only
  const double modulation = d * d * (6 * layers + 3 * dual + 6 * (layers - 1) + 2 + 2);  // norm_out has 2
  const double condition = 256 * d + d * d + pooled_width * d + d * d;
  return {{computed, image}, {text, of_text}, {1, modulation + condition}};
}

// FLOPs of one call at batch 1: `computed` of `tokens` image tokens, with `text` text tokens.
double call_flops(const TransformerSpec &spec, double computed, double tokens, double text) {
  const auto width = static_cast<double>(spec.heads * spec.head_dim), layers = static_cast<double>(spec.layers);
  double linear = 0;
  for (const Layers &layer : linear_layers(spec, computed, text)) linear += 2 * layer.rows * layer.weights;
  const double attention = 4 * width * (tokens + text) * ((layers - 1) * (computed + text) + computed);
  return linear + attention + 4 * width * computed * tokens * static_cast<double>(spec.dual_layers);
}

double call_weights(const TransformerSpec &spec) {
  double weights = 0;
  for (const Layers &layer : linear_layers(spec, 0, 0)) weights += layer.weights;
  return weights;
}

CallCosts modelled_costs(const Bundle &bundle, const RequestShape &shape) {
  const TargetEntry &target = bundle.manifest.target;
  const double per_weight = target.backend == "onnxruntime" ? kFlopsPerWeightByte * (target.precision == "float32" ? 4 : 2) : 0;
  const auto work = [shape, per_weight, text = static_cast<double>(bundle.spec.text_length())](const TransformerSpec &spec, int64_t tokens) {
    const double flops = call_flops(spec, static_cast<double>(tokens), static_cast<double>(shape.tokens()), text);
    return static_cast<double>(shape.rows()) * flops + per_weight * call_weights(spec);
  };
  const double full = work(bundle.spec.large, shape.tokens());
  return {per_weight > 0 ? "cost model (FLOPs and weights read)" : "cost model (FLOPs)",
          [work, full, large = bundle.spec.large](int64_t tokens) { return work(large, tokens) / full; },
          work(bundle.spec.small, shape.tokens()) / full, (target.backend == "onnxruntime" ? kGlueFlops : 0) / full};
}

}  // namespace

CallCosts call_costs(const Bundle &bundle, const RequestShape &shape, const Machine &machine) {
  const int64_t side = bundle.spec.token_side(), tokens = shape.tokens();
  const std::vector<int64_t> buckets = token_buckets(tokens, bundle.manifest.bucket_ratios);
  for (const CostsEntry &entry : bundle.manifest.costs) {
    const bool fits = entry.machine == machine.name && entry.threads == machine.threads && entry.images == shape.images &&
                      entry.guided == shape.guided && entry.height == side * shape.h && entry.width == side * shape.w;
    const auto measured = [&entry](int64_t bucket) { return entry.large_seconds.count(bucket) > 0; };
    if (!fits || !std::all_of(buckets.begin(), buckets.end(), measured)) continue;
    const double full = entry.large_seconds.at(tokens);
    return {"measured on " + entry.machine + ", " + entry.date,
            [seconds = entry.large_seconds, full](int64_t count) { return seconds.at(count) / full; }, entry.small_seconds / full,
            entry.step_seconds / full};
  }
  return modelled_costs(bundle, shape);
}

}  // namespace hst_trt
