#include "json.h"

#include <charconv>
#include <stdexcept>

#include "unicode.h"

namespace hst_trt::json {
namespace {

constexpr int kMaxLevels = 200;  // of arrays and objects: far beyond any manifest, far below what a thread's stack takes

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Value document() {
    Value value = any(kMaxLevels);
    space();
    if (at_ != text_.size()) fail("more after the end");
    return value;
  }

 private:
  [[noreturn]] void fail(const char *what) const {
    throw std::invalid_argument(std::string(what) + " at byte " + std::to_string(at_));
  }
  void space() {
    while (at_ < text_.size() && std::string_view(" \t\n\r").find(text_[at_]) != std::string_view::npos) ++at_;
  }
  bool take(char c) {
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  bool take(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  // levels: how many more arrays and objects may be nested here.
  Value any(int levels) {
    space();
    if (at_ >= text_.size()) fail("an early end");
    if (levels == 0 && (text_[at_] == '{' || text_[at_] == '[')) fail("too many levels");
    switch (text_[at_]) {
      case '{':
        return object(levels);
      case '[':
        return array(levels);
      case '"':
        return Value(string());
      default:
        if (take("true")) return Value(true);
        if (take("false")) return Value(false);
        if (take("null")) return Value();
        return number();
    }
  }

  Value object(int levels) {
    Object members;
    ++at_;
    space();
    if (!take('}')) {
      do {
        space();
        if (at_ >= text_.size() || text_[at_] != '"') fail("no key");
        std::string key = string();
        space();
        if (!take(':')) fail("no colon after a key");
        if (members.count(key) > 0) fail("a key that stands twice");
        members.emplace(std::move(key), any(levels - 1));
        space();
      } while (take(','));
      if (!take('}')) fail("an object that is not closed");
    }
    return Value(std::make_shared<const Object>(std::move(members)));
  }

  Value array(int levels) {
    Array items;
    ++at_;
    space();
    if (!take(']')) {
      do {
        items.push_back(any(levels - 1));
        space();
      } while (take(','));
      if (!take(']')) fail("an array that is not closed");
    }
    return Value(std::make_shared<const Array>(std::move(items)));
  }

  bool digits() {
    const size_t start = at_;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
    return at_ > start;
  }

  Value number() {
    const size_t start = at_;
    bool whole = true;
    take('-');
    if (!take('0') && !digits()) fail("no value");
    if (take('.')) {
      whole = false;
      if (!digits()) fail("no digits after the point");
    }
    if (take('e') || take('E')) {
      whole = false;
      if (!take('+')) take('-');
      if (!digits()) fail("no exponent");
    }
    const char *first = text_.data() + start, *last = text_.data() + at_;
    const auto read = [&](auto value) {
      if (std::from_chars(first, last, value).ec != std::errc()) fail("a number that is out of range");
      return Value(value);
    };
    return whole ? read(int64_t{}) : read(double{});
  }

  uint32_t hex4() {
    uint32_t value = 0;
    const std::string_view digits = text_.substr(at_, 4);
    const auto end = std::from_chars(digits.data(), digits.data() + digits.size(), value, 16);
    if (digits.size() != 4 || end.ec != std::errc() || end.ptr != digits.data() + 4) fail("a bad \\u escape");
    at_ += 4;
    return value;
  }

  std::string string() {
    std::string out;
    const size_t start = ++at_;
    for (;;) {
      if (at_ >= text_.size()) fail("a string that is not closed");
      const char c = text_[at_++];
      if (c == '"') break;
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a string");
      if (c != '\\') {
        out.push_back(c);
        continue;
      }
      if (at_ >= text_.size()) fail("a string that is not closed");
      static constexpr std::string_view kEscapes = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
      const char kind = text_[at_++];
      if (const size_t index = kEscapes.find(kind); index != std::string_view::npos) {
        out.push_back(kMeant[index]);
      } else if (kind == 'u') {
        uint32_t point = hex4();
        if (point >= 0xD800 && point < 0xDC00 && take("\\u")) {
          const uint32_t low = hex4();
          if (low < 0xDC00 || low > 0xDFFF) fail("half a character");
          point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
        }
        if (point >= 0xD800 && point < 0xE000) fail("half a character");
        unicode::append(out, point);
      } else {
        fail("an unknown escape");
      }
    }
    if (!unicode::is_valid(text_.substr(start, at_ - 1 - start))) fail("a string that is not UTF-8");
    return out;
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

const Array *Value::array() const {
  const auto *held = std::get_if<std::shared_ptr<const Array>>(&data_);
  return held ? held->get() : nullptr;
}

const Object *Value::object() const {
  const auto *held = std::get_if<std::shared_ptr<const Object>>(&data_);
  return held ? held->get() : nullptr;
}

bool Value::number(double &value) const {
  if (const int64_t *held = whole()) {
    value = static_cast<double>(*held);
    return true;
  }
  const double *held = std::get_if<double>(&data_);
  if (held) value = *held;
  return held != nullptr;
}

const Value &Value::operator[](std::string_view key) const {
  static const Value nothing;
  const Object *members = object();
  if (!members) return nothing;
  const auto found = members->find(key);
  return found == members->end() ? nothing : found->second;
}

bool Value::truthy() const {
  if (double value = 0; number(value)) return value != 0;
  if (const bool *held = boolean()) return *held;
  if (const std::string *held = text()) return !held->empty();
  if (const Array *held = array()) return !held->empty();
  if (const Object *held = object()) return !held->empty();
  return false;
}

Value parse(std::string_view text) { return Parser(text).document(); }

}  // namespace hst_trt::json
