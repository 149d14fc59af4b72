// Writes 8-bit RGB pictures as PNG (ISO/IEC 15948).
#pragma once

#include <cstdint>
#include <string>

// Throws hst::Error if the file cannot be written: HST_RESOURCE where the disk is full, else HST_REQUEST. rgb: [height, width, 3].
void write_png(const std::string &path, const uint8_t *rgb, int width, int height);
