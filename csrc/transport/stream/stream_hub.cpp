// Peers, io threads and memory of a stream-based transport; see stream_hub.hpp.
#include "transport/stream/stream_hub.hpp"

#include <algorithm>
#include <utility>

#include "transport/stream/frame.hpp"
#include "transport/stream/stream_peer.hpp"

namespace pdxfer::transport::stream {

StreamHub::StreamHub(const Context& context, const char* transport)
    : limits_(context.limits), wake_(context.wake ? context.wake : [] {}), transport_(transport) {}

StreamHub::~StreamHub() = default;

Bytes StreamHub::register_memory(const Region& region) {
  regions_.add(region, transport_);
  return {};
}

void StreamHub::deregister_memory(RegionId region) {
  const Buffer buffer = regions_.remove(region);
  const std::lock_guard lock(mutex_);
  // New uses find no such region; one visit of every io thread ends the old ones.
  for (auto& loop : loops_)
    loop->run([&] {
      for (StreamPeer* peer : peers_) peer->revoke(*loop, region, buffer);
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
                                           std::string description) {
  if (channels.empty() || channels.size() > kMaxStreams)
    throw Error(Code::kInvalid, std::string(transport_) + ": a link needs 1 to 64 streams");
  std::unique_ptr<StreamPeer> peer;
  {
    const std::lock_guard lock(mutex_);
    const uint32_t threads = std::max(1u, limits_.io_threads);
    while (loops_.size() < threads)
      loops_.push_back(std::make_unique<IoLoop>("pdx-io-" + std::to_string(loops_.size())));
    peer = std::make_unique<StreamPeer>(*this, id, std::move(channels), std::move(description));
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
