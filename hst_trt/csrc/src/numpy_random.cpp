#include "numpy_random.h"

#include <array>

namespace hst_trt {
namespace {

__extension__ typedef unsigned __int128 Wide;

Wide wide(uint64_t high, uint64_t low) { return static_cast<Wide>(high) << 64 | low; }

// The words of a whole number, the lowest first; 0 has one, too.
void append_words(std::vector<uint32_t> &words, uint64_t value) {
  words.push_back(static_cast<uint32_t>(value));
  if (value >> 32) words.push_back(static_cast<uint32_t>(value >> 32));
}

// numpy.random.SeedSequence: entropy of any length hashed into a pool of four words, and from there into a generator's state.
class SeedSequence {
 public:
  explicit SeedSequence(const std::vector<uint32_t> &entropy) {
    for (size_t i = 0; i < pool_.size(); ++i) pool_[i] = hashed(i < entropy.size() ? entropy[i] : 0);
    for (size_t from = 0; from < pool_.size(); ++from) {
      for (size_t to = 0; to < pool_.size(); ++to) {
        if (from != to) pool_[to] = mixed(pool_[to], hashed(pool_[from]));
      }
    }
    for (size_t i = pool_.size(); i < entropy.size(); ++i) {
      for (uint32_t &word : pool_) word = mixed(word, hashed(entropy[i]));
    }
  }

  std::array<uint64_t, 4> state() const {
    std::array<uint64_t, 4> state{};
    uint32_t factor = 0x8b51f9dd;
    for (size_t i = 0; i < 2 * state.size(); ++i) {
      uint32_t word = pool_[i % pool_.size()] ^ factor;
      factor *= 0x58f38ded;
      word *= factor;
      state[i / 2] |= static_cast<uint64_t>(word ^ word >> 16) << 32 * (i % 2);
    }
    return state;
  }

 private:
  uint32_t hashed(uint32_t word) {
    word ^= factor_;
    factor_ *= 0x931e8875;
    word *= factor_;
    return word ^ word >> 16;
  }
  static uint32_t mixed(uint32_t a, uint32_t b) {
    const uint32_t word = 0xca01f9ddU * a - 0x4973f715U * b;
    return word ^ word >> 16;
  }

  std::array<uint32_t, 4> pool_;
  uint32_t factor_ = 0x43b0d7e5;
};

// PCG XSL RR 128/64.
class Pcg64 {
 public:
  explicit Pcg64(const SeedSequence &seeds) {
    const auto words = seeds.state();
    increment_ = wide(words[2], words[3]) << 1 | 1;
    state_ = increment_ + wide(words[0], words[1]);
    advance();
  }
  uint64_t operator()() {
    advance();
    const auto folded = static_cast<uint64_t>(state_ >> 64) ^ static_cast<uint64_t>(state_);
    const auto turn = static_cast<unsigned>(state_ >> 122);
    return folded >> turn | folded << (64 - turn) % 64;
  }

 private:
  void advance() { state_ = state_ * wide(0x2360ED051FC65DA4, 0x4385DF649FCCF645) + increment_; }

  Wide state_, increment_;
};

}  // namespace

std::vector<double> numpy_uniform(uint64_t seed, uint64_t stream, size_t count) {
  std::vector<uint32_t> entropy;
  append_words(entropy, seed);
  append_words(entropy, stream);
  Pcg64 draw{SeedSequence(entropy)};
  std::vector<double> numbers(count);
  for (double &number : numbers) number = static_cast<double>(draw() >> 11) * 0x1p-53;
  return numbers;
}

}  // namespace hst_trt
