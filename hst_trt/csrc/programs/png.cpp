#include "png.h"

#include <zlib.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <system_error>

#include "hst_trt.hpp"

namespace {

void put_number(std::string &out, uint32_t value) {
  for (int shift = 24; shift >= 0; shift -= 8) out.push_back(static_cast<char>(value >> shift & 255));
}

void put_chunk(std::string &out, const std::string &kind, const std::string &data) {
  put_number(out, static_cast<uint32_t>(data.size()));
  const std::string body = kind + data;
  out += body;
  put_number(out, static_cast<uint32_t>(crc32(0, reinterpret_cast<const Bytef *>(body.data()), static_cast<uInt>(body.size()))));
}

// All of it or none: of a regular file nothing is left if it cannot be finished.
void write_file(const std::string &path, const std::string &content) {
  const std::unique_ptr<FILE, int (*)(FILE *)> file(std::fopen(path.c_str(), "wb"), &std::fclose);
  const bool whole = file && std::fwrite(content.data(), 1, content.size(), file.get()) == content.size() && std::fflush(file.get()) == 0;
  if (whole) return;
  const int why = errno;
  std::error_code ignored;
  if (file && std::filesystem::is_regular_file(path, ignored)) std::filesystem::remove(path, ignored);
  const bool full = why == ENOSPC || why == EDQUOT || why == EFBIG;
  throw hst::Error(full ? HST_RESOURCE : HST_REQUEST, path + " cannot be written: " + std::generic_category().message(why));
}

}  // namespace

void write_png(const std::string &path, const uint8_t *rgb, int width, int height) {
  const size_t row = static_cast<size_t>(width) * 3;
  std::string rows;  // each after a byte that names its filter: 1, the difference to the pixel on the left
  for (int y = 0; y < height; ++y) {
    rows.push_back(1);
    const uint8_t *pixels = rgb + static_cast<size_t>(y) * row;
    for (size_t x = 0; x < row; ++x) rows.push_back(static_cast<char>(pixels[x] - (x < 3 ? 0 : pixels[x - 3])));
  }
  uLongf size = compressBound(static_cast<uLong>(rows.size()));
  std::string packed(size, '\0');
  if (compress(reinterpret_cast<Bytef *>(packed.data()), &size, reinterpret_cast<const Bytef *>(rows.data()), static_cast<uLong>(rows.size())) != Z_OK) {
    throw hst::Error(HST_RESOURCE, "the picture could not be compressed");
  }
  packed.resize(size);

  std::string header;
  put_number(header, static_cast<uint32_t>(width));
  put_number(header, static_cast<uint32_t>(height));
  header += std::string("\x08\x02\x00\x00\x00", 5);  // 8 bits, red green blue, nothing special
  std::string out = "\x89PNG\r\n\x1a\n";
  put_chunk(out, "IHDR", header);
  put_chunk(out, "IDAT", packed);
  put_chunk(out, "IEND", "");
  write_file(path, out);
}
