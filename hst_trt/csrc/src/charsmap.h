// sentencepiece's compiled normalisation rules: texts of a few characters and what stands in their place.
//
// The bytes are: the length of a double-array trie, the trie in 32-bit units, and all replacements, each ended by a zero. Everything is in
// little-endian order. https://github.com/google/sentencepiece and its darts_clone define it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace hst_trt {

class Charsmap {
 public:
  // Throws std::invalid_argument if no walk through the trie may be trusted.
  explicit Charsmap(const std::string &base64);
  // As the `tokenizers` library applies it: to a cluster of characters as a whole if that is short, else to each character.
  std::string operator()(const std::string &text) const;

 private:
  // What stands in the place of the shortest start of the text that the rules know: the library then drops the rest of the text.
  std::optional<std::string_view> replacement(std::string_view text) const;
  void check() const;

  std::vector<uint32_t> units_;
  std::string replacements_;
};

}  // namespace hst_trt
