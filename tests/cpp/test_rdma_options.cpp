// The options of Config::rdma: every one, and errors that name the option and what it allows.
#include <doctest/doctest.h>

#include <string>

#include "core/config.hpp"
#include "core/rdma_options.hpp"
#include "core/status.hpp"

using pdxfer::RdmaOptions;

namespace {

std::string complaint(std::string_view text) {
  try {
    (void)RdmaOptions::parse(text);
  } catch (const pdxfer::Error& error) {
    CHECK(error.code() == pdxfer::Code::kInvalid);
    return error.what();
  }
  return "";
}

bool has(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("nothing given: everything is chosen, and failure is noticed") {
  const RdmaOptions options = RdmaOptions::parse("");
  CHECK(options.devices.empty());
  CHECK(options.gid == -1);
  CHECK(options.gpu == -1);
  CHECK_FALSE(options.pkey.has_value());
  CHECK(options.retry < 7);
  CHECK(options.path == RdmaOptions::Path::kAuto);
}

TEST_CASE("every option is read") {
  const RdmaOptions options = RdmaOptions::parse(
      "devices=mlx5_0;mlx5_1:2,gpu=3,gid=5,pkey=0x8001,sl=2,tc=106,mtu=2048,timeout=18,retry=3,rnr_retry=1,qps=4,path="
      "packed");
  CHECK(options.devices == std::vector<std::string>{"mlx5_0", "mlx5_1:2"});
  CHECK(options.gpu == 3);
  CHECK(options.gid == 5);
  CHECK(options.pkey == 0x8001);
  CHECK(options.service_level == 2);
  CHECK(options.traffic_class == 106);
  CHECK(options.mtu == 2048);
  CHECK(options.timeout == 18);
  CHECK(options.retry == 3);
  CHECK(options.rnr_retry == 1);
  CHECK(options.queue_pairs == 4);
  CHECK(options.path == RdmaOptions::Path::kPacked);
  CHECK(RdmaOptions::parse("path=direct,gid=auto").path == RdmaOptions::Path::kDirect);
}

TEST_CASE("a wrong option is named with what it allows") {
  CHECK(has(complaint("mtu=9000"), "rdma option mtu=9000: expected one of 256, 512, 1024, 2048, 4096"));
  CHECK(has(complaint("retry=8"), "rdma option retry=8: expected a whole number from 0 to 7"));
  CHECK(has(complaint("sl=0x"), "sl=0x"));
  CHECK(has(complaint("sl=-1"), "from 0 to 15"));
  CHECK(has(complaint("qps=0"), "from 1 to 64"));
  CHECK(has(complaint("tc=106x"), "tc=106x"));
  CHECK(has(complaint("path=fast"), "one of auto, direct, packed"));
  CHECK(has(complaint("devices="), "devices"));
  CHECK(has(complaint("devices=mlx5_0;"), "separated by ';'"));
  CHECK(has(complaint("devices=mlx5_0;mlx5_0"), "twice"));
  CHECK(has(complaint("devices=mlx5_0:0"), "port"));
  CHECK(has(complaint("devices=../etc"), "separated by ';'"));
  CHECK(has(complaint("speed=11"), "\"speed\" is not known"));
  CHECK(has(complaint("gid"), "has no '='"));
  CHECK(has(complaint("gid=1,gid=2"), "given twice"));
}

TEST_CASE("the setting is checked with the others") {
  pdxfer::Config config;
  config.set("rdma", "gid=3", "PDXFER_RDMA");
  config.validate();
  config.set("rdma", "gid=x", "PDXFER_RDMA");
  CHECK_THROWS_AS(config.validate(), pdxfer::Error);
}
