#include "twin/rm/rm.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "abi/rm/rm.hpp"
#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"
#include "twin/rm/objects.hpp"
#include "twin/rm/page.hpp"
#include "twin/rm/scheduler.hpp"
#include "twin/rm/store.hpp"
#include "twin/state/state.hpp"

namespace bulkhead::twin::rm {

namespace fs = std::filesystem;

namespace {

constexpr std::uint32_t err_insufficient_resources = 0x1a;
constexpr std::uint32_t err_invalid_param_struct = 0x25;
constexpr std::uint32_t err_invalid_parameter = 0x3b;
constexpr std::uint32_t first_client = 0xc1d00001, client_numbers = 0xffff;
constexpr std::uint32_t first_chosen_handle = 0xcaf00000;
constexpr std::uint32_t params_limit = 4096;  // the largest parameters of a control that is answered here
constexpr std::uint64_t small_granularity = 64 << 10;
constexpr std::uint64_t reap_every_ns = 50'000'000;
constexpr std::uint64_t measure_every_ns = 1'000'000'000;

// A tenant may pass any address: the kernel's answer is EFAULT, so reading it must not kill the caller, who may be a
// supervisor. Where process_vm_readv is forbidden the address is trusted.
bool copy(void* local, std::uint64_t remote, std::size_t size, bool in) {
  if (size == 0) return true;
  void* there = reinterpret_cast<void*>(remote);  // NOLINT(performance-no-int-to-ptr)
  if (there == nullptr) return false;
  const iovec ours{local, size}, theirs{there, size};
  const ssize_t done = in ? ::process_vm_readv(::getpid(), &ours, 1, &theirs, 1, 0)
                          : ::process_vm_writev(::getpid(), &ours, 1, &theirs, 1, 0);
  if (done == static_cast<ssize_t>(size)) return true;
  if (done >= 0 || (errno != EPERM && errno != ENOSYS)) return false;
  if (in) {
    std::memcpy(local, there, size);
  } else {
    std::memcpy(there, local, size);
  }
  return true;
}
std::uint64_t address(const void* pointer) { return reinterpret_cast<std::uint64_t>(pointer); }

// The calling process, as the kernel's driver would see it.
Owner caller() {
  Owner owner{};
  owner.pid = static_cast<std::uint32_t>(::getpid());
  owner.uid = ::geteuid();
  owner.start_time = 1;
  const auto stat = read_file("/proc/self/stat", 4096);
  if (!stat.ok()) return owner;
  const auto open = stat->find('('), close = stat->rfind(')');
  if (open == std::string::npos || close == std::string::npos || close + 2 > stat->size()) return owner;
  owner.name.set(std::string_view(*stat).substr(open + 1, close - open - 1));
  const auto fields = split(std::string_view(*stat).substr(close + 2), ' ');
  if (fields.size() > 19) owner.start_time = std::max<std::uint64_t>(parse_u64(fields[19]).value_or(1), 1);
  return owner;
}

struct flock byte_of(std::uint64_t serial, short type) {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = static_cast<off_t>(serial);
  lock.l_len = 1;
  return lock;
}

// What the twin's state says that the driver needs.
struct World {
  bool stepped = false;
  std::uint32_t gpu_count = 0;
  std::uint64_t now_ns = 0;
  struct {
    bool there = false, ignores_slices = false, ignores_disable = false;
    std::uint64_t memory_bytes = 0, reserved_bytes = 0;
  } gpus[max_gpus] = {};
};

World look_at(const State& state) {
  World world;
  world.stepped = state.realtime == 0;
  world.now_ns = state.now_ns;
  world.gpu_count = state.gpu_count;
  for (std::uint32_t g = 0; g < state.gpu_count; ++g) {
    auto& gpu = world.gpus[g];
    const Chip& chip = state.chips[state.gpus[g].chip];
    gpu.there = state.gpus[g].on_pci != 0 && state.driver_loaded != 0;
    gpu.memory_bytes = chip.memory_bytes;
    gpu.reserved_bytes = std::min(chip.reserved_bytes, chip.memory_bytes);
    for (const Fault& fault : state.faults) {
      if (fault.remaining == 0 || (fault.gpu != none && fault.gpu != g)) continue;
      gpu.ignores_slices |= fault.kind == FaultKind::ignores_slices;
      gpu.ignores_disable |= fault.kind == FaultKind::ignores_disable;
    }
  }
  return world;
}

}  // namespace

struct Driver::Open {
  fs::path twin;
  std::unique_ptr<Store> store;
  std::unique_ptr<StateFile> state;
  UniqueFd control;  // nvidiactl through a description of our own, to ask who holds what locked
  std::unique_ptr<Objects> objects;
  std::unique_ptr<Scheduler> scheduler;
  World world;

