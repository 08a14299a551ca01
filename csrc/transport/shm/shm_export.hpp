// Handing a region's shared pages to a peer, and mapping those of a peer's region. The owner encodes segments and
// descriptors into one message; the other end checks it and lays the pieces out contiguously. Poll thread only.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/types.hpp"
#include "sys/fd.hpp"
#include "sys/mapping.hpp"
#include "sys/shared_memory.hpp"

namespace pdxfer::transport::shm {

// More pieces than this do not fit one message.
inline constexpr size_t kMaxSegments = 2048;

// Empty, or why the view cannot go into one message.
std::string why_not_exportable(const std::vector<sys::Segment>& segments);

// The body of kSegments and, in `files`, each file once.
Bytes encode_segments(const Buffer& buffer, const std::vector<sys::Segment>& segments,
                      std::vector<std::shared_ptr<const sys::SharedFile>>& files);

// A peer's region in this process: whole pages, of which only [data, data + bytes) may be touched.
struct MappedRegion {
  sys::Mapping pages;
  std::byte* data = nullptr;
};

// Throws Error(kInvalid) when the message does not describe a region of `bytes`, kUnavailable when mapping fails.
MappedRegion map_segments(ByteView body, const std::vector<sys::UniqueFd>& fds, uint64_t bytes);

}  // namespace pdxfer::transport::shm
