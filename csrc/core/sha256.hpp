// SHA-256 (FIPS 180-4) and HMAC-SHA-256 (RFC 2104), for the handshake's proof of the shared secret.
// Our own because the module may link no crypto library (one wheel for every machine); checked against the published
// vectors in tests/cpp/test_sha256.cpp. Used a few times per connection, so it is plain rather than fast.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "core/types.hpp"

namespace pdxfer {

using Digest = std::array<std::byte, 32>;

Digest sha256(ByteView data);
Digest hmac_sha256(ByteView key, ByteView data);
// Takes the same time wherever the first difference is.
bool equal_constant_time(ByteView a, ByteView b) noexcept;
// Fills from the kernel's generator; throws Error(kUnavailable) when there is none.
void random_bytes(std::span<std::byte> out);

}  // namespace pdxfer
