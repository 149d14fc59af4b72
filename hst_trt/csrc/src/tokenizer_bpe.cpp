// CLIP's tokenizer: words by a regex, each word's bytes as letters, the last one with "</w>", then merges by rank.
#include <array>
#include <limits>
#include <queue>
#include <stdexcept>
#include <unordered_map>

#include "tokenizer.h"
#include "unicode.h"

namespace hst_trt {
namespace {

constexpr const char *kWords = "'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+";  // transformers 4
constexpr const char *kSpecials = "<\\|startoftext\\|>|<\\|endoftext\\|>|";                              // before them in transformers 5
constexpr std::u32string_view kEndings[] = {U"'s", U"'t", U"'re", U"'ve", U"'m", U"'ll", U"'d"};

bool is_other(char32_t c) { return !unicode::is_regex_space(c) && !unicode::is_letter(c) && !unicode::is_number(c); }

template <typename Is>
size_t run(std::u32string_view text, size_t from, Is is) {
  size_t end = from;
  while (end < text.size() && is(text[end])) ++end;
  return end - from;
}

size_t special(std::u32string_view rest) {
  for (const std::u32string_view token : {U"<|startoftext|>", U"<|endoftext|>"}) {
    if (rest.substr(0, token.size()) == token) return token.size();
  }
  return 0;
}

// How far the first alternative that matches at `from` goes, 0 for none. `many` numbers are one word, as the byte-level splitter has it.
size_t word(std::u32string_view text, size_t from, bool many) {
  const std::u32string_view rest = text.substr(from);
  for (const std::u32string_view ending : kEndings) {
    if (rest.substr(0, ending.size()) == ending) return ending.size();
  }
  if (const size_t letters = run(text, from, unicode::is_letter)) return letters;
  if (unicode::is_number(rest[0])) return many ? run(text, from, unicode::is_number) : 1;
  return run(text, from, is_other);
}

// Each byte as a printable character: those that are one stay, the others take the characters from 256 on.
std::array<char32_t, 256> byte_letters() {
  std::array<char32_t, 256> letters{};
  char32_t next = 256;
  for (char32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
    letters[byte] = printable ? byte : next++;
  }
  return letters;
}

class Bpe : public TokenModel {
 public:
  Bpe(const json::Value &model, bool specials) : specials_(specials) {
    const json::Object *vocab = model["vocab"].object();
    const json::Array *merges = model["merges"].array();
    if (!vocab || !merges) throw std::invalid_argument("no vocabulary or no merges");
    ids_.reserve(vocab->size());
    for (const auto &entry : *vocab) ids_.emplace(entry.first, id_of(entry.second));
    if (!model["unk_token"].is_null()) {
      unknown_ = id(text_of(model["unk_token"]));
      if (unknown_ < 0) throw std::invalid_argument("an unknown token that is not in the vocabulary");
    }
    const std::string &suffix = text_of(model["end_of_word_suffix"]);
    const std::array<char32_t, 256> letters = byte_letters();
    for (size_t byte = 0; byte < 256; ++byte) {
      std::string letter;
      unicode::append(letter, letters[byte]);
      letters_[byte] = id(letter);
      last_letters_[byte] = id(letter + suffix);
    }
    merges_.reserve(merges->size());
    for (size_t rank = 0; rank < merges->size(); ++rank) {
      const auto [left, right] = pair((*merges)[rank]);
      const int64_t a = id(left), b = id(right), one = id(left + right);
      if (a < 0 || b < 0 || one < 0) throw std::invalid_argument("a merge of unknown tokens");
      merges_[key(a, b)] = {static_cast<int64_t>(rank), one};  // of equal pairs the last one counts
    }
  }

  void encode(const std::string &piece, bool, std::vector<int64_t> &ids) const override {
    const std::u32string points = unicode::decode(piece);
    const std::u32string_view text = points;
    for (size_t i = 0; i < text.size();) {
      size_t length = specials_ ? special(text.substr(i)) : 0;
      if (length == 0) length = word(text, i, false);
      for (size_t k = i; k < i + length;) {  // the byte-level splitter looks at each word once more
        const size_t part = word(text.substr(0, i + length), k, true);
        merge(unicode::encode(text.substr(k, part)), ids);
        k += part;
      }
      i += length ? length : 1;
    }
  }

  int64_t id(std::string_view token) const override {
    const auto found = ids_.find(std::string(token));
    return found == ids_.end() ? -1 : found->second;
  }
  int64_t size() const override { return static_cast<int64_t>(ids_.size()); }

