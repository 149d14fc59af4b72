#include "charsmap.h"

#include <algorithm>
#include <stdexcept>

#include "unicode.h"

namespace hst_trt {
namespace {

constexpr size_t kLongestCluster = 5;  // bytes; longer ones are taken character by character

// A unit's label, with the bit that tells it from a value; whether a text ends here; how far its children are (by exclusive or).
uint32_t label(uint32_t unit) { return unit & (1U << 31 | 0xFF); }
bool ends(uint32_t unit) { return (unit >> 8 & 1) != 0; }
size_t offset(uint32_t unit) { return size_t{unit >> 10} << (unit & 1U << 9 ? 8 : 0); }
size_t value(uint32_t unit) { return unit & ((1U << 31) - 1); }

std::string decode_base64(const std::string &text) {
  static constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string bytes;
  const size_t digits = std::min(text.find('='), text.size()), padding = text.size() - digits;
  if (text.size() % 4 != 0 || padding > 2 || text.find_first_not_of('=', digits) != std::string::npos) {
    throw std::invalid_argument("a character map that is not base64");
  }
  uint32_t held = 0;
  for (size_t i = 0; i < digits; ++i) {
    const size_t digit = kDigits.find(text[i]);
    if (digit == std::string_view::npos) throw std::invalid_argument("a character map that is not base64");
    held = held << 6 | static_cast<uint32_t>(digit);
    const unsigned spare = static_cast<unsigned>(6 * (i + 1) % 8);  // bits that do not make a byte yet
    if (spare != 6) bytes.push_back(static_cast<char>(held >> spare));
  }
  if (padding != 0 && (held & (padding == 2 ? 15U : 3U)) != 0) throw std::invalid_argument("a character map that is not base64");
  return bytes;
}

uint32_t little_endian(std::string_view bytes) {
  uint32_t whole = 0;
  for (size_t i = 4; i-- > 0;) whole = whole << 8 | static_cast<unsigned char>(bytes[i]);
  return whole;
}

}  // namespace

Charsmap::Charsmap(const std::string &base64) {
  const std::string bytes = decode_base64(base64);
  const std::string_view rest = std::string_view(bytes).substr(std::min<size_t>(bytes.size(), 4));
  if (bytes.size() < 4 || little_endian(bytes) / 4 > rest.size() / 4) throw std::invalid_argument("a character map that is cut off");
  units_.resize(little_endian(bytes) / 4);
  for (size_t i = 0; i < units_.size(); ++i) units_[i] = little_endian(rest.substr(4 * i));
  replacements_ = rest.substr(4 * units_.size());
  check();
}

// Goes wherever a text can lead, so that replacement() needs no care.
void Charsmap::check() const {
  if (!unicode::is_valid(replacements_)) throw std::invalid_argument("a character map whose replacements are not UTF-8");
  if (units_.empty()) throw std::invalid_argument("a character map without a trie");
  std::vector<bool> seen(units_.size());
  std::vector<size_t> places{offset(units_[0])};
  while (!places.empty()) {
    const size_t place = places.back();
    places.pop_back();
    if ((place | 0xFF) >= units_.size()) throw std::invalid_argument("a character map whose trie leads outside");
    if (seen[place]) continue;
    seen[place] = true;
    for (uint32_t byte = 1; byte < 256; ++byte) {
      const uint32_t unit = units_[place ^ byte];
      if (label(unit) != byte) continue;
      const size_t next = place ^ byte ^ offset(unit);
      places.push_back(next);
      if (!ends(unit)) continue;
      const size_t start = next < units_.size() ? value(units_[next]) : units_.size() + replacements_.size();
      const bool inside = start < replacements_.size() && (static_cast<unsigned char>(replacements_[start]) & 0xC0) == 0x80;
      if (start > replacements_.size() || inside) throw std::invalid_argument("a character map whose trie leads outside its replacements");
    }
  }
}

std::optional<std::string_view> Charsmap::replacement(std::string_view text) const {
  size_t place = offset(units_[0]);
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    const uint32_t unit = units_[place ^ byte];
    if (byte == 0 || label(unit) != byte) break;
    place = place ^ byte ^ offset(unit);
    if (ends(unit)) {
      const std::string_view found = std::string_view(replacements_).substr(value(units_[place]));
      return found.substr(0, found.find('\0'));
    }
  }
  return std::nullopt;
}

std::string Charsmap::operator()(const std::string &text) const {
  const std::u32string points = unicode::decode(text);
  const std::string_view bytes = text;
  std::string out;
  for (size_t i = 0, at = 0; i < points.size();) {
    size_t count = unicode::cluster(std::u32string_view(points).substr(i));
    size_t end = at;
    for (size_t k = i; k < i + count; ++k) end += unicode::size(points[k]);
    i += count;
    if (end - at <= kLongestCluster) {
      if (const auto found = replacement(bytes.substr(at, end - at))) {
        out += *found;
        at = end;
        continue;
      }
    }
    while (at < end) {
      const size_t length = unicode::size(points[i - count--]);
      const std::string_view character = bytes.substr(at, length);
      out += replacement(character).value_or(character);
      at += length;
    }
  }
  return out;
}

}  // namespace hst_trt
