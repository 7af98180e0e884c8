// What one process holds of the twin's CUDA driver. One mutex guards all of it and is given back while a call
// waits.
//
// Every context has one compute channel group, whose jobs run in the order they were submitted: so work of
// one stream is behind whatever the context submitted before, and "stream A waits for stream B" needs
// nothing. What the host does in stream order (host functions, and what stands behind them) is done by one
// thread a context, made at first need.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "twin/cuda/cuda_api.h"
#include "twin/rm/rm.hpp"
#include "twin/state/state.hpp"

#define EXPORT extern "C" [[gnu::visibility("default")]]

namespace bulkhead::twin::cuda {

using Lock = std::unique_lock<std::mutex>;
using Handle = std::uint32_t;  // of an RM object

inline constexpr std::uint64_t granule = 2UL << 20;        // of device memory
inline constexpr std::uint64_t pool_granule = 32UL << 20;  // what a stream-ordered pool reserves at a time
inline constexpr std::uint64_t default_kernel_ns = 5000;

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t to) { return (value + to - 1) / to * to; }

// ---- RM, through the C library's ioctl on the process's own open driver file (rm.cpp)
class Rm {
 public:
  CUresult open(const std::string& root);  // NO_DEVICE when there is no driver
  CUresult alloc(Handle parent, std::uint32_t cls, void* params, Handle wanted);
  CUresult alloc_memory(Handle device, std::uint64_t bytes, Handle& made);
  void free(Handle parent, Handle object);
  CUresult control(Handle object, std::uint32_t command, void* params, std::uint32_t size);
  CUresult duplicate(Handle parent, Handle client, Handle object, Handle& made);
  void lend(Handle object);  // other processes of this user may duplicate it
  Handle client() const { return client_; }
  Handle take_handle();                      // the lowest free one, as libcuda numbers
  Handle take_handles(std::uint32_t count);  // in a row
  void give_back(Handle first, std::uint32_t count = 1);
  const std::string& root() const { return root_; }

 private:
  std::string root_;
  int file_ = -1;
  Handle client_ = 0, next_ = 0x5c000001;
  std::set<Handle> free_;
};

// ---- memory
struct Device;

// Physical memory: one RM object, or for IPC and imports a handle to another process's.
struct Backing {
  Device* device = nullptr;
  Handle handle = 0;
  std::uint64_t bytes = 0;
  std::uint64_t references = 1;
  char* content = nullptr;  // what was written to its beginning; made at the first write
  std::uint64_t content_bytes = 0;
};

struct Mapping {  // of addresses
  std::uint64_t bytes = 0;
  Backing* backing = nullptr;
  std::uint64_t offset = 0;
};

enum class Kind { device, async, graph, ipc, managed, host, registered };

struct Pool;
struct GraphMemory;

struct Allocation {  // what one call returned
  Kind kind = Kind::device;
  std::uint64_t bytes = 0;
  CUcontext context = nullptr;
  Pool* pool = nullptr;            // of Kind::async
  std::uint64_t mapped_bytes = 0;  // the address space to give back
  std::uint64_t opens = 1;         // of Kind::ipc
  std::uint64_t id = 0;
  bool pooled = false;  // lies in a slab
  Handle object = 0;    // of host memory
  std::uint64_t ipc_source = 0;
};

struct Slab {  // 2 MiB that small allocations share
  CUdeviceptr base = 0;
  std::map<std::uint64_t, std::uint64_t> free;  // offset -> bytes
};

struct Point {                 // in a context's work
  std::uint64_t ticket = 0;    // of the channel group
  std::uint64_t deferred = 0;  // of the context's host thread
};

struct Block {  // of a pool's region
  std::uint64_t bytes = 0;
  bool used = false;
  CUcontext context = nullptr;  // where it was freed, and when
  CUstream stream = nullptr;
  Point freed;
};
struct PoolRegion {
  CUdeviceptr base = 0;
  std::vector<Backing*> chunks;
  std::map<std::uint64_t, Block> blocks;
};

struct Pool {
  Device* device = nullptr;
  bool is_default = false;
  int handle_types = 0;
  std::uint64_t max_bytes = 0, threshold = 0;
  std::uint64_t reserved = 0, reserved_high = 0, used = 0, used_high = 0;
  std::uint64_t flags[3] = {1, 1, 1};
  std::vector<std::unique_ptr<PoolRegion>> regions;
};

struct GraphMemory {  // of an allocation node and of the graphs instantiated from its graph
  Device* device = nullptr;
  CUdeviceptr base = 0;
  std::uint64_t bytes = 0, mapped_bytes = 0;
  std::vector<Backing*> chunks;  // while allocated
  ~GraphMemory();
};

