// T5's tokenizer: words with a mark in front, then the likeliest way to cut each into known tokens (Kudo 2018).
#include <algorithm>
#include <array>
#include <charconv>
#include <limits>
#include <stdexcept>

#include "tokenizer.h"
#include "unicode.h"

namespace hst_trt {
namespace {

constexpr std::string_view kMark = u8"\u2581";
constexpr double kUnknownPenalty = 10;  // an unknown character is that much less likely than the least likely token

// A score as the `tokenizers` library has it: its shortest decimal digits as a whole number, times or by a power of ten. One in eight is a
// last bit away from the number that is meant, and that decides between cuts that are equally likely, such as those of "aaaa".
double as_the_library_reads(double score) {
  std::array<char, 32> text{};
  const char *end = std::to_chars(text.data(), text.data() + text.size(), score, std::chars_format::scientific).ptr;  // -d.ddde-dd
  const char *e = std::find<const char *>(text.data(), end, 'e');
  uint64_t digits = 0;
  int exponent = 0;
  std::from_chars(e[1] == '+' ? e + 2 : e + 1, end, exponent);
  bool fraction = false;
  for (const char *c = text.data(); c < e; ++c) {
    if (*c == '.') fraction = true;
    if (*c < '0' || *c > '9') continue;
    digits = digits * 10 + static_cast<uint64_t>(*c - '0');
    exponent -= fraction ? 1 : 0;
  }
  double read = static_cast<double>(digits), power = 1;
  for (; exponent < -308; exponent += 308) read /= 1e308;
  const std::string written = "1e" + std::to_string(std::abs(exponent));
  std::from_chars(written.data(), written.data() + written.size(), power);
  read = exponent < 0 ? read / power : read * power;
  return score < 0 ? -read : read;
}

class Unigram : public TokenModel {
 public:
  enum class Prepend { kNever, kFirst, kAlways };  // which words get a mark in front
  struct Words {
    bool at_white_space, at_marks;  // where they are parted
    Prepend prepend;
  };

  Unigram(const json::Value &model, const Words &words) : words_(words) {
    const json::Array *vocab = model["vocab"].array();
    if (!vocab || vocab->empty()) throw std::invalid_argument("no vocabulary");
    double least = std::numeric_limits<double>::infinity();
    std::vector<std::pair<std::string, int64_t>> entries;
    for (const json::Value &token : *vocab) {
      const json::Array *entry = token.array();
      double score = 0;
      if (!entry || entry->size() != 2 || !(*entry)[0].text() || !(*entry)[1].number(score)) throw std::invalid_argument("a bad token");
      entries.emplace_back(*(*entry)[0].text(), static_cast<int64_t>(scores_.size()));
      scores_.push_back(as_the_library_reads(score));
      least = std::min(least, scores_.back());
    }
    tokens_ = Trie(std::move(entries));
    if (model["unk_id"].is_null()) refuse_tokenizer("Unigram model", "no unknown token");
    unknown_ = id_of(model["unk_id"]);
    if (unknown_ >= size()) throw std::invalid_argument("an unknown token that is not in the vocabulary");
    unknown_score_ = least - kUnknownPenalty;
  }

  void encode(const std::string &piece, bool first, std::vector<int64_t> &ids) const override {
    if (!words_.at_white_space) return encode_word(piece, first, ids);
    for (size_t start = 0, end = 0; start < piece.size(); start = end) {
      while (end < piece.size() && !unicode::is_space(unicode::at(piece, end))) end += unicode::size(unicode::at(piece, end));
      if (end > start) {
        encode_word(std::string_view(piece).substr(start, end - start), first, ids);
      } else {
        end += unicode::size(unicode::at(piece, end));
      }
    }
  }

  int64_t id(std::string_view token) const override {
    int64_t known = -1;
    tokens_.prefixes(token, [&](size_t bytes, int64_t number) {
      if (bytes == token.size()) known = number;
    });
    return known;
  }
  int64_t size() const override { return static_cast<int64_t>(scores_.size()); }

 private:
  struct Path {  // the likeliest one to an end
    double score = 0;
    size_t from = std::numeric_limits<size_t>::max();
    bool unknown = false;
    bool known() const { return from != std::numeric_limits<size_t>::max(); }
  };

