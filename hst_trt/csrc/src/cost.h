// What calls cost in units of a full large call: by a model, from FLOPs and the weights that a call reads, or as measured:
// hst_trt/cost.py, and call_costs of hst_trt/arguments.py.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "bundle.h"
#include "machine.h"
#include "workspace.h"

namespace hst_trt {

struct CallCosts {
  std::string source;                            // what they were taken from, in words
  std::function<double(int64_t tokens)> large;  // of a call on so many image tokens of each image
  double small;
  double glue;  // of a step that draws a mask or uses one
};

// What the calls of a request cost: as measured, if the bundle has that for this machine and for requests of this shape, else by the
// cost model.
CallCosts call_costs(const Bundle &bundle, const RequestShape &shape, const Machine &machine);

}  // namespace hst_trt