// ---- devices
struct Device {
  int ordinal = 0;
  std::uint32_t gpu = 0;  // index in the twin, and RM's device instance
  std::string name, uuid, pci;
  std::uint32_t pci_domain = 0, pci_bus = 0, pci_device = 0, cc_major = 0, cc_minor = 0, multiprocessors = 0,
                clock_mhz = 0, memory_clock_mhz = 0, memory_bus_bits = 0, architecture = 0, numa = 0,
                nvlinks = 0, compute_mode = 0, ecc = 0, pci_id = 0, pci_subsystem = 0;
  std::uint32_t wrong = none;  // the multiprocessor that computes wrong (a fault, as of the process's start)
  int file = -1;
  Handle device = 0, subdevice = 0;
  std::uint64_t total = 0;
  std::uint64_t part = 0;  // of a MIG device: the memory of its instance
  CUcontext primary = nullptr;
  unsigned primary_count = 0, primary_flags = 0;
  Pool default_pool;
  Pool* pool = nullptr;               // the current one
  std::vector<Backing*> graph_cache;  // chunks no graph uses now
  Point graph_cache_free;             // when the last user of them is done
  CUcontext graph_cache_context = nullptr;
  std::uint64_t graph_reserved = 0, graph_reserved_high = 0, graph_used = 0, graph_used_high = 0;
};

}  // namespace bulkhead::twin::cuda

// ---- what CUDA's opaque handles point to
struct CUfunc_st {
  std::string name;
  std::uint64_t ns = bulkhead::twin::cuda::default_kernel_ns;
  std::uint64_t param_unit_ns = 0;  // not 0: the first parameter says how many of these
  bool faults = false;
  CUmodule module = nullptr;
  CUlibrary library = nullptr;
  int attributes[16] = {};
  // Computes what a kernel of this name does, on `device`; null: nothing (kernels.cpp).
  void (*work)(const bulkhead::twin::cuda::Device& device, const unsigned* size,
               void* const* params) = nullptr;
};
struct CUmod_st {
  CUcontext context = nullptr;
  std::map<std::string, std::unique_ptr<CUfunc_st>> functions;
};
struct CUlib_st {
  std::map<std::string, std::unique_ptr<CUfunc_st>> kernels;
  CUmod_st module;
};

namespace bulkhead::twin::cuda {
struct Capture {
  CUgraph graph = nullptr;
  CUstream origin = nullptr;
  int mode = 0;
  std::uint64_t id = 0;
  bool invalid = false;
  std::set<CUstream> streams;
};
struct EventState {  // of one recording
  CUcontext context = nullptr;
  Point point;
  bool submitted = false;  // point.ticket is known
  std::uint64_t done_ns = 0;
};
}  // namespace bulkhead::twin::cuda

struct CUstream_st {
  CUcontext context = nullptr;
  unsigned flags = 0;  // 1: does not wait for the legacy stream
  int priority = 0;
  std::uint64_t id = 0;
  bulkhead::twin::cuda::Point last;
  std::shared_ptr<bulkhead::twin::cuda::Capture> capture;
  std::vector<CUgraphNode> tail;  // while capturing: what the next node depends on
};
struct CUevent_st {
  CUcontext context = nullptr;
  unsigned flags = 0;
  std::shared_ptr<bulkhead::twin::cuda::EventState> state;  // null: never recorded
  std::shared_ptr<bulkhead::twin::cuda::Capture> capture;
  std::vector<CUgraphNode> tail;
};
struct CUarray_st {
  CUcontext context = nullptr;
  CUDA_ARRAY3D_DESCRIPTOR descriptor{};
  std::uint64_t element = 0;
  CUdeviceptr base = 0;
  bool owned = true;
};
struct CUmipmappedArray_st {
  CUcontext context = nullptr;
  CUDA_ARRAY3D_DESCRIPTOR descriptor{};
  CUdeviceptr base = 0;
  std::uint64_t bytes = 0;
  std::vector<std::unique_ptr<CUarray_st>> levels;
};
struct CUgraphNode_st {
  int type = CU_GRAPH_NODE_TYPE_EMPTY;
  CUgraph graph = nullptr;
  std::vector<CUgraphNode> after;
  bool enabled = true;
  std::uint64_t ns = 0;  // of a kernel
  CUDA_KERNEL_NODE_PARAMS kernel{};
  CUDA_MEMCPY3D copy{};
  CUDA_MEMSET_NODE_PARAMS set{};
  CUDA_HOST_NODE_PARAMS host{};
  CUDA_MEM_ALLOC_NODE_PARAMS alloc{};
  std::shared_ptr<bulkhead::twin::cuda::GraphMemory> memory;
  CUdeviceptr pointer = 0;  // of a free node
  CUevent event = nullptr;
  std::shared_ptr<CUgraph_st> child;
};
struct CUgraph_st {
  std::vector<std::unique_ptr<CUgraphNode_st>> nodes;
};
struct CUgraphExec_st {
  std::shared_ptr<CUgraph_st> graph;
  std::map<CUgraphNode, CUgraphNode> copies;  // of the nodes it was made from
  unsigned long long flags = 0;
  CUcontext context = nullptr;
};

