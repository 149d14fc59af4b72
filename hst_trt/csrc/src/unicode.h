// UTF-8, character classes, lower case and the normal form C, as the `tokenizers` library knows them (scripts/host_unicode.py).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace hst_trt::unicode {

bool is_valid(std::string_view utf8);
void append(std::string &utf8, uint32_t point);
std::u32string decode(std::string_view utf8);  // which is valid
std::string encode(std::u32string_view points);

bool is_letter(uint32_t point);       // \p{L} of the regex engine
bool is_number(uint32_t point);       // \p{N}
bool is_regex_space(uint32_t point);  // \s
bool is_space(uint32_t point);        // what words are parted by

std::u32string lower(std::u32string_view text);  // character by character
std::u32string nfc(std::u32string_view text);

}  // namespace hst_trt::unicode
