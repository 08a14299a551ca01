// What the stream protocol does with a peer that holds a valid token and then misbehaves: every frame here is made by
// hand and sent over a bare socket. Memory outside what a valid plan names is never touched, other links go on.
#include "frame_sender.hpp"
#include "sys/token_listener.hpp"
#include "transport/tcp/tcp_transport.hpp"

namespace {

using namespace conformance;
using namespace pdxfer::transport::stream;

const Factory kTcp = [](Context c) { return transport::make_tcp(std::move(c)); };

// A bare socket in the place of a peer's only stream, and the end that takes it for a peer.
struct Attack : FrameSender {
  explicit Attack(End& victim) : end(victim) {
    static uint8_t number = 100;
    Link link;
    link.peer = 66;
    link.role = Role::kAccept;
    link.token[15] = ++number;
    link.deadline = Clock::now() + kPatience;
    auto accepting = std::async(std::launch::async, [&] { return end.transport->connect(link); });
    const Bytes address = end.transport->address();
    const auto port = static_cast<uint16_t>(std::to_integer<int>(address[1]) | std::to_integer<int>(address[2]) << 8);
    socket = sys::connect_to("127.0.0.1", port, link.deadline);
    sys::Token token;
    std::copy(std::begin(link.token), std::end(link.token), token.begin());
    sys::send_preamble(socket.get(), token, 1u << 16, link.deadline);
    std::byte welcome[4];
    sys::recv_exact(socket.get(), welcome, link.deadline);
    peer = accepting.get();
  }

  void chunk(BatchId batch, Cursor cursor, uint64_t bytes) {
    FrameHeader h;
    h.type = FrameType::kChunk;
    h.batch = batch;
    h.body = bytes;
    h.words[0] = cursor.pair;
    h.words[1] = cursor.run;
    h.words[2] = cursor.slot;
    h.count = cursor.byte;
    send(h);
    const Bytes payload(bytes, std::byte{0xab});
    send(payload.data(), payload.size());
  }
  // Did the victim close the link, with a reason that contains `why`?
  bool dies(const std::string& why) {
    const auto deadline = Clock::now() + kPatience;
    while (peer->lost().ok() && Clock::now() < deadline) end.poll();
    const Status lost = peer->lost();
    CAPTURE(lost.to_string());
    const bool as_expected = lost.code == Code::kPeerLost && std::string(lost.where).find(why) != std::string::npos;
    CHECK(as_expected);
    return as_expected;
  }

  End& end;
  std::unique_ptr<transport::Peer> peer;
};

const WirePair kGoodPair{2, 0, 0, 1024, 1024};

}  // namespace

TEST_CASE("a batch made by hand arrives") {
  End b(kTcp);
  Memory& dst = b.add(2, 64 << 10);
  Attack attack(b);
  attack.plan(1, {kGoodPair}, {{3, 2}});
  attack.chunk(1, {}, 2048);
  attack.finish(1, 2048);
  CHECK(attack.hear().words[0] == 0);
  std::fill_n(dst.expected_data() + 3 * 1024, 2048, std::byte{0xab});
  CHECK(dst.as_expected());
}

