// What io threads stand on: gathering and scattering windows, and the loop's wake-ups, also while it looks for an edge.
#include <doctest/doctest.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "sys/fd.hpp"
#include "transport/stream/io_loop.hpp"
#include "transport/stream/small_extents.hpp"

using namespace pdxfer;
using namespace pdxfer::transport::stream;
using namespace std::chrono_literals;

namespace {

// Counts its turns and the numbers that its descriptor brought; every turn asks the loop to look for the next.
class Counter final : public Driven {
 public:
  Turn turn() noexcept override {
    uint64_t count = 0;
    if (::read(fd.get(), &count, sizeof count) == sizeof count) sum += count;
    ++turns;
    return Turn::kSoon;
  }
  bool wait_for(uint64_t wanted) const {
    for (const auto end = std::chrono::steady_clock::now() + 30s; std::chrono::steady_clock::now() < end;) {
      if (sum.load() == wanted) return true;
      std::this_thread::yield();
    }
    return false;
  }
  void ring() const {
    const uint64_t one = 1;
    REQUIRE(::write(fd.get(), &one, sizeof one) == sizeof one);
  }

  const sys::UniqueFd fd{::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)};
  std::atomic<uint64_t> sum{0}, turns{0};
};

}  // namespace

TEST_CASE("extents of any size and alignment are gathered in order") {
  std::mt19937 random(1);
  std::vector<std::byte> memory(1 << 20), packed(kPackBytes + 64, std::byte{0xEE});
  for (std::byte& b : memory) b = static_cast<std::byte>(random());
  for (int round = 0; round < 50; ++round) {
    std::vector<iovec> extents;
    std::vector<std::byte> want;
    const size_t longest = round % 2 == 0 ? 300 : 9000;
    while (want.size() + longest < kPackBytes && extents.size() < 400) {
      const size_t bytes = 1 + random() % longest, at = random() % (memory.size() - longest);
      extents.push_back({memory.data() + at, bytes});
      want.insert(want.end(), memory.begin() + static_cast<ptrdiff_t>(at),
                  memory.begin() + static_cast<ptrdiff_t>(at + bytes));
    }
    gather(extents, packed.data());
    CHECK(std::memcmp(packed.data(), want.data(), want.size()) == 0);
    CHECK(packed[kPackBytes] == std::byte{0xEE});
  }
}

TEST_CASE("what comes in pieces is scattered over extents of any size and alignment, and nothing beside them") {
  std::mt19937 random(2);
  for (int round = 0; round < 50; ++round) {
    std::vector<std::byte> memory(300000, std::byte{0xEE}), want = memory, stream;
    std::vector<iovec> extents;
    for (size_t at = random() % 64; at + 3000 < memory.size();) {
      const size_t bytes = 1 + random() % (round % 2 == 0 ? 200 : 2500);
      extents.push_back({memory.data() + at, bytes});
      for (size_t i = 0; i < bytes; ++i) stream.push_back(want[at + i] = static_cast<std::byte>(random()));
      at += bytes + random() % 100;
    }
    size_t first = 0, done = 0;
    while (done < stream.size()) {
      const size_t bytes = std::min<size_t>(stream.size() - done, 1 + random() % 20000);
      first += scatter(std::span(extents).subspan(first), stream.data() + done, bytes);
      done += bytes;
    }
    CHECK(first == extents.size());
    CHECK(memory == want);
  }
}

TEST_CASE("edges, kicks and tasks reach a loop that looks for an edge as well as one that sleeps") {
  IoLoop loop("pdx-test");
  Counter counter;
  loop.add(counter.fd.get(), counter);
  uint64_t rung = 0;
  for (const auto pause : {0us, 20us, 200us}) {  // within the look, at its end, and asleep
    for (int i = 0; i < 100; ++i) {
      counter.ring();
      REQUIRE(counter.wait_for(++rung));
      std::this_thread::sleep_for(pause);
      const uint64_t before = counter.turns.load();
      loop.kick(counter);
      for (const auto end = std::chrono::steady_clock::now() + 30s;
           counter.turns.load() == before && std::chrono::steady_clock::now() < end;)
        std::this_thread::yield();
      REQUIRE(counter.turns.load() > before);
      bool ran = false;
      loop.run([&] { ran = true; });
      REQUIRE(ran);
    }
  }
  // Nobody rings: sooner or later it takes no more turns.
  bool quiet = false;
  for (const auto end = std::chrono::steady_clock::now() + 30s; !quiet && std::chrono::steady_clock::now() < end;) {
    const uint64_t turns = counter.turns.load();
    std::this_thread::sleep_for(20ms);
    quiet = counter.turns.load() == turns;
  }
  CHECK(quiet);
  loop.remove(counter.fd.get(), counter);
}
