// Status and Error: how every layer says that something went wrong.
//
// The data path (submit, poll, copy) returns Status: trivially copyable, no allocation, never thrown.
// The set-up path (register, connect, parse) throws Error, whose text says what was tried, on what,
// the native code by name, and the next step. bindings/errors_py.cpp is the only translator to Python.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace pdxfer {

enum class Code : int32_t {
  kOk = 0,
  kInvalid = 1,      // the caller's arguments: an id, an index, a range, a layout
  kUnavailable = 2,  // the machine or the peer cannot do this: library, permission, version, secret
  kPeerLost = 3,     // the peer died, hung or closed while work was outstanding
  kTimeout = 4,      // a bounded wait ran out
  kCancelled = 5,    // cancel() got there first; nothing of the batch lands after this
  kInternal = 6,     // a bug of ours: please report
  kCorrupt = 7,      // what landed is not what was sent: nothing of the batch may be used
};

// "invalid", "peer lost", ...: a static string, safe to hold for ever.
const char* code_name(Code code) noexcept;

struct Status {
  Code code = Code::kOk;
  int32_t native = 0;                 // errno or the library's own code; 0 when there is none
  const char* where = "";             // static string naming the call or the check that failed
  const char* native_name = nullptr;  // static: what the library calls its code; nullptr: it is an errno

  constexpr bool ok() const noexcept { return code == Code::kOk; }
  std::string to_string() const;
};

inline constexpr Status kOkStatus{};

class Error : public std::runtime_error {
 public:
  Error(Code code, const std::string& what, int32_t native = 0, const char* native_name = nullptr)
      : std::runtime_error(what), status_{code, native, code_name(code), native_name} {}
  const Status& status() const noexcept { return status_; }
  // The same on the data path: `where` is a static string, the native code keeps its name.
  Status at(const char* where) const noexcept { return {status_.code, status_.native, where, status_.native_name}; }
  Code code() const noexcept { return status_.code; }

 private:
  Status status_;
};

// "ECONNREFUSED (Connection refused)" for an errno value.
std::string errno_name(int error);

}  // namespace pdxfer
