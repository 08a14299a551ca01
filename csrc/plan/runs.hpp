// Run-finding: two arrays of page numbers, read side by side, become the runs of a copy.
//
// Called by make_copy.cpp on whatever thread plans a transfer. Pure: owns nothing, keeps nothing, throws
// Error(kInvalid) that names the first offending index and its value. One vectorised pass finds the breaks and the
// bounds together.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/types.hpp"

namespace pdxfer::plan {

struct RunOptions {
  // A destination page named twice is an error, because which of its two writers wins is not defined. State lists whose
  // rows may repeat with equal content set this; their runs keep the order of the arrays.
  bool allow_duplicates = false;
};

// Page src[i] goes to page dst[i]. Pages of a side must lie in [0, slots). Unless duplicates are allowed the runs come
// out in ascending order of destination, merged where both sides continue.
std::vector<Run> find_runs(std::span<const int32_t> src, std::span<const int32_t> dst, uint64_t src_slots,
                           uint64_t dst_slots, RunOptions options = {});
std::vector<Run> find_runs(std::span<const int64_t> src, std::span<const int64_t> dst, uint64_t src_slots,
                           uint64_t dst_slots, RunOptions options = {});

// The same without vector instructions: for tests that compare the two.
std::vector<Run> find_runs_portable(std::span<const int32_t> src, std::span<const int32_t> dst, uint64_t src_slots,
                                    uint64_t dst_slots, RunOptions options = {});

}  // namespace pdxfer::plan
