// The one exception of the host: the tree of hst_trt/errors.py with its exit codes, flattened to a code.
#pragma once

#include <algorithm>
#include <exception>
#include <string>

#include "hst_trt.h"

namespace hst_trt {

class Error : public std::exception {
 public:
  // problem: one sentence without a full stop; found: what was there instead; fix: what to do next. The last two may be empty.
  Error(int code, std::string problem, const std::string &found = "", const std::string &fix = "")
      : code_(code), text_(std::move(problem)) {
    if (!found.empty()) text_ += "\nfound: " + found;
    if (!fix.empty()) text_ += "\nto do: " + fix;
    std::replace(text_.begin(), text_.end(), '\0', ' ');  // a file's text may hold it, and a message ends at it
  }
  int code() const noexcept { return code_; }
  const char *what() const noexcept override { return text_.c_str(); }

 private:
  int code_;
  std::string text_;
};

}  // namespace hst_trt