 private:
  struct Merge {
    int64_t rank, id;
  };
  struct Symbol {
    int64_t id;
    size_t before, after;  // neighbours, kNone at the ends
    bool gone;
  };
  struct Candidate {
    Merge merge;
    size_t at;
    bool operator<(const Candidate &other) const {  // the least is on top
      return merge.rank != other.merge.rank ? merge.rank > other.merge.rank : at > other.at;
    }
  };
  static constexpr size_t kNone = std::numeric_limits<size_t>::max();

  static uint64_t key(int64_t a, int64_t b) { return static_cast<uint64_t>(a) << 32 | static_cast<uint64_t>(b); }

  // A merge's two tokens: a list, or, in older files, a text with one space.
  static std::pair<std::string, std::string> pair(const json::Value &merge) {
    if (const json::Array *two = merge.array(); two && two->size() == 2 && (*two)[0].text() && (*two)[1].text()) {
      return {*(*two)[0].text(), *(*two)[1].text()};
    }
    const std::string &line = text_of(merge);
    const size_t space = line.find(' ');
    if (space == std::string::npos || space != line.rfind(' ')) throw std::invalid_argument("a merge that is not two tokens");
    return {line.substr(0, space), line.substr(space + 1)};
  }

  void merge(const std::string &bytes, std::vector<int64_t> &ids) const {
    std::vector<Symbol> symbols;
    for (size_t i = 0; i < bytes.size(); ++i) {
      int64_t known = (i + 1 < bytes.size() ? letters_ : last_letters_)[static_cast<unsigned char>(bytes[i])];
      if (known < 0) known = unknown_;
      if (known < 0) continue;
      if (!symbols.empty()) symbols.back().after = symbols.size();
      symbols.push_back({known, symbols.empty() ? kNone : symbols.size() - 1, kNone, false});
    }
    const auto merge_at = [&](size_t at) -> const Merge * {
      if (at == kNone || symbols[at].gone || symbols[at].after == kNone) return nullptr;
      const auto found = merges_.find(key(symbols[at].id, symbols[symbols[at].after].id));
      return found == merges_.end() ? nullptr : &found->second;
    };
    std::priority_queue<Candidate> queue;
    const auto offer = [&](size_t at) {
      if (const Merge *merge = merge_at(at)) queue.push({*merge, at});
    };
    for (size_t i = 0; i < symbols.size(); ++i) offer(i);
    while (!queue.empty()) {
      const Candidate best = queue.top();
      queue.pop();
      const Merge *now = merge_at(best.at);
      if (!now || now->id != best.merge.id) continue;  // one of the two has been merged since
      Symbol &left = symbols[best.at], &right = symbols[left.after];
      right.gone = true;
      left.id = best.merge.id;
      left.after = right.after;
      if (left.after != kNone) symbols[left.after].before = best.at;
      offer(left.before);
      offer(best.at);
    }
    for (const Symbol &symbol : symbols) {
      if (!symbol.gone) ids.push_back(symbol.id);
    }
  }

  std::unordered_map<std::string, int64_t> ids_;
  std::unordered_map<uint64_t, Merge> merges_;
  std::array<int64_t, 256> letters_{}, last_letters_{};  // the bytes' ids within a word, and at its end
  int64_t unknown_ = -1;
  bool specials_;
};

}  // namespace

std::unique_ptr<TokenModel> bpe_model(const json::Value &file) {
  const json::Value &model = file["model"], &splitter = file["pre_tokenizer"];
  for (const char *option : {"dropout", "byte_fallback", "ignore_merges", "fuse_unk", "continuing_subword_prefix"}) {
    if (model[option].truthy()) refuse_tokenizer("model option", option);
  }
  const json::Array *parts = splitter["pretokenizers"].array();
  if (!parts || parts->size() != 2 || !is_text((*parts)[0]["type"], "Split") || !is_text((*parts)[1]["type"], "ByteLevel")) {
    refuse_tokenizer("pre-tokenizer for BPE", text_of(splitter["type"]));
  }
  const json::Value &split = (*parts)[0], &bytes = (*parts)[1];
  const std::string &regex = text_of(split["pattern"]["Regex"]);
  const bool specials = regex == std::string(kSpecials) + kWords;
  if (!specials && regex != kWords) refuse_tokenizer("Split pre-tokenizer with a pattern", regex);
  if (!is_text(split["behavior"], "Removed") || !flag_of(split, "invert")) {
    refuse_tokenizer("Split pre-tokenizer with a behavior", text_of(split["behavior"]));
  }
  if (flag_of(bytes, "add_prefix_space")) refuse_tokenizer("ByteLevel pre-tokenizer", "add_prefix_space");
  if (!bytes["use_regex"].is_null() && !flag_of(bytes, "use_regex")) refuse_tokenizer("ByteLevel pre-tokenizer", "no use_regex");
  return std::make_unique<Bpe>(model, specials);
}

}  // namespace hst_trt
