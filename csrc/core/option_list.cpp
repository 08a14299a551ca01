// See option_list.hpp.
#include "core/option_list.hpp"

#include <algorithm>
#include <charconv>
#include <string>
#include <vector>

#include "core/status.hpp"

namespace pdxfer {

void OptionKind::parse(std::string_view text,
                       const std::function<void(std::string_view option, std::string_view value)>& set) const {
  std::vector<std::string_view> seen;
  while (!text.empty()) {
    const size_t comma = std::min(text.find(','), text.size());
    const std::string_view item = text.substr(0, comma);
    text.remove_prefix(std::min(comma + 1, text.size()));
    const size_t equals = item.find('=');
    if (equals == std::string_view::npos)
      throw Error(Code::kInvalid, std::string(name) + " option \"" + std::string(item) +
                                      "\" has no '=': expected NAME=VALUE with " + std::string(known));
    const std::string_view option = item.substr(0, equals);
    if (std::ranges::find(seen, option) != seen.end())
      throw Error(Code::kInvalid, std::string(name) + " option " + std::string(option) + " is given twice");
    seen.push_back(option);
    set(option, item.substr(equals + 1));
  }
}

void OptionKind::reject(std::string_view option, std::string_view value, std::string_view want) const {
  throw Error(Code::kInvalid, std::string(name) + " option " + std::string(option) + "=" + std::string(value) +
                                  ": expected " + std::string(want));
}

void OptionKind::reject_unknown(std::string_view option) const {
  throw Error(Code::kInvalid, std::string(name) + " option \"" + std::string(option) + "\" is not known: expected " +
                                  std::string(known));
}

uint32_t OptionKind::number(std::string_view option, std::string_view value, uint32_t low, uint32_t high) const {
  const bool hex = value.starts_with("0x") || value.starts_with("0X");
  const std::string_view digits = hex ? value.substr(2) : value;
  uint32_t result = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), result, hex ? 16 : 10);
  if (digits.empty() || error != std::errc{} || end != digits.data() + digits.size() || result < low || result > high)
    reject(option, value, "a whole number from " + std::to_string(low) + " to " + std::to_string(high));
  return result;
}

}  // namespace pdxfer
