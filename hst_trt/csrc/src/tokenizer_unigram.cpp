// T5's tokenizer: words by white space, each with a mark in front, then the likeliest way to cut it into known tokens (Kudo 2018).
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <unordered_map>

#include "tokenizer.h"
#include "unicode.h"

namespace hst_trt {
namespace {

constexpr char32_t kMark = U'\u2581';
constexpr double kUnknownPenalty = 10;  // an unknown character is that much less likely than the least likely token

class Unigram : public TokenModel {
 public:
  explicit Unigram(const json::Value &model) {
    const json::Array *vocab = model["vocab"].array();
    if (!vocab || vocab->empty()) throw std::invalid_argument("no vocabulary");
    double least = std::numeric_limits<double>::infinity();
    for (size_t id = 0; id < vocab->size(); ++id) {
      const json::Array *entry = (*vocab)[id].array();
      double score = 0;
      if (!entry || entry->size() != 2 || !(*entry)[0].text() || !(*entry)[1].number(score)) throw std::invalid_argument("a bad token");
      const std::string &token = *(*entry)[0].text();
      tokens_[token] = {static_cast<int64_t>(id), score};
      longest_ = std::max(longest_, token.size());
      least = std::min(least, score);
    }
    const int64_t *unknown = model["unk_id"].whole();
    if (!unknown || *unknown < 0 || *unknown >= static_cast<int64_t>(vocab->size())) throw std::invalid_argument("no unknown token");
    unknown_ = {*unknown, least - kUnknownPenalty};
  }

  void encode(const std::u32string &piece, std::vector<int64_t> &ids) const override {
    for (size_t i = 0; i < piece.size();) {
      if (unicode::is_space(piece[i])) {
        ++i;
        continue;
      }
      size_t end = i;
      while (end < piece.size() && !unicode::is_space(piece[end])) ++end;
      std::u32string word = piece.substr(i, end - i);
      if (word[0] != kMark) word.insert(word.begin(), kMark);
      for (size_t from = 0; from < word.size();) {  // a mark within the word starts a word, too
        const size_t to = std::min(word.find(kMark, from + 1), word.size());
        cut(unicode::encode(std::u32string_view(word).substr(from, to - from)), ids);
        from = to;
      }
      i = end;
    }
  }

 private:
  struct Token {
    int64_t id;
    double score;
  };
  struct Path {  // the likeliest one to an end
    double score = 0;
    size_t from = std::numeric_limits<size_t>::max();
    bool unknown = false;
    bool known() const { return from != std::numeric_limits<size_t>::max(); }
  };

  void cut(const std::string &word, std::vector<int64_t> &ids) const {
    std::vector<Path> paths(word.size() + 1);
    for (size_t start = 0; start < word.size();) {
      size_t next = start + 1;
      while (next < word.size() && (static_cast<unsigned char>(word[next]) & 0xC0) == 0x80) ++next;
      bool single = false;  // whether the character alone is a token
      const auto offer = [&](size_t end, const Token &token) {
        Path &path = paths[end];
        const double score = paths[start].score + token.score;
        if (!path.known() || score > path.score) path = {score, start, token.id == unknown_.id};
      };
      for (size_t end = next; end <= std::min(word.size(), start + longest_); ++end) {
        const auto found = tokens_.find(word.substr(start, end - start));
        if (found == tokens_.end()) continue;
        offer(end, found->second);
        single = single || end == next;
      }
      if (!single) offer(next, unknown_);
      start = next;
    }
    std::vector<int64_t> backwards;
    for (size_t end = word.size(); end > 0;) {
      size_t from = paths[end].from;
      if (paths[end].unknown) {  // unknown characters in a row are one
        while (from > 0 && paths[from].unknown) from = paths[from].from;
      }
      const auto found = tokens_.find(word.substr(from, end - from));
      backwards.push_back(found == tokens_.end() ? unknown_.id : found->second.id);
      end = from;
    }
    ids.insert(ids.end(), backwards.rbegin(), backwards.rend());
  }

  std::unordered_map<std::string, Token> tokens_;
  size_t longest_ = 0;
  Token unknown_{};
};

}  // namespace

std::unique_ptr<TokenModel> unigram_model(const json::Value &file) {
  const json::Value &model = file["model"], &splitter = file["pre_tokenizer"];
  if (model["byte_fallback"].truthy()) refuse_tokenizer("model with byte_fallback", model);
  const json::Array *parts = splitter["pretokenizers"].array();
  const auto is = [](const json::Value &value, const char *text) { return value.text() && *value.text() == text; };
  if (!parts || parts->size() != 2 || !is((*parts)[0]["type"], "WhitespaceSplit") || !is((*parts)[1]["type"], "Metaspace") ||
      !is((*parts)[1]["replacement"], "\u2581") || !is((*parts)[1]["prepend_scheme"], "always") || !(*parts)[1]["split"].truthy()) {
    refuse_tokenizer("pre-tokenizer", splitter);
  }
  return std::make_unique<Unigram>(model);
}

}  // namespace hst_trt
