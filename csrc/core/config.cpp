// Parsing and checking of Config; see config.hpp.
#include "core/config.hpp"

#include <unistd.h>

#include <array>
#include <charconv>
#include <functional>
#include <string>

#include "core/cuda_options.hpp"
#include "core/log.hpp"
#include "core/rdma_options.hpp"
#include "core/status.hpp"

namespace pdxfer {
namespace {

[[noreturn]] void reject(std::string_view origin, std::string_view value, const std::string& want) {
  throw Error(Code::kInvalid, std::string(origin) + "=" + std::string(value) + ": expected " + want);
}

// "64MiB", "1000000", "50MB": a count with an optional binary or decimal suffix.
uint64_t parse_bytes(std::string_view origin, std::string_view text) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const std::string_view unit(end, static_cast<size_t>(text.data() + text.size() - end));
  static constexpr std::array<std::pair<std::string_view, uint64_t>, 8> kUnits{{{"", 1},
                                                                                {"B", 1},
                                                                                {"KiB", 1ull << 10},
                                                                                {"MiB", 1ull << 20},
                                                                                {"GiB", 1ull << 30},
                                                                                {"KB", 1000},
                                                                                {"MB", 1000000},
                                                                                {"GB", 1000000000}}};
  if (error == std::errc{} && end != text.data())
    for (const auto& [name, scale] : kUnits)
      if (unit == name && value <= UINT64_MAX / scale) return value * scale;
  reject(origin, text, "a number of bytes such as 1048576, 1MiB or 64MiB");
}

uint32_t parse_count(std::string_view origin, std::string_view text) {
  uint32_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || text.empty())
    reject(origin, text, "a whole number from 0 to 4294967295");
  return value;
}

struct Field {
  std::string_view name;
  std::string Config::*text = nullptr;
  uint32_t Config::*count = nullptr;
  uint64_t Config::*bytes = nullptr;
};

const std::array<Field, 17>& fields() {
  static constexpr auto T = [](std::string_view n, std::string Config::*p) { return Field{n, p, nullptr, nullptr}; };
  static constexpr auto N = [](std::string_view n, uint32_t Config::*p) { return Field{n, nullptr, p, nullptr}; };
  static constexpr auto B = [](std::string_view n, uint64_t Config::*p) { return Field{n, nullptr, nullptr, p}; };
  static constexpr std::array<Field, 17> kFields{
      T("host", &Config::host),
      N("port", &Config::port),
      T("secret", &Config::secret),
      T("transports", &Config::transports),
      T("shm_path", &Config::shm_path),
      N("tcp_streams", &Config::tcp_streams),
      N("io_threads", &Config::io_threads),
      N("copy_threads", &Config::copy_threads),
      B("chunk_bytes", &Config::chunk_bytes),
      B("staging_bytes", &Config::staging_bytes),
      N("max_batches", &Config::max_batches),
      N("connect_timeout_ms", &Config::connect_timeout_ms),
      N("peer_timeout_ms", &Config::peer_timeout_ms),
      T("cuda", &Config::cuda),
      T("rdma", &Config::rdma),
      T("log_level", &Config::log_level),
      T("fault", &Config::fault),
  };
  return kFields;
}

void check_range(std::string_view name, uint64_t value, uint64_t low, uint64_t high) {
  if (value < low || value > high)
    reject(name, std::to_string(value), "a value from " + std::to_string(low) + " to " + std::to_string(high));
}

void check_choice(std::string_view name, const std::string& value, std::initializer_list<std::string_view> choices) {
  std::string all;
  for (std::string_view choice : choices) {
    if (value == choice) return;
    all += (all.empty() ? "" : ", ") + std::string(choice);
  }
  reject(name, value, "one of " + all);
}

}  // namespace

void Config::set(std::string_view field, std::string_view value, std::string_view origin) {
  for (const Field& f : fields()) {
    if (f.name != field) continue;
    if (f.text != nullptr) this->*f.text = value;
    if (f.count != nullptr) this->*f.count = parse_count(origin, value);
    if (f.bytes != nullptr) this->*f.bytes = parse_bytes(origin, value);
    return;
  }
  throw Error(Code::kInvalid, std::string(origin) + ": no such setting; see docs/configuration.md for the list");
}

Config Config::from_environment() {
  Config config;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string_view text(*entry);
    if (!text.starts_with("PDXFER_")) continue;
    const size_t equals = text.find('=');
    if (equals == std::string_view::npos) continue;
    const std::string_view name = text.substr(0, equals);
    std::string field(name.substr(7));
    for (char& c : field)
      if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    bool known = false;
    for (const Field& f : fields()) known = known || f.name == field;
    if (known)
      config.set(field, text.substr(equals + 1), name);
    else
      log(LogLevel::kWarning,
          std::string(name) + " is not a pdxfer setting and has no effect; see docs/configuration.md");
  }
  config.validate();
  return config;
}

void Config::validate() const {
  check_range("port", port, 0, 65535);
  check_choice("shm_path", shm_path, {"auto", "map", "cma", "staging"});
  check_range("tcp_streams", tcp_streams, 0, 64);
  check_range("io_threads", io_threads, 0, 64);
  check_range("copy_threads", copy_threads, 0, 64);
  check_range("chunk_bytes", chunk_bytes, 4096, 64ull << 20);
  check_range("staging_bytes", staging_bytes, 1ull << 20, 16ull << 30);
  check_range("max_batches", max_batches, 1, 1u << 20);
  check_range("connect_timeout_ms", connect_timeout_ms, 1, 600000);
  check_range("peer_timeout_ms", peer_timeout_ms, 100, 600000);
  check_choice("log_level", log_level, {"debug", "info", "warning", "error"});
  if (host.empty()) reject("host", host, "an address or a name to listen on, such as 127.0.0.1 or ::");
  if (transports.empty()) reject("transports", transports, "auto, or names such as shm,tcp");
  (void)CudaOptions::parse(cuda);
  (void)RdmaOptions::parse(rdma);
  (void)Faults::parse(fault);
}

std::vector<std::pair<std::string, std::string>> Config::items() const {
  std::vector<std::pair<std::string, std::string>> all;
  for (const Field& f : fields()) {
    std::string value = f.text != nullptr    ? this->*f.text
                        : f.count != nullptr ? std::to_string(this->*f.count)
                                             : std::to_string(this->*f.bytes);
    if (f.name == "secret" && !value.empty()) value = "***";
    all.emplace_back(f.name, std::move(value));
  }
  return all;
}

Faults Faults::parse(std::string_view text) {
  Faults faults;
  while (!text.empty()) {
    const size_t comma = std::min(text.find(','), text.size());
    const std::string_view item = text.substr(0, comma);
    text.remove_prefix(std::min(comma + 1, text.size()));
    const size_t equals = item.find('=');
    const std::string_view name = item.substr(0, equals);
    std::string_view value = equals == std::string_view::npos ? std::string_view{} : item.substr(equals + 1);
    if (name == "throttle" && value.ends_with("/s")) {
      value.remove_suffix(2);
      faults.throttle_bytes_per_s = parse_bytes("fault throttle", value);
    } else if (name == "drop_after") {
      faults.drop_after_bytes = parse_bytes("fault drop_after", value);
    } else if (name == "refuse" && !value.empty()) {
      faults.refuse.emplace_back(value);
    } else {
      reject("fault", item, "throttle=BYTES/s, drop_after=BYTES or refuse=TRANSPORT");
    }
  }
  return faults;
}

}  // namespace pdxfer
