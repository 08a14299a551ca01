// SHA-256 and HMAC against the published vectors: FIPS 180-4 examples and RFC 4231.
#include <doctest/doctest.h>

#include <string>

#include "core/codec.hpp"
#include "core/sha256.hpp"

using namespace pdxfer;

namespace {
ByteView view(const std::string& s) { return std::as_bytes(std::span(s)); }
std::string hex(const Digest& d) {
  static const char* digits = "0123456789abcdef";
  std::string text;
  for (std::byte b : d) {
    text += digits[std::to_integer<int>(b >> 4)];
    text += digits[std::to_integer<int>(b & std::byte{15})];
  }
  return text;
}
}  // namespace

TEST_CASE("sha256 of the standard's examples") {
  CHECK(hex(sha256(view(""))) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(hex(sha256(view("abc"))) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(hex(sha256(view("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"))) ==
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  CHECK(hex(sha256(view(std::string(1000000, 'a')))) ==
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST_CASE("hmac of RFC 4231, short and long keys") {
  CHECK(hex(hmac_sha256(view(std::string(20, '\x0b')), view("Hi There"))) ==
        "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
  CHECK(hex(hmac_sha256(view("Jefe"), view("what do ya want for nothing?"))) ==
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
  CHECK(hex(hmac_sha256(view(std::string(131, '\xaa')),
                        view("Test Using Larger Than Block-Size Key - Hash Key First"))) ==
        "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
}

TEST_CASE("constant-time comparison compares") {
  CHECK(equal_constant_time(view("same"), view("same")));
  CHECK_FALSE(equal_constant_time(view("same"), view("sane")));
  CHECK_FALSE(equal_constant_time(view("same"), view("sam")));
}

TEST_CASE("the reader never leaves its view") {
  Writer writer;
  writer.integer(uint32_t{7}).text("hello").integer(uint64_t{9});
  const Bytes all = writer.take();
  Reader whole{all};
  CHECK(whole.integer<uint32_t>() == 7);
  CHECK(whole.text() == "hello");
  CHECK(whole.integer<uint64_t>() == 9);
  CHECK(whole.done());
  for (size_t cut = 0; cut < all.size(); ++cut) {
    Reader part{ByteView(all).first(cut)};
    (void)part.integer<uint32_t>();
    (void)part.text();
    (void)part.integer<uint64_t>();
    CHECK_FALSE(part.ok());
  }
  Bytes lie(4, std::byte{0xff});  // a length of 4 GiB
  Reader liar{lie};
  CHECK(liar.text().empty());
  CHECK_FALSE(liar.ok());
}
