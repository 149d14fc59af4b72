// A JSON reader for manifests and tokenizers: hst_trt/bundle/strict_json.py. RFC 8259 without what parsers read differently: no key
// twice, no half of a character, no number out of range, no deep nesting. Numbers keep whether they are whole.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace hst_trt::json {

class Value;
using Array = std::vector<Value>;
using Object = std::map<std::string, Value, std::less<>>;

class Value {
 public:
  Value() = default;
  template <typename T>
  explicit Value(T value) : data_(std::move(value)) {}

  bool is_null() const { return std::holds_alternative<std::monostate>(data_); }
  // The value as a T, or null if it is something else. A whole number is a double too.
  const bool *boolean() const { return std::get_if<bool>(&data_); }
  const int64_t *whole() const { return std::get_if<int64_t>(&data_); }
  const std::string *text() const { return std::get_if<std::string>(&data_); }
  const Array *array() const;
  const Object *object() const;
  bool number(double &value) const;

  // The member `key` of an object; a null value where there is none.
  const Value &operator[](std::string_view key) const;
  // Python's bool(): whether it is anything but null, false, 0, or empty.
  bool truthy() const;

 private:
  std::variant<std::monostate, bool, int64_t, double, std::string, std::shared_ptr<const Array>, std::shared_ptr<const Object>> data_;
};

// Throws std::invalid_argument, which says where.
Value parse(std::string_view text);

}  // namespace hst_trt::json
