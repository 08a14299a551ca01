// cuda_ipc between two processes over the fake driver: memory mapped by handle and by pieces, a killed receiver, memory
// that cannot be mapped, and mappings that end with their regions.
#include <doctest/doctest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <thread>

#include "engine/engine.hpp"
#include "fake/fake_cuda.hpp"

namespace pdxfer {
namespace {

using Clock = std::chrono::steady_clock;
constexpr uint64_t kPool = 4 << 20;

struct Board {  // shared by both processes
  std::atomic<bool> ready{false}, stop{false};
  char address[64] = {};
  RegionId plain = 0, pieces = 0;
  std::atomic<uint64_t> arrivals{0};
  std::atomic<int> wrong{-1};  // bytes, once the receiver compared
};

Config config() {
  Config made;
  made.transports = "cuda_ipc";
  return made;
}

[[noreturn]] void receive(Board& board) {
  fake_cuda::install();
  std::byte* const plain = fake_cuda::allocate(1, kPool);
  std::byte* const pieces = fake_cuda::allocate_pieces(1, 3);
  engine::Engine engine(config());
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
  Receiver()
      : board(new(::mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)) Board) {
    pid = ::fork();
    if (pid == 0) receive(*board);
    for (int i = 0; i < 5000 && !board->ready; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    REQUIRE(board->ready);
  }
  ~Receiver() {
    board->stop = true;
    ::waitpid(pid, nullptr, 0);
    ::munmap(board, sizeof(Board));
  }
  Board* board;
  pid_t pid = 0;
};

std::shared_ptr<TransferPlan> whole(RegionId src, RegionId dst, uint64_t page) {
  PagedCopy copy;
  copy.pairs = {{src, dst, 0, 0, page, page, page}};
  copy.runs = {{0, 0, static_cast<uint32_t>(kPool / page)}};
  copy.seal();
  auto plan = std::make_shared<TransferPlan>();
  plan->copies.push_back(copy);
  return plan;
}

Status finish(const std::shared_ptr<engine::Batch>& batch) {
  REQUIRE(batch->wait_until(Clock::now() + std::chrono::seconds(8)));
  return batch->status();
}

struct Source {
  Source() : memory(fake_cuda::allocate(0, kPool)) {
    for (uint64_t i = 0; i < kPool; ++i) memory[i] = static_cast<std::byte>(i % 251 + 1);
  }
  ~Source() { fake_cuda::release(memory); }
  std::byte* memory;
};

}  // namespace

TEST_CASE("memory of another process, by handle and by pieces, and no mapping left behind") {
  Receiver receiver;
  fake_cuda::install();
  Source source;
  {
    engine::Engine engine(config());
    const RegionId mine = engine.register_memory({source.memory, kPool, 0}).id;
    const PeerId peer = engine.connect(receiver.board->address, std::chrono::seconds(8));
    const Status plain = finish(engine.submit(peer, whole(mine, receiver.board->plain, 1024), 1, {}));
    CHECK_MESSAGE(plain.ok(), plain.to_string());
    const Status pieces = finish(engine.submit(peer, whole(mine, receiver.board->pieces, 4096), 2, {}));
    CHECK_MESSAGE(pieces.ok(), pieces.to_string());
    CHECK(fake_cuda::mappings() == 4);  // an allocation and three pieces
    for (int i = 0; i < 8000 && receiver.board->wrong < 0; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    CHECK(receiver.board->wrong == 0);
    engine.disconnect(peer);
  }
  CHECK(fake_cuda::mappings() == 0);
}

TEST_CASE("a killed receiver is a lost peer within a second") {
  Receiver receiver;
  fake_cuda::install();
  fake_cuda::set_delay_us(2000);
  Source source;
  engine::Engine engine(config());
  const RegionId mine = engine.register_memory({source.memory, kPool, 0}).id;
  const PeerId peer = engine.connect(receiver.board->address, std::chrono::seconds(8));
  ::kill(receiver.pid, SIGSTOP);  // it acknowledges nothing
  const auto batch = engine.submit(peer, whole(mine, receiver.board->plain, 1024), 1, {});
  const auto killed = Clock::now();
  ::kill(receiver.pid, SIGKILL);
  CHECK(finish(batch).code == Code::kPeerLost);
  CHECK(Clock::now() - killed < std::chrono::seconds(1));
  fake_cuda::set_delay_us(0);
}

TEST_CASE("memory that cannot be mapped is refused with the reason, and the engine says which") {
  Receiver receiver;
  fake_cuda::install();
  fake_cuda::refuse_mapping(true);
  Source source;
  engine::Engine engine(config());
  const RegionId mine = engine.register_memory({source.memory, kPool, 0}).id;
  const PeerId peer = engine.connect(receiver.board->address, std::chrono::seconds(8));
  CHECK(finish(engine.submit(peer, whole(mine, receiver.board->plain, 1024), 1, {})).code == Code::kUnavailable);
  for (int i = 0; i < 2000 && engine.peer(peer)->link_text().empty(); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  CHECK(engine.peer(peer)->link_text().find("cuIpcOpenMemHandle") != std::string::npos);
  fake_cuda::refuse_mapping(false);
}

TEST_CASE("memory that is not of the device it is said to be on is refused") {
  fake_cuda::install();
  engine::Engine engine(config());
  Source source;
  CHECK_THROWS_AS(engine.register_memory({source.memory, kPool, 1}), Error);
  std::vector<std::byte> host(4096);
  CHECK_THROWS_AS(engine.register_memory({host.data(), 4096, 0}), Error);
  CHECK_THROWS_AS(engine.register_memory({host.data(), 4096, kHost}), Error);
  CHECK(engine.register_memory({source.memory, kPool, 0}).id != kNoId);
}

}  // namespace pdxfer
