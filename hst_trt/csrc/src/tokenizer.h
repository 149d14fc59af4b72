// Prompts to token ids from a Hugging Face tokenizer.json: the byte-level BPE of CLIP and the Unigram of T5, nothing else.
//
// What a file asks for beyond that is refused by name, never passed over: other ids would draw another picture.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "json.h"
#include "trie.h"

namespace hst_trt {

// Parts of a text become ids. Implementations are in tokenizer_bpe.cpp and tokenizer_unigram.cpp.
class TokenModel {
 public:
  virtual ~TokenModel() = default;
  // Appends the ids of a normalised piece of text that holds no added token. first: whether the text starts with it.
  virtual void encode(const std::string &piece, bool first, std::vector<int64_t> &ids) const = 0;
  virtual int64_t id(std::string_view token) const = 0;  // -1 for none
  virtual int64_t size() const = 0;
};

std::unique_ptr<TokenModel> bpe_model(const json::Value &file);      // the whole tokenizer.json; throws as Tokenizer
std::unique_ptr<TokenModel> unigram_model(const json::Value &file);  // the same

// One step of what is done to a text first. Takes and returns valid UTF-8.
using Normalizer = std::function<std::string(const std::string &)>;
void add_normalizers(const json::Value &value, std::vector<Normalizer> &normalizers);  // of a "normalizer"; throws as Tokenizer

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
  struct AddedToken {
    int64_t id;
    bool single_word, lstrip, rstrip;  // counts only apart from letters and digits; takes the white space beside it along
  };
  struct AddedTokens {
    Trie trie;  // numbers are places in `tokens`
    std::vector<AddedToken> tokens;
  };
  void read_added_tokens(const json::Value &file);
  void read_post_processor(const json::Value &post);
  template <typename Between>
  static void split(std::string_view text, const AddedTokens &added, std::vector<int64_t> &ids, Between between);
  std::string normalize(std::string text) const;

  std::vector<Normalizer> normalizers_;
  AddedTokens raw_, normalized_;  // what is looked for before and after normalisation
  std::unique_ptr<TokenModel> model_;
  std::vector<int64_t> before_, after_;  // special tokens around every text
  int64_t length_, pad_id_;
};

// A tokenizer.json whose part `what` is not one that the host has.
[[noreturn]] void refuse_tokenizer(const std::string &what, const std::string &found);

// A member of an object: its text or "" if it is not one; whether it is a text, and which.
const std::string &text_of(const json::Value &value);
bool is_text(const json::Value &value, const char *text);
// A token's id, below 2^32; throws std::invalid_argument if it is not.
int64_t id_of(const json::Value &value);
// true or false; throws std::invalid_argument if it is not.
bool flag_of(const json::Value &object, const char *name);

}  // namespace hst_trt
