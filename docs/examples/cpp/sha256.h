// SHA-256 (FIPS 180-4) of a buffer, as 64 hex digits.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>

namespace sha256 {

// The constants are the first 32 bits of the fractional parts of roots of the first primes.
inline std::array<uint32_t, 64> fractions_of_roots(int primes, double (*root)(double)) {
  std::array<uint32_t, 64> found{};
  for (int n = 0, candidate = 2; n < primes; ++candidate) {
    bool prime = true;
    for (int divisor = 2; divisor * divisor <= candidate; ++divisor) prime = prime && candidate % divisor != 0;
    if (!prime) continue;
    const double value = root(candidate);
    found[n++] = static_cast<uint32_t>((value - std::floor(value)) * 4294967296.0);
  }
  return found;
}

inline uint32_t turned(uint32_t word, int bits) { return (word >> bits) | (word << (32 - bits)); }

inline void add_block(std::array<uint32_t, 8>& state, const uint8_t* block, const std::array<uint32_t, 64>& constants) {
  std::array<uint32_t, 64> w{};
  for (int i = 0; i < 16; ++i)
    w[i] = uint32_t{block[4 * i]} << 24 | uint32_t{block[4 * i + 1]} << 16 | uint32_t{block[4 * i + 2]} << 8 |
           block[4 * i + 3];
  for (int i = 16; i < 64; ++i) {
    const uint32_t low = turned(w[i - 15], 7) ^ turned(w[i - 15], 18) ^ (w[i - 15] >> 3);
    const uint32_t high = turned(w[i - 2], 17) ^ turned(w[i - 2], 19) ^ (w[i - 2] >> 10);
    w[i] = w[i - 16] + low + w[i - 7] + high;
  }
  auto [a, b, c, d, e, f, g, h] = state;
  for (int i = 0; i < 64; ++i) {
    const uint32_t one = h + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + ((e & f) ^ (~e & g)) + constants[i] + w[i];
    const uint32_t two = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + one, d = c, c = b, b = a, a = one + two;
  }
  const std::array<uint32_t, 8> added{a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; ++i) state[i] += added[i];
}

inline std::string hex(const std::string& data) {
  static const auto constants = fractions_of_roots(64, [](double n) { return std::cbrt(n); });
  static const auto start = fractions_of_roots(8, [](double n) { return std::sqrt(n); });
  std::array<uint32_t, 8> state{};
  for (int i = 0; i < 8; ++i) state[i] = start[i];
  const auto* bytes = reinterpret_cast<const uint8_t*>(data.data());
  const size_t whole = data.size() / 64 * 64;
  for (size_t at = 0; at < whole; at += 64) add_block(state, bytes + at, constants);
  std::string rest = data.substr(whole) + '\x80';
  rest.resize((rest.size() + 8 + 63) / 64 * 64);
  for (int i = 0; i < 8; ++i) rest[rest.size() - 1 - i] = static_cast<char>(uint64_t{data.size()} * 8 >> (8 * i));
  for (size_t at = 0; at < rest.size(); at += 64)
    add_block(state, reinterpret_cast<const uint8_t*>(rest.data()) + at, constants);
  std::string digits(64, '0');
  for (int i = 0; i < 8; ++i) std::snprintf(&digits[8 * i], 9, "%08x", state[i]);
  return digits;
}

}  // namespace sha256