struct CUctx_st {
  bulkhead::twin::cuda::Device* device = nullptr;
  unsigned flags = 0, version = 3020;
  bool primary = false, alive = false;
  std::uint64_t id = 0;
  CUresult sticky = CUDA_SUCCESS;
  struct Object {
    bulkhead::twin::cuda::Handle parent, handle;
  };
  std::vector<Object> objects;
  bulkhead::twin::cuda::Handle first_handle = 0, group = 0, local_memory = 0;
  CUdeviceptr internal_managed = 0;
  std::uint64_t stack_bytes = 1024,
                stack_made = 1024;  // a thread: asked for, and what local memory was made for
  std::uint64_t limits[8] = {1024, 1UL << 20, 8UL << 20, 2, 2048, 64, 0, 0};
  std::uint64_t last_ticket = 0, completed = 0, fault_ticket = 0;
  std::map<CUstream, std::shared_ptr<CUstream_st>> streams;
  std::shared_ptr<CUstream_st> legacy;
  std::map<pid_t, std::shared_ptr<CUstream_st>> of_threads;
  std::deque<std::shared_ptr<bulkhead::twin::cuda::EventState>> timed;  // events whose time is not read yet
  std::vector<std::unique_ptr<bulkhead::twin::cuda::Slab>> slabs;
  std::set<CUcontext> peers;
  // The host thread's queue.
  struct Deferred {
    std::shared_ptr<CUstream_st> stream;
    std::function<void(bulkhead::twin::cuda::Lock&)> run;
  };
  std::deque<Deferred> queue;
  std::uint64_t deferred = 0, deferred_done = 0;
  bool has_thread = false, stopping = false;
  std::condition_variable changed;
};

namespace bulkhead::twin::cuda {

struct Process {
  std::mutex mutex;
  bool initialised = false;
  bool forked = false;  // a child of a process that was initialised: the driver's file is not the child's
  Rm rm;
  int uvm = -1;
  std::unique_ptr<rm::Driver> driver;
  std::vector<std::unique_ptr<Device>> devices;
  std::uint64_t next_id = 1;
  std::set<CUcontext> contexts;  // ever made; a destroyed one stays, dead
  std::set<std::unique_ptr<CUctx_st>> owned_contexts;
  std::map<Backing*, std::unique_ptr<Backing>> backings;
  std::map<CUdeviceptr, Mapping> mappings;
  std::map<CUdeviceptr, std::uint64_t> reservations;  // of cuMemAddressReserve
  std::map<CUdeviceptr, Allocation> allocations;
  std::map<CUdeviceptr, std::shared_ptr<GraphMemory>> graph_memory;
  std::map<CUmemGenericAllocationHandle, std::pair<Backing*, std::uint64_t>>
      vmm;  // and how often it must be released
  std::set<std::unique_ptr<Pool>> pools;
  std::map<CUmodule, std::unique_ptr<CUmod_st>> modules;
  std::map<CUlibrary, std::unique_ptr<CUlib_st>> libraries;
  std::map<CUevent, std::unique_ptr<CUevent_st>> events;
  std::map<CUarray, std::unique_ptr<CUarray_st>> arrays;
  std::map<CUmipmappedArray, std::unique_ptr<CUmipmappedArray_st>> mipmaps;
  std::map<CUgraph, std::shared_ptr<CUgraph_st>> graphs;
  std::map<CUgraphExec, std::unique_ptr<CUgraphExec_st>> execs;
  std::uint64_t content_bytes = 0;  // host memory spent on what was written to device memory
};
Process& process();  // never destroyed: threads of the program may call while it exits

std::vector<CUcontext>& context_stack();  // of the calling thread
CUcontext current();                      // null: none

enum class Needs { nothing, driver, context };

// One API call: the lock, and why the call cannot be made.
class Call {
 public:
  explicit Call(Needs needs);
  CUresult error() const { return error_; }
  explicit operator bool() const { return error_ == CUDA_SUCCESS; }
  Lock& lock() { return lock_; }
  CUcontext context() const { return context_; }
  Device& device() const { return *context_->device; }

