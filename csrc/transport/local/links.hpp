// The links of one transport between processes of one machine (shm, cuda_ipc): Links watches the socket of each and the
// process at its other end, and LinkPeer is the handle of one that the engine owns. Any thread but where it says so;
// a link lives as long as it is listed or in somebody's hands.
#pragma once

#include <sys/epoll.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "sys/poller.hpp"
#include "transport/transport.hpp"

namespace pdxfer::transport::local {

template <typename Link>
class Links {
 public:
  using Map = std::map<uint64_t, std::shared_ptr<Link>>;

  // From here on its messages are received. `process`: a descriptor that becomes readable when the other end's process
  // ends, -1: none. The socket may outlive its process in a forked child; the process's own end is always told.
  // Returns the link's number, from 1 on.
  uint64_t add(std::shared_ptr<Link> link, int socket, int process) {
    uint64_t number = 0;
    {
      const std::lock_guard lock(mutex);
      number = next_++;
      links_.emplace(number, std::move(link));
    }
    poller.add(socket, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, name(number, false));
    if (process >= 0) poller.add(process, EPOLLIN, name(number, true));
    return number;
  }

  void remove(uint64_t number, int socket, int process) noexcept {
    poller.remove(socket);
    if (process >= 0) poller.remove(process);
    const std::lock_guard lock(mutex);
    links_.erase(number);
  }

  std::vector<std::shared_ptr<Link>> all() const {
    std::vector<std::shared_ptr<Link>> found;
    const std::lock_guard lock(mutex);
    for (const auto& [number, link] : links_) found.push_back(link);
    return found;
  }

  const Map& listed() const noexcept { return links_; }  // with `mutex` held

  // Poll thread: hands an event of `poller` to its link, unless that was removed meanwhile.
  void dispatch(const sys::Poller::Event& event) {
    const auto named = reinterpret_cast<uintptr_t>(event.what);
    std::shared_ptr<Link> link;
    {
      const std::lock_guard lock(mutex);
      const auto found = links_.find(named / 2);
      if (found == links_.end()) return;
      link = found->second;
    }
    if (named % 2 == 0)
      link->receive();
    else
      link->process_exited();
  }

  sys::Poller poller;
  mutable std::mutex mutex;

 private:
  static void* name(uint64_t number, bool process) {
    return reinterpret_cast<void*>(static_cast<uintptr_t>(number * 2 + (process ? 1 : 0)));
  }

  Map links_;
  uint64_t next_ = 1;
};

// The link itself may live a moment longer, in the poll thread's hands.
template <typename Link, typename Key>
class LinkPeer final : public Peer {
 public:
  explicit LinkPeer(std::shared_ptr<Link> link) : link_(std::move(link)) { link_->start(link_); }
  ~LinkPeer() override { link_->stop(); }

  void import_region(const Region& region, ByteView key) override { link_->import(region, Key::decode(key)); }
  void forget_region(RegionId region) override { link_->forget(region); }
  Status submit(BatchId batch, const TransferPlan& plan, uint32_t copy_index, Cursor& cursor) override {
    return link_->submit(batch, plan, copy_index, cursor);
  }
  bool notify(BatchId batch, std::optional<uint64_t> tag, ByteView tail) override {
    return link_->notify(batch, tag, tail);
  }
  void cancel(BatchId batch) override { link_->cancel(batch); }
  Status lost() const override { return link_->lost(); }
  std::string describe() const override { return link_->describe(); }

 private:
  const std::shared_ptr<Link> link_;
};

}  // namespace pdxfer::transport::local
