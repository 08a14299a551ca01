// Config: every knob of an engine, and the only place in the project that reads the environment.
//
// Each field has one environment variable, PDXFER_<FIELD IN CAPITALS>, applied over the defaults by from_environment()
// and under what the caller sets. A value that does not parse throws Error(kInvalid) naming the variable; unknown
// PDXFER_* names are reported once as a warning. docs/configuration.md lists them for users; keep the two together.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace pdxfer {

struct Config {
  std::string host = "127.0.0.1";      // address to listen on and to give to peers; IPv4, IPv6 or a name
  uint32_t port = 0;                   // control port; 0: the kernel chooses
  std::string secret;                  // shared secret of the deployment; empty: peers are not authenticated
  std::string transports = "auto";     // "auto", or names in order of preference: "shm,tcp"
  std::string shm_path = "auto";       // how shm reaches the peer's memory: auto | map | cma | staging
  uint32_t tcp_streams = 0;            // connections per tcp peer, 1..64; 0: by where the peer is
  uint32_t io_threads = 0;             // threads that drive streams; 0: from the number of cores
  uint32_t copy_threads = 0;           // threads for host copies; 0: from the number of cores
  uint64_t chunk_bytes = 1 << 20;      // unit of pipelining and of fairness, 4 KiB..64 MiB
  uint64_t staging_bytes = 64 << 20;   // ring per direction of a staged peer, 1 MiB..16 GiB
  uint32_t max_batches = 4096;         // batches in flight per engine; more is back-pressure (kUnavailable)
  uint32_t connect_timeout_ms = 5000;  // bound of one connect(), handshake and set-up together
  uint32_t peer_timeout_ms = 3000;     // silence after which a peer counts as lost
  std::string cuda;                    // options of device memory: "sm_budget=16,path=map"; see core/cuda_options.hpp
  std::string rdma;                    // options of rdma: "devices=mlx5_0;mlx5_1,gid=3"; see core/rdma_options.hpp
  std::string log_level = "warning";   // debug | info | warning | error
  std::string fault;  // tests only: "throttle=50MB/s", "drop_after=1MiB", "refuse=shm", comma separated

  // Defaults, then the process's PDXFER_* variables. Throws Error(kInvalid).
  static Config from_environment();
  // Set one field from text, as the environment does. Throws Error(kInvalid) naming `origin`.
  void set(std::string_view field, std::string_view value, std::string_view origin);
  // Throws Error(kInvalid) naming the first field out of range.
  void validate() const;
  // Every field and its value as text (the secret as "***"), in declaration order.
  std::vector<std::pair<std::string, std::string>> items() const;
};

// The faults of Config::fault, parsed. All off by default.
struct Faults {
  uint64_t throttle_bytes_per_s = 0;           // a worker moves at most this much
  uint64_t drop_after_bytes = 0;               // a connection is cut after this many bytes of payload were submitted
  std::vector<std::string> refuse;             // transports that answer "unavailable" to connect
  static Faults parse(std::string_view text);  // throws Error(kInvalid)
};

}  // namespace pdxfer