TEST_CASE("a bad plan or chunk fails its batch, touches nothing, and the link goes on") {
  End b(kTcp);
  Memory& dst = b.add(2, 64 << 10);
  Attack attack(b);
  struct Bad {
    WirePair pair;
    WireRun run;
  };
  const Bad bad[] = {{{9, 0, 0, 1024, 1024}, {0, 1}},                    // unknown region
                     {{2, 7, 0, 1024, 1024}, {0, 1}},                    // reserved field in use
                     {{2, 0, 0, 1024, 1024}, {64, 1}},                   // one past the end
                     {{2, 0, 1, 1024, 1024}, {63, 1}},                   // the same by its offset
                     {{2, 0, UINT64_MAX, 1024, 1024}, {0, 1}},           // sums that wrap
                     {{2, 0, 0, UINT64_MAX / 2, 1024}, {3, 1}},          //
                     {{2, 0, 0, UINT64_MAX, UINT64_MAX}, {0, 4}},        //
                     {{2, 0, 0, 1024, 1024}, {0xffffffff, 0xffffffff}},  //
                     {{2, 0, 0, 512, 1024}, {0, 1}},                     // slots that overlap
                     {{2, 0, 0, 1024, 0}, {0, 1}},                       // empty slots
                     {{2, 0, 0, 1024, 1024}, {0, 0}}};                   // empty run
  BatchId batch = 0;
  for (const Bad& b_ : bad) {
    ++batch;
    CAPTURE(batch);
    attack.plan(batch, {b_.pair}, {b_.run});
    attack.chunk(batch, {}, 1024);
    attack.finish(batch, 1024);
    const FrameHeader ack = attack.hear();
    CHECK(ack.batch == batch);
    CHECK(ack.words[0] == static_cast<uint32_t>(Code::kInvalid));
  }
  const Cursor outside[] = {{1, 0, 0, 0}, {0, 1, 0, 0}, {0, 0, 1, 0}, {0, 0, 0, 1024}, {~0u, ~0u, ~0u, UINT64_MAX}};
  for (const Cursor& cursor : outside) {
    attack.plan(++batch, {kGoodPair}, {{0, 1}});
    attack.chunk(batch, cursor, 1024);
    attack.finish(batch, 1024);
    CHECK(attack.hear().words[0] == static_cast<uint32_t>(Code::kInvalid));
  }
  CHECK(dst.as_expected());
  attack.plan(++batch, {kGoodPair}, {{5, 1}});
  attack.chunk(batch, {}, 300000);  // longer than its copy: what fits lands, the rest is thrown away
  attack.finish(batch, 300000);
  CHECK(attack.hear().words[1] == static_cast<uint32_t>(Refusal::kChunk));
  attack.plan(++batch, {kGoodPair}, {{5, 1}});
  attack.chunk(batch, {}, 1024);
  attack.finish(batch, 1023);
  CHECK(attack.hear().words[1] == static_cast<uint32_t>(Refusal::kCount));
  std::fill_n(dst.expected_data() + 5 * 1024, 1024, std::byte{0xab});
  CHECK(dst.as_expected());
  CHECK(attack.peer->lost().ok());
  const auto deadline = Clock::now() + kPatience;
  while (b.arrived.size() < batch && Clock::now() < deadline) b.poll();
  CHECK(b.arrived.size() == batch);
  for (const Completion& c : b.arrived) CHECK(c.status.code == Code::kInvalid);
}

TEST_CASE("a malformed frame ends its link and no other") {
  End a(kTcp), b(kTcp);
  Memory& src = a.add(1, 1 << 20);
  Memory& dst = b.add(2, 1 << 20);
  Batches batches;
  Pair pair(a, b);
  using Edit = std::function<void(FrameHeader&)>;
  const std::pair<const char*, Edit> edits[] = {
      {"magic", [](FrameHeader& h) { h.magic = 1; }},
      {"version", [](FrameHeader& h) { h.version = 2; }},
      {"reserved", [](FrameHeader& h) { h.reserved = 1; }},
      {"flags", [](FrameHeader& h) { h.flags = 2; }},
      {"type", [](FrameHeader& h) { h.type = static_cast<FrameType>(9); }},
      {"plan too large", [](FrameHeader& h) { h.words[0] = kMaxPairs + 1; }},
      {"plan too large", [](FrameHeader& h) { h.words[1] = kMaxRuns + 1; }},
      {"plan too large", [](FrameHeader& h) { h.copy = kMaxCopies; }},
      {"length of plan", [](FrameHeader& h) { h.body = UINT64_MAX; }},
      {"length of chunk", [](FrameHeader& h) { h.type = FrameType::kChunk, h.body = kMaxChunk + 1; }},
      {"unknown batch", [](FrameHeader& h) { h.type = FrameType::kChunk; }},
      {"tail", [](FrameHeader& h) { h.type = FrameType::kEnd, h.body = (1 << 16) + 1; }},
      {"number of streams", [](FrameHeader& h) { h.type = FrameType::kEnd, h.body = 0, h.words[1] = 0; }},
      {"more streams", [](FrameHeader& h) { h.type = FrameType::kEnd, h.body = 0, h.words[1] = 2; }},
      {"did not end", [](FrameHeader& h) { h.type = FrameType::kAck, h.body = 0; }},
  };
  for (const auto& entry : edits) {
    const char* why = entry.first;
    CAPTURE(why);
    Attack attack(b);
    FrameHeader h;
    h.words[0] = h.words[1] = 1;
    h.body = sizeof(WirePair) + sizeof(WireRun);
    entry.second(h);
    attack.send(h);
    CHECK(attack.dies(why));
  }
  {
    Attack truncated(b);
    truncated.send("PDXS", 4);
    truncated.socket.reset();
    CHECK(truncated.dies("closed"));
  }
  {
    // A plan of 16 million runs that never come must not cost their memory, and dies with its connection.
    Attack empty_promise(b);
    FrameHeader h;
    h.words[0] = 1;
    h.words[1] = kMaxRuns;
    h.body = sizeof(WirePair) + uint64_t{kMaxRuns} * sizeof(WireRun);
    empty_promise.send(h);
    empty_promise.socket.reset();
    CHECK(empty_promise.dies("closed"));
  }
  batches.push_back(std::make_unique<Batch>(*pair.ab, 70, plan_of(whole_copy(src, dst, 1024)), 70));
  expect_plan(batches[0]->plan, a.memories, b.memories);
  REQUIRE(run(pair, batches, a));
  CHECK(a.find_sent(70)->status.ok());
  CHECK(b.memory_as_expected());
}

