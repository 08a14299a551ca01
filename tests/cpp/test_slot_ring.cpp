// The frames of shared slots from a peer that misbehaves, made by hand over one half of a socketpair: what is not a
// slot to be had closes the link, what does not belong lands nowhere, and a slot always comes back.
#include <sys/socket.h>

#include "frame_sender.hpp"
#include "sys/mapping.hpp"
#include "transport/stream/socket_channel.hpp"
#include "transport/stream/stream_hub.hpp"

namespace {

using namespace conformance;
using namespace pdxfer::transport::stream;

constexpr uint64_t kSlotBytes = 64 << 10;

SlotRingEnd ring_end(uint64_t bytes, uint32_t slots) {
  return {sys::make_memfd("test-ring", bytes * slots), bytes, slots};
}

// A hub with one region of host memory and one peer, whose other end is this test.
struct Victim : FrameSender {
  explicit Victim(bool with_ring = true) : memory(1, 256 << 10, 5) {
    Context context;
    context.copy = host_copy;
    hub = std::make_unique<StreamHub>(context, "test");
    hub->register_memory(memory.region());
    int ends[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    socket = sys::UniqueFd(ends[1]);
    std::vector<std::unique_ptr<Channel>> channels;
    channels.push_back(std::make_unique<SocketChannel>(sys::UniqueFd(ends[0])));
    SlotRingEnd mine = ring_end(kSlotBytes, 4);
    slots = sys::map_shared(mine.memory.get(), 0, 4 * kSlotBytes);
    std::unique_ptr<SlotRing> ring;
    if (with_ring) ring = std::make_unique<SlotRing>(ring_end(kSlotBytes, 2), std::move(mine), transport::HostPin{});
    peer = hub->make_peer(3, std::move(channels), "", std::move(ring));
  }

  void plan(BatchId batch) { FrameSender::plan(batch, {{1, 0, 0, 1024, 1024}}, {{0, 64}}); }  // 64 KiB from the start
  void slot(BatchId batch, uint32_t at_slot, uint32_t number, uint64_t bytes) {
    FrameHeader h;
    h.type = FrameType::kSlot;
    h.batch = batch;
    h.words[2] = at_slot;
    h.tag = uint64_t{number} << 32 | bytes;
    send(h);
  }
  bool lost() {
    const auto deadline = Clock::now() + kPatience;
    while (peer->lost().ok() && Clock::now() < deadline) std::this_thread::sleep_for(std::chrono::microseconds(100));
    return peer->lost().code == Code::kPeerLost;
  }

  Memory memory;
  sys::Mapping slots;  // the ring that this test fills
  std::unique_ptr<StreamHub> hub;
  std::unique_ptr<transport::Peer> peer;
};

}  // namespace

TEST_CASE("a slot's bytes land where the plan says, and the slot comes back before the acknowledgement") {
  Victim victim;
  for (uint64_t i = 0; i < 2048; ++i) victim.slots.data()[2 * kSlotBytes + i] = static_cast<std::byte>(i * 7);
  std::memcpy(victim.memory.expected_data() + 3 * 1024, victim.slots.data() + 2 * kSlotBytes, 2048);
  victim.plan(9);
  victim.slot(9, 3, 2, 2048);
  victim.finish(9, 2048);
  const FrameHeader credit = victim.hear();
  CHECK(credit.type == FrameType::kCredit);
  CHECK(credit.tag == 2);
  const FrameHeader ack = victim.hear();
  CHECK(ack.type == FrameType::kAck);
  CHECK(ack.words[0] == 0);
  CHECK(victim.memory.as_expected());
  CHECK(victim.peer->lost().ok());
}

TEST_CASE("a slot that runs beyond its plan fails its batch alone, and still comes back") {
  Victim victim;
  victim.plan(9);
  victim.slot(9, 64, 1, 1024);  // no such slot in the run
  victim.finish(9, 1024);
  CHECK(victim.hear().type == FrameType::kCredit);
  const FrameHeader ack = victim.hear();
  CHECK(ack.words[0] == static_cast<uint32_t>(Code::kInvalid));
  CHECK(ack.words[1] == static_cast<uint32_t>(Refusal::kChunk));
  CHECK(victim.memory.as_expected());
  std::memcpy(victim.memory.expected_data() + 63 * 1024, victim.slots.data(), 1024);
  victim.plan(10);
  victim.slot(10, 63, 0, 4096);  // longer than the rest of its copy: what belongs may land, the batch fails
  victim.finish(10, 4096);
  CHECK(victim.hear().type == FrameType::kCredit);
  CHECK(victim.hear().words[1] == static_cast<uint32_t>(Refusal::kChunk));
  CHECK(victim.memory.as_expected());
  CHECK(victim.peer->lost().ok());
}

TEST_CASE("frames about slots that cannot be had close the link and touch nothing") {
  struct Wrong {
    const char* what;
    void (*send)(Victim& victim);
  };
  const Wrong all[] = {
      {"a number that is no slot", [](Victim& v) { v.slot(9, 0, 4, 1024); }},
      {"a huge number", [](Victim& v) { v.slot(9, 0, UINT32_MAX, 1024); }},
      {"more bytes than a slot has", [](Victim& v) { v.slot(9, 0, 0, kSlotBytes + 1); }},
      {"no bytes", [](Victim& v) { v.slot(9, 0, 0, 0); }},
      {"a batch without a plan", [](Victim& v) { v.slot(10, 0, 0, 1024); }},
      {"a credit for what was not lent",
       [](Victim& v) {
         FrameHeader h;
         h.type = FrameType::kCredit;
         h.tag = 1;
         v.send(h);
       }},
      {"a credit for a number that is no slot",
       [](Victim& v) {
         FrameHeader h;
         h.type = FrameType::kCredit;
         h.tag = uint64_t{1} << 40;
         v.send(h);
       }},
  };
  for (const Wrong& wrong : all) {
    CAPTURE(wrong.what);
    Victim victim;
    victim.plan(9);
    wrong.send(victim);
    CHECK(victim.lost());
    CHECK(victim.memory.as_expected());
  }
  Victim without(false);
  without.plan(9);
  without.slot(9, 0, 0, 1024);
  CHECK(without.lost());
  CHECK(without.memory.as_expected());
}

TEST_CASE("a ring that is smaller than it says is refused; a slot is in one hand at a time") {
  SlotRingEnd small = ring_end(kSlotBytes, 2);
  small.slots = 3;
  CHECK_THROWS_AS(SlotRing(ring_end(kSlotBytes, 2), std::move(small), transport::HostPin{}), Error);
  SlotRingEnd none = ring_end(kSlotBytes, 2);
  none.slots = 0;
  CHECK_THROWS_AS(SlotRing(ring_end(kSlotBytes, 2), std::move(none), transport::HostPin{}), Error);

  SlotRingEnd large = ring_end(kSlotBytes, 2);
  large.slot_bytes = UINT64_MAX / 2 + 1;  // twice of that is nothing
  CHECK_THROWS_AS(SlotRing(ring_end(kSlotBytes, 2), std::move(large), transport::HostPin{}), Error);

  SlotRing ring(ring_end(kSlotBytes, 2), ring_end(2 * kSlotBytes, 2), transport::HostPin{});
  REQUIRE(ring.borrow(1, 2 * kSlotBytes));
  CHECK_FALSE(ring.borrow(1, 1));
  ring.hold(1);
  CHECK_FALSE(ring.let_go(1));
  CHECK_FALSE(ring.borrow(1, 1));
  CHECK(ring.let_go(1));
  CHECK(ring.borrow(1, 1));

  const uint32_t slot = ring.outgoing().take(0);
  CHECK_FALSE(ring.repaid(slot));  // taken, not lent
  ring.lend(slot);
  CHECK(ring.repaid(slot));
  CHECK_FALSE(ring.repaid(slot));
  CHECK_FALSE(ring.repaid(77));
  std::string why;
  CHECK(ring.pin_outgoing(0, why).code == Code::kUnavailable);
  CHECK(why.find("staging_bytes") != std::string::npos);
}
