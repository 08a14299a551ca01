// See shm_export.hpp. Body: u64 offset of the region in the first page, u32 segments, then {u64 bytes, u64 offset in
// the file, u32 index of the descriptor} each.
#include "transport/shm/shm_export.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>

#include "core/codec.hpp"
#include "sys/proc_maps.hpp"
#include "sys/seqpacket.hpp"

namespace pdxfer::transport::shm {
namespace {

using Files = std::vector<std::shared_ptr<const sys::SharedFile>>;

Files files_of(const std::vector<sys::Segment>& segments) {
  Files files;
  for (const sys::Segment& s : segments)
    if (std::find(files.begin(), files.end(), s.file) == files.end()) files.push_back(s.file);
  return files;
}

Error malformed(const char* what) { return Error(Code::kInvalid, std::string("shm: a peer's segments: ") + what); }

// Mapping past the end of a file would be SIGBUS at the first store.
void require_size(int fd, uint64_t end) {
  struct stat info {};
  if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) throw malformed("a descriptor is no file");
  if (info.st_size < 0 || static_cast<uint64_t>(info.st_size) < end) throw malformed("a file is too short");
}

}  // namespace

std::string why_not_exportable(const std::vector<sys::Segment>& segments) {
  if (segments.size() <= kMaxSegments && files_of(segments).size() <= sys::kMaxFds) return "";
  return "its memory lies in " + std::to_string(segments.size()) + " pieces of shared memory, too many to hand over";
}

Bytes encode_segments(const Buffer& buffer, const std::vector<sys::Segment>& segments, Files& files) {
  files = files_of(segments);
  Writer writer;
  writer.integer(static_cast<uint64_t>(buffer.data - segments.front().address));
  writer.integer(static_cast<uint32_t>(segments.size()));
  for (const sys::Segment& s : segments) {
    const auto file = std::find(files.begin(), files.end(), s.file) - files.begin();
    writer.integer(s.bytes).integer(s.offset).integer(static_cast<uint32_t>(file));
  }
  return writer.take();
}

MappedRegion map_segments(ByteView body, const std::vector<sys::UniqueFd>& fds, uint64_t bytes) {
  struct Piece {
    uint64_t bytes, offset;
    uint32_t file;
  };
  const uint64_t page = sys::page_bytes();
  Reader reader(body);
  const auto skip = reader.integer<uint64_t>();
  const auto count = reader.integer<uint32_t>();
  if (count == 0 || count > kMaxSegments) throw malformed("their number");
  std::vector<Piece> pieces(count);
  uint64_t total = 0;
  for (Piece& p : pieces) {
    p.bytes = reader.integer<uint64_t>();
    p.offset = reader.integer<uint64_t>();
    p.file = reader.integer<uint32_t>();
    uint64_t end = 0;
    if (!reader.ok() || p.file >= fds.size() || p.bytes == 0 || p.bytes % page != 0 || p.offset % page != 0 ||
        __builtin_add_overflow(p.offset, p.bytes, &end) || __builtin_add_overflow(total, p.bytes, &total))
      throw malformed("a field out of range");
    require_size(fds[p.file].get(), end);
  }
  if (!reader.done() || skip >= page || bytes > total || skip > total - bytes || total > uint64_t{1} << 62)
    throw malformed("their total");
  MappedRegion region;
  // As far from a multiple of a huge page as in the file, so that the owner's huge pages are huge here too.
  region.pages = sys::reserve_addresses(total + sys::kHugePage);
  const uint64_t lead = (pieces[0].offset - reinterpret_cast<uintptr_t>(region.pages.data())) & (sys::kHugePage - 1);
  std::byte* at = region.pages.data() + lead;
  for (const Piece& p : pieces) {
    if (::mmap(at, p.bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fds[p.file].get(),
               static_cast<off_t>(p.offset)) == MAP_FAILED)
      throw Error(Code::kUnavailable, "mapping " + std::to_string(p.bytes) + " bytes of a peer: " + errno_name(errno),
                  errno);
    at += p.bytes;
  }
  region.data = region.pages.data() + lead + skip;
  return region;
}

}  // namespace pdxfer::transport::shm