TEST_CASE("an acknowledgement before its time frees nothing") {
  Batches batches;
  End b(kTcp);
  b.add(2, 32 << 20);
  Attack attack(b);
  Memory there(9, 32 << 20, 1);
  attack.peer->import_region(there.region(), {});
  batches.push_back(std::make_unique<Batch>(*attack.peer, 5, plan_of(whole_copy(*b.memories[0], there, 4096))));
  FrameHeader ack;
  ack.type = FrameType::kAck;
  ack.batch = 5;
  for (int i = 0; i < 100; ++i) batches[0]->step();  // the socket's buffers fill: nobody reads
  attack.send(ack);
  CHECK(attack.dies("did not end"));
  const auto deadline = Clock::now() + kPatience;
  while (b.sent.empty() && Clock::now() < deadline) b.poll();
  REQUIRE(b.sent.size() == 1);
  CHECK(b.sent[0].status.code == Code::kPeerLost);
}

TEST_CASE("mutated conversations touch nothing but what a valid plan names") {
  End b(kTcp);
  Memory& dst = b.add(2, 64 << 10);
  Memory& other = b.add(3, 64 << 10);
  Random random(11);
  for (int round = 0; round < 150; ++round) {
    CAPTURE(round);
    Attack attack(b);
    std::vector<std::byte> bytes;
    const auto put = [&](const auto& value) {
      const auto* p = reinterpret_cast<const std::byte*>(&value);
      bytes.insert(bytes.end(), p, p + sizeof value);
    };
    FrameHeader plan, chunk, end;
    plan.batch = chunk.batch = end.batch = 1;
    plan.words[0] = plan.words[1] = end.words[1] = 1;
    plan.body = sizeof(WirePair) + sizeof(WireRun);
    chunk.type = FrameType::kChunk;
    chunk.body = end.count = 4096;
    end.type = FrameType::kEnd;
    end.body = 8;
    put(plan), put(kGoodPair), put(WireRun{1, 4}), put(chunk);
    bytes.insert(bytes.end(), 4096, std::byte{0xcd});
    put(end), put(uint64_t{1});
    // Not the pair's region and not beyond: a mutated plan that is valid may write to its own region anywhere.
    for (uint64_t i = pick(random, 1, 6); i > 0; --i) {
      const size_t at = pick(random, 0, 1) == 0 ? pick(random, 4, 171) : pick(random, 4, bytes.size() - 1);
      if (at >= 64 && at < 68) continue;
      bytes[at] = static_cast<std::byte>(random());
    }
    if (pick(random, 0, 3) == 0) bytes.resize(pick(random, 1, bytes.size()));
    try {
      attack.send(bytes.data(), bytes.size());
    } catch (const Error& error) {
      CHECK(error.code() == Code::kPeerLost);  // it closed the link already
    }
    attack.socket.reset();
    CHECK(attack.dies(""));
    CHECK(other.as_expected());
    CHECK(std::equal(dst.expected.begin(), dst.expected.begin() + kGuard, dst.data() - kGuard));
    CHECK(std::equal(dst.expected.end() - kGuard, dst.expected.end(), dst.data() + dst.bytes()));
  }
}
