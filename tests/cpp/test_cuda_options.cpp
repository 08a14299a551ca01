// Config::cuda: what parses to what, and that a mistake names the option.
#include <doctest/doctest.h>

#include <string>

#include "core/cuda_options.hpp"
#include "core/status.hpp"

namespace pdxfer {

static std::string refusal(const char* text) {
  try {
    (void)CudaOptions::parse(text);
  } catch (const Error& error) {
    CHECK(error.code() == Code::kInvalid);
    return error.what();
  }
  return "";
}

TEST_CASE("options of cuda") {
  CHECK(CudaOptions::parse("").sm_budget == 0);
  const CudaOptions options = CudaOptions::parse("sm_budget=16,path=staging,copy_engine=off,checksum=on");
  CHECK(options.sm_budget == 16);
  CHECK(options.path == CudaOptions::Path::kStaging);
  CHECK_FALSE(options.copy_engine);
  CHECK(options.checksum);
  CHECK_FALSE(CudaOptions::parse("").checksum);
  CHECK(CudaOptions::parse("path=map").path == CudaOptions::Path::kMap);
}

TEST_CASE("a mistake names the option and what is expected") {
  CHECK(refusal("sm_budget=many") == "cuda option sm_budget=many: expected a whole number from 0 to 1024");
  CHECK(refusal("path=direct") == "cuda option path=direct: expected one of auto, map, staging");
  CHECK(refusal("copy_engine=1").find("one of auto, off") != std::string::npos);
  CHECK(refusal("checksum=crc32") == "cuda option checksum=crc32: expected one of on, off");
  CHECK(refusal("blocks=3").find("\"blocks\" is not known") != std::string::npos);
  CHECK(refusal("path").find("has no '='") != std::string::npos);
  CHECK(refusal("path=map,path=map").find("given twice") != std::string::npos);
}

}  // namespace pdxfer
