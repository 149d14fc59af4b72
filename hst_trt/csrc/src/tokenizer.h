// Prompts to token ids from a Hugging Face tokenizer.json: the byte-level BPE of CLIP and the Unigram of T5, nothing else.
//
// What a file asks for beyond that is refused by name, never passed over: other ids would draw another picture.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "json.h"

namespace hst_trt {

// Parts of a text become ids. Implementations are in tokenizer_bpe.cpp and tokenizer_unigram.cpp.
class TokenModel {
 public:
  virtual ~TokenModel() = default;
  // Appends the ids of a piece of text that holds no added token.
  virtual void encode(const std::u32string &piece, std::vector<int64_t> &ids) const = 0;
};

std::unique_ptr<TokenModel> bpe_model(const json::Value &file);      // the whole tokenizer.json; throws as Tokenizer
std::unique_ptr<TokenModel> unigram_model(const json::Value &file);  // the same

class Tokenizer {
 public:
  // Throws std::invalid_argument if the file is damaged, Error (HST_INCOMPATIBLE) if it asks for what is not here.
  Tokenizer(const json::Value &file, int64_t length, int64_t pad_id);

  struct Encoding {
    std::vector<int64_t> ids;  // cut and padded to the length
    size_t needed;             // ids before that
  };
  // text: valid UTF-8. Any thread.
  Encoding operator()(const std::string &text) const;

 private:
  struct Added {
    std::u32string content;
    int64_t id;
  };
  void split(const std::u32string &text, const std::vector<Added> &added, bool normalized, std::vector<int64_t> &ids) const;
  std::u32string normalize(const std::u32string &text) const;

  std::vector<Added> raw_, normalized_;  // added tokens that are looked for before and after normalisation
  bool clip_ = false;
  std::unique_ptr<TokenModel> model_;
  std::vector<int64_t> before_, after_;  // special tokens around every text
  int64_t length_, pad_id_;
};

// A tokenizer.json whose part `what` is not one that the host has.
[[noreturn]] void refuse_tokenizer(const std::string &what, const json::Value &found);

}  // namespace hst_trt
