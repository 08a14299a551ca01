// DynamicLibrary: one library opened at run time, or the reason why it is not there. Used by every shim on the thread
// that first asks; holds the handle for the life of the process (libraries with threads of their own do not unload).
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>

namespace pdxfer::shim {

class DynamicLibrary {
 public:
  // Tries one that the process already holds, then each name or path in turn. Never throws for a missing library.
  explicit DynamicLibrary(std::initializer_list<std::string_view> names);

  bool present() const noexcept { return handle_ != nullptr; }
  const std::string& path() const noexcept { return path_; }      // of the file that was loaded, symlinks resolved
  const std::string& reason() const noexcept { return reason_; }  // why absent: what the loader said of each name
  bool already_loaded() const noexcept { return already_loaded_; }

  // Null when the library is absent or too old to have the function.
  template <typename Function>
  bool load(Function& target, const char* symbol) noexcept {
    target = reinterpret_cast<Function>(find(symbol));
    return target != nullptr;
  }
  // The library is there but of no use: forget it and keep why.
  void reject(std::string reason);

 private:
  void* find(const char* symbol) const noexcept;
  void* handle_ = nullptr;
  bool already_loaded_ = false;
  std::string path_, reason_;
};

}  // namespace pdxfer::shim
