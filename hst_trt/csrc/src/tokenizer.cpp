#include "tokenizer.h"

#include <algorithm>
#include <stdexcept>

#include "error.h"
#include "unicode.h"

namespace hst_trt {
namespace {

const std::string &text_of(const json::Value &value, const char *what) {
  if (!value.text()) throw std::invalid_argument(std::string("no ") + what);
  return *value.text();
}

int64_t whole_of(const json::Value &value, const char *what) {
  if (!value.whole()) throw std::invalid_argument(std::string("no ") + what);
  return *value.whole();
}

// CLIP's: composed, runs of white space made one space, lower case.
bool is_clip_normalizer(const json::Value &normalizer) {
  const json::Array *parts = normalizer["normalizers"].array();
  if (!parts || parts->size() != 3) return false;
  const auto type = [parts](size_t i) { return (*parts)[i]["type"].text() ? *(*parts)[i]["type"].text() : ""; };
  const std::string *regex = (*parts)[1]["pattern"]["Regex"].text(), *content = (*parts)[1]["content"].text();
  return type(0) == "NFC" && type(1) == "Replace" && type(2) == "Lowercase" && regex && *regex == "\\s+" && content && *content == " ";
}

}  // namespace

void refuse_tokenizer(const std::string &what, const json::Value &found) {
  throw Error(HST_INCOMPATIBLE, "a tokenizer of the bundle has a " + what + " that this host does not know",
              found["type"].text() ? *found["type"].text() : "", "run the bundle from Python, or use a pair with CLIP's and T5's tokenizers");
}

Tokenizer::Tokenizer(const json::Value &file, int64_t length, int64_t pad_id) : length_(length), pad_id_(pad_id) {
  if (!file.object()) throw std::invalid_argument("not an object");
  const std::string &kind = text_of(file["model"]["type"], "model type");
  if (kind != "BPE" && kind != "Unigram") refuse_tokenizer("model", file["model"]);
  const json::Value &normalizer = file["normalizer"], &post = file["post_processor"];
  if (kind == "BPE") {
    if (!is_clip_normalizer(normalizer)) refuse_tokenizer("normalizer", normalizer);
    clip_ = true;
    model_ = bpe_model(file);
    const json::Array *cls = post["cls"].array(), *sep = post["sep"].array();
    if (!post["type"].text() || *post["type"].text() != "RobertaProcessing" || !cls || cls->size() != 2 || !sep || sep->size() != 2) {
      refuse_tokenizer("post-processor", post);
    }
    before_ = {whole_of((*cls)[1], "cls token")};
    after_ = {whole_of((*sep)[1], "sep token")};
  } else {
    if (!normalizer.is_null()) refuse_tokenizer("normalizer", normalizer);
    model_ = unigram_model(file);
    const json::Array *single = post["single"].array();
    if (!post["type"].text() || *post["type"].text() != "TemplateProcessing" || !single) refuse_tokenizer("post-processor", post);
    bool passed = false;
    for (const json::Value &item : *single) {
      if (item["Sequence"].object()) {
        passed = true;
        continue;
      }
      const json::Array *ids = post["special_tokens"][text_of(item["SpecialToken"]["id"], "special token")]["ids"].array();
      if (!ids) throw std::invalid_argument("a special token without ids");
      for (const json::Value &id : *ids) (passed ? after_ : before_).push_back(whole_of(id, "special token's id"));
    }
  }
  if (static_cast<int64_t>(before_.size() + after_.size()) > length_) throw std::invalid_argument("special tokens alone are too long");
  if (const json::Array *added = file["added_tokens"].array()) {
    for (const json::Value &token : *added) {
      for (const char *flag : {"single_word", "lstrip", "rstrip"}) {
        if (token[flag].truthy()) refuse_tokenizer(std::string("token with ") + flag, token);
      }
      const bool normalized = token["normalized"].truthy();
      std::u32string content = unicode::decode(text_of(token["content"], "added token's content"));
      if (normalized) content = normalize(content);
      if (content.empty()) throw std::invalid_argument("an added token without content");
      (normalized ? normalized_ : raw_).push_back({std::move(content), whole_of(token["id"], "added token's id")});
    }
  }
}

Tokenizer::Encoding Tokenizer::operator()(const std::string &text) const {
  std::vector<int64_t> middle;
  split(unicode::decode(text), raw_, false, middle);
  const size_t special = before_.size() + after_.size();
  Encoding encoding{before_, middle.size() + special};
  middle.resize(std::min(middle.size(), static_cast<size_t>(length_) - special));
  encoding.ids.insert(encoding.ids.end(), middle.begin(), middle.end());
  encoding.ids.insert(encoding.ids.end(), after_.begin(), after_.end());
  encoding.ids.resize(static_cast<size_t>(length_), pad_id_);
  return encoding;
}

// Added tokens first, of those that start at one place the longest; what lies between goes on to the next pass or the model.
void Tokenizer::split(const std::u32string &text, const std::vector<Added> &added, bool normalized, std::vector<int64_t> &ids) const {
  const auto pass_on = [&](size_t from, size_t to) {
    if (from == to) return;
    const std::u32string piece = text.substr(from, to - from);
    if (normalized) {
      model_->encode(piece, ids);
    } else {
      split(normalize(piece), normalized_, true, ids);
    }
  };
  size_t start = 0;
  for (size_t i = 0; i < text.size();) {
    const Added *best = nullptr;
    for (const Added &token : added) {
      if (text.compare(i, token.content.size(), token.content) == 0 && (!best || token.content.size() > best->content.size())) best = &token;
    }
    if (!best) {
      ++i;
      continue;
    }
    pass_on(start, i);
    ids.push_back(best->id);
    start = i += best->content.size();
  }
  pass_on(start, text.size());
}

std::u32string Tokenizer::normalize(const std::u32string &text) const {
  if (!clip_) return text;
  std::u32string spaced;
  bool inside = false;
  for (const char32_t point : unicode::nfc(text)) {
    const bool space = unicode::is_regex_space(point);
    if (!space || !inside) spaced.push_back(space ? U' ' : point);
    inside = space;
  }
  return unicode::lower(spaced);
}

}  // namespace hst_trt
