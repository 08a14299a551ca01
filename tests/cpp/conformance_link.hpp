// Two ends and how they are driven in the conformance suite: End is a transport with its memory and what it polled;
// Pair connects two of them; Batch submits a plan piece by piece as the engine's worker would.
#pragma once

#include <doctest/doctest.h>

#include <atomic>
#include <functional>
#include <future>
#include <string>
#include <thread>

#include "conformance_memory.hpp"

namespace conformance {

using transport::Clock;
using transport::Context;
using transport::Limits;
using transport::Link;
using transport::Role;
using transport::Transport;
using Factory = std::function<std::unique_ptr<Transport>(Context)>;

inline constexpr auto kPatience = std::chrono::seconds(8);  // what the suite waits before it calls something hung

inline DeviceCopyFactory device_copies;  // empty: none
inline transport::HostPin pin;           // likewise

struct End {
  explicit End(const Factory& make, Limits limits = {}) {
    Context context;
    context.limits = limits;
    context.copy = host_copy;
    context.device_copy = device_copies;
    context.pin = pin;
    context.host = "127.0.0.1";
    context.shm_path = "auto";
    context.wake = [w = wakes] { w->fetch_add(1); };
    transport = make(std::move(context));
  }

  Memory& add(RegionId id, uint64_t bytes) {
    memories.push_back(std::make_unique<Memory>(id, bytes, id * 7919 + bytes));
    keys.push_back(transport->register_memory(memories.back()->region()));
    return *memories.back();
  }

  size_t poll(size_t at_most = 16) {
    std::vector<Completion> out(at_most);
    const size_t n = transport->poll(out);
    for (size_t i = 0; i < n; ++i)
      (out[i].kind == Completion::Kind::kSent ? sent : arrived).push_back(std::move(out[i]));
    return n;
  }

  const Completion* find_sent(BatchId batch) const {
    for (const Completion& c : sent)
      if (c.batch == batch) return &c;
    return nullptr;
  }
  const Completion* find_arrived(uint64_t tag) const {
    for (const Completion& c : arrived)
      if (c.tag == tag) return &c;
    return nullptr;
  }
  bool memory_as_expected() const {
    return std::all_of(memories.begin(), memories.end(), [](const auto& m) { return m->as_expected(); });
  }

  std::shared_ptr<std::atomic<int>> wakes = std::make_shared<std::atomic<int>>(0);
  Memories memories;
  std::vector<Bytes> keys;
  std::vector<Completion> sent, arrived;
  std::unique_ptr<Transport> transport;  // destroyed before the memory it may touch
};

struct Pair {
  Pair(End& left, End& right, PeerId left_name = 2, PeerId right_name = 1) : a(left), b(right) {
    static std::atomic<uint32_t> links{1};
    Link to_b, to_a;
    to_b.peer = left_name;
    to_a.peer = right_name;
    to_b.role = Role::kConnect;
    to_a.role = Role::kAccept;
    to_b.address = b.transport->address();
    to_a.address = a.transport->address();
    const uint32_t number = links++;
    std::memcpy(to_b.token, &number, sizeof number);
    std::memcpy(to_a.token, &number, sizeof number);
    to_b.host_hint = to_a.host_hint = "127.0.0.1";
    to_b.deadline = to_a.deadline = Clock::now() + kPatience;
    auto accepting = std::async(std::launch::async, [&] { return b.transport->connect(to_a); });
    ab = a.transport->connect(to_b);
    ba = accepting.get();
    exchange();
  }

  // As the engine does after the handshake and after each later register_memory.
  void exchange() {
    for (size_t i = 0; i < b.memories.size(); ++i) ab->import_region(b.memories[i]->region(), b.keys[i]);
    for (size_t i = 0; i < a.memories.size(); ++i) ba->import_region(a.memories[i]->region(), a.keys[i]);
  }

  void poll() {
    const size_t got = a.poll() + b.poll();
    if (got == 0) std::this_thread::sleep_for(std::chrono::microseconds(20));
  }

  template <typename Done>
  [[nodiscard]] bool poll_until(Done&& done, std::chrono::milliseconds patience = kPatience) {
    const auto deadline = Clock::now() + patience;
    while (!done()) {
      if (Clock::now() >= deadline) return false;
      poll();
    }
    return true;
  }
  void poll_for(std::chrono::milliseconds time) {
    (void)poll_until([] { return false; }, time);
  }

  End& a;
  End& b;
  std::unique_ptr<transport::Peer> ab, ba;
};

// A batch under way. step() is one turn of a worker that never waits.
struct Batch {
  Batch(transport::Peer& over, BatchId number, TransferPlan what, std::optional<uint64_t> with_tag = std::nullopt,
        Bytes with_tail = {})
      : peer(over), id(number), plan(std::move(what)), tag(with_tag), tail(std::move(with_tail)) {}

  // Returns false when the transport took nothing.
  bool step() {
    if (notified) return false;
    while (copy < plan.copies.size() && at_end(plan.copies[copy], cursor)) {
      ++copy;
      cursor = {};
    }
    if (copy == plan.copies.size()) return notified = peer.notify(id, tag, tail);
    const Cursor before = cursor;
    status = peer.submit(id, plan, copy, cursor);
    if (!status.ok()) notified = true;  // over: its kSent follows
    return !(cursor == before);
  }

  transport::Peer& peer;
  BatchId id;
  TransferPlan plan;
  std::optional<uint64_t> tag;
  Bytes tail;
  uint32_t copy = 0;
  Cursor cursor;
  bool notified = false;
  Status status;
};

using Batches = std::vector<std::unique_ptr<Batch>>;

// Submits everything, round robin, polling when nothing moves, until every kSent is there.
[[nodiscard]] inline bool run(Pair& pair, Batches& batches, End& sender) {
  const auto deadline = Clock::now() + kPatience;
  for (;;) {
    bool moved = false, all = true;
    for (auto& b : batches) moved = b->step() || moved;
    for (auto& b : batches) all = all && sender.find_sent(b->id) != nullptr;
    if (all) return true;
    if (Clock::now() >= deadline) return false;
    if (!moved) pair.poll();
  }
}

inline TransferPlan plan_of(PagedCopy copy) {
  TransferPlan plan;
  plan.copies.push_back(std::move(copy));
  return plan;
}

}  // namespace conformance
