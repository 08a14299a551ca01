// The engine's table of regions: which plans fit it, whatever the order of ids in table and plan.
#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "engine/region_table.hpp"

using namespace pdxfer;
using engine::RegionTable;

namespace {

Region region(RegionId id, uint64_t bytes) {
  return {id, {reinterpret_cast<std::byte*>(uint64_t{id} << 20), bytes, kHost}};
}

// One slot of `bytes` from each region of `src` to region 1.
TransferPlan plan_from(const std::vector<RegionId>& src, uint64_t bytes) {
  TransferPlan plan;
  PagedCopy copy;
  for (const RegionId id : src) copy.pairs.push_back({id, 1, 0, 0, bytes, bytes, bytes});
  copy.runs.push_back({0, 0, 1});
  copy.seal();
  plan.copies.push_back(copy);
  return plan;
}

}  // namespace

TEST_CASE("a plan fits the regions it names, in any order of ids, and no others") {
  std::mt19937 random(1);
  std::vector<RegionId> ids(200);
  for (uint32_t i = 0; i < ids.size(); ++i) ids[i] = 1 + 3 * i;
  RegionTable table;
  std::shuffle(ids.begin(), ids.end(), random);
  for (const RegionId id : ids) table.add(region(id, 1000 + id));

  CHECK(table.check(plan_from(ids, 1000), Side::kSrc).ok());
  std::vector<RegionId> repeated = ids;
  repeated.insert(repeated.end(), ids.begin(), ids.end());
  std::shuffle(repeated.begin(), repeated.end(), random);
  CHECK(table.check(plan_from(repeated, 1000), Side::kSrc).ok());
  std::sort(ids.begin(), ids.end());
  CHECK(table.check(plan_from(ids, 1000), Side::kSrc).ok());

  for (const RegionId id : {ids.front(), ids[100], ids.back()}) {
    CAPTURE(id);
    CHECK(table.check(plan_from({id}, 1000 + id), Side::kSrc).ok());
    CHECK(table.check(plan_from({id}, 1001 + id), Side::kSrc).code == Code::kInvalid);
    CHECK(table.check(plan_from({id, id + 1}, 10), Side::kSrc).code == Code::kInvalid);
    CHECK(table.check(plan_from({id - 1, id}, 10), Side::kSrc).code == Code::kInvalid);
    REQUIRE(table.remove(id));
    CHECK(!table.remove(id));
    CHECK(table.check(plan_from({id}, 1), Side::kSrc).code == Code::kInvalid);
    CHECK(table.check(plan_from({ids[50], id, ids[51]}, 1), Side::kSrc).code == Code::kInvalid);
    CHECK(table.check(plan_from({ids[50], ids[51]}, 1000), Side::kSrc).ok());
  }
  CHECK(table.check(plan_from({kNoId}, 1), Side::kSrc).code == Code::kInvalid);
  CHECK(RegionTable().check(plan_from({1}, 1), Side::kDst).code == Code::kInvalid);
}

TEST_CASE("a region that was refused is not in the table") {
  RegionTable table;
  table.add(region(5, 100));
  Region clash = region(6, 100);
  clash.buffer.data = region(5, 100).buffer.data + 50;
  CHECK_THROWS_AS(table.add(clash), Error);
  Region twice = region(9, 100);
  twice.id = 5;
  CHECK_THROWS_AS(table.add(twice), Error);
  CHECK(table.size() == 1);
  CHECK(table.check(plan_from({6}, 1), Side::kSrc).code == Code::kInvalid);
  CHECK(table.check(plan_from({5}, 100), Side::kSrc).ok());
  CHECK(table.check(plan_from({5}, 101), Side::kSrc).code == Code::kInvalid);
}
