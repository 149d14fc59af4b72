#include "machine.h"

#include <sys/utsname.h>
#include <unistd.h>

#include <fstream>

namespace hst_trt {
namespace {

std::string cpu_model() {
  constexpr const char *kSpaces = " \t";
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    const size_t colon = line.find(':');
    if (line.rfind("model name", 0) != 0 || colon == std::string::npos) continue;
    const size_t first = line.find_first_not_of(kSpaces, colon + 1);
    return first == std::string::npos ? "" : line.substr(first, line.find_last_not_of(kSpaces) + 1 - first);
  }
  utsname here{};
  uname(&here);
  return here.machine;
}

}  // namespace

Machine cpu(int64_t threads) { return {cpu_model() + ", " + std::to_string(sysconf(_SC_NPROCESSORS_ONLN)) + " CPUs", threads}; }

}  // namespace hst_trt
