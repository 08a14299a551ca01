// cuda_ipc between two processes over the fake driver: memory mapped by handle and by pieces, a killed receiver, memory
// that may not be staged, and mappings that end with their regions.
#include <csignal>
#include <vector>

#include "cuda_receiver.hpp"

namespace cuda_processes {

TEST_CASE("memory of another process, by handle and by pieces, and no mapping left behind") {
  Receiver receiver;
  fake_cuda::install();
  {
    Sender sender(receiver);
    const Status plain = sender.move(receiver.board->plain, 1024, 1);
    CHECK_MESSAGE(plain.ok(), plain.to_string());
    const Status pieces = sender.move(receiver.board->pieces, 4096, 2);
    CHECK_MESSAGE(pieces.ok(), pieces.to_string());
    CHECK(fake_cuda::mappings() == 4);  // an allocation and three pieces
    CHECK(receiver.wrong() == 0);
    sender.engine.disconnect(sender.peer);
  }
  CHECK(fake_cuda::mappings() == 0);
}

TEST_CASE("checksums that only the sender asked for are verified") {
  Receiver receiver;
  fake_cuda::install();
  Sender sender(receiver, config("checksum=on"));
  CHECK(sender.said("which sum what they read"));
  for (const uint64_t tag : {1, 2}) {
    const Status status = sender.move(tag == 1 ? receiver.board->plain : receiver.board->pieces, 1024, tag);
    CHECK_MESSAGE(status.ok(), status.to_string());
  }
  CHECK(receiver.wrong() == 0);
}

TEST_CASE("what is staged has no checksum, and explain() says so") {
  Receiver receiver;
  fake_cuda::install();
  Sender sender(receiver, config("checksum=on,path=staging"));
  CHECK(sender.move(receiver.board->plain, 1024, 1).ok());
  CHECK(sender.said("no checksums of what is not mapped"));
}

TEST_CASE("a killed receiver is a lost peer within a second") {
  Receiver receiver;
  fake_cuda::install();
  fake_cuda::set_delay_us(2000);
  Sender sender(receiver);
  ::kill(receiver.pid, SIGSTOP);  // it acknowledges nothing
  const auto batch = sender.submit(receiver.board->plain, 1024, 1);
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
  Sender sender(receiver, config("path=map"));
  CHECK(sender.move(receiver.board->plain, 1024, 1).code == Code::kUnavailable);
  CHECK(sender.said("cuIpcOpenMemHandle"));
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
