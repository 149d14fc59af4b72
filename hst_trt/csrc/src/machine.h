// What computes, by the name that measured costs go by: hst_trt/machine.py.
#pragma once

#include <cstdint>
#include <string>

namespace hst_trt {

// Costs that were measured on an equal one are taken to hold.
struct Machine {
  std::string name;     // the CPU's, or the GPU's
  int64_t threads = 0;  // of a call on a CPU, 0 for one per physical core; 0 for a GPU
};

// The CPU: its own name, or if it tells none that of its architecture, and how many there are.
Machine cpu(int64_t threads);

}  // namespace hst_trt
