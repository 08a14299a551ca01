// Text of the form "name=value,name=value", as the fields of Config that hold options have it. Pure; called by
// CudaOptions and RdmaOptions, which know the names. All throw Error(kInvalid) that names the kind ("cuda"), the option
// and what it allows.
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>

namespace pdxfer {

struct OptionKind {
  std::string_view name;   // "cuda"
  std::string_view known;  // the options and an example, for errors: "sm_budget or path, as in sm_budget=16"

  // Calls `set` for each option of `text`, in order, each name once.
  void parse(std::string_view text,
             const std::function<void(std::string_view option, std::string_view value)>& set) const;
  [[noreturn]] void reject(std::string_view option, std::string_view value, std::string_view want) const;
  [[noreturn]] void reject_unknown(std::string_view option) const;
  // A whole number, decimal or hexadecimal after 0x.
  uint32_t number(std::string_view option, std::string_view value, uint32_t low, uint32_t high) const;
};

}  // namespace pdxfer