  Page& page() const { return store->page(); }

  // ---- coming in, under the lock
  void enter(bool reap_now);
  void reap(bool now);
  void take_faults();
  void measure(std::uint32_t gpu);
  void leave();  // tells the twin's state what changed
  void report(Index charge);
  std::uint64_t memory_free(std::uint32_t gpu) const;
  template <class Test>
  bool any_charge(Test test) const {
    const Charge* first = page().charges + 1;
    return std::any_of(first, first + page().counters.charges.used,
                       [&](const Charge& charge) { return charge.used != 0 && test(charge); });
  }

  // ---- the file behind a descriptor; 0 with `error` set
  Index file_of(int fd, int& error);

  // ---- requests: RM's status
  std::uint32_t alloc(Index file, std::uint32_t root, std::uint32_t parent, std::uint32_t& handle, std::uint32_t cls,
                      std::span<std::byte> params, const Owner& owner);
  std::uint32_t free(Index file, const abi::Free& request);
  std::uint32_t dup(Index file, abi::Dup& request);
  std::uint32_t control_call(Index file, const abi::Control& request, std::span<std::byte> params);
  std::uint32_t group_control(Index object, std::uint32_t command, std::span<std::byte> params);
  std::uint32_t disable_channels(Index file, const Object& subdevice, abi::DisableChannels& params);
  std::uint32_t fb_info(std::uint32_t gpu, abi::FbInfo& params) const;
  std::uint32_t pids(std::uint32_t gpu, std::span<std::byte> params) const;
  std::uint32_t export_objects(Index file, const abi::Control& request, abi::ExportObjects& params);
  std::uint32_t import_objects(Index file, const abi::Control& request, ImportObjects& params);
  std::uint32_t choose_handle(std::uint32_t client);
  void schedule(Index group);
  Index group_named(GroupName name) const;
};

namespace {

// A parameter structure in its place; nothing when the sizes differ, as in RM.
template <class T>
T* as(std::span<std::byte> params) {
  return params.size() == sizeof(T) ? reinterpret_cast<T*>(params.data()) : nullptr;
}

// How many bytes of parameters an allocation has: libcuda leaves the size at 0, the class says it.
std::size_t params_of(std::uint32_t cls) {
  switch (cls) {
    case abi::class_device: return sizeof(abi::DeviceParams);
    case abi::class_device_memory: return sizeof(abi::MemoryParams);
    case abi::class_channel_group: return sizeof(abi::GroupParams);
    default: return 0;
  }
}

}  // namespace

// ---- coming in and going out

void Driver::Open::enter(bool reap_now) {
  state->read([&](const State& now) { world = look_at(now); });
  if (!world.stepped) world.now_ns = monotonic_ns();
  take_faults();
  for (std::uint32_t g = 0; g < world.gpu_count; ++g) scheduler->advance(g, world.now_ns);
  reap(reap_now);
  for (std::uint32_t g = 0; g < world.gpu_count; ++g) measure(g);
}

void Driver::Open::take_faults() {
  for (std::uint32_t g = 0; g < world.gpu_count; ++g) {
    Gpu& gpu = page().gpus[g];
    const auto& wanted = world.gpus[g];
    if ((gpu.ignores_slices != 0) == wanted.ignores_slices && (gpu.ignores_disable != 0) == wanted.ignores_disable)
      continue;
    scheduler->advance(g, world.now_ns);
    store->edit(gpu);
    gpu.ignores_slices = wanted.ignores_slices ? 1 : 0;
    gpu.ignores_disable = wanted.ignores_disable ? 1 : 0;
    // Mended: what was disabled meanwhile goes now.
    if (gpu.ignores_disable == 0 && gpu.loaded != 0 && scheduler->off(page().groups[gpu.loaded]))
      scheduler->take_off(gpu.loaded);
    store->commit();
  }
}

// The driver frees a client when its file is closed for the last time. Here whoever comes next finds that nobody holds
// the file's byte any more.
void Driver::Open::reap(bool now) {
  const std::uint64_t host_ns = monotonic_ns();
  if (!now && host_ns >= page().reaped_ns && host_ns - page().reaped_ns < reap_every_ns) return;
  page().reaped_ns = host_ns;
  for (Index at = 1; at <= page().counters.files.used; ++at) {
    if (page().files[at].used == 0) continue;
    struct flock lock = byte_of(page().files[at].serial, F_WRLCK);
    if (::fcntl(control.get(), F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK) continue;
    objects->free_file(at);
  }
}

// Each process's share of the GPU over the time since the last look, at least a second.
void Driver::Open::measure(std::uint32_t g) {
  Gpu& gpu = page().gpus[g];
  const std::uint64_t over_ns = gpu.now_ns - gpu.measured_ns;
  if (over_ns < measure_every_ns) return;
  store->edit(gpu).measured_ns = gpu.now_ns;
  store->commit();
  for (Index c = 1; c <= page().counters.charges.used; ++c) {
    Charge& charge = page().charges[c];
    if (charge.used == 0 || charge.gpu != g) continue;
    std::uint64_t ran_ns = 0;
    for (Index at = gpu.first; at != 0; at = page().groups[at].next) {
      Group& group = page().groups[at];
      if (group.charge != c || group.busy_ns == group.measured_busy_ns) continue;
      ran_ns += group.busy_ns - group.measured_busy_ns;
      store->edit(group).measured_busy_ns = group.busy_ns;
      store->commit();
    }
    const double busy = std::min(1.0, static_cast<double>(ran_ns) / static_cast<double>(over_ns));
    if (busy == charge.busy) continue;
    store->edit(charge).busy = busy;
    charge.dirty = 1;
    store->commit();
  }
}

void Driver::Open::leave() {
  for (Index at = 1; at <= page().counters.charges.used; ++at) {
    if (page().charges[at].used != 0 && page().charges[at].dirty != 0) report(at);
  }
}

// The row of State::processes says what the charge says; done again by the next one when it is cut off.
void Driver::Open::report(Index at) {
  Charge& charge = page().charges[at];
  const bool holds = charge.bytes > 0 || charge.groups > 0;
  bool begins = false;
  state->write([&](State& now) {
    Process* row = nullptr;
    Process* vacant = nullptr;
    for (Process& process : now.processes) {
      if (process.used == 0) {
        if (vacant == nullptr) vacant = &process;
      } else if (process.pid == charge.pid && process.gpu == charge.gpu && process.graphics == 0) {
        row = &process;
      }
    }
    if (row == nullptr) {
      if (!holds || vacant == nullptr) return false;
      row = vacant;
      *row = Process{};
      row->used = 1;
      row->pid = charge.pid;
      row->gpu = charge.gpu;
      row->gpu_instance = row->compute_instance = none;
      begins = true;
    } else if (!holds) {
      *row = Process{};
      return true;
    }
    row->start_time = charge.start_time;
    row->name = charge.name;
    row->memory_bytes = charge.bytes;
    row->busy = charge.busy;
    return true;
  });
  // Where the twin's users look for a process on the GPU; `twin` verbs keep it as well.
  const std::string proc = (twin / "root/proc" / std::to_string(charge.pid)).string();
  if (begins && ::symlink(fmt::format("/proc/{}", charge.pid).c_str(), proc.c_str()) != 0) begins = false;
  if (!holds) {
    const bool elsewhere = any_charge([&](const Charge& other) {
      return &other != &charge && other.pid == charge.pid && (other.bytes > 0 || other.groups > 0);
    });
    if (!elsewhere) ::unlink(proc.c_str());
    store->give_back(page().charges, page().counters.charges, at);
  } else {
    store->edit(charge).dirty = 0;
  }
  store->commit();
}

std::uint64_t Driver::Open::memory_free(std::uint32_t g) const {
  std::uint64_t used = page().gpus[g].memory_bytes;
  state->read([&](const State& now) {
    for (const Process& process : now.processes) {
      if (process.used == 0 || process.gpu != g) continue;
      const bool ours =
          any_charge([&](const Charge& charge) { return charge.pid == process.pid && charge.gpu == g; });
      if (!ours) used += process.memory_bytes;
    }
  });
  const std::uint64_t room = world.gpus[g].memory_bytes - world.gpus[g].reserved_bytes;
  return room > used ? room - used : 0;
}

// ---- the file

Index Driver::Open::file_of(int fd, int& error) {
  const off_t offset = ::lseek(fd, 0, SEEK_CUR);
  if (offset < 0) {
    error = -errno;
    return 0;
  }
  if (offset > 0) {
    for (Index at = 1; at <= page().counters.files.used; ++at) {
      if (page().files[at].used == 0 || page().files[at].serial != static_cast<std::uint64_t>(offset)) continue;
      // Its own description locks again what it has; another one that was moved here does not get it.
      struct flock lock = byte_of(page().files[at].serial, F_WRLCK);
      if (::fcntl(fd, F_OFD_SETLK, &lock) == 0) return at;
      break;
    }
  }
  reap(true);
  const std::uint64_t serial = std::max<std::uint64_t>(page().counters.next_serial, 1);
  store->edit(page().counters).next_serial = serial + 1;
  store->commit();
  struct flock lock = byte_of(serial, F_WRLCK);
  if (::fcntl(fd, F_OFD_SETLK, &lock) != 0 || ::lseek(fd, static_cast<off_t>(serial), SEEK_SET) < 0) {
    error = -errno;  // EBADF: not open for writing, as the real one must be
    return 0;
  }
  const Index at = store->take(page().files, page().counters.files);
  if (at == 0) {
    error = -ENFILE;
    return 0;
  }
  page().files[at].serial = serial;
  store->commit();
  return at;
}

// ---- objects

std::uint32_t Driver::Open::choose_handle(std::uint32_t client) {
  Client& who = store->edit(page().clients[objects->find_client(client)]);
  std::uint32_t handle = 0;
  do {
    handle = first_chosen_handle + who.next_handle++;
  } while (objects->find(client, handle) != 0);
  return handle;
}

std::uint32_t Driver::Open::alloc(Index file, std::uint32_t root, std::uint32_t parent_handle, std::uint32_t& handle,
                                  std::uint32_t cls, std::span<std::byte> params, const Owner& owner) {
  if (cls == abi::class_client || cls == abi::class_root) {
    if (handle == 0) {
      Counters& counters = store->edit(page().counters);
      for (std::uint32_t tries = 0; tries < client_numbers; ++tries) {
        const std::uint32_t candidate = first_client + counters.next_client;
        counters.next_client = (counters.next_client + 1) % client_numbers;
        if (objects->find_client(candidate) != 0) continue;
        handle = candidate;
        break;
      }
    } else if (objects->find_client(handle) != 0) {
      return abi::err_insert_duplicate_name;
    }
    return objects->add_client(file, handle, owner) != 0 ? 0U : err_insufficient_resources;
  }
  const Index client = objects->find_client(root);
  if (client == 0 || page().clients[client].file != file) return abi::err_invalid_client;
  const Index parent = objects->find(root, parent_handle);
  if (parent == 0) return abi::err_invalid_object_handle;
  if (handle == 0) {
    handle = choose_handle(root);
  } else if (objects->find(root, handle) != 0) {
    return abi::err_insert_duplicate_name;
  }
  const Object& above = page().objects[parent];
  std::uint32_t gpu = above.gpu;
  if (cls == abi::class_device) {
    if (above.cls != abi::class_client) return abi::err_invalid_object_handle;
    const auto* device = as<abi::DeviceParams>(params);
    gpu = device != nullptr ? device->device : 0;
    if (gpu >= world.gpu_count || !world.gpus[gpu].there) return abi::err_invalid_argument;
  } else if (cls == abi::class_subdevice) {
    if (above.cls != abi::class_device) return abi::err_invalid_object_handle;
  }
  auto* memory = cls == abi::class_device_memory ? as<abi::MemoryParams>(params) : nullptr;
  auto* group = cls == abi::class_channel_group ? as<abi::GroupParams>(params) : nullptr;
  if (cls == abi::class_device_memory || cls == abi::class_channel_group || abi::is_channel(cls)) {
    if (gpu == none) return abi::err_invalid_object_handle;
    if (!world.gpus[gpu].there) return abi::err_invalid_state;
  }
  if (cls == abi::class_device_memory) {
    if (memory == nullptr || memory->size == 0) return abi::err_invalid_argument;
    const std::uint64_t granularity = memory->size >= 1U << 20 ? memory_granularity : small_granularity;
    if (memory->size > UINT64_MAX - granularity) return abi::err_invalid_argument;
    memory->size = (memory->size + granularity - 1) / granularity * granularity;
    if (memory->size > memory_free(gpu)) {
      reap(true);  // room may be what a process left that ended just now
      if (objects->find(root, parent_handle) != parent || memory->size > memory_free(gpu)) return abi::err_no_memory;
    }
  }
  if (cls == abi::class_channel_group && group == nullptr) return abi::err_invalid_argument;
  const Index made = objects->add(parent, handle, cls, gpu);
  if (made == 0) return err_insufficient_resources;
  if (memory != nullptr) {
    if (!objects->add_memory(made, memory->size)) return err_insufficient_resources;
    memory->limit = memory->size - 1;
  }
  if (group != nullptr && !objects->add_group(made, group->engine)) return err_insufficient_resources;
  if (abi::is_channel(cls) && above.cls == abi::class_channel_group) objects->join_group(made, above.group);
  return abi::ok;
}

std::uint32_t Driver::Open::free(Index file, const abi::Free& request) {
  const Index client = objects->find_client(request.root);
  if (client == 0 || page().clients[client].file != file) return abi::err_invalid_client;
  const Index object = objects->find(request.root, request.handle);
  if (object == 0) return abi::err_object_not_found;
  objects->free(object);
  return abi::ok;
}

std::uint32_t Driver::Open::dup(Index file, abi::Dup& request) {
  const Index client = objects->find_client(request.client), from = objects->find_client(request.source_client);
  if (client == 0 || from == 0 || page().clients[client].file != file) return abi::err_invalid_client;
  const Index source = objects->find(request.source_client, request.source_handle);
  if (source == 0) return abi::err_object_not_found;
  // Sharing between processes is between those of one user.
  if (page().clients[from].file != file && page().clients[from].uid != page().clients[client].uid)
    return abi::err_insufficient_permissions;
  const Index parent = objects->find(request.client, request.parent);
  if (parent == 0) return abi::err_invalid_object_handle;
  const Object object = page().objects[source];
  if (object.group != 0 || object.parent == 0) return abi::err_not_supported;
  if (object.gpu != none && page().objects[parent].gpu != object.gpu) return abi::err_invalid_object_handle;
  if (request.handle == 0) {
    request.handle = choose_handle(request.client);
  } else if (objects->find(request.client, request.handle) != 0) {
    return abi::err_insert_duplicate_name;
  }
  const Index made = objects->add(parent, request.handle, object.cls, object.gpu);
  if (made == 0) return err_insufficient_resources;
  if (object.memory != 0) objects->hold_memory(made, object.memory);
  return abi::ok;
}

// ---- controls

void Driver::Open::schedule(Index at) {
  if (page().groups[at].scheduled != 0) return;
  // What was set before is lost here, as on the real one.
  store->edit(page().groups[at]).scheduled = 1;
  scheduler->set_slice(at, slice_when_scheduled_us * 1000);
}

std::uint32_t Driver::Open::group_control(Index object, std::uint32_t command, std::span<std::byte> params) {
  const Index at = page().objects[object].group;
  const bool compute = page().groups[at].engine == abi::engine_compute;
  switch (command) {
    case abi::cmd_group_schedule:
      if (params.empty()) return err_invalid_param_struct;
      if (params[0] != std::byte{0}) schedule(at);  // 0 answers OK and stops nothing
      return abi::ok;
    case abi::cmd_group_set_timeslice: {
      const auto* us = as<std::uint64_t>(params);
      if (us == nullptr) return err_invalid_param_struct;
      if (!compute) return abi::err_not_supported;
      if (*us == 0 || *us > 1'000'000'000) return abi::err_invalid_argument;
      scheduler->set_slice(at, *us * 1000);
      return abi::ok;
    }
    case abi::cmd_group_get_timeslice: {
      auto* us = as<std::uint64_t>(params);
      if (us == nullptr) return err_invalid_param_struct;
      if (!compute) return abi::err_not_supported;
      *us = page().groups[at].slice_ns / 1000;
      return abi::ok;
    }
    case abi::cmd_group_preempt:
      if (compute) scheduler->take_off(at);
      return abi::ok;
    case abi::cmd_group_set_interleave: {
      const auto* level = as<std::uint32_t>(params);
      if (level == nullptr) return err_invalid_param_struct;
      return *level <= 2 ? abi::ok : abi::err_invalid_argument;
    }
    default:
      return abi::err_not_supported;
  }
}

std::uint32_t Driver::Open::disable_channels(Index file, const Object& subdevice, abi::DisableChannels& params) {
  if (params.count > 64) return abi::err_invalid_argument;
  std::array<Index, 64> channels{};
  for (std::uint32_t i = 0; i < params.count; ++i) {
    const Index client = objects->find_client(params.clients[i]);
    if (client == 0) return abi::err_invalid_client;
    if (page().clients[client].file != file) return abi::err_insufficient_permissions;
    channels[i] = objects->find(params.clients[i], params.channels[i]);
    if (channels[i] == 0) return abi::err_object_not_found;
    const Object& channel = page().objects[channels[i]];
    if (!abi::is_channel(channel.cls) || channel.gpu != subdevice.gpu) return abi::err_invalid_object_handle;
  }
  for (std::uint32_t i = 0; i < params.count; ++i) {
    const Object& channel = page().objects[channels[i]];
    if (params.disable == 0) {
      if (channel.disables > 0) objects->set_disables(channels[i], channel.disables - 1);
      continue;
    }
    objects->set_disables(channels[i], channel.disables + 1);
    if (channel.group == 0 || page().gpus[channel.gpu].ignores_disable != 0) continue;
    const Group& group = page().groups[channel.group];
    if (group.engine == abi::engine_compute && scheduler->off(group)) scheduler->take_off(channel.group);
  }
  return abi::ok;
}

std::uint32_t Driver::Open::fb_info(std::uint32_t g, abi::FbInfo& params) const {
  if (params.count > 128) return abi::err_invalid_argument;
  const auto& gpu = world.gpus[g];
  const auto kib = [](std::uint64_t bytes) { return static_cast<std::uint32_t>(bytes >> 10U); };
  for (std::uint32_t i = 0; i < params.count; ++i) {
    auto& entry = params.list[i];
    switch (entry.index) {
      case abi::fb_ram_size:
      case abi::fb_total_ram_size:
        entry.data = kib(gpu.memory_bytes);
        break;
      case abi::fb_heap_size:
      case abi::fb_usable_ram_size:
        entry.data = kib(gpu.memory_bytes - gpu.reserved_bytes);
        break;
      case abi::fb_heap_free:
        entry.data = kib(memory_free(g));
        break;
      default:
        entry.data = 0;
        break;
    }
  }
  return abi::ok;
}

std::uint32_t Driver::Open::pids(std::uint32_t gpu, std::span<std::byte> params) const {
  struct Pids {  // NV2080_CTRL_GPU_GET_PIDS_PARAMS
    std::uint32_t id_type, id, count, list[950];
  };
  auto* answer = as<Pids>(params);
  if (answer == nullptr) return err_invalid_param_struct;
  answer->count = 0;
  for (Index at = 1; at <= page().counters.objects.used; ++at) {
    const Object& object = page().objects[at];
    if (object.used == 0 || object.gpu != gpu || (answer->id != 0 && object.cls != answer->id)) continue;
    const std::uint32_t pid = page().clients[object.client].pid;
    auto* const end = answer->list + answer->count;
    if (std::find(answer->list, end, pid) == end && answer->count < std::size(answer->list))
      answer->list[answer->count++] = pid;
  }
  return abi::ok;
}

std::uint32_t Driver::Open::export_objects(Index, const abi::Control& request, abi::ExportObjects& params) {
  if (params.count > std::size(params.objects)) return abi::err_invalid_argument;
  int error = 0;
  struct stat theirs {}, ours {};
  if (::fstat(params.fd, &theirs) != 0 || ::fstat(control.get(), &ours) != 0 || theirs.st_ino != ours.st_ino ||
      theirs.st_dev != ours.st_dev)
    return abi::err_invalid_argument;
  for (std::uint32_t i = 0; i < params.count; ++i) {
    const Index object = objects->find(request.client, params.objects[i]);
    if (object == 0) return abi::err_object_not_found;
    if (page().objects[object].memory == 0) return abi::err_not_supported;
  }
  const Index keeper = file_of(params.fd, error);
  if (keeper == 0) return abi::err_invalid_argument;
  File& file = store->edit(page().files[keeper]);
  file.export_device = params.device;
  file.export_max = params.max_objects;
  std::memcpy(file.export_metadata, params.metadata, sizeof params.metadata);
  for (std::uint32_t i = 0; i < params.count; ++i) {
    const Index object = objects->find(request.client, params.objects[i]);
    if (!objects->export_memory(keeper, page().objects[object].memory)) return err_insufficient_resources;
    store->commit();
  }
  return abi::ok;
}

std::uint32_t Driver::Open::import_objects(Index, const abi::Control& request, ImportObjects& params) {
  if (params.count > std::size(params.objects)) return abi::err_invalid_argument;
  const Index parent = objects->find(request.client, params.parent);
  if (parent == 0) return abi::err_invalid_object_handle;
  struct stat theirs {}, ours {};
  if (::fstat(params.fd, &theirs) != 0 || ::fstat(control.get(), &ours) != 0 || theirs.st_ino != ours.st_ino ||
      theirs.st_dev != ours.st_dev)
    return abi::err_invalid_argument;
  int error = 0;
  const Index keeper = file_of(params.fd, error);
  if (keeper == 0) return abi::err_invalid_argument;
  std::uint32_t seen = 0, given = 0;
  for (Index at = 1; at <= page().counters.exports.used && given < params.count; ++at) {
    const Export& exported = page().exports[at];
    if (exported.used == 0 || exported.file != keeper || seen++ < params.index) continue;
    if (page().memory[exported.memory].gpu != page().objects[parent].gpu) return abi::err_invalid_object_handle;
    std::uint32_t& handle = params.objects[given];
    if (handle == 0) {
      handle = choose_handle(request.client);
    } else if (objects->find(request.client, handle) != 0) {
      return abi::err_insert_duplicate_name;
    }
    const Index made = objects->add(parent, handle, abi::class_device_memory, page().objects[parent].gpu);
    if (made == 0) return err_insufficient_resources;
    objects->hold_memory(made, exported.memory);
    store->commit();
    params.types[given++] = 1;
  }
  return given == params.count ? abi::ok : abi::err_object_not_found;
}

std::uint32_t Driver::Open::control_call(Index file, const abi::Control& request, std::span<std::byte> params) {
  const Index client = objects->find_client(request.client);
  if (client == 0 || page().clients[client].file != file) return abi::err_invalid_client;
  const Index at = objects->find(request.client, request.object);
  if (at == 0) return abi::err_object_not_found;
  const Object& object = page().objects[at];
  if (object.cls == abi::class_channel_group) return group_control(at, request.command, params);
  if (abi::is_channel(object.cls) && (request.command & 0xffffU) == 0x0103 && object.group != 0) {
    schedule(object.group);  // NVA06F_CTRL_CMD_GPFIFO_SCHEDULE and its successors
    return abi::ok;
  }
  switch (request.command) {
    case abi::cmd_disable_channels:
    case abi::cmd_fb_get_info_v2:
    case abi::cmd_get_pids: {
      if (object.cls != abi::class_subdevice) return abi::err_not_supported;
      if (request.command == abi::cmd_get_pids) return pids(object.gpu, params);
      if (request.command == abi::cmd_fb_get_info_v2) {
        auto* info = as<abi::FbInfo>(params);
        return info != nullptr ? fb_info(object.gpu, *info) : err_invalid_param_struct;
      }
      auto* disable = as<abi::DisableChannels>(params);
      return disable != nullptr ? disable_channels(file, object, *disable) : err_invalid_param_struct;
    }
    case abi::cmd_export_objects_to_fd: {
      auto* exported = as<abi::ExportObjects>(params);
      return exported != nullptr ? export_objects(file, request, *exported) : err_invalid_param_struct;
    }
    case abi::cmd_import_objects_from_fd: {
      auto* imported = as<ImportObjects>(params);
      return imported != nullptr ? import_objects(file, request, *imported) : err_invalid_param_struct;
    }
    case cmd_get_export_info: {
      auto* info = as<ExportInfo>(params);
      if (info == nullptr) return err_invalid_param_struct;
      int error = 0;
      const Index keeper = file_of(info->fd, error);
      if (keeper == 0 || page().files[keeper].export_max == 0) return err_invalid_parameter;  // nothing was exported
      info->device = page().files[keeper].export_device;
      info->max_objects = static_cast<std::uint16_t>(page().files[keeper].export_max);
      std::memcpy(info->metadata, page().files[keeper].export_metadata, sizeof info->metadata);
      return abi::ok;
    }
    default:
      return abi::err_not_supported;
  }
}

// ---- the front

Result<std::unique_ptr<Driver>> Driver::open(const fs::path& twin) {
  std::unique_ptr<Driver> driver(new Driver);
  driver->open_ = std::make_unique<Open>();
  Open& open = *driver->open_;
  open.twin = twin;
  BH_TRY(open.state, StateFile::open(twin / "state.bin"));
  BH_TRY(open.store, Store::open(twin / "rm.bin"));
  const fs::path control = twin / "root/dev/nvidiactl";
  open.control.reset(::open(control.c_str(), O_RDONLY | O_CLOEXEC));
  if (!open.control) return errno_error(fmt::format("open {}", control.string()), errno);
  open.objects = std::make_unique<Objects>(*open.store);
  open.scheduler = std::make_unique<Scheduler>(*open.store);
  return driver;
}

Driver::~Driver() = default;

namespace {

int size_of_request(unsigned number) {
  switch (number) {
    case abi::esc_free: return sizeof(abi::Free);
    case abi::esc_control: return sizeof(abi::Control);
    case abi::esc_alloc: return sizeof(abi::Alloc);
    case abi::esc_dup_object: return sizeof(abi::Dup);
    default: return -1;
  }
}

}  // namespace

int Driver::ioctl_on(int fd, unsigned long request, void* arg) {
  const unsigned number = request & 0xffU;
  const auto size = static_cast<std::size_t>((request >> 16U) & 0x3fffU);
  const int wanted = size_of_request(number);
  if (((request >> 8U) & 0xffU) != abi::ioctl_magic || wanted < 0) return -ENOTTY;
  if (size != static_cast<std::size_t>(wanted) && !(number == abi::esc_alloc && size == sizeof(abi::AllocOld)))
    return -EINVAL;

  // Everything is read before the lock is taken and written after it is given back: a page may be slow to come.
  union {
    abi::Free free;
    abi::Control control;
    abi::Alloc alloc;
    abi::AllocOld alloc_old;
    abi::Dup dup;
  } call{};
  if (!copy(&call, address(arg), size, true)) return -EFAULT;
  std::vector<std::byte> params;
  std::uint64_t params_at = 0;
  Owner owner;
  if (number == abi::esc_alloc) {
    if (size == sizeof(abi::AllocOld)) {
      const abi::AllocOld old = call.alloc_old;
      call.alloc = {old.root, old.parent, old.handle, old.cls, old.params, 0, old.params_size, 0, 0, 0};
    }
    params_at = call.alloc.params;
    if (params_at != 0) params.resize(params_of(call.alloc.cls));
    if (call.alloc.cls == abi::class_client || call.alloc.cls == abi::class_root) owner = caller();
  } else if (number == abi::esc_control) {
    params_at = call.control.params;
    if (call.control.params_size > params_limit) {
      call.control.status = abi::err_not_supported;  // no command that is answered here has so many
      return copy(&call, address(arg), size, false) ? 0 : -EFAULT;
    }
    params.resize(call.control.params_size);
  }
  if (!copy(params.data(), params_at, params.size(), true)) return -EFAULT;

  int error = 0;
  {
    Open& open = *open_;
    const Store::Lock lock(*open.store);
    if (!lock.held()) return -EIO;
    open.enter(false);
    const Index file = open.file_of(fd, error);
    if (file == 0) return error;
    std::uint32_t status = abi::ok;
    switch (number) {
      case abi::esc_alloc:
        status = call.alloc.status = open.alloc(file, call.alloc.root, call.alloc.parent, call.alloc.handle,
                                                call.alloc.cls, params, owner);
        break;
      case abi::esc_free:
        status = call.free.status = open.free(file, call.free);
        break;
      case abi::esc_dup_object:
        status = call.dup.status = open.dup(file, call.dup);
        break;
      default:
        status = call.control.status = open.control_call(file, call.control, params);
        break;
    }
    if (status == abi::ok) {
      open.store->commit();
    } else {
      open.store->abandon();
    }
    open.leave();
  }
  if (size == sizeof(abi::AllocOld) && number == abi::esc_alloc) {
    const abi::Alloc done = call.alloc;
    call.alloc_old = {done.root, done.parent, done.handle, done.cls, done.params, done.params_size, done.status};
  }
  if (!copy(params.data(), params_at, params.size(), false)) return -EFAULT;
  return copy(&call, address(arg), size, false) ? 0 : -EFAULT;
}

Index Driver::Open::group_named(GroupName name) const {
  const Index object = objects->find(name.client, name.group);
  if (object == 0 || page().objects[object].cls != abi::class_channel_group) return 0;
  return page().objects[object].group;
}

namespace {
Error no_such_group(GroupName name) {
  return Error(Errc::not_found, fmt::format("no channel group {:#x} of client {:#x}", name.group, name.client));
}
Error no_lock() { return Error(Errc::io, "the twin's rm.bin cannot be locked"); }
}  // namespace

Result<std::uint64_t> Driver::submit(GroupName name, std::uint64_t duration_ns) {
  Open& open = *open_;
  const Store::Lock lock(*open.store);
  if (!lock.held()) return no_lock();
  open.enter(false);
  const Index group = open.group_named(name);
  if (group == 0) return no_such_group(name);
  const std::uint64_t ticket = open.scheduler->submit(group, duration_ns);
  open.store->commit();
  open.leave();
  if (ticket == 0) return Error(Errc::in_use, "the channel is full");
  return ticket;
}

Result<Progress> Driver::progress(GroupName name) {
  Open& open = *open_;
  const Store::Lock lock(*open.store);
  if (!lock.held()) return no_lock();
  open.enter(false);
  const Index at = open.group_named(name);
  if (at == 0) return no_such_group(name);
  const Group& group = open.page().groups[at];
  const Progress progress{.now_ns = open.page().gpus[group.gpu].now_ns,
                          .submitted = group.submitted,
                          .completed = group.completed,
                          .busy_ns = group.busy_ns,
                          .last_done_ns = group.last_done_ns,
                          .on = group.scheduled != 0 && !open.scheduler->off(group),
                          .stepped = open.world.stepped};
  open.leave();
  return progress;
}

Result<std::uint64_t> Driver::finished_at_ns(GroupName name, std::uint64_t ticket) {
  Open& open = *open_;
  const Store::Lock lock(*open.store);
  if (!lock.held()) return no_lock();
  open.enter(false);
  const Index at = open.group_named(name);
  if (at == 0) return no_such_group(name);
  const Group& group = open.page().groups[at];
  if (ticket == 0 || ticket > group.completed) return Error(Errc::in_use, "the job has not finished");
  if (ticket + queue_depth <= group.submitted) return Error(Errc::gone, "the job finished too long ago");
  return open.page().jobs[at][ticket % jobs_of_a_group].ns;
}

Result<std::uint64_t> Driver::at_least_ns(GroupName name, std::uint64_t ticket) {
  Open& open = *open_;
  const Store::Lock lock(*open.store);
  if (!lock.held()) return no_lock();
  open.enter(false);
  const Index at = open.group_named(name);
  if (at == 0) return no_such_group(name);
  return open.scheduler->at_least_ns(at, ticket);
}

Status Driver::follow() {
  Open& open = *open_;
  const Store::Lock lock(*open.store);
  if (!lock.held()) return no_lock();
  open.enter(true);
  open.leave();
  return ok_status();
}

}  // namespace bulkhead::twin::rm
