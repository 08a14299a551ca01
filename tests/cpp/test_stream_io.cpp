// What io threads stand on: the windows that a sender writes, gathering and scattering them, and the loop's wake-ups,
// also while it looks for an edge.
#include <doctest/doctest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <random>
#include <span>
#include <thread>
#include <vector>

#include "core/paged_copy.hpp"
#include "sys/fd.hpp"
#include "transport/stream/io_loop.hpp"
#include "transport/stream/sender.hpp"
#include "transport/stream/small_extents.hpp"
#include "transport/stream/socket_channel.hpp"

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

// Takes all that is written and remembers in what portions it came.
class Recorder final : public Channel {
 public:
  explicit Recorder(uint64_t segment) : segment_(segment) {}
  int64_t writev(std::span<const iovec> iov) noexcept override {
    uint64_t bytes = 0;
    for (const iovec& v : iov) {
      const auto* from = static_cast<const std::byte*>(v.iov_base);
      stream.insert(stream.end(), from, from + v.iov_len);
      bytes += v.iov_len;
    }
    portions.push_back(bytes);
    return static_cast<int64_t>(bytes);
  }
  int64_t readv(std::span<const iovec>) noexcept override { return 0; }
  int wait_fd() const noexcept override { return -1; }
  uint64_t segment() const noexcept override { return segment_; }
  void shutdown() noexcept override {}

  // What lies between the headers of chunks.
  std::vector<std::byte> payload() const {
    std::vector<std::byte> out;
    for (size_t at = 0; at < stream.size();) {
      FrameHeader header;
      REQUIRE(decode_header(stream.data() + at, 0, header) == nullptr);
      at += kHeaderBytes;
      const auto body = stream.begin() + static_cast<ptrdiff_t>(at);
      if (header.type == FrameType::kChunk) out.insert(out.end(), body, body + static_cast<ptrdiff_t>(header.body));
      at += header.body;
    }
    return out;
  }

  std::vector<std::byte> stream;
  std::vector<uint64_t> portions;

 private:
  const uint64_t segment_;
};

// A batch of one copy, from region 1, in chunks of some 300 KB.
void send_all(const TransferPlan& plan, std::span<std::byte> memory, Channel& channel) {
  RegionTable regions;
  regions.add({1, {memory.data(), memory.size()}}, "the test");
  const transport::Context context;
  LinkState link(7, regions, context.limits, [] {}, 1);
  DeviceLane lane(context, 1 << 20);
  Sender sender(link, channel, 0, lane, nullptr);
  const PagedCopy& copy = plan.copies[0];
  Outbound batch(5, &plan);
  batch.streams = 1;
  batch.bytes = copy.bytes;
  batch.ends_left = 1;
  batch.copies[0].places.push_back({memory.data(), kHost});
  for (Cursor cursor; !at_end(copy, cursor);) {
    const Cursor from = cursor;
    const uint64_t bytes = advance(copy, cursor, 300000);
    REQUIRE(sender.queue().push({&batch, bytes, from, regions.epoch(), 0, from == Cursor{}, kHost}));
  }
  REQUIRE(sender.queue().push({&batch, 0, {}, 0, 0, false, kHost}));
  bool moved = false;
  CHECK(sender.pump(UINT64_MAX, moved) == 0);
}

}  // namespace

TEST_CASE("a sender writes whole segments of its channel, of extents of any size and across chunks") {
  for (const uint64_t segment : {uint64_t{1}, uint64_t{1448}, uint64_t{65483}, uint64_t{1} << 20})
    for (const uint64_t slot : {uint64_t{600}, uint64_t{5000}}) {  // packed, and straight from memory
      CAPTURE(segment);
      CAPTURE(slot);
      std::mt19937 random(3);
      std::vector<std::byte> memory(4 << 20), want;
      for (std::byte& b : memory) b = static_cast<std::byte>(random());
      TransferPlan plan;
      PagedCopy& copy = plan.copies.emplace_back();
      copy.pairs.push_back({1, 2, 0, 0, slot, slot, slot});
      for (uint32_t i = 0; i < memory.size() / slot; i += 2) {  // every other one
        copy.runs.push_back({i, i, 1});
        const auto from = memory.begin() + static_cast<ptrdiff_t>(i * slot);
        want.insert(want.end(), from, from + static_cast<ptrdiff_t>(slot));
      }
      copy.seal();
      Recorder channel(segment);
      send_all(plan, memory, channel);
      CHECK(channel.payload() == want);
      // Windows are whole segments, save the last, and those that a chunk's header or the plan went past the end of.
      const uint64_t window = segment < 128 << 10 ? (128 << 10) / segment * segment : 128 << 10;
      size_t others = 0;
      for (size_t i = 0; i + 1 < channel.portions.size(); ++i) others += channel.portions[i] != window;
      CHECK(others <= channel.portions.size() / 8);
      CHECK(channel.portions.size() >= want.size() / window);
    }
}

TEST_CASE("a socket's segment is TCP's; a socket without one has no say") {
  int pair[2];
  REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
  const sys::UniqueFd other(pair[1]);
  CHECK(SocketChannel(sys::UniqueFd(pair[0])).segment() == 1);

  sys::UniqueFd listener(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)), to(::socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  auto* const generic = reinterpret_cast<sockaddr*>(&address);
  REQUIRE(::bind(listener.get(), generic, length) == 0);
  REQUIRE(::listen(listener.get(), 1) == 0);
  REQUIRE(::getsockname(listener.get(), generic, &length) == 0);
  REQUIRE(::connect(to.get(), generic, length) == 0);
  int bytes = 0;
  socklen_t size = sizeof bytes;
  REQUIRE(::getsockopt(to.get(), IPPROTO_TCP, TCP_MAXSEG, &bytes, &size) == 0);
  CHECK(bytes > 500);
  CHECK(SocketChannel(std::move(to)).segment() == static_cast<uint64_t>(bytes));
}

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
    for (const auto gather : {gather<CacheLevel::kFirst>, gather<CacheLevel::kSecond>, gather_at_once}) {
      std::fill(packed.begin(), packed.end(), std::byte{0xEE});
      gather(extents, packed.data());
      CHECK(std::memcmp(packed.data(), want.data(), want.size()) == 0);
      CHECK(std::all_of(packed.begin() + static_cast<ptrdiff_t>(want.size()), packed.end(),
                        [](std::byte b) { return b == std::byte{0xEE}; }));
    }
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

TEST_CASE("loops stay on a processor each where there are no more of those, and else on none") {
  const auto processors_of = [](IoLoop& loop) {
    std::vector<int> all;
    loop.run([&] {
      cpu_set_t set{};
      CHECK(::sched_getaffinity(0, sizeof set, &set) == 0);  // no REQUIRE: this is the loop's thread
      for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
        if (CPU_ISSET(cpu, &set)) all.push_back(cpu);
    });
    return all;
  };
  IoLoop anywhere(0, 0);
  const std::vector<int> all = processors_of(anywhere);
  const auto count = static_cast<uint32_t>(all.size());
  for (uint32_t index = 0; index < 2 * count; ++index) {
    IoLoop own(index, 2 * count);
    CHECK(processors_of(own) == std::vector<int>{all[index % count]});
  }
  if (count > 1) {
    IoLoop one_of_few(0, count - 1);
    CHECK(processors_of(one_of_few) == all);
  }
}

TEST_CASE("edges, kicks and tasks reach a loop that looks for an edge as well as one that sleeps") {
  IoLoop loop(0, 1);
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
