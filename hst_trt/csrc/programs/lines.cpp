#include "lines.h"

#include <poll.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <system_error>

Signals::Signals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  file_ = signalfd(-1, &set, SFD_CLOEXEC);
  if (file_ < 0) throw std::system_error(errno, std::generic_category(), "signals cannot be waited for");
}

bool Signals::came() const {
  pollfd waiting{file_, POLLIN, 0};
  return poll(&waiting, 1, 0) > 0;
}

bool Lines::next(std::string &line, size_t &number) {
  const std::lock_guard<std::mutex> lock(guard_);
  line.clear();
  for (bool any = false;; any = true) {
    if (at_ == held_ && !fill()) {
      number = ++count_;
      return any && !signals_.came();  // the last line may lack its end
    }
    const char byte = chunk_[at_++];
    if (byte == '\n') {
      number = ++count_;
      return !signals_.came();
    }
    if (line.size() <= kLongest) line.push_back(byte);
  }
}

bool Lines::fill() {
  at_ = held_ = 0;
  pollfd waiting[] = {{STDIN_FILENO, POLLIN, 0}, {signals_.file(), POLLIN, 0}};
  while (poll(waiting, 2, -1) < 0 && errno == EINTR) {
  }
  if (waiting[1].revents != 0) return false;
  const ssize_t got = read(STDIN_FILENO, chunk_, sizeof chunk_);
  if (got < 0) error_ = errno;
  held_ = got > 0 ? static_cast<size_t>(got) : 0;
  return held_ > 0;
}
