// The staged way of cuda_ipc between two processes over the fake driver: memory that cannot be mapped arrives through
// the slots that both share and explain() says so, host memory rides along, and either end may be killed with slots in
// use.
#include <csignal>
#include <cstring>
#include <vector>

#include "cuda_receiver.hpp"

namespace cuda_processes {

TEST_CASE("memory that cannot be mapped arrives through shared slots, and explain() says why") {
  Receiver receiver;
  fake_cuda::install();
  fake_cuda::refuse_mapping(true);
  {
    Sender sender(receiver);
    const Status plain = sender.move(receiver.board->plain, 1024, 1);
    CHECK_MESSAGE(plain.ok(), plain.to_string());
    const Status pieces = sender.move(receiver.board->pieces, 4096, 2);
    CHECK_MESSAGE(pieces.ok(), pieces.to_string());
    CHECK(receiver.wrong() == 0);
    CHECK(fake_cuda::mappings() == 0);
    CHECK(sender.said("staged through pinned host memory: 2 regions"));
    CHECK(sender.said("cuIpcOpenMemHandle"));
    CHECK(sender.said("8 MiB sent in shared slots"));
  }
  fake_cuda::refuse_mapping(false);
}

TEST_CASE("host memory goes to device memory of a peer, staged, while device memory is mapped") {
  Receiver receiver;
  fake_cuda::install();
  Sender sender(receiver);
  std::vector<std::byte> host(sender.source.memory, sender.source.memory + kPool);
  const RegionId from_host = sender.engine.register_memory({host.data(), kPool, kHost}).id;
  const auto plan = whole(from_host, receiver.board->plain, 1024);
  plan->copies.push_back(whole(sender.mine, receiver.board->pieces, 4096)->copies[0]);
  for (const uint64_t tag : {1, 2}) {
    const Status status = finish(sender.engine.submit(sender.peer, plan, tag, {}));
    CHECK_MESSAGE(status.ok(), status.to_string());
  }
  CHECK(receiver.wrong() == 0);
  CHECK(fake_cuda::mappings() == 4);
  sender.engine.close();  // before `host` goes
}

TEST_CASE("a receiver killed with slots in its hands is a lost peer, and the next one is served") {
  fake_cuda::install();
  Receiver receiver(config("path=staging")), next(config("path=staging"));  // both before this process has threads
  fake_cuda::set_delay_us(2000);
  Sender sender(receiver, config("path=staging"));
  CHECK(sender.move(receiver.board->plain, 1024, 1).ok());
  ::kill(receiver.pid, SIGSTOP);  // it gives no slot back
  std::vector<std::shared_ptr<engine::Batch>> batches;
  for (uint64_t tag = 2; tag < 10; ++tag) batches.push_back(sender.submit(receiver.board->pieces, 1024, tag));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  ::kill(receiver.pid, SIGKILL);
  for (const auto& batch : batches) CHECK(finish(batch).code == Code::kPeerLost);
  fake_cuda::set_delay_us(0);
  const PeerId second = sender.engine.connect(next.board->address, std::chrono::seconds(8));
  CHECK(finish(sender.engine.submit(second, whole(sender.mine, next.board->plain, 1024), 20, {})).ok());
}

namespace {
struct Shared {  // between the receiving test and the sender that it kills
  std::atomic<bool> ready{false};
  char address[64] = {};
  RegionId region = 0;
};

[[noreturn]] void send_for_ever(const Shared& shared) {
  fake_cuda::install();
  fake_cuda::set_delay_us(300);
  const Source source;
  engine::Engine engine(config("path=staging"));
  const RegionId mine = engine.register_memory({source.memory, kPool, 0}).id;
  const PeerId peer = engine.connect(shared.address, std::chrono::seconds(8));
  for (uint64_t tag = 1;; ++tag) {
    std::vector<std::shared_ptr<engine::Batch>> batches;
    for (int i = 0; i < 3; ++i) batches.push_back(engine.submit(peer, whole(mine, shared.region, 1024), tag, {}));
    for (const auto& batch : batches) (void)batch->wait_until(Clock::now() + std::chrono::seconds(8));
  }
}
}  // namespace

TEST_CASE("after a sender was killed nothing is written any more, and the memory can be given away") {
  auto* shared =
      new (::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)) Shared;
  const pid_t sender = ::fork();
  if (sender == 0) {
    while (!shared->ready) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    send_for_ever(*shared);
  }
  fake_cuda::install();
  fake_cuda::set_delay_us(300);
  std::byte* const memory = fake_cuda::allocate(0, kPool);
  {
    engine::Engine engine(config("path=staging"));
    shared->region = engine.register_memory({memory, kPool, 0}).id;
    std::snprintf(shared->address, sizeof shared->address, "%s", engine.address().c_str());
    shared->ready = true;
    size_t arrived = 0;
    for (int i = 0; i < 20000 && arrived < 7; ++i) {
      arrived += engine.poll(16).size();
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK(arrived >= 7);
    ::kill(sender, SIGKILL);
    ::waitpid(sender, nullptr, 0);
    for (int i = 0; i < 8000 && engine.peers().at(0)->alive(); ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    CHECK_FALSE(engine.peers().at(0)->alive());
    std::memset(memory, 42, kPool);
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    size_t changed = 0;
    for (uint64_t i = 0; i < kPool; ++i) changed += memory[i] != std::byte{42};
    CHECK(changed == 0);
    engine.deregister_memory(shared->region);
  }
  fake_cuda::release(memory);
  fake_cuda::set_delay_us(0);
  ::munmap(shared, sizeof(Shared));
}

}  // namespace cuda_processes