 private:
  Lock lock_;
  CUresult error_ = CUDA_SUCCESS;
  CUcontext context_ = nullptr;
};
#define ENTER(call, needs) \
  Call call(Needs::needs); \
  if (!(call)) return (call).error()

Device* device_of(CUdevice ordinal);  // null: none such
CUresult memory_info(Device& device, std::uint64_t& free_bytes, std::uint64_t& total_bytes);

// ---- contexts (context.cpp)
CUresult make_context(Device& device, unsigned flags, CUcontext& made);
void destroy_context(Lock& lock, CUcontext context);
CUresult fit_stack(CUcontext context);  // local memory as large as the stack limit wants

// ---- work (stream.cpp)
std::shared_ptr<CUstream_st> find_stream(CUcontext context, CUstream stream);  // null: no such stream
CUresult submit(Lock& lock, const std::shared_ptr<CUstream_st>& stream, std::uint64_t ns,
                bool faults = false);
CUresult do_in_order(Lock& lock, const std::shared_ptr<CUstream_st>& stream, std::function<void(Lock&)> what);
CUresult call_host(Lock& lock, const std::shared_ptr<CUstream_st>& stream, CUhostFn function, void* data);
CUresult record(Lock& lock, CUevent_st& event, const std::shared_ptr<CUstream_st>& stream);
CUresult wait_for_event(Lock& lock, CUevent_st& event, const std::shared_ptr<CUstream_st>& stream);
bool done(CUcontext context, const Point& point);  // looks, does not wait
CUresult wait(Lock& lock, CUcontext context, const Point& point);
CUresult wait_all(Lock& lock, CUcontext context);
CUresult fault_seen(CUcontext context);  // its sticky error, if it has one by now
void start_thread(CUcontext context);
void stop_thread(Lock& lock, CUcontext context);

// ---- memory (memory.cpp, pool.cpp)
CUdeviceptr reserve_addresses(std::uint64_t bytes, CUdeviceptr wanted = 0);
void free_addresses(CUdeviceptr base, std::uint64_t bytes);
Backing* add_backing(Device& device, Handle handle, std::uint64_t bytes);  // of an RM object there is
CUresult make_backing(Device& device, std::uint64_t bytes,
                      Backing*& made);  // tries again without what pools keep unused
void drop(Backing* backing);            // one reference less
void map(CUdeviceptr base, Backing* backing, std::uint64_t offset, std::uint64_t bytes);
void unmap(CUdeviceptr base);
CUresult allocate(CUcontext context, std::uint64_t bytes, CUdeviceptr& pointer);
void release(std::map<CUdeviceptr, Allocation>::iterator which);
std::map<CUdeviceptr, Allocation>::iterator allocation_at(CUdeviceptr pointer);  // that holds this address
CUresult map_managed(std::uint64_t bytes, CUdeviceptr& base);
void unmap_managed(CUdeviceptr base, std::uint64_t bytes);
CUresult pool_allocate(Pool& pool, CUstream_st& stream, std::uint64_t bytes, CUdeviceptr& pointer);
void pool_free(Pool& pool, CUdeviceptr pointer, CUstream_st& stream);
void pool_trim(Pool& pool, std::uint64_t keep);
void pool_empty(Pool& pool);
void settle_pools(CUcontext context);  // after waiting: what lies beyond each pool's threshold goes back
void trim_everything(Device& device);
void graph_cache_trim(Device& device);
CUresult graph_attach(GraphMemory& memory);
void graph_detach(GraphMemory& memory, CUcontext context, Point when);

// ---- content (copy.cpp)
void copy_bytes(std::uint64_t to, std::uint64_t from, std::uint64_t bytes);
void copy_3d(const CUDA_MEMCPY3D& copy);
void set_bytes(const CUDA_MEMSET_NODE_PARAMS& set);
CUDA_MEMCPY3D as_3d(const CUDA_MEMCPY2D& copy);

// ---- kernels that compute (kernels.cpp)
decltype(CUfunc_st::work) work_of(std::string_view name);

// ---- graphs (graph.cpp)
CUgraphNode add_node(CUgraph graph, int type, std::vector<CUgraphNode> after);
CUgraphNode capture_node(CUstream_st& stream, int type);  // behind what the stream captured before
std::uint64_t duration(const CUfunc_st& function, void* const* params, void* const* extra);

}  // namespace bulkhead::twin::cuda
