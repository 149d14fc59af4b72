// A line that asks for a picture: a JSON object with the arguments that it has in Python, and where to write it.
#pragma once

#include <string>

#include "hst_trt.hpp"
#include "json.h"

struct Order {
  hst_trt::json::Value fields;  // whose texts the request points to
  std::string output;
  hst::Request request;
};

// Throws hst::Error, HST_REQUEST.
Order order_of(const std::string &line);
