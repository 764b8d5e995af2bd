// The words of a reason to refuse.
#pragma once
#include <string>

#include "geometry.h"

namespace convlab {

inline std::string text(const char* words) { return words; }
inline std::string text(int64_t number) { return std::to_string(number); }
inline std::string text(const int64_t (&sizes)[kMaxSpatial]) {
  return text(sizes[0]) + "x" + text(sizes[1]) + "x" + text(sizes[2]);
}

// `auto` asks for a reason on every call and only wants to know whether there is one.
template <class... Parts>
std::string because(bool in_words, const Parts&... parts) {
  return in_words ? (text(parts) + ...) : "refused";
}

}  // namespace convlab
