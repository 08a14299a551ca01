// PeerState: all that one engine knows of one other engine. Created by the handshake, then owned jointly by the engine
// (callers look things up) and the worker (which alone moves it). Which half a member belongs to is marked.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "engine/batch.hpp"
#include "engine/handshake.hpp"
#include "engine/region_table.hpp"

namespace pdxfer::engine {

class PeerState {
 public:
  PeerState(PeerId id, transport::Role role, Identity identity, FrameLink control, Choice choice)
      : id(id),
        accepted(role == transport::Role::kAccept),
        identity(std::move(identity)),
        address(control.who()),
        transport_name(choice.transport->name()),
        passed_over(std::move(choice.passed_over)),
        control(std::move(control)),
        link(std::move(choice.peer)),
        transport(choice.transport) {}

  // Fixed at creation: any thread.
  const PeerId id;
  const bool accepted;  // the other end connected to us
  const Identity identity;
  const std::string address;
  const std::string transport_name;
  const std::vector<std::pair<std::string, std::string>> passed_over;

  // Any thread, guarded inside.
  RegionTable regions;  // what the peer published
  bool alive() const noexcept { return alive_.load(std::memory_order_acquire); }
  std::string lost_reason() const {
    std::lock_guard lock(mutex_);
    return lost_reason_;
  }
  void mark_lost(std::string reason) {
    {
      std::lock_guard lock(mutex_);
      if (!alive()) return;
      lost_reason_ = std::move(reason);
      alive_.store(false, std::memory_order_release);
    }
    regions.close();
  }
  std::string link_text() const {
    std::lock_guard lock(mutex_);
    return link_text_;
  }
  void set_link_text(std::string text) {
    std::lock_guard lock(mutex_);
    link_text_ = std::move(text);
  }
  std::atomic<uint64_t> batches_sent{0}, bytes_sent{0}, batches_failed{0}, batches_arrived{0};

  // Under Worker's turn, from adoption on.
  FrameLink control;
  std::unique_ptr<transport::Peer> link;
  transport::Transport* const transport;
  std::vector<std::shared_ptr<Batch>> active;  // in the order of their turns
  std::set<RegionId> published;                // ours that this peer was told of
  std::set<RegionId> forgetting;               // theirs that they want back, once our batches into them are over
  std::set<RegionId> withdrawn;                // ours that we asked back and they have not let go of yet
  std::chrono::steady_clock::time_point last_heard{}, last_ping{};
  uint64_t fault_bytes = 0;  // moved so far, for Config::fault

 private:
  std::atomic<bool> alive_{true};
  mutable std::mutex mutex_;
  std::string lost_reason_, link_text_;
};

}  // namespace pdxfer::engine
