// A set of texts, each with a number, to find those that a text starts with: a trie in one array, siblings side by side.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace hst_trt {

class Trie {
 public:
  Trie() : Trie(std::vector<std::pair<std::string, int64_t>>{}) {}
  // Numbers are not negative. Of equal texts the last one counts; the empty text is never found.
  explicit Trie(std::vector<std::pair<std::string, int64_t>> entries);

  // Calls found(bytes, number) for each text of the set that `text` starts with, the shortest first.
  template <typename Found>
  void prefixes(std::string_view text, Found found) const {
    const Node *node = nodes_.data();
    for (size_t i = 0; i < text.size(); ++i) {
      const auto label = static_cast<unsigned char>(text[i]);
      const Node *first = nodes_.data() + node->children, *last = first + node->count;
      node = std::lower_bound(first, last, label, [](const Node &child, unsigned char wanted) { return child.label < wanted; });
      if (node == last || node->label != label) return;
      if (node->number >= 0) found(i + 1, node->number);
    }
  }

 private:
  struct Node {
    int64_t number = -1;  // of the text that ends here
    size_t children = 0;  // where they start in nodes_, in the order of their labels
    uint16_t count = 0;
    unsigned char label = 0;
  };
  std::vector<Node> nodes_;
};

}  // namespace hst_trt
