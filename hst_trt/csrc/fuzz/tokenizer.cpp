// A tokenizer.json and a text, with a NUL between them: read or refused as promised; what is read gives as many ids as it was asked for.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "error.h"
#include "json.h"
#include "tokenizer.h"
#include "unicode.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const std::string_view all(reinterpret_cast<const char *>(data), size);
  const size_t end = all.find('\0');
  const std::string text(end == std::string_view::npos ? "a red apple" : all.substr(end + 1));
  try {
    const hst_trt::Tokenizer tokenizer(hst_trt::json::parse(all.substr(0, end)), 16, 1);
    if (hst_trt::unicode::is_valid(text) && tokenizer(text).ids.size() != 16) std::abort();
  } catch (const std::invalid_argument &) {
  } catch (const hst_trt::Error &) {
  }
  return 0;
}
