// The stream protocol spoken by hand over a socket, with whatever values a test likes: the hostile ends of
// test_stream_hostile.cpp and test_slot_ring.cpp. The test's thread; owns the socket.
#pragma once

#include <vector>

#include "conformance.hpp"
#include "sys/socket.hpp"
#include "transport/stream/frame.hpp"

namespace conformance {

struct FrameSender {
  void send(const void* data, size_t bytes) {
    sys::send_exact(socket.get(), {static_cast<const std::byte*>(data), bytes}, Clock::now() + kPatience);
  }
  void send(const transport::stream::FrameHeader& header) { send(&header, sizeof header); }

  void plan(BatchId batch, const std::vector<transport::stream::WirePair>& pairs,
            const std::vector<transport::stream::WireRun>& runs) {
    const uint64_t pair_bytes = pairs.size() * sizeof pairs[0], run_bytes = runs.size() * sizeof runs[0];
    transport::stream::FrameHeader h;
    h.batch = batch;
    h.words[0] = static_cast<uint32_t>(pairs.size());
    h.words[1] = static_cast<uint32_t>(runs.size());
    h.body = pair_bytes + run_bytes;
    send(h);
    send(pairs.data(), pair_bytes);
    send(runs.data(), run_bytes);
  }
  // The end of `batch` on its only stream, tagged with the batch's number.
  void finish(BatchId batch, uint64_t bytes) {
    transport::stream::FrameHeader h;
    h.type = transport::stream::FrameType::kEnd;
    h.batch = batch;
    h.words[1] = 1;
    h.count = bytes;
    h.flags = transport::stream::kTagged;
    h.tag = batch;
    send(h);
  }
  transport::stream::FrameHeader hear() {
    transport::stream::FrameHeader h;
    sys::recv_exact(socket.get(), {reinterpret_cast<std::byte*>(&h), sizeof h}, Clock::now() + kPatience);
    return h;
  }

  sys::UniqueFd socket;
};

}  // namespace conformance
