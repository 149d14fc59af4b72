#include "unicode.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace hst_trt::unicode {
namespace {

struct Range {
  uint32_t first, last;
};
struct Mapping {
  uint32_t point, to[3];
};
struct Decomposition {
  uint32_t point, to[4];
};
struct Composition {
  uint32_t first, second, point;
};
struct CombiningClass {
  uint32_t point, value;
};
// What a character does in a cluster: the property Grapheme_Cluster_Break, Extended_Pictographic, and Indic_Conjunct_Break, which parts
// Extend in three and has consonants. Hangul syllables, flags and the joiner are known by rule, the others from the table.
enum class Role {
  kOther, kControl, kExtend, kConjoining, kLinker, kSpacingMark, kPrepend, kLead, kVowel, kTail, kPicture, kConsonant, kJoiner,
  kOpenSyllable, kClosedSyllable, kFlag
};
struct RoleRange {
  uint32_t first, last;
  Role role;
};

#include "unicode_data.inc"

// Hangul syllables are composed of letters by rule: lead, vowel, and perhaps a tail.
constexpr uint32_t kSyllables = 0xAC00, kLeads = 0x1100, kVowels = 0x1161, kTails = 0x11A7;
constexpr uint32_t kLeadCount = 19, kVowelCount = 21, kTailCount = 28, kSyllableCount = kLeadCount * kVowelCount * kTailCount;

template <typename Row, size_t N>
const Row *covers(const Row (&rows)[N], uint32_t point) {
  const Row *found = std::lower_bound(std::begin(rows), std::end(rows), point, [](const Row &r, uint32_t p) { return r.last < p; });
  return found != std::end(rows) && found->first <= point ? found : nullptr;
}

template <typename Row, size_t N>
const Row *find(const Row (&rows)[N], uint32_t point) {
  const Row *found = std::lower_bound(std::begin(rows), std::end(rows), point, [](const Row &r, uint32_t p) { return r.point < p; });
  return found != std::end(rows) && found->point == point ? found : nullptr;
}

uint32_t combining_class(uint32_t point) {
  const CombiningClass *found = find(kClasses, point);
  return found ? found->value : 0;
}

Role role(uint32_t point) {
  if (point == 0x200D) return Role::kJoiner;
  if (point - 0x1F1E6 < 26) return Role::kFlag;
  if (point - kSyllables < kSyllableCount) return (point - kSyllables) % kTailCount ? Role::kClosedSyllable : Role::kOpenSyllable;
  const RoleRange *found = covers(kRoles, point);
  return found ? found->role : Role::kOther;
}

void append_apart(std::u32string &out, uint32_t point) {
  if (point - kSyllables < kSyllableCount) {
    const uint32_t index = point - kSyllables;
    out.push_back(kLeads + index / (kVowelCount * kTailCount));
    out.push_back(kVowels + index % (kVowelCount * kTailCount) / kTailCount);
    if (index % kTailCount) out.push_back(kTails + index % kTailCount);
  } else if (const Decomposition *found = find(kApart, point)) {
    for (const uint32_t part : found->to) {
      if (part) out.push_back(part);
    }
  } else {
    out.push_back(point);
  }
}

// The character that two make, or 0.
uint32_t together(uint32_t first, uint32_t second) {
  if (first - kLeads < kLeadCount && second - kVowels < kVowelCount) {
    return kSyllables + ((first - kLeads) * kVowelCount + (second - kVowels)) * kTailCount;
  }
  if (first - kSyllables < kSyllableCount && (first - kSyllables) % kTailCount == 0 && second - kTails - 1 < kTailCount - 1) {
    return first + (second - kTails);
  }
  const auto before = [](const Composition &row, const std::pair<uint32_t, uint32_t> &two) {
    return std::make_pair(row.first, row.second) < two;
  };
  const auto *found = std::lower_bound(std::begin(kTogether), std::end(kTogether), std::make_pair(first, second), before);
  return found != std::end(kTogether) && found->first == first && found->second == second ? found->point : 0;
}

}  // namespace

bool is_valid(std::string_view utf8) {
  for (size_t i = 0; i < utf8.size();) {
    const auto lead = static_cast<unsigned char>(utf8[i]);
    const size_t length = lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
    if (length == 0 || i + length > utf8.size()) return false;
    for (size_t k = 1; k < length; ++k) {
      if ((static_cast<unsigned char>(utf8[i + k]) & 0xC0) != 0x80) return false;
    }
    if (length > 2) {  // no overlong forms, no surrogates, nothing past the last code point
      const auto next = static_cast<unsigned char>(utf8[i + 1]);
      if ((lead == 0xE0 && next < 0xA0) || (lead == 0xED && next > 0x9F) || (lead == 0xF0 && next < 0x90) || (lead == 0xF4 && next > 0x8F)) {
        return false;
      }
    }
    i += length;
  }
  return true;
}

void append(std::string &utf8, uint32_t point) {
  const auto push = [&utf8](uint32_t byte) { utf8.push_back(static_cast<char>(byte)); };
  if (point < 0x80) {
    push(point);
  } else if (point < 0x800) {
    push(0xC0 | point >> 6);
    push(0x80 | (point & 63));
  } else if (point < 0x10000) {
    push(0xE0 | point >> 12);
    push(0x80 | (point >> 6 & 63));
    push(0x80 | (point & 63));
  } else {
    push(0xF0 | point >> 18);
    push(0x80 | (point >> 12 & 63));
    push(0x80 | (point >> 6 & 63));
    push(0x80 | (point & 63));
  }
}

