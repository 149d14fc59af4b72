// The files and folders of the command line, one by one, to the entry point that a fuzzer would call: for compilers without libFuzzer.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

namespace fs = std::filesystem;

namespace {

int replay(const fs::path &file) {
  std::ifstream stream(file, std::ios::binary);
  if (!stream) return 0;
  const std::vector<char> content{std::istreambuf_iterator<char>(stream), {}};
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t *>(content.data()), content.size());
  return 1;
}

}  // namespace

int main(int count, char **arguments) {
  int replayed = 0;
  for (int i = 1; i < count; ++i) {
    if (!fs::is_directory(arguments[i])) {
      replayed += replay(arguments[i]);
      continue;
    }
    for (const auto &entry : fs::directory_iterator(arguments[i])) replayed += replay(entry.path());
  }
  std::printf("%d inputs\n", replayed);
  return replayed > 0 ? 0 : 2;
}
