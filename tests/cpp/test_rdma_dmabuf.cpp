// How rdma reaches GPU memory, over the fake driver and the fake verbs table: by dma-buf where it can, else through
// nvidia-peermem, else not at all, each with its reasons; and whose GPU's NICs are asked for. By ctest.
#include <map>

#include "conformance_link.hpp"
#include "fake/fake_cuda.hpp"
#include "fake_verbs.hpp"
#include "transport/rdma/rdma_transport.hpp"

using namespace pdxfer;
using namespace conformance;

namespace {

constexpr int kPorts = 2;

std::unique_ptr<Transport> make(Context context) {
  return transport::make_rdma_on(std::move(context), fake::table(), fake::devices(kPorts));
}

// The fakes as they are by default, and memory of GPU 0 for what the case adds.
struct Scene {
  explicit Scene(
      std::byte* (*allocate)(size_t) = [](size_t n) { return fake_cuda::allocate(0, n); },
      void (*release)(std::byte*) = &fake_cuda::release) {
    fake_cuda::install();
    reset();
    memory_kind = {0, allocate, release};
  }
  ~Scene() {
    reset();
    memory_kind = {};
  }
  static void reset() {
    fake::reset_faults();
    fake_cuda::set_dmabuf(fake_cuda::Dmabuf::kWorks);
  }
};

// Moves all of one GPU's region into another's, and returns what explain() would say.
std::string moved(uint64_t bytes) {
  End a(make), b(make);
  Memory& src = a.add(1, bytes);
  Memory& dst = b.add(2, bytes);
  Pair pair(a, b);
  Batches batches;
  batches.push_back(std::make_unique<Batch>(*pair.ab, 1, plan_of(whole_copy(src, dst, 1024)), 1));
  expect_plan(batches[0]->plan, a.memories, b.memories);
  REQUIRE(run(pair, batches, a));
  REQUIRE(a.find_sent(1) != nullptr);
  CHECK_MESSAGE(a.find_sent(1)->status.ok(), a.find_sent(1)->status.to_string());
  CHECK(b.memory_as_expected());
  return pair.ab->describe();
}

std::string refusal(uint64_t bytes) {
  End end(make);
  Memory memory(5, bytes, 1);
  try {
    (void)end.transport->register_memory(memory.region());
  } catch (const Error& error) {
    CHECK(error.code() == Code::kUnavailable);
    return error.what();
  }
  FAIL("registered");
  return "";
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

// Memory of separately made pieces, by its size: the hook of MemoryKind is told only where it begins.
std::map<std::byte*, size_t> pieces_of;
std::byte* allocate_pieces(size_t bytes) {
  const size_t count = (bytes + (2 << 20) - 1) / (2 << 20);
  std::byte* made = fake_cuda::allocate_pieces(0, count);
  pieces_of[made] = count;
  return made;
}
void release_pieces(std::byte* memory) { fake_cuda::release_pieces(memory, pieces_of.at(memory)); }

}  // namespace

TEST_CASE("GPU memory goes by dma-buf, once a port, wherever in its page it begins") {
  const Scene scene;
  const auto before = fake::counts().dmabufs;
  const std::string said = moved(1 << 20);  // between guards of 256 bytes: not at the beginning of a page
  CHECK(fake::counts().dmabufs == before + 2 * kPorts);
  CHECK_MESSAGE(has(said, "1 dma-buf"), said);
  CHECK(fake::counts().mrs == 0);
}

TEST_CASE("memory mapped from many pieces is one dma-buf, and copies cross the pieces") {
  const Scene scene(&allocate_pieces, &release_pieces);
  const auto before = fake::counts().dmabufs;
  const std::string said = moved(7 << 20);
  CHECK(fake::counts().dmabufs == before + 2 * kPorts);
  CHECK_MESSAGE(has(said, "1 dma-buf"), said);
}

TEST_CASE("without dma-buf nvidia-peermem, and explain says why") {
  const Scene scene;
  const auto before = fake::counts().dmabufs;
  SUBCASE("the driver refuses") {
    fake_cuda::set_dmabuf(fake_cuda::Dmabuf::kRefused);
    const std::string said = moved(1 << 20);
    CHECK_MESSAGE(has(said, "1 nvidia-peermem (dma-buf: cuMemGetHandleForAddressRange: "), said);
  }
  SUBCASE("the driver is too old") {
    fake_cuda::set_dmabuf(fake_cuda::Dmabuf::kOldDriver);
    const std::string said = moved(1 << 20);
    CHECK_MESSAGE(has(said, "no cuMemGetHandleForAddressRange (11.7"), said);
  }
  SUBCASE("the NIC's driver refuses") {
    fake::faults().no_dmabuf = 95;
    const std::string said = moved(1 << 20);
    CHECK_MESSAGE(has(said, "ibv_reg_dmabuf_mr on fake0"), said);
    CHECK_MESSAGE(has(said, "EOPNOTSUPP"), said);
  }
  CHECK(fake::counts().dmabufs == before);
}

TEST_CASE("without either, the region is refused with both reasons: the engine takes another transport") {
  const Scene scene;
  fake_cuda::set_dmabuf(fake_cuda::Dmabuf::kRefused);
  fake::faults().no_registration = 14;
  const std::string said = refusal(1 << 16);
  CHECK_MESSAGE(has(said, "dma-buf: cuMemGetHandleForAddressRange: "), said);
  CHECK_MESSAGE(has(said, "nvidia-peermem: "), said);
  CHECK_MESSAGE(has(said, "EFAULT"), said);
  CHECK_MESSAGE(has(said, "modprobe nvidia_peermem"), said);
  CHECK(fake::counts().mrs == 0);  // nothing is left of what one port had taken
}

TEST_CASE("the option gpu: a GPU that the driver lists, else an error that says what it lists") {
  const Scene scene;
  const auto on_gpu = [](int ordinal) {
    return Factory([ordinal](Context c) {
      c.rdma.gpu = ordinal;
      return make(std::move(c));
    });
  };
  CHECK(End(on_gpu(1)).transport != nullptr);
  try {
    const End end(on_gpu(2));
    FAIL("made");
  } catch (const Error& error) {
    CHECK(error.code() == Code::kUnavailable);
    CHECK_MESSAGE(has(error.what(), "gpu=2: the CUDA driver lists 2 GPU(s)"), error.what());
  }
}
