// Writes 8-bit RGB pictures as PNG (ISO/IEC 15948).
#pragma once

#include <cstdint>
#include <string>

// Throws std::runtime_error if the file cannot be written. rgb: [height, width, 3].
void write_png(const std::string &path, const uint8_t *rgb, int width, int height);
