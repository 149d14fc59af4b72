#include "trie.h"

namespace hst_trt {

Trie::Trie(std::vector<std::pair<std::string, int64_t>> entries) {
  std::stable_sort(entries.begin(), entries.end(), [](const auto &a, const auto &b) { return a.first < b.first; });
  struct Range {  // of the entries under a node, which is `depth` bytes down
    size_t first, last, depth;
  };
  std::vector<Range> ranges{{0, entries.size(), 0}};
  nodes_.emplace_back();
  for (size_t at = 0; at < nodes_.size(); ++at) {  // breadth first, so that siblings come to stand together; no recursion, however long a text is
    auto [first, last, depth] = ranges[at];
    for (; first < last && entries[first].first.size() == depth; ++first) nodes_[at].number = entries[first].second;
    nodes_[at].children = nodes_.size();
    while (first < last) {
      const char label = entries[first].first[depth];
      size_t next = first;
      while (next < last && entries[next].first[depth] == label) ++next;
      Node child;
      child.label = static_cast<unsigned char>(label);
      nodes_.push_back(child);
      ranges.push_back({first, next, depth + 1});
      ++nodes_[at].count;
      first = next;
    }
  }
}

}  // namespace hst_trt
