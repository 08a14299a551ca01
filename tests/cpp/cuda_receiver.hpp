// A receiver in a process of its own, over the fake CUDA driver, and a sender in the test's: for the tests of cuda_ipc
// between two processes. The receiver compares what arrived in its two regions.
#pragma once

#include <doctest/doctest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <string>
#include <thread>

#include "engine/engine.hpp"
#include "fake/fake_cuda.hpp"

namespace cuda_processes {

using namespace pdxfer;
using Clock = std::chrono::steady_clock;
constexpr uint64_t kPool = 4 << 20;

struct Board {  // shared by both processes
  std::atomic<bool> ready{false}, stop{false};
  char address[64] = {};
  RegionId plain = 0, pieces = 0;
  std::atomic<uint64_t> arrivals{0};
  std::atomic<int> wrong{-1};  // bytes, once the receiver compared
};

inline Config config(const std::string& cuda = "") {
  Config made;
  made.transports = "cuda_ipc";
  made.cuda = cuda;
  return made;
}

[[noreturn]] inline void receive(Board& board, const Config& with) {
  fake_cuda::install();
  std::byte* const plain = fake_cuda::allocate(1, kPool);
  std::byte* const pieces = fake_cuda::allocate_pieces(1, 3);
  engine::Engine engine(with);
  board.plain = engine.register_memory({plain, kPool, 1}).id;
  board.pieces = engine.register_memory({pieces + 4096, kPool, 1}).id;  // from within the first piece to the third
  std::snprintf(board.address, sizeof board.address, "%s", engine.address().c_str());
  board.ready = true;
  while (!board.stop) {
    if (!engine.poll(16).empty() && ++board.arrivals == 2) {
      int wrong = 0;
      for (uint64_t i = 0; i < kPool; ++i) wrong += plain[i] != pieces[4096 + i] || plain[i] == std::byte{0};
      board.wrong = wrong;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  engine.close();
  ::_exit(0);
}

struct Receiver {
  explicit Receiver(const Config& with = config())
      : board(new(::mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)) Board) {
    pid = ::fork();
    if (pid == 0) receive(*board, with);
    for (int i = 0; i < 30000 && !board->ready; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    REQUIRE(board->ready);
  }
  Receiver(const Receiver&) = delete;
  ~Receiver() {
    board->stop = true;
    ::waitpid(pid, nullptr, 0);
    ::munmap(board, sizeof(Board));
  }
  // Bytes that differ between the two regions, once both have arrived; -1: they did not in time.
  int wrong() const {
    for (int i = 0; i < 8000 && board->wrong < 0; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return board->wrong;
  }
  Board* board;
  pid_t pid = 0;
};

inline std::shared_ptr<TransferPlan> whole(RegionId src, RegionId dst, uint64_t page) {
  PagedCopy copy;
  copy.pairs = {{src, dst, 0, 0, page, page, page}};
  copy.runs = {{0, 0, static_cast<uint32_t>(kPool / page)}};
  copy.seal();
  auto plan = std::make_shared<TransferPlan>();
  plan->copies.push_back(copy);
  return plan;
}

inline Status finish(const std::shared_ptr<engine::Batch>& batch) {
  REQUIRE(batch->wait_until(Clock::now() + std::chrono::seconds(8)));
  return batch->status();
}

struct Source {
  Source() : memory(fake_cuda::allocate(0, kPool)) {
    for (uint64_t i = 0; i < kPool; ++i) memory[i] = static_cast<std::byte>(i % 251 + 1);
  }
  Source(const Source&) = delete;
  ~Source() { fake_cuda::release(memory); }
  std::byte* memory;
};

// An engine with one region on device 0, connected to a receiver.
struct Sender {
  explicit Sender(const Receiver& to, const Config& with = config())
      : engine(with),
        mine(engine.register_memory({source.memory, kPool, 0}).id),
        peer(engine.connect(to.board->address, std::chrono::seconds(8))) {}

  std::shared_ptr<engine::Batch> submit(RegionId to, uint64_t page, uint64_t tag) {
    return engine.submit(peer, whole(mine, to, page), tag, {});
  }
  Status move(RegionId to, uint64_t page, uint64_t tag) { return finish(submit(to, page, tag)); }
  // Does explain() say so? Its text is made anew with every heartbeat.
  bool said(const char* what) {
    for (int i = 0; i < 8000; ++i) {
      if (engine.peer(peer)->link_text().find(what) != std::string::npos) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return false;
  }

  const Source source;
  engine::Engine engine;
  const RegionId mine;
  const PeerId peer;
};

}  // namespace cuda_processes
