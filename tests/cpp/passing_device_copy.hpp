// PassingDeviceCopy: hands every call to another DeviceCopy, for tests whose device does one thing differently.
#pragma once

#include <memory>
#include <utility>

#include "core/device_copy.hpp"

namespace conformance {

struct PassingDeviceCopy : pdxfer::DeviceCopy {
  explicit PassingDeviceCopy(std::unique_ptr<pdxfer::DeviceCopy> made) : inner(std::move(made)) {}
  pdxfer::Status prepare(const pdxfer::PagedCopy& copy, pdxfer::DeviceForm form, std::span<const uint64_t> src,
                         std::span<const uint64_t> dst, pdxfer::DeviceTables& tables) noexcept override {
    return inner->prepare(copy, form, src, dst, tables);
  }
  void release(pdxfer::DeviceTables tables) noexcept override { inner->release(tables); }
  pdxfer::Status launch(pdxfer::DeviceTables tables, const pdxfer::PagedCopy& copy, pdxfer::Cursor& cursor,
                        uint64_t budget, uint64_t buffer, pdxfer::DeviceTicket& ticket) noexcept override {
    return inner->launch(tables, copy, cursor, budget, buffer, ticket);
  }
  pdxfer::Status done(pdxfer::DeviceTicket ticket, bool& over) noexcept override { return inner->done(ticket, over); }
  uint64_t sum(pdxfer::DeviceTicket ticket) const noexcept override { return inner->sum(ticket); }
  uint64_t landed(pdxfer::DeviceTicket ticket) const noexcept override { return inner->landed(ticket); }
  bool tells() const noexcept override { return inner->tells(); }
  std::string describe() const override { return inner->describe(); }

  const std::unique_ptr<pdxfer::DeviceCopy> inner;
};

}  // namespace conformance