size_t size(uint32_t point) { return point < 0x80 ? 1 : point < 0x800 ? 2 : point < 0x10000 ? 3 : 4; }

uint32_t at(std::string_view utf8, size_t i) {
  const auto lead = static_cast<unsigned char>(utf8[i]);
  const size_t more = lead < 0x80 ? 0 : lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
  uint32_t point = more == 0 ? lead : lead & (0x3FU >> more);
  for (size_t k = 1; k <= more; ++k) point = point << 6 | (static_cast<unsigned char>(utf8[i + k]) & 63U);
  return point;
}

size_t before(std::string_view utf8, size_t i) {
  do --i;
  while ((static_cast<unsigned char>(utf8[i]) & 0xC0) == 0x80);
  return i;
}

std::u32string decode(std::string_view utf8) {
  std::u32string points;
  for (size_t i = 0; i < utf8.size(); i += size(points.back())) points.push_back(at(utf8, i));
  return points;
}

std::string encode(std::u32string_view points) {
  std::string utf8;
  for (const char32_t point : points) append(utf8, point);
  return utf8;
}

bool is_letter(uint32_t point) { return covers(kLetters, point) != nullptr; }
bool is_number(uint32_t point) { return covers(kNumbers, point) != nullptr; }
bool is_regex_space(uint32_t point) { return covers(kRegexSpaces, point) != nullptr; }
bool is_word(uint32_t point) { return covers(kWordCharacters, point) != nullptr; }
bool is_space(uint32_t point) { return covers(kSpaces, point) != nullptr; }

// UAX #29. Every rule that looks back looks no further than the cluster's start.
size_t cluster(std::u32string_view text) {
  Role last = role(text[0]);
  bool picture = last == Role::kPicture;      // a picture, and nothing since that parts it from a joiner
  bool joined = false;                        // a picture and a joiner
  bool consonant = last == Role::kConsonant;  // a consonant, and nothing since that parts it from the next one
  bool linked = false;                        // with a linker in between
  bool odd_flag = last == Role::kFlag;        // flags are pairs
  for (size_t i = 1; i < text.size(); ++i) {
    const Role here = role(text[i]);
    const bool extends = here == Role::kExtend || here == Role::kConjoining || here == Role::kLinker || here == Role::kJoiner;
    if (last == Role::kControl || here == Role::kControl) return text[i - 1] == U'\r' && text[i] == U'\n' ? 2 : i;
    const bool after_lead = here == Role::kLead || here == Role::kVowel || here == Role::kOpenSyllable || here == Role::kClosedSyllable;
    const bool stays = extends || here == Role::kSpacingMark || last == Role::kPrepend || (last == Role::kLead && after_lead) ||
                       ((last == Role::kVowel || last == Role::kOpenSyllable) && (here == Role::kVowel || here == Role::kTail)) ||
                       ((last == Role::kTail || last == Role::kClosedSyllable) && here == Role::kTail) ||
                       (here == Role::kConsonant && consonant && linked) || (here == Role::kPicture && joined) ||
                       (here == Role::kFlag && odd_flag);
    if (!stays) return i;
    joined = picture && here == Role::kJoiner;
    picture = here == Role::kPicture || (picture && extends && here != Role::kJoiner);
    linked = here == Role::kLinker || (linked && extends);
    consonant = here == Role::kConsonant || (consonant && extends && here != Role::kExtend);
    if (here == Role::kConsonant) linked = false;
    odd_flag = here == Role::kFlag && !odd_flag;
    last = here;
  }
  return text.size();
}

std::u32string lower(std::u32string_view text) {
  std::u32string out;
  for (const char32_t point : text) {
    if (const Mapping *found = find(kLower, point)) {
      for (const uint32_t part : found->to) {
        if (part) out.push_back(part);
      }
    } else {
      out.push_back(point);
    }
  }
  return out;
}

std::u32string nfc(std::u32string_view text) {
  std::u32string apart;
  for (const char32_t point : text) append_apart(apart, point);
  for (size_t start = 0; start < apart.size();) {  // marks between two base characters, ordered by their classes
    if (combining_class(apart[start]) == 0) {
      ++start;
      continue;
    }
    size_t end = start;
    while (end < apart.size() && combining_class(apart[end]) != 0) ++end;
    std::stable_sort(apart.begin() + static_cast<std::ptrdiff_t>(start), apart.begin() + static_cast<std::ptrdiff_t>(end),
                     [](char32_t a, char32_t b) { return combining_class(a) < combining_class(b); });
    start = end;
  }
  std::u32string out;
  size_t base = std::u32string::npos;  // the last base character, which marks may join
  uint32_t last_class = 0;             // of the character before, if it stayed
  for (const char32_t point : apart) {
    const uint32_t here = combining_class(point);
    const bool next_to_base = base != std::u32string::npos && base + 1 == out.size();
    if (base != std::u32string::npos && (next_to_base || (last_class < here && last_class != 0))) {
      if (const uint32_t one = together(out[base], point)) {
        out[base] = one;
        continue;
      }
    }
    if (here == 0) base = out.size();
    last_class = here;
    out.push_back(point);
  }
  return out;
}

}  // namespace hst_trt::unicode
