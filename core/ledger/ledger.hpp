// What one tenant holds in the driver: an object tree with bytes, kept by watching the calls that make and
// free objects. Pure. The sum of device memory here equals what NVML reports for the tenant's processes
// (H100: to the MiB), so a cap on this sum is a cap on the real thing.
//
// The ledger is a fold over events: the same events give the same ledger, and snapshot() gives fewer events
// that give the same ledger again. Whoever keeps the events survives its own death.
//
// When in doubt it holds too much, never too little: a call of which only the request was seen (hearsay)
// cannot take bytes out; exported bytes stay until their exporter has ended and somebody who looked at all
// descriptors says that none holds them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <unordered_map>
#include <vector>

namespace bulkhead::ledger {

inline constexpr std::size_t max_gpus = 16;  // by the driver's device instance
inline constexpr std::size_t max_objects =
    131072;  // of one tenant: 141 GiB in chunks of 2 MiB, nearly twice. At the
             // bound new objects are not taken: full() says so beforehand
inline constexpr std::size_t max_processes = 4096;  // of one tenant at a time; likewise

enum class Kind : std::uint8_t {
  none,
  process,       // process; source_client: pid; bytes: start time
  process_gone,  // process; everything of its clients goes
  moved,         // clients of `process` at `fd` live on with process `cls` at fd `source_handle`
  object,  // process, fd, client, parent, handle, what, gpu, bytes, cls. A client not seen before begins here
  duplicate,  // client, parent, handle of source_client, source_handle: the same bytes
  import,     // client, parent, handle: bytes that another process is charged for
  free,       // client, handle, and all below
  exported,   // client, handle: descriptors may hold its bytes from now on, made by process; 0: which has ended
  kept,       // process, gpu, bytes: exported, with no handle left
  orphaned,   // gpu, bytes: exported by a process that has ended, with no handle left
  managed,    // process, gpu, bytes: all that it has mapped now
  unheld,     // no descriptor holds what ended processes exported
};

enum class What : std::uint8_t { other, client, device, subdevice, group, channel, memory };

struct Event {  // plain, of a fixed size: kept in memory that outlives the process
  Kind kind = Kind::none;
  What what = What::other;
  std::uint8_t hearsay = 0;  // the request was seen and not the answer
  std::uint8_t gpu = 0;
  std::uint32_t process = 0;  // a number that whoever writes events gives, never twice
  std::uint32_t client = 0, parent = 0, handle = 0, cls = 0;
  std::uint32_t source_client = 0, source_handle = 0;
  std::uint64_t bytes = 0;  // of a group: when it was born, ns
  std::int32_t fd = -1;
  std::uint32_t engine = 0;
};
static_assert(sizeof(Event) == 48);

struct Process {
  int pid = 0;
  std::uint64_t start_time = 0;
  std::uint64_t managed = 0;
  std::uint32_t managed_gpu = 0;
};

struct Group {
  std::uint32_t process = 0;
  std::uint32_t gpu = 0, engine = 0;
  std::uint32_t client = 0, subdevice = 0, handle = 0;
  std::vector<std::uint32_t> channels = {};
  std::uint64_t born_ns = 0;
  int fd = -1;
};

class Ledger {
 public:
  // False when it changed nothing: known already, not known at all, or no room.
  bool apply(const Event& event);

  // Bytes charged to the tenant on one GPU: memory, what exports keep, managed.
  std::uint64_t used(std::uint32_t gpu) const;
  std::uint64_t managed(std::uint32_t gpu) const { return gpu < max_gpus ? managed_[gpu] : 0; }
  bool full() const {
    return live_ + 3 >= max_objects;
  }  // an object may bring its client and its parent along

  bool knows(std::uint32_t client, std::uint32_t handle) const;
  // Whether freeing the handle frees anything known.
  bool covers(std::uint32_t client, std::uint32_t handle) const { return find(client, handle) != 0; }
  bool has_memory(std::uint32_t client, std::uint32_t handle) const;  // a handle to bytes itself
  // Whether bytes are charged that only a descriptor can still hold; `unheld` lets them go.
  bool orphans() const;
  std::optional<What> what(std::uint32_t client, std::uint32_t handle) const;
  // The GPU below which an object is; a client's when it has one device. nullopt: not known.
  std::optional<std::uint32_t> gpu_of(std::uint32_t client, std::uint32_t handle) const;
  // Where a process's managed memory counts: where it has a compute group, else its lowest device, else 0.
  std::uint32_t home_of(std::uint32_t process) const;

  const std::map<std::uint32_t, Process>& processes() const { return processes_; }
  std::vector<Group> groups() const;                        // those with channels
  std::uint64_t generation() const { return generation_; }  // changes with groups()
  // Descriptors through which a process has clients.
  std::vector<int> files_of(std::uint32_t process) const;
  std::vector<std::uint32_t> clients_of(std::uint32_t process, int fd) const;
  std::optional<std::pair<std::uint32_t, int>> owner_of(std::uint32_t client) const;  // process, fd

  // Events that make this ledger from an empty one, at most 2 * max_objects + 2 * max_processes of them.
  void snapshot(const std::function<void(const Event&)>& take) const;
  std::size_t size() const { return live_ + processes_.size(); }  // about how many that will be

 private:
  using Index = std::uint32_t;  // 0: none
  struct Node {
    std::uint32_t client = 0, handle = 0, cls = 0;
    What what = What::other;
    bool used = false, placeholder = false, imported = false;
    std::uint8_t gpu = no_gpu;
    Index parent = 0, first_child = 0, next = 0, previous = 0, block = 0;
    std::uint32_t process = 0, engine = 0;  // process: of a client
    int fd = -1;
    std::uint64_t born_ns = 0;
  };
  struct Block {  // bytes, however many handles they have
    std::uint64_t bytes = 0;
    std::uint32_t handles = 0, exporter = 0;  // 0: was not exported; has_ended
    std::uint8_t gpu = 0;
    bool used = false;
  };
  static constexpr std::uint8_t no_gpu = 0xff;
  static constexpr std::uint32_t has_ended = ~0U;
  static std::uint64_t key(std::uint32_t client, std::uint32_t handle) {
    return static_cast<std::uint64_t>(client) << 32U | handle;
  }

  Index find(std::uint32_t client, std::uint32_t handle) const;
  Index take_node();
  Index client_node(const Event& event);
  Index parent_node(const Event& event, Index client);
  void link(Index node, Index parent);
  void unlink(Index node);
  bool guarded(Index node) const;   // bytes or a group at it or below
  Index place(const Event& event);  // a node for the event's handle, or 0
  bool add(const Event& event);
  bool add_duplicate(const Event& event);
  void hold(Index node, Index block);
  void release(Index block);
  void give_back(Index node);
  void free_tree(Index node);
  bool end_process(std::uint32_t process);
  Index take_block();
  bool let_orphans_go();

  std::vector<Node> nodes_ = std::vector<Node>(1);
  std::vector<Index> free_nodes_;
  std::vector<Block> blocks_ = std::vector<Block>(1);
  std::vector<Index> free_blocks_;
  std::unordered_map<std::uint64_t, Index> by_handle_;
  std::map<std::uint32_t, Process> processes_;
  std::array<std::uint64_t, max_gpus> memory_{}, managed_{}, orphaned_{};
  std::size_t live_ = 0, imports_ = 0;  // live_: nodes and blocks without handles
  std::uint64_t generation_ = 0;
};

}  // namespace bulkhead::ledger
