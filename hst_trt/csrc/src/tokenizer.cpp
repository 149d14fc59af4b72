#include "tokenizer.h"

#include <algorithm>
#include <limits>
#include <map>
#include <set>
#include <stdexcept>

#include "error.h"
#include "unicode.h"

namespace hst_trt {
namespace {

constexpr int64_t kMaxLength = 1 << 20;  // tokens of a prompt; far beyond any text encoder

}  // namespace

void refuse_tokenizer(const std::string &what, const std::string &found) {
  throw Error(HST_INCOMPATIBLE, "a tokenizer of the bundle has a " + what + " that this host does not know", found,
              "run the bundle from Python, or use a pair with CLIP's and T5's tokenizers");
}

const std::string &text_of(const json::Value &value) {
  static const std::string nothing;
  return value.text() ? *value.text() : nothing;
}

bool is_text(const json::Value &value, const char *text) { return value.text() && *value.text() == text; }

int64_t id_of(const json::Value &value) {
  const int64_t *id = value.whole();
  if (!id || *id < 0 || *id > std::numeric_limits<uint32_t>::max()) throw std::invalid_argument("a token without an id");
  return *id;
}

bool flag_of(const json::Value &object, const char *name) {
  const bool *flag = object[name].boolean();
  if (!flag) throw std::invalid_argument(std::string("no ") + name);
  return *flag;
}

Tokenizer::Tokenizer(const json::Value &file, int64_t length, int64_t pad_id) : length_(length), pad_id_(pad_id) {
  if (!file.object()) throw std::invalid_argument("not an object");
  if (!file["version"].is_null() && !is_text(file["version"], "1.0")) throw std::invalid_argument("an unknown version of the format");
  if (length < 1 || length > kMaxLength) throw std::invalid_argument("a length that cannot be");
  add_normalizers(file["normalizer"], normalizers_);
  if (!file["model"].object()) throw std::invalid_argument("the tokenizer has no model");
  const std::string &kind = text_of(file["model"]["type"]);
  if (kind != "BPE" && kind != "Unigram") refuse_tokenizer("model", kind);
  model_ = kind == "BPE" ? bpe_model(file) : unigram_model(file);
  read_post_processor(file["post_processor"]);
  read_added_tokens(file);
}

void Tokenizer::read_post_processor(const json::Value &post) {
  const std::string &kind = text_of(post["type"]);
  if (kind == "RobertaProcessing") {
    const json::Array *cls = post["cls"].array(), *sep = post["sep"].array();
    if (!cls || cls->size() != 2 || !sep || sep->size() != 2) throw std::invalid_argument("a post-processor without its tokens");
    before_ = {id_of((*cls)[1])};
    after_ = {id_of((*sep)[1])};
  } else if (kind == "TemplateProcessing") {
    const json::Array *single = post["single"].array();
    if (!single) throw std::invalid_argument("a post-processor without a template");
    size_t texts = 0;
    for (const json::Value &item : *single) {
      if (item["Sequence"].object()) {
        if (++texts > 1 || !is_text(item["Sequence"]["id"], "A")) refuse_tokenizer("post-processor template", "another text than the one prompt");
        continue;
      }
      const json::Array *ids = post["special_tokens"][text_of(item["SpecialToken"]["id"])]["ids"].array();
      if (!ids) throw std::invalid_argument("a special token without ids");
      for (const json::Value &id : *ids) (texts ? after_ : before_).push_back(id_of(id));
    }
    if (texts == 0) refuse_tokenizer("post-processor template", "no prompt");
  } else {
    refuse_tokenizer("post-processor", kind);
  }
  if (static_cast<int64_t>(before_.size() + after_.size()) > length_) throw std::invalid_argument("special tokens alone are too long");
}

// As the library does it, a token that the model knows has the model's id, and the others are numbered from there, whatever the file says.
void Tokenizer::read_added_tokens(const json::Value &file) {
  if (file["added_tokens"].is_null()) return;
  const json::Array *listed = file["added_tokens"].array();
  if (!listed) throw std::invalid_argument("added tokens that are not a list");
  std::map<std::string, int64_t> numbered;
  std::map<int64_t, std::pair<const json::Value *, std::string>> by_id;  // of equal ids the last one counts
  for (const json::Value &token : *listed) {
    id_of(token["id"]);
    if (!token["content"].text()) throw std::invalid_argument("an added token without content");
    const std::string &content = *token["content"].text();
    if (content.empty()) continue;
    int64_t id = model_->id(content);
    if (id < 0) id = numbered.emplace(content, model_->size() + static_cast<int64_t>(numbered.size())).first->second;
    by_id[id] = {&token, flag_of(token, "normalized") ? normalize(content) : content};
  }
  std::vector<std::pair<std::string, int64_t>> raw, normalized;
  for (const auto &[id, entry] : by_id) {
    const json::Value &token = *entry.first;
    AddedTokens &added = flag_of(token, "normalized") ? normalized_ : raw_;
    auto &texts = flag_of(token, "normalized") ? normalized : raw;
    if (entry.second.empty()) continue;  // of which normalisation leaves nothing
    texts.emplace_back(entry.second, static_cast<int64_t>(added.tokens.size()));
    added.tokens.push_back({id, flag_of(token, "single_word"), flag_of(token, "lstrip"), flag_of(token, "rstrip")});
  }
  std::set<std::string> known;
  for (const auto &entry : normalized) {  // the library takes either, by chance
    if (!known.insert(entry.first).second) refuse_tokenizer("pair of added tokens that normalisation makes one", entry.first);
  }
  raw_.trie = Trie(std::move(raw));
  normalized_.trie = Trie(std::move(normalized));
}

Tokenizer::Encoding Tokenizer::operator()(const std::string &text) const {
  std::vector<int64_t> middle;
  split(text, raw_, middle, [&](std::string_view raw, bool first) {
    split(normalize(std::string(raw)), normalized_, middle,
          [&](std::string_view piece, bool first_of_it) { model_->encode(std::string(piece), first && first_of_it, middle); });
  });
  const size_t special = before_.size() + after_.size();
  Encoding encoding{before_, middle.size() + special};
  middle.resize(std::min(middle.size(), static_cast<size_t>(length_) - special));
  encoding.ids.insert(encoding.ids.end(), middle.begin(), middle.end());
  encoding.ids.insert(encoding.ids.end(), after_.begin(), after_.end());
  encoding.ids.resize(static_cast<size_t>(length_), pad_id_);
  return encoding;
}

// Added tokens become their ids, of those that start at one place the longest; between(piece, whether it starts the text) gets the rest.
template <typename Between>
void Tokenizer::split(std::string_view text, const AddedTokens &added, std::vector<int64_t> &ids, Between between) {
  const auto is_word_at = [text](size_t i) { return unicode::is_word(unicode::at(text, i)); };
  size_t start = 0;  // of what is not passed on yet
  for (size_t i = 0, length = 0; i < text.size(); i += length) {
    const AddedToken *token = nullptr;
    added.trie.prefixes(text.substr(i), [&](size_t bytes, int64_t number) {
      length = bytes;
      token = &added.tokens[static_cast<size_t>(number)];
    });
    if (!token) {
      length = 1;  // a token never starts within a character
      continue;
    }
    size_t from = i, to = i + length;
    if (token->single_word && ((from > 0 && is_word_at(unicode::before(text, from))) || (to < text.size() && is_word_at(to)))) continue;
    while (token->lstrip && from > start && unicode::is_space(unicode::at(text, unicode::before(text, from)))) from = unicode::before(text, from);
    if (token->rstrip) to = std::max(to, start);  // white space that the one before has taken along is not walked again
    while (token->rstrip && to < text.size() && unicode::is_space(unicode::at(text, to))) to += unicode::size(unicode::at(text, to));
    if (token->lstrip) from = std::max(from, start);
    if (from > start) between(text.substr(start, from - start), start == 0);
    if (to > from) ids.push_back(token->id);  // not if one before it took all of it
    start = to;
  }
  if (start < text.size()) between(text.substr(start), start == 0);
}

std::string Tokenizer::normalize(std::string text) const {
  for (const Normalizer &step : normalizers_) text = step(text);
  return text;
}

}  // namespace hst_trt
