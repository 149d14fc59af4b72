#include "schedule.h"

#include <cmath>
#include <stdexcept>

#include "error.h"
#include "spec.h"

namespace hst_trt {
namespace {

constexpr double kMaxShift = 100;
using Rows = std::vector<std::array<double, 5>>;  // (a, b, c, d, e): x' = a x + b v + c h, h' = d x + e v

template <typename T>
T shifted(T time, double shift) {
  return static_cast<T>(shift) * time / (1 + static_cast<T>(shift - 1) * time);
}

double unshifted(double sigma, double shift) { return sigma / (shift - (shift - 1) * sigma); }

Rows euler(const std::vector<double> &sigmas) {
  Rows rows;
  for (size_t t = 0; t + 1 < sigmas.size(); ++t) rows.push_back({1, sigmas[t + 1] - sigmas[t], 0, 0, 0});
  return rows;
}

// Nodes and weights of Gauss and Legendre on [-1, 1], for 8 of them.
constexpr double kNodes[] = {0.1834346424956498, 0.525532409916329, 0.7966664774136267, 0.9602898564975363};
constexpr double kWeights[] = {0.3626837833783622, 0.3137066458778869, 0.22238103445337445, 0.10122853629037626};

Rows adams_bashforth(const std::vector<double> &sigmas, double shift) {
  Rows rows = euler(sigmas);
  for (size_t t = 0; t < rows.size(); ++t) {
    if (t > 0) {
      const double now = unshifted(sigmas[t], shift), last = unshifted(sigmas[t - 1], shift);
      const double half = (sigmas[t + 1] - sigmas[t]) / 2;
      double sum = 0;
      for (int k = 0; k < 4; ++k) {
        for (const double node : {-kNodes[k], kNodes[k]}) sum += kWeights[k] * (unshifted(sigmas[t] + half * (1 + node), shift) - now);
      }
      const double extra = half * sum / (now - last);
      rows[t][1] = 2 * half + extra;
      rows[t][2] = -extra;
    }
    rows[t][4] = 1;
  }
  return rows;
}

Rows dpm_solver(const std::vector<double> &sigmas) {
  Rows rows = euler(sigmas);
  const auto lambda = [&sigmas](size_t t) { return std::log((1 - sigmas[t]) / sigmas[t]); };
  for (size_t t = 0; t < rows.size(); ++t) {
    if (t >= 2 && t + 1 < rows.size()) {
      const double last = lambda(t - 1), now = lambda(t), then = lambda(t + 1);
      const double extra = (then - now) / (2 * (now - last));
      const double gain = (1 - sigmas[t + 1]) * -std::expm1(now - then);
      rows[t][0] = sigmas[t + 1] / sigmas[t] + gain * (1 + extra);
      rows[t][1] = -sigmas[t] * gain * (1 + extra);
      rows[t][2] = -gain * extra;
    }
    rows[t][3] = 1;
    rows[t][4] = -sigmas[t];
  }
  return rows;
}

}  // namespace

void Sampling::check() const {
  if (solver != "euler" && solver != "ab2" && solver != "dpmpp-2m") {
    throw Error(HST_REQUEST, "unknown solver '" + solver + "'", "", "choose one of euler, ab2, dpmpp-2m");
  }
  if (timestep_spacing != "linspace" && timestep_spacing != "trailing") {
    throw Error(HST_REQUEST, "unknown timestep spacing '" + timestep_spacing + "'", "", "choose one of linspace, trailing");
  }
  if (!(shift >= 0 && shift <= kMaxShift)) {
    throw Error(HST_REQUEST, "shift " + std::to_string(shift) + " is outside (0, 100]", "", "3 is SD3's; 2 to 6 are usual");
  }
}

Scheduler Scheduler::from_config(const json::Value &config) {
  if (!config.object()) throw std::invalid_argument("the scheduler's config is not an object");
  const std::string *name = config["_class_name"].text();
  std::string refused;
  for (const char *key : {"use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling",
                          "invert_sigmas", "shift_terminal"}) {
    if (config[key].truthy()) refused += (refused.empty() ? " with " : ", ") + std::string(key);
  }
  if (!name || *name != "FlowMatchEulerDiscreteScheduler" || !refused.empty()) {
    throw Error(HST_INCOMPATIBLE, "the scheduler is not one HybridStitch can run on: it needs deterministic Euler steps of a rectified flow",
                (name ? *name : "no class") + refused,
                "use FlowMatchEulerDiscreteScheduler with plain `shift`; SDE and ancestral samplers would make the cached keys and values invalid");
  }
  Scheduler scheduler;
  const json::Value &shift = config["shift"], &steps = config["num_train_timesteps"];
  const auto has = [&config](const char *key) { return config.object()->count(key) > 0; };
  if (has("shift") && (!shift.number(scheduler.shift) || !(scheduler.shift > 0 && scheduler.shift <= kMaxShift))) {
    throw std::invalid_argument("shift is not a number above 0 and up to 100");
  }
  if (has("num_train_timesteps")) {
    if (!steps.whole() || *steps.whole() < 1 || *steps.whole() > kMaxCount) {
      throw std::invalid_argument("num_train_timesteps is not a whole number from 1 to " + std::to_string(kMaxCount));
    }
    scheduler.num_train_timesteps = *steps.whole();
  }
  return scheduler;
}

StepTable Scheduler::table(int64_t steps, const Sampling &sampling) const {
  const int64_t most = std::min(num_train_timesteps, kMaxSteps);
  if (steps < 1 || steps > most) {
    throw Error(HST_REQUEST, "num_inference_steps " + std::to_string(steps) + " is outside 1 .. " + std::to_string(most), "",
                "20 to 50 steps are usual");
  }
  const double own = sampling.shift > 0 ? sampling.shift : shift, count = static_cast<double>(steps);
  const auto training = static_cast<double>(num_train_timesteps);
  std::vector<double> ramp;
  if (sampling.timestep_spacing == "trailing") {
    for (int64_t t = 0; t < steps; ++t) ramp.push_back(static_cast<double>(t) * (-1 / count) + 1);
  } else {  // the ends are shifted once, and the even steps between them once more
    const auto end = [&](float timestep) { return static_cast<double>(shifted(timestep / static_cast<float>(training), own)) * training; };
    const double start = end(static_cast<float>(training)), stop = end(1);
    const double stride = steps > 1 ? (stop - start) / (count - 1) : 0;
    for (int64_t t = 0; t < steps; ++t) ramp.push_back((t > 0 && t + 1 == steps ? stop : static_cast<double>(t) * stride + start) / training);
  }
  StepTable table;
  std::vector<double> sigmas;
  for (const double time : ramp) {
    const auto sigma = static_cast<float>(shifted(time, own));
    table.sigmas.push_back(sigma);
    table.timesteps.push_back(sigma * static_cast<float>(training));
    sigmas.push_back(static_cast<double>(sigma));
  }
  table.sigmas.push_back(0);
  sigmas.push_back(0);
  const Rows rows = sampling.solver == "ab2" ? adams_bashforth(sigmas, own) : sampling.solver == "dpmpp-2m" ? dpm_solver(sigmas) : euler(sigmas);
  for (const auto &row : rows) {
    std::array<float, 5> rounded{};
    for (size_t k = 0; k < 5; ++k) rounded[k] = static_cast<float>(row[k]);
    table.coefficients.push_back(rounded);
  }
  return table;
}

}  // namespace hst_trt
