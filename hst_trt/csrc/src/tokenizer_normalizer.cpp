// What a tokenizer does to a text before it is cut: CLIP's composed lower case, T5's compiled rules and the spaces around them.
#include <stdexcept>

#include "charsmap.h"
#include "tokenizer.h"
#include "unicode.h"

namespace hst_trt {
namespace {

bool is_blank(uint32_t point) { return point == U' '; }

// Replaces every run of `least` or more characters.
Normalizer replace_runs(bool (*is)(uint32_t), size_t least, const std::string &content) {
  return [is, least, content](const std::string &text) {
    const std::u32string points = unicode::decode(text);
    std::string out;
    for (size_t i = 0; i < points.size();) {
      size_t end = i;
      while (end < points.size() && is(points[end])) ++end;
      if (end - i >= least) {
        out += content;
        i = end;
      } else {
        for (end = std::max(end, i + 1); i < end; ++i) unicode::append(out, points[i]);
      }
    }
    return out;
  };
}

std::string strip_right(const std::string &text) {
  size_t end = text.size();
  while (end > 0) {
    const size_t before = unicode::before(text, end);
    if (!unicode::is_space(unicode::at(text, before))) break;
    end = before;
  }
  return text.substr(0, end);
}

Normalizer read_replace(const json::Value &replace) {
  const std::string *regex = replace["pattern"]["Regex"].text(), *content = replace["content"].text();
  if (!content) throw std::invalid_argument("a replacement without content");
  if (regex && *regex == "\\s+") return replace_runs(unicode::is_regex_space, 1, *content);
  if (regex && *regex == " {2,}") return replace_runs(is_blank, 2, *content);
  const std::string *literal = replace["pattern"]["String"].text();
  refuse_tokenizer("Replace normalizer with a pattern", regex ? *regex : literal ? *literal : "");
}

Normalizer read_strip(const json::Value &strip) {
  const bool *left = strip["strip_left"].boolean(), *right = strip["strip_right"].boolean();
  if (!left || !right) throw std::invalid_argument("a Strip normalizer without its sides");
  if (*left || !*right) refuse_tokenizer("Strip normalizer", *left ? "strip_left" : "no side");
  return strip_right;
}

}  // namespace

void add_normalizers(const json::Value &value, std::vector<Normalizer> &normalizers) {
  if (value.is_null()) return;
  const std::string type = value["type"].text() ? *value["type"].text() : "";
  if (type == "Sequence") {
    const json::Array *parts = value["normalizers"].array();
    if (!parts) throw std::invalid_argument("a sequence without normalizers");
    for (const json::Value &part : *parts) {
      if (part.is_null()) throw std::invalid_argument("a sequence with a normalizer that is nothing");
      add_normalizers(part, normalizers);
    }
  } else if (type == "NFC") {
    normalizers.emplace_back([](const std::string &text) { return unicode::encode(unicode::nfc(unicode::decode(text))); });
  } else if (type == "Lowercase") {
    normalizers.emplace_back([](const std::string &text) { return unicode::encode(unicode::lower(unicode::decode(text))); });
  } else if (type == "Replace") {
    normalizers.push_back(read_replace(value));
  } else if (type == "Strip") {
    normalizers.push_back(read_strip(value));
  } else if (type == "Precompiled") {
    const std::string *map = value["precompiled_charsmap"].text();
    if (!map) throw std::invalid_argument("a Precompiled normalizer without its character map");
    normalizers.emplace_back(Charsmap(*map));
  } else {
    refuse_tokenizer("normalizer", type);
  }
}

}  // namespace hst_trt
