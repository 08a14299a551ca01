// cuda_ipc between two processes over the fake driver: memory mapped by handle and by pieces, a killed receiver, memory
// that may not be staged, and mappings that end with their regions.
#include <csignal>
#include <vector>

#include "cuda_receiver.hpp"

namespace cuda_processes {

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

TEST_CASE("with path=map, memory that cannot be mapped is refused with the reason, and the engine says which") {
  Receiver receiver;
  fake_cuda::install();
  fake_cuda::refuse_mapping(true);
  Source source;
  engine::Engine engine(config("path=map"));
  const RegionId mine = engine.register_memory({source.memory, kPool, 0}).id;
  const PeerId peer = engine.connect(receiver.board->address, std::chrono::seconds(8));
  CHECK(finish(engine.submit(peer, whole(mine, receiver.board->plain, 1024), 1, {})).code == Code::kUnavailable);
  for (int i = 0; i < 8000 && engine.peer(peer)->link_text().empty(); ++i)
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
  CHECK(engine.register_memory({source.memory, kPool, 0}).id != kNoId);
}

}  // namespace cuda_processes