  void encode_word(std::string_view word, bool first, std::vector<int64_t> &ids) const {
    std::string marked;
    for (const char c : word) c == ' ' ? marked += kMark : marked += c;
    const bool prepend = words_.prepend == Prepend::kAlways || (words_.prepend == Prepend::kFirst && first);
    if (prepend && marked.compare(0, kMark.size(), kMark) != 0) marked.insert(0, kMark);
    const std::string_view text = marked;
    for (size_t from = 0; from < text.size();) {
      const size_t to = words_.at_marks ? std::min(text.find(kMark, from + 1), text.size()) : text.size();
      cut(text.substr(from, to - from), ids);
      from = to;
    }
  }

  void cut(std::string_view word, std::vector<int64_t> &ids) const {
    std::vector<Path> paths(word.size() + 1);
    for (size_t start = 0, next = 0; start < word.size(); start = next) {
      next = start + unicode::size(unicode::at(word, start));
      bool single = false;  // whether the character alone is a token
      const auto offer = [&](size_t end, int64_t id, double token_score) {
        Path &path = paths[end];
        const double score = token_score + paths[start].score;
        if (!path.known() || score > path.score) path = {score, start, id == unknown_};
      };
      tokens_.prefixes(word.substr(start), [&](size_t bytes, int64_t id) {
        offer(start + bytes, id, scores_[static_cast<size_t>(id)]);
        single = single || start + bytes == next;
      });
      if (!single) offer(next, unknown_, unknown_score_);
    }
    const size_t first = ids.size();
    for (size_t end = word.size(); end > 0;) {
      size_t from = paths[end].from;
      if (paths[end].unknown) {  // unknown characters in a row are one
        while (from > 0 && paths[from].unknown) from = paths[from].from;
      }
      const int64_t known = id(word.substr(from, end - from));
      ids.push_back(known < 0 ? unknown_ : known);
      end = from;
    }
    std::reverse(ids.begin() + static_cast<std::ptrdiff_t>(first), ids.end());
  }

  Words words_;
  Trie tokens_;
  std::vector<double> scores_;
  int64_t unknown_ = 0;
  double unknown_score_ = 0;
};

Unigram::Prepend read_prepend(const json::Value &metaspace) {
  const json::Value &scheme = metaspace["prepend_scheme"], &older = metaspace["add_prefix_space"];
  const bool never = is_text(scheme, "never");
  if (older.boolean() && !*older.boolean() && !never) throw std::invalid_argument("add_prefix_space is not what prepend_scheme says");
  if (never) return Unigram::Prepend::kNever;
  if (is_text(scheme, "first")) return Unigram::Prepend::kFirst;
  if (!scheme.is_null() && !is_text(scheme, "always")) throw std::invalid_argument("an unknown prepend_scheme");
  return Unigram::Prepend::kAlways;
}

}  // namespace

std::unique_ptr<TokenModel> unigram_model(const json::Value &file) {
  const json::Value &model = file["model"], &splitter = file["pre_tokenizer"];
  if (model["byte_fallback"].truthy()) refuse_tokenizer("model option", "byte_fallback");
  const json::Array *listed = is_text(splitter["type"], "Sequence") ? splitter["pretokenizers"].array() : nullptr;
  const json::Array parts = listed ? *listed : json::Array{splitter};
  const bool at_white_space = parts.size() == 2 && is_text(parts[0]["type"], "WhitespaceSplit");
  if (parts.size() != (at_white_space ? 2U : 1U) || !is_text(parts.back()["type"], "Metaspace")) {
    refuse_tokenizer("pre-tokenizer for Unigram", text_of(splitter["type"]));
  }
  const json::Value &metaspace = parts.back();
  if (text_of(metaspace["replacement"]) != kMark) refuse_tokenizer("Metaspace pre-tokenizer with a mark", text_of(metaspace["replacement"]));
  const bool at_marks = metaspace["split"].is_null() || flag_of(metaspace, "split");
  const Unigram::Prepend prepend = read_prepend(metaspace);
  if (at_white_space && prepend == Unigram::Prepend::kFirst) {
    refuse_tokenizer("WhitespaceSplit pre-tokenizer before a Metaspace with prepend_scheme", "first");
  }
  return std::make_unique<Unigram>(model, Unigram::Words{at_white_space, at_marks, prepend});
}

}  // namespace hst_trt
