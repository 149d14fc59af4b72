// Numbers on a command line.
#pragma once

#include <stdexcept>
#include <string>

// Both throw std::logic_error if the text is anything else.
inline int whole(const std::string &text) {
  size_t used = 0;
  const int value = std::stoi(text, &used);
  if (used != text.size()) throw std::invalid_argument(text);
  return value;
}

inline double number(const std::string &text) {
  size_t used = 0;
  const double value = std::stod(text, &used);
  if (used != text.size()) throw std::invalid_argument(text);
  return value;
}
