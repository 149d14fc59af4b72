// UTF-8, character classes, clusters, lower case and the normal form C, as the `tokenizers` library knows them
// (scripts/host_unicode.py).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace hst_trt::unicode {

bool is_valid(std::string_view utf8);
void append(std::string &utf8, uint32_t point);
// The rest takes valid UTF-8.
std::u32string decode(std::string_view utf8);
std::string encode(std::u32string_view points);
size_t size(uint32_t point);                           // bytes in UTF-8
uint32_t at(std::string_view utf8, size_t i);          // the character that starts at byte i
size_t before(std::string_view utf8, size_t i);        // where the character before byte i starts; i > 0

bool is_letter(uint32_t point);       // \p{L} of the regex engine
bool is_number(uint32_t point);       // \p{N}
bool is_regex_space(uint32_t point);  // \s
bool is_word(uint32_t point);         // \w of the engine that looks for added tokens
bool is_space(uint32_t point);        // what words are parted by

// How many characters from the first one on stand for one that a reader sees (an extended grapheme cluster). text: not empty.
size_t cluster(std::u32string_view text);

std::u32string lower(std::u32string_view text);  // character by character
std::u32string nfc(std::u32string_view text);

}  // namespace hst_trt::unicode
