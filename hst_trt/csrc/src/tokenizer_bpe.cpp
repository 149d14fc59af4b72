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

constexpr const char *kWords = "<\\|startoftext\\|>|<\\|endoftext\\|>|'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+";
constexpr std::u32string_view kEndings[] = {U"'s", U"'t", U"'re", U"'ve", U"'m", U"'ll", U"'d"};

bool is_other(char32_t c) { return !unicode::is_regex_space(c) && !unicode::is_letter(c) && !unicode::is_number(c); }

template <typename Is>
size_t run(std::u32string_view text, size_t from, Is is) {
  size_t end = from;
  while (end < text.size() && is(text[end])) ++end;
  return end - from;
}

// How far the first alternative that matches at `from` goes, 0 for none. `many` numbers are one word, as the byte-level splitter has it.
size_t word(std::u32string_view text, size_t from, bool many) {
  const std::u32string_view rest = text.substr(from);
  if (!many) {
    for (const std::u32string_view special : {U"<|startoftext|>", U"<|endoftext|>"}) {
      if (rest.substr(0, special.size()) == special) return special.size();
    }
  }
  for (const std::u32string_view ending : kEndings) {
    if (rest.substr(0, ending.size()) == ending) return ending.size();
  }
  if (const size_t letters = run(text, from, unicode::is_letter)) return letters;
  if (const size_t numbers = run(text, from, unicode::is_number)) return many ? numbers : 1;
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
  explicit Bpe(const json::Value &model) {
    const json::Object *vocab = model["vocab"].object();
    const json::Array *merges = model["merges"].array();
    if (!vocab || !merges) throw std::invalid_argument("no vocabulary or no merges");
    for (const auto &entry : *vocab) {
      if (!entry.second.whole()) throw std::invalid_argument("a token without an id");
      ids_.emplace(entry.first, *entry.second.whole());
    }
    if (const std::string *suffix = model["end_of_word_suffix"].text()) suffix_ = *suffix;
    if (const std::string *unknown = model["unk_token"].text()) unknown_ = id(*unknown);
    for (size_t rank = 0; rank < merges->size(); ++rank) {
      const json::Value &merge = (*merges)[rank];
      std::string left, right;
      if (const json::Array *two = merge.array(); two && two->size() == 2 && (*two)[0].text() && (*two)[1].text()) {
        left = *(*two)[0].text();
        right = *(*two)[1].text();
      } else if (const std::string *line = merge.text(); line && line->find(' ') != std::string::npos) {
        left = line->substr(0, line->find(' '));
        right = line->substr(line->find(' ') + 1);
      } else {
        throw std::invalid_argument("a merge that is not two tokens");
      }
      const int64_t a = id(left), b = id(right), one = id(left + right);
      if (a < 0 || b < 0 || one < 0) throw std::invalid_argument("a merge of unknown tokens");
      merges_[key(a, b)] = {static_cast<int64_t>(rank), one};  // of equal pairs the last one counts
    }
  }

  void encode(const std::u32string &piece, std::vector<int64_t> &ids) const override {
    for (size_t i = 0; i < piece.size();) {
      const size_t length = word(piece, i, false);
      for (size_t k = i; k < i + length;) {  // the byte-level splitter looks at each word once more
        const size_t part = word(std::u32string_view(piece).substr(0, i + length), k, true);
        merge(unicode::encode(std::u32string_view(piece).substr(k, part)), ids);
        k += part;
      }
      i += length ? length : 1;
    }
  }

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
    int64_t rank;
    size_t at;
    int64_t id, left, right;
    bool operator<(const Candidate &other) const { return rank != other.rank ? rank > other.rank : at > other.at; }  // the least is on top
  };
  static constexpr size_t kNone = std::numeric_limits<size_t>::max();

  static uint64_t key(int64_t a, int64_t b) { return static_cast<uint64_t>(a) << 32 | static_cast<uint64_t>(b); }
  int64_t id(const std::string &token) const {
    const auto found = ids_.find(token);
    return found == ids_.end() ? -1 : found->second;
  }

  void merge(const std::string &bytes, std::vector<int64_t> &ids) const {
    static const std::array<char32_t, 256> letters = byte_letters();
    std::vector<Symbol> symbols;
    for (size_t i = 0; i < bytes.size(); ++i) {
      std::string letter;
      unicode::append(letter, letters[static_cast<unsigned char>(bytes[i])]);
      if (i + 1 == bytes.size()) letter += suffix_;
      int64_t known = id(letter);
      if (known < 0) known = unknown_;
      if (known < 0) continue;
      if (!symbols.empty()) symbols.back().after = symbols.size();
      symbols.push_back({known, symbols.empty() ? kNone : symbols.size() - 1, kNone, false});
    }
    std::priority_queue<Candidate> queue;
    const auto offer = [&](size_t at) {
      if (at == kNone || symbols[at].after == kNone) return;
      const int64_t left = symbols[at].id, right = symbols[symbols[at].after].id;
      if (const auto found = merges_.find(key(left, right)); found != merges_.end()) {
        queue.push({found->second.rank, at, found->second.id, left, right});
      }
    };
    for (size_t i = 0; i < symbols.size(); ++i) offer(i);
    while (!queue.empty()) {
      const Candidate best = queue.top();
      queue.pop();
      Symbol &left = symbols[best.at];
      if (left.gone || left.after == kNone || left.id != best.left || symbols[left.after].id != best.right) continue;
      Symbol &right = symbols[left.after];
      right.gone = true;
      left.id = best.id;
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
  std::string suffix_;
  int64_t unknown_ = -1;
};

}  // namespace

std::unique_ptr<TokenModel> bpe_model(const json::Value &file) {
  const json::Value &model = file["model"], &splitter = file["pre_tokenizer"];
  for (const char *option : {"dropout", "byte_fallback", "ignore_merges", "fuse_unk"}) {
    if (model[option].truthy()) refuse_tokenizer(std::string("model with ") + option, model);
  }
  if (model["continuing_subword_prefix"].truthy()) refuse_tokenizer("model with continuing_subword_prefix", model);
  const json::Array *parts = splitter["pretokenizers"].array();
  if (!parts || parts->size() != 2) refuse_tokenizer("pre-tokenizer", splitter);
  const json::Value &split = (*parts)[0], &bytes = (*parts)[1];
  const auto is = [](const json::Value &value, const char *text) { return value.text() && *value.text() == text; };
  if (!is(split["type"], "Split") || !is(split["pattern"]["Regex"], kWords) || !is(split["behavior"], "Removed") || !split["invert"].truthy() ||
      !is(bytes["type"], "ByteLevel") || bytes["add_prefix_space"].truthy() || !bytes["use_regex"].truthy()) {
    refuse_tokenizer("pre-tokenizer", splitter);
  }
  return std::make_unique<Bpe>(model);
}

}  // namespace hst_trt
