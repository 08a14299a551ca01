// Writing and reading little-endian fields of set-up messages (handshake, keys, addresses).
// The Reader never reads past its view and never allocates more than the view holds, so it may be fed by a stranger:
// after the first short field it stays failed and every further field reads as zero; check done() or ok() at the end.
#pragma once

#include <bit>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>

#include "core/types.hpp"

namespace pdxfer {

static_assert(std::endian::native == std::endian::little,
              "the wire is little-endian; a big-endian port must swap here");

class Writer {
 public:
  template <typename T>
    requires std::is_integral_v<T>
  Writer& integer(T value) {
    const auto* raw = reinterpret_cast<const std::byte*>(&value);
    out_.insert(out_.end(), raw, raw + sizeof value);
    return *this;
  }
  Writer& raw(ByteView data) {
    out_.insert(out_.end(), data.begin(), data.end());
    return *this;
  }
  Writer& bytes(ByteView data) { return integer(static_cast<uint32_t>(data.size())).raw(data); }
  Writer& text(std::string_view s) { return bytes(std::as_bytes(std::span(s))); }
  Bytes take() { return std::move(out_); }
  const Bytes& view() const noexcept { return out_; }

 private:
  Bytes out_;
};

class Reader {
 public:
  explicit Reader(ByteView data) noexcept : data_(data) {}
  template <typename T>
    requires std::is_integral_v<T>
  T integer() noexcept {
    T value{};
    const ByteView field = raw(sizeof value);
    if (!field.empty()) std::memcpy(&value, field.data(), sizeof value);
    return value;
  }
  // A view into the input, empty when it is too short.
  ByteView raw(size_t bytes) noexcept {
    if (!ok_ || bytes > data_.size()) {
      ok_ = false;
      return {};
    }
    const ByteView field = data_.first(bytes);
    data_ = data_.subspan(bytes);
    return field;
  }
  ByteView bytes() noexcept { return raw(integer<uint32_t>()); }
  std::string text() {
    const ByteView field = bytes();
    return {reinterpret_cast<const char*>(field.data()), field.size()};
  }
  bool ok() const noexcept { return ok_; }
  bool done() const noexcept { return ok_ && data_.empty(); }  // everything read, nothing left over

 private:
  ByteView data_;
  bool ok_ = true;
};

}  // namespace pdxfer
