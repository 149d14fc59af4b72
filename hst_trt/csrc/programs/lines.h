// What a program that answers lines waits for: lines of standard input, and the signals that end it. Linux only.
#pragma once

#include <atomic>
#include <cstddef>
#include <mutex>
#include <string>

// SIGTERM and SIGINT as a file that can be read from once one came. Nobody reads it, so every thread sees it. Make this first: only the
// thread that does, and those it starts later, are kept from the signals' usual effect. Throws std::system_error.
class Signals {
 public:
  Signals();
  bool came() const;
  int file() const { return file_; }

 private:
  int file_;
};

// Standard input by lines, for any thread, until it ends or a signal comes.
class Lines {
 public:
  static constexpr size_t kLongest = size_t{1} << 20;

  explicit Lines(const Signals &signals) : signals_(signals) {}

  // False at the end. Of a line that is too long, one byte more than the longest is kept.
  bool next(std::string &line, size_t &number);
  int error() const { return error_; }  // errno, if the input could not be read

 private:
  bool fill();

  const Signals &signals_;
  std::mutex guard_;
  char chunk_[1 << 16];
  size_t at_ = 0, held_ = 0, count_ = 0;
  std::atomic<int> error_{0};
};
