// Peers, io threads and memory of a stream-based transport; see stream_hub.hpp.
#include "transport/stream/stream_hub.hpp"

#include <algorithm>
#include <utility>

#include "transport/stream/frame.hpp"
#include "transport/stream/stream_peer.hpp"

namespace pdxfer::transport::stream {

StreamHub::StreamHub(const Context& context, const char* transport, TryDevices tried)
    : context_(context),
      limits_(context.limits),
      wake_(context.wake ? context.wake : [] {}),
      transport_(transport),
      tried_(tried) {}

StreamHub::~StreamHub() = default;

Bytes StreamHub::register_memory(const Region& region) {
  if (region.buffer.device != kHost && tried_ == TryDevices::kAtRegistration) try_device(region.buffer.device);
  regions_.add(region, transport_);
  return {};
}

void StreamHub::try_device(int ordinal) {
  const std::lock_guard lock(mutex_);
  if (std::ranges::find(devices_, ordinal) != devices_.end()) return;
  try {
    DeviceLane(context_, 0).add_device(ordinal);
  } catch (const Error& error) {
    throw Error(
        error.code(),
        std::string(transport_) + " cannot move memory of CUDA device " + std::to_string(ordinal) + ": " + error.what(),
        error.status().native);
  }
  devices_.push_back(ordinal);
}

void StreamHub::add_driver() {
  Driver driver;
  driver.lane = std::make_unique<DeviceLane>(context_, limits_.staging_bytes / std::max(1u, limits_.io_threads));
  driver.loop = std::make_unique<IoLoop>(static_cast<uint32_t>(drivers_.size()), limits_.io_threads);
  drivers_.push_back(std::move(driver));
}

void StreamHub::deregister_memory(RegionId region) {
  const Buffer buffer = regions_.remove(region);
  const std::lock_guard lock(mutex_);
  // New uses find no such region; one visit of every io thread ends the old ones.
  for (auto& driver : drivers_)
    driver.loop->run([&] {
      for (StreamPeer* peer : peers_) peer->revoke(*driver.loop, region, buffer);
    });
}

size_t StreamHub::poll(std::span<Completion> out) {
  const std::lock_guard lock(mutex_);
  size_t n = 0;
  for (size_t i = 0; i < peers_.size() && n < out.size(); ++i)
    n += peers_[(next_peer_ + i) % peers_.size()]->poll(out.subspan(n));
  if (n == out.size()) ++next_peer_;  // so that a busy peer does not starve the others
  return n;
}

std::unique_ptr<Peer> StreamHub::make_peer(PeerId id, std::vector<std::unique_ptr<Channel>> channels,
                                           std::string description, std::unique_ptr<SlotRing> ring) {
  if (channels.empty() || channels.size() > kMaxStreams || (ring && channels.size() > 1))
    throw Error(Code::kInvalid, std::string(transport_) + ": a link needs 1 to 64 streams, and with a ring one");
  std::unique_ptr<StreamPeer> peer;
  {
    const std::lock_guard lock(mutex_);
    const uint32_t threads = std::max(1u, limits_.io_threads);
    while (drivers_.size() < threads) add_driver();
    peer = std::make_unique<StreamPeer>(*this, id, std::move(channels), std::move(description), std::move(ring));
    peers_.push_back(peer.get());
  }
  peer->start();
  return peer;
}

void StreamHub::forget(StreamPeer* peer) {
  const std::lock_guard lock(mutex_);
  std::erase(peers_, peer);
}

}  // namespace pdxfer::transport::stream
