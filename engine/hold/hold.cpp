#include "engine/hold/hold.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/capability.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>

#include "abi/rm/rm.hpp"
#include "base/clock.hpp"
#include "edge/rm/rm.hpp"
#include "edge/seccomp/seccomp.hpp"
#include "engine/hold/exported.hpp"
#include "engine/hold/processes.hpp"
#include "engine/hold/record.hpp"

namespace bulkhead::hold {

namespace {

using ledger::Event;
using ledger::Kind;
using ledger::What;

constexpr std::uint64_t record_magic = 0x32646c6f682d6862;
constexpr std::uint32_t insufficient_resources = 0x1a;  // RM status
constexpr std::uint32_t esc_indirect = 0xd3, esc_dma_buf = 0xd9;
constexpr std::uint32_t class_os_descriptor = 0x71;  // host memory of the caller's, pinned
constexpr std::uint32_t class_local_privileged = 0x3f,
                        class_local_physical = 0xc2;    // device memory, for root
constexpr std::uint32_t first_own_handle = 0xb1d00000;  // where a caller leaves the choice to the driver
constexpr std::uint32_t cmd_import_object_from_fd = 0x3d06;
constexpr std::uint32_t harmless_command = 0x101;  // of a client: the driver's version
constexpr unsigned calls_a_pump = 512;
constexpr std::uint64_t pending_ns = 100'000'000;
constexpr std::uint64_t closed_token = 1ULL << 63U;

// Another driver file may be another GPU's; its number is the last thing known about it.
struct LegacyAlloc {  // NVOS02_PARAMETERS
  std::uint32_t root, parent, handle, cls, flags, pad;
  std::uint64_t memory, limit;
  std::uint32_t status, pad2;
};
constexpr std::size_t legacy_heap_status = 20;  // NVOS32_PARAMETERS
struct Indirect {                               // nv_ioctl_xfer_t
  std::uint32_t number, size;
  std::uint64_t argument;
};
struct ExportOne {  // NV0000_CTRL_OS_UNIX_EXPORT_OBJECT_TO_FD_PARAMS
  std::uint32_t type, device, parent, object;
  std::int32_t fd;
  std::uint32_t flags;
};
struct ImportOne {  // NV0000_CTRL_OS_UNIX_IMPORT_OBJECT_FROM_FD_PARAMS
  std::int32_t fd;
  std::uint32_t type, device, parent, object;
};
struct ImportMany {  // NV0000_CTRL_OS_UNIX_IMPORT_OBJECTS_FROM_FD_PARAMS
  std::int32_t fd;
  std::uint32_t parent, objects[128];
  std::uint8_t types[128];
  std::uint16_t count, index;
};

template <class T>
std::span<std::byte> bytes_of(T& value) {
  return std::as_writable_bytes(std::span(&value, 1));
}
std::uint64_t address(const void* pointer) { return reinterpret_cast<std::uint64_t>(pointer); }

// RM grants more to whoever has CAP_SYS_ADMIN; a call on the tenant's behalf is made without.
class Unprivileged {
 public:
  Unprivileged() {
    header_.version = _LINUX_CAPABILITY_VERSION_3;
    if (::syscall(SYS_capget, &header_, now_) != 0) return;
    if ((now_[0].effective & (1U << CAP_SYS_ADMIN)) == 0) return;
    __user_cap_data_struct without[2] = {now_[0], now_[1]};
    without[0].effective &= ~(1U << CAP_SYS_ADMIN);
    changed_ = ::syscall(SYS_capset, &header_, without) == 0;
  }
  ~Unprivileged() {
    if (changed_) ::syscall(SYS_capset, &header_, now_);
  }
  Unprivileged(const Unprivileged&) = delete;
  Unprivileged& operator=(const Unprivileged&) = delete;

 private:
  __user_cap_header_struct header_{};
  __user_cap_data_struct now_[2] = {};
  bool changed_ = false;
};

// The driver gives device memory in whole pages; so much a size may grow.
std::uint64_t rounded(std::uint64_t bytes) {
  const std::uint64_t page = bytes >= 1ULL << 20 ? 2ULL << 20 : 64ULL << 10;
  return bytes > ~0ULL - page ? ~0ULL : (bytes + page - 1) / page * page;
}

bool concerns_us(std::uint32_t command) {
  return command == abi::cmd_fb_get_info_v2 || command == abi::cmd_group_set_timeslice ||
         command == abi::cmd_disable_channels ||
         command == abi::cmd_export_objects_to_fd || command == abi::cmd_export_object_to_fd ||
         command == abi::cmd_import_objects_from_fd || command == cmd_import_object_from_fd;
}

}  // namespace

Result<UniqueFd> make_inflight() {
  UniqueFd fd(::memfd_create("bulkhead-hold", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) return errno_error("make the hold's record", errno);
  if (::ftruncate(fd.get(), sizeof(Record)) != 0 ||
      ::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
    return errno_error("size the hold's record", errno);
  return fd;
}

Result<void*> map_inflight(int fd) {
  void* at = ::mmap(nullptr, sizeof(Record), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (at == MAP_FAILED) return errno_error("map the hold's record", errno);
  return at;
}

struct Hold::Inside {
  seccomp::Listener listener;
  guard::Page& page;
  Settings settings;
  UniqueFd own_memory;  // of the record, when the caller gave none
  void* own_record = nullptr;
  Record& record;
  Journal journal;
  Processes processes;
  Exported exported;
  Closer closer;
  UniqueFd ended;  // epoll over processes.epoll() and closer.fd()
  std::vector<Group> groups;
  std::vector<Process> listed;
  std::uint64_t listed_generation = ~0ULL;
  std::uint64_t generation = 0;
  std::uint32_t next_handle = first_own_handle;
  bool logged = false;  // the outcome of the call in flight was in the ledger when this arbiter began

  Inside(UniqueFd fd, guard::Page& shared, Settings wanted, Record& kept)
      : listener(std::move(fd)),
        page(shared),
        settings(std::move(wanted)),
        record(kept),
        journal(kept),
        processes(settings.root),
        exported(settings.root, processes),
        logged(journal.sequence() != kept.sequence) {}
  ~Inside() {
    closer.wait();
    if (own_record != nullptr) ::munmap(own_record, sizeof(Record));
  }

  const ledger::Ledger& book() const { return journal.ledger(); }
  bool apply(const Event& event) {
    if (!journal.apply(event)) return false;
    publish();
    return true;
  }
  void publish();
  std::uint64_t used(std::uint32_t gpu) const;
  std::uint64_t room(std::uint32_t gpu) const;
  void relist();

  // ---- who lives
  void meet();
  void bury(bool wait);
  void give_up_lost();
  void recount_managed();
  void reconcile();
  std::set<std::pair<std::uint32_t, std::uint32_t>>
      made_by_libcuda;  // groups (client, handle) that were given a slice

  // ---- calls
  struct Caller {
    int tid = 0;
    std::uint32_t process = 0;
    int fd = -1;
    std::uint64_t argument = 0;
  };
  rm::DriverFile* file_of(const Caller& caller);
  template <class T>
  bool read(const Caller& caller, std::uint64_t at, T& into) const;
  template <class T>
  void write(const Caller& caller, std::uint64_t at, const T& from) const;
  int perform(const rm::DriverFile& file, void* request);
  void let_through() { static_cast<void>(listener.let_through(record.call.id)); }
  void refuse(int error) { static_cast<void>(listener.refuse(record.call.id, error)); }
  bool answer(std::int64_t value);
  void handle();
  void on_ioctl(const Caller& caller, std::uint32_t number, std::size_t size);
  void on_alloc(const Caller& caller, std::size_t size);
  void on_memory(const Caller& caller, std::uint32_t gpu);
  void finish_memory(const Caller& caller, int code);
  void answer_alloc(const Caller& caller, std::uint32_t status);
  void take_back(rm::DriverFile* file);
  void on_free(const Caller& caller);
  void finish_free(const Caller& caller, int code);
  void on_control(const Caller& caller);
  void on_memory_size(const Caller& caller, abi::Control& control);
  void on_import(const Caller& caller, std::uint32_t client, std::uint32_t parent, std::uint32_t handle);
  void on_duplicate(const Caller& caller);
  void on_legacy(const Caller& caller, std::uint32_t number);
  void on_dma_buf(const Caller& caller, std::size_t size);
  void on_mmap(const Caller& caller, std::uint64_t length);
  std::uint32_t choose_handle(std::uint32_t client);
  void clear();
  void recover();
};

// ---- what others see

std::uint64_t Hold::Inside::used(std::uint32_t gpu) const {
  if (gpu >= ledger::max_gpus) return 0;
  return guard::add_saturating(book().used(gpu), record.beyond[gpu].load(std::memory_order_relaxed));
}

std::uint64_t Hold::Inside::room(std::uint32_t gpu) const {
  if (gpu >= guard::max_gpus) return ~0ULL;
  const std::uint64_t cap = page.cap[gpu].load(std::memory_order_acquire);
  if (cap == guard::no_cap) return ~0ULL;
  const std::uint64_t taken = used(gpu);
  return cap > taken ? cap - taken : 0;
}

void Hold::Inside::publish() {
  for (std::uint32_t gpu = 0; gpu < guard::max_gpus; ++gpu) {
    const std::uint64_t now = used(gpu);
    if (page.outside[gpu].load(std::memory_order_relaxed) != now)
      page.outside[gpu].store(now, std::memory_order_release);
  }
}

void Hold::Inside::relist() {
  if (listed_generation == book().generation()) return;
  listed_generation = book().generation();
  std::vector<Group> fresh;
  for (auto& group : book().groups()) {
    if (group.engine != abi::engine_compute) continue;
    const auto process = book().processes().find(group.process);
    if (process == book().processes().end()) continue;
    fresh.push_back({.pid = process->second.pid,
                     .start_time = process->second.start_time,
                     .gpu = group.gpu,
                     .client = group.client,
                     .subdevice = group.subdevice,
                     .handle = group.handle,
                     .channels = std::move(group.channels),
                     .born_ns = group.born_ns,
                     .fd = group.fd});
  }
  const auto same = [](const Group& a, const Group& b) {
    return a.pid == b.pid && a.start_time == b.start_time && a.gpu == b.gpu && a.client == b.client &&
           a.subdevice == b.subdevice && a.handle == b.handle && a.channels == b.channels && a.fd == b.fd;
  };
  if (std::equal(fresh.begin(), fresh.end(), groups.begin(), groups.end(), same)) return;
  groups = std::move(fresh);
  ++generation;
}

// ---- who lives

void Hold::Inside::meet() {
  for (const auto number : processes.born()) {
    const auto& who = processes.all().at(number);
    apply({.kind = Kind::process,
           .process = number,
           .source_client = static_cast<std::uint32_t>(who.pid),
           .bytes = who.start_time});
  }
}

// A process that ended gives its bytes back once the driver has them: when the files borrowed from it are
// closed too.
void Hold::Inside::bury(bool wait) {
  epoll_event any{};
  if (!wait && ::epoll_wait(ended.get(), &any, 1, 0) <= 0) return;
  for (const auto number : processes.ended()) {
    std::vector<rm::DriverFile> files;
    auto all = processes.lost(number);
    meet();
    for (auto& lost : all) {
      if (lost.heir != 0) {
        apply({.kind = Kind::moved,
               .process = number,
               .cls = lost.heir,
               .source_handle = static_cast<std::uint32_t>(lost.heir_fd),
               .fd = lost.fd});
      } else if (lost.file) {
        files.push_back(std::move(*lost.file));
      }
    }
    processes.forget(number);
    closer.close(std::move(files), number);
  }
  if (wait) closer.wait();
  for (const auto token : closer.finished())
    if ((token & closed_token) == 0)
      apply({.kind = Kind::process_gone, .process = static_cast<std::uint32_t>(token)});
}

// Driver files that a living process closed (exec closes them as well): without the copy here the driver
// would have freed what they had.
void Hold::Inside::give_up_lost() {
  std::vector<std::pair<std::uint32_t, int>> gone;
  std::vector<rm::DriverFile> files;
  auto all = processes.lost();
  meet();
  for (auto& lost : all) {
    if (lost.heir != 0) {
      apply({.kind = Kind::moved,
             .process = lost.process,
             .cls = lost.heir,
             .source_handle = static_cast<std::uint32_t>(lost.heir_fd),
             .fd = lost.fd});
    } else if (lost.file) {
      gone.emplace_back(lost.process, lost.fd);
      files.push_back(std::move(*lost.file));
    }
  }
  if (gone.empty()) return;
  closer.close(std::move(files), closed_token);
  closer.wait();
  for (const auto& [process, fd] : gone)
    for (const auto client : book().clients_of(process, fd))
      apply({.kind = Kind::free, .client = client, .handle = client});
}

void Hold::Inside::recount_managed() {
  const std::uint64_t now = monotonic_ns();
  // With every place taken by a mapping just let through, others may be missing: nothing is known for
  // certain.
  if (std::all_of(std::begin(record.pending), std::end(record.pending),
                  [now](const Pending& one) { return one.until_ns >= now; }))
    return;
  std::vector<Event> changes;
  for (const auto& [number, process] : book().processes()) {
    if (process.managed == 0) continue;
    std::uint64_t bytes = processes.mapped_managed(number);
    if (bytes == ~0ULL) continue;
    for (const auto& one : record.pending)
      if (one.process == number && one.until_ns >= now) bytes = guard::add_saturating(bytes, one.bytes);
    // Never more than was let through: what is pending may be among what is mapped.
    if (bytes < process.managed)
      changes.push_back({.kind = Kind::managed,
                         .gpu = static_cast<std::uint8_t>(book().home_of(number)),
                         .process = number,
                         .bytes = bytes});
  }
  for (const auto& change : changes) apply(change);
}

void Hold::Inside::reconcile() {
  bury(true);
  give_up_lost();
  recount_managed();
  if (book().orphans() && !exported.held()) apply({.kind = Kind::unheld});
}

// ---- calls

template <class T>
bool Hold::Inside::read(const Caller& caller, std::uint64_t at, T& into) const {
  return seccomp::read_memory(caller.tid, at, bytes_of(into)).ok() && listener.alive(record.call.id);
}

template <class T>
void Hold::Inside::write(const Caller& caller, std::uint64_t at, const T& from) const {
  static_cast<void>(seccomp::write_memory(caller.tid, at, std::as_bytes(std::span(&from, 1))));
}

rm::DriverFile* Hold::Inside::file_of(const Caller& caller) {
  if (auto* file = processes.control_file(caller.process, caller.tid, caller.fd)) return file;
  if (processes.kind_of(caller.tid, caller.fd) != FileKind::control) return nullptr;
  give_up_lost();
  return processes.control_file(caller.process, caller.tid, caller.fd);
}

int Hold::Inside::perform(const rm::DriverFile& file, void* request) {
  record.stage.store(Stage::performing, std::memory_order_release);
  const Unprivileged as_the_tenant;
  return file.perform(record.call.args[1], request);
}

bool Hold::Inside::answer(std::int64_t value) {
  record.stage.store(Stage::answering, std::memory_order_release);
  return listener.answer(record.call.id, value).ok();
}

void Hold::Inside::clear() {
  // By now nobody waits for the answer any more, so a kill half-way leaves a call that is answered already.
  record.stage.store(Stage::received, std::memory_order_release);
  record.call = {};
  logged = false;
}

std::uint32_t Hold::Inside::choose_handle(std::uint32_t client) {
  do {
    next_handle = next_handle == first_own_handle + 0xffff ? first_own_handle : next_handle + 1;
  } while (book().knows(client, next_handle));
  return next_handle;
}

void Hold::Inside::handle() {
  const seccomp::Call& call = record.call;
  Caller caller{.tid = static_cast<int>(call.tid)};
  if (caller.tid == 0)
    return refuse(EPERM);  // in a pid namespace that is not below ours: whose memory is it?
  if (call.number != SYS_mmap && (call.args[1] & 0xffU) == abi::esc_control) {
    // By far the most calls, and most of them of no interest.
    abi::Control control{};
    if (!read(caller, call.args[2], control)) return refuse(EFAULT);
    if (!concerns_us(control.command)) return let_through();
  }
  const auto process = processes.process_of(caller.tid);
  meet();
  if (!process.ok()) {
    // Its thread is gone, or /proc cannot be read: nothing is let past unseen.
    if (listener.alive(call.id)) refuse(EAGAIN);
    return;
  }
  caller.process = *process;
  record.sequence = journal.sequence();
  if (call.number == SYS_mmap) {
    caller.fd = static_cast<int>(call.args[4]);
    return on_mmap(caller, call.args[1]);
  }
  caller.fd = static_cast<int>(call.args[0]);
  caller.argument = call.args[2];
  on_ioctl(caller, call.args[1] & 0xffU, (call.args[1] >> 16U) & 0x3fffU);
}

void Hold::Inside::on_ioctl(const Caller& caller, std::uint32_t number, std::size_t size) {
  switch (number) {
    case abi::esc_alloc:
      return on_alloc(caller, size);
    case abi::esc_free:
      return on_free(caller);
    case abi::esc_control:
      return on_control(caller);
    case abi::esc_dup_object:
      return on_duplicate(caller);
    case esc_dma_buf:
      return on_dma_buf(caller, size);
    default:
      return on_legacy(caller, number);
  }
}

void Hold::Inside::on_alloc(const Caller& caller, std::size_t size) {
  std::memset(&record.request, 0, sizeof record.request);
  const bool old = size == sizeof(abi::AllocOld);
  if (old ? !read(caller, caller.argument, record.request.alloc_old)
          : !read(caller, caller.argument, record.request.alloc))
    return refuse(EFAULT);
  const abi::Alloc& alloc = record.request.alloc;  // the older form begins the same way
  What what = What::other;
  switch (alloc.cls) {
    case abi::class_device:
      what = What::device;
      break;
    case abi::class_subdevice:
      what = What::subdevice;
      break;
    case abi::class_channel_group:
      what = What::group;
      break;
    case abi::class_device_memory:
      what = What::memory;
      break;
    case class_local_privileged:
    case class_local_physical:
      what = What::memory;
      break;
    default:
      if (abi::is_channel(alloc.cls)) what = What::channel;
      break;
  }
  // A client's handle is RM's choice and written back after the call: it is learned from what is made below
  // it.
  if (what == What::other) return let_through();
  if (file_of(caller) == nullptr) {
    // It cannot be borrowed: no rights, or a thread with descriptors of its own has another one under this
    // number.
    if (processes.kind_of(caller.tid, caller.fd) == FileKind::control) return refuse(EPERM);
    return let_through();  // not the driver's
  }
  auto gpu = book().gpu_of(alloc.root, alloc.parent);
  if (what == What::memory) {
    if (alloc.cls != abi::class_device_memory && settings.memory) {
      ++record.escapes;
      return answer_alloc(caller, abi::err_insufficient_permissions);
    }
    if (!gpu) ++record.escapes;
    return on_memory(caller, gpu ? *gpu : book().home_of(caller.process));
  }
  Event event{.kind = Kind::object,
              .what = what,
              .hearsay = 1,
              .gpu = static_cast<std::uint8_t>(gpu.value_or(0xff)),
              .process = caller.process,
              .client = alloc.root,
              .parent = alloc.parent,
              .handle = alloc.handle,
              .cls = alloc.cls,
              .fd = caller.fd};
  if (what == What::device) {
    abi::DeviceParams device{};
    if (alloc.params != 0 && !read(caller, alloc.params, device.device)) return refuse(EFAULT);
    event.gpu = static_cast<std::uint8_t>(std::min<std::uint32_t>(device.device, 0xff));
  } else if (what == What::group) {
    abi::GroupParams group{};
    if (alloc.params != 0 && !read(caller, alloc.params, group)) return refuse(EFAULT);
    event.engine = group.engine;
    event.bytes = monotonic_ns();
  }
  if (event.handle == 0) {  // else only the driver would know it, and only afterwards
    event.handle = choose_handle(event.client);
    write(caller, caller.argument + offsetof(abi::Alloc, handle), event.handle);
  }
  apply(event);
  let_through();
}

namespace {
std::uint32_t& status_of(Record& record, bool old) {
  return old ? record.request.alloc_old.status : record.request.alloc.status;
}
}  // namespace

// ---- device memory: reserve, perform, commit

void Hold::Inside::on_memory(const Caller& caller, std::uint32_t gpu) {
  abi::Alloc& alloc = record.request.alloc;
  std::memset(record.params, 0, sizeof record.params);
  auto& params = *reinterpret_cast<abi::MemoryParams*>(record.params);
  if (alloc.params != 0 && !read(caller, alloc.params, params)) return refuse(EFAULT);
  const bool with_rights = (record.call.args[1] >> 16U & 0x3fffU) == sizeof(abi::Alloc);
  if (with_rights && alloc.rights != 0 && !read(caller, alloc.rights, record.rights)) return refuse(EFAULT);
  if (book().full()) return answer_alloc(caller, insufficient_resources);
  if (settings.memory && rounded(params.size) > room(gpu)) {
    reconcile();
    if (rounded(params.size) > room(gpu)) {
      ++record.refused;
      return answer_alloc(caller, abi::err_no_memory);
    }
  }
  if (alloc.handle == 0) alloc.handle = choose_handle(alloc.root);
  std::memcpy(record.params_before, record.params, sizeof params);
  record.known = book().knows(alloc.root, alloc.handle) ? 1 : 0;
  finish_memory(caller, 1);
}

// `code` 1: the driver is to be asked; else what its ioctl returned, 0 or -errno, and the outcome is in the
// record.
void Hold::Inside::finish_memory(const Caller& caller, int code) {
  abi::Alloc& alloc = record.request.alloc;
  const bool old = (record.call.args[1] >> 16U & 0x3fffU) == sizeof(abi::AllocOld);
  auto* file = file_of(caller);
  if (code == 1) {
    if (file == nullptr) return refuse(EBADF);
    if (alloc.params != 0) alloc.params = address(record.params);
    if (!old && alloc.rights != 0) alloc.rights = address(&record.rights);
    record.sequence = journal.sequence();
    logged = false;
    status_of(record, old) = unanswered;
    code = perform(*file, &record.request);
    if (code < 0) return refuse(-code);
  }
  const std::uint32_t status = status_of(record, old);
  const auto& params = *reinterpret_cast<const abi::MemoryParams*>(record.params);
  if (status == abi::ok && !logged) {
    const auto below = book().gpu_of(alloc.root, alloc.parent);
    const auto gpu = below ? *below : book().home_of(caller.process);
    if (settings.memory && params.size > room(gpu)) {  // rounded up by more than was foreseen
      take_back(file);
      ++record.refused;
      return answer_alloc(caller, abi::err_no_memory);
    }
    apply({.kind = Kind::object,
           .what = What::memory,
           .gpu = static_cast<std::uint8_t>(gpu),
           .process = caller.process,
           .client = alloc.root,
           .parent = alloc.parent,
           .handle = alloc.handle,
           .cls = alloc.cls,
           .bytes = params.size,
           .fd = caller.fd});
  }
  // Written back as the driver would have: its parameters, then the request with the tenant's own pointers.
  abi::AllocOld theirs{};  // the beginning that both forms have
  if (!read(caller, caller.argument, theirs)) {
    take_back(file);
    return refuse(EFAULT);
  }
  if (theirs.params != 0) write(caller, theirs.params, params);
  answer_alloc(caller, status);
}

void Hold::Inside::answer_alloc(const Caller& caller, std::uint32_t status) {
  const abi::Alloc& alloc = record.request.alloc;
  const bool old = (record.call.args[1] >> 16U & 0x3fffU) == sizeof(abi::AllocOld);
  status_of(record, old) = status;  // what a successor would answer
  write(caller, caller.argument + offsetof(abi::Alloc, handle), alloc.handle);
  write(caller, caller.argument + (old ? offsetof(abi::AllocOld, status) : offsetof(abi::Alloc, status)),
        status);
  if (answer(0) || status != abi::ok) return;
  // Nobody got it: before Linux 5.19 a signal ends the wait, and the thread asks again.
  take_back(file_of(caller));
}

void Hold::Inside::take_back(rm::DriverFile* file) {
  abi::Free request{.root = record.request.alloc.root,
                    .parent = record.request.alloc.parent,
                    .handle = record.request.alloc.handle,
                    .status = 0};
  if (file != nullptr) {
    const Unprivileged as_the_tenant;
    file->perform(abi::request(abi::esc_free, sizeof request), &request);
  }
  apply({.kind = Kind::free, .client = request.root, .handle = request.handle});
}

// ---- frees

void Hold::Inside::on_free(const Caller& caller) {
  abi::Free& request = record.request.free;
  std::memset(&record.request, 0, sizeof record.request);
  if (!read(caller, caller.argument, request)) return refuse(EFAULT);
  // What is not recorded frees no byte and no group: the driver may do it alone.
  if (!book().covers(request.root, request.handle) || file_of(caller) == nullptr) return let_through();
  record.known = 1;  // asked for the first time
  finish_free(caller, 1);
}

void Hold::Inside::finish_free(const Caller& caller, int code) {
  abi::Free& request = record.request.free;
  if (code == 1) {
    auto* file = file_of(caller);
    if (file == nullptr) return refuse(EBADF);
    request.status = unanswered;
    code = perform(*file, &request);
    if (code < 0) return refuse(-code);
  }
  // Asked again by a successor, what the first asking has done already is not there any more.
  if (record.known == 2 &&
      (request.status == abi::err_object_not_found || request.status == abi::err_invalid_object_handle ||
       request.status == abi::err_invalid_client))
    request.status = abi::ok;
  if (request.status == abi::ok)
    apply({.kind = Kind::free, .client = request.root, .handle = request.handle});
  write(caller, caller.argument + offsetof(abi::Free, status), request.status);
  answer(0);
}

// ---- controls

void Hold::Inside::on_control(const Caller& caller) {
  abi::Control control{};
  if (!read(caller, caller.argument, control)) return refuse(EFAULT);
  switch (control.command) {
    case abi::cmd_fb_get_info_v2:
      return on_memory_size(caller, control);
    case abi::cmd_group_set_timeslice: {
      if (file_of(caller) == nullptr) return let_through();
      // libcuda sets a slice itself as the last act of making a context, and gives the context up when it may
      // not (H100, driver 580). Later it is the tenant's own idea: it hears that it was done, and it was not.
      if (book().what(control.client, control.object) == What::group && made_by_libcuda.size() < 65536 &&
          made_by_libcuda.emplace(control.client, control.object).second)
        return let_through();
      ++record.self_set;
      write(caller, caller.argument + offsetof(abi::Control, status), std::uint32_t{abi::ok});
      answer(0);
      return;
    }
    case abi::cmd_disable_channels:  // its ceiling or its turn; libcuda 580 never asks (H100)
      if (file_of(caller) == nullptr) return let_through();
      ++record.self_set;
      write(caller, caller.argument + offsetof(abi::Control, status), std::uint32_t{abi::ok});
      answer(0);
      return;
    case abi::cmd_export_objects_to_fd: {
      abi::ExportObjects params{};
      if (control.params_size == sizeof params && read(caller, control.params, params)) {
        const std::size_t count = std::min<std::size_t>(params.count, std::size(params.objects));
        for (std::size_t i = 0; i < count; ++i)
          apply({.kind = Kind::exported,
                 .process = caller.process,
                 .client = control.client,
                 .handle = params.objects[i]});
      }
      return let_through();
    }
    case abi::cmd_export_object_to_fd: {
      ExportOne params{};
      if (control.params_size >= sizeof params && read(caller, control.params, params))
        apply({.kind = Kind::exported,
               .process = caller.process,
               .client = control.client,
               .handle = params.object});
      return let_through();
    }
    case abi::cmd_import_objects_from_fd: {
      ImportMany params{};
      if (control.params_size == sizeof params && read(caller, control.params, params)) {
        bool chosen = false;
        const std::size_t count = std::min<std::size_t>(params.count, std::size(params.objects));
        for (std::size_t i = 0; i < count; ++i) {
          if (params.objects[i] == 0) {
            params.objects[i] = choose_handle(control.client);
            chosen = true;
          }
          on_import(caller, control.client, params.parent, params.objects[i]);
        }
        if (chosen) write(caller, control.params + offsetof(ImportMany, objects), params.objects);
      }
      return let_through();
    }
    case cmd_import_object_from_fd: {
      ImportOne params{};
      if (control.params_size >= sizeof params && read(caller, control.params, params))
        on_import(caller, control.client, params.parent, params.object);
      return let_through();
    }
    default:
      return let_through();
  }
}

void Hold::Inside::on_import(const Caller& caller, std::uint32_t client, std::uint32_t parent,
                             std::uint32_t handle) {
  apply({.kind = Kind::import,
         .hearsay = 1,
         .gpu = static_cast<std::uint8_t>(book().gpu_of(client, parent).value_or(0xff)),
         .process = caller.process,
         .client = client,
         .parent = parent,
         .handle = handle,
         .cls = abi::class_device_memory,
         .fd = caller.fd});
}

// The tenant sees its slice: what cuMemGetInfo and NVML inside it ask.
void Hold::Inside::on_memory_size(const Caller& caller, abi::Control& control) {
  const auto gpu = book().gpu_of(control.client, control.object);
  auto* file = file_of(caller);
  const std::uint64_t cap =
      gpu && *gpu < guard::max_gpus ? page.cap[*gpu].load(std::memory_order_acquire) : guard::no_cap;
  if (file == nullptr || cap == guard::no_cap || !settings.memory ||
      control.params_size != sizeof(abi::FbInfo))
    return let_through();
  abi::FbInfo info{};
  const std::uint64_t theirs = control.params;
  if (!read(caller, theirs, info)) return refuse(EFAULT);
  control.params = address(&info);
  int code = 0;
  {
    const Unprivileged as_the_tenant;
    code = file->perform(record.call.args[1], &control);
  }
  if (code < 0) return refuse(-code);
  if (control.status == abi::ok) {
    const auto at_most = [](std::uint32_t& kib, std::uint64_t bytes) {
      kib = static_cast<std::uint32_t>(std::min<std::uint64_t>(kib, bytes >> 10U));
    };
    for (std::size_t i = 0; i < std::min<std::size_t>(info.count, std::size(info.list)); ++i) {
      switch (info.list[i].index) {
        case abi::fb_ram_size:
        case abi::fb_total_ram_size:
        case abi::fb_heap_size:
        case abi::fb_usable_ram_size:
          at_most(info.list[i].data, cap);
          break;
        case abi::fb_heap_free:
          at_most(info.list[i].data, room(*gpu));
          break;
        default:
          break;
      }
    }
    write(caller, theirs, info);
  }
  write(caller, caller.argument + offsetof(abi::Control, status), control.status);
  answer(0);
}

// ---- the rest

void Hold::Inside::on_duplicate(const Caller& caller) {
  abi::Dup dup{};
  if (!read(caller, caller.argument, dup)) return refuse(EFAULT);
  if (file_of(caller) == nullptr) return let_through();
  if (dup.handle == 0) {
    dup.handle = choose_handle(dup.client);
    write(caller, caller.argument + offsetof(abi::Dup, handle), dup.handle);
  }
  const Event event{.kind = Kind::duplicate,
                    .hearsay = 1,
                    .process = caller.process,
                    .client = dup.client,
                    .parent = dup.parent,
                    .handle = dup.handle,
                    .source_client = dup.source_client,
                    .source_handle = dup.source_handle,
                    .fd = caller.fd};
  // Somebody else's client: how many bytes it has is for the audit to find.
  if (!book().owner_of(dup.source_client)) ++record.escapes;
  apply(event);
  let_through();
}

void Hold::Inside::on_legacy(const Caller& caller, std::uint32_t number) {
  if (!settings.memory || processes.kind_of(caller.tid, caller.fd) == FileKind::uvm) return let_through();
  if (number == abi::esc_alloc_memory) {
    LegacyAlloc request{};
    if (!read(caller, caller.argument, request)) return refuse(EFAULT);
    // Host memory pinned for the GPU (cuMemHostRegister): libcuda does that so, and only the caller itself
    // can.
    if (request.cls == class_os_descriptor || request.cls == abi::class_system_memory) return let_through();
    ++record.escapes;
    write(caller, caller.argument + offsetof(LegacyAlloc, status), std::uint32_t{abi::err_not_supported});
    answer(0);
  } else if (number == abi::esc_vid_heap_control) {
    ++record.escapes;
    write(caller, caller.argument + legacy_heap_status, std::uint32_t{abi::err_not_supported});
    answer(0);
  } else if (number == esc_indirect && file_of(caller) != nullptr) {
    // Any call of the driver's behind a pointer that may change: refused as an unknown number is.
    ++record.escapes;
    refuse(EINVAL);
  } else {
    let_through();
  }
}

void Hold::Inside::on_dma_buf(const Caller& caller, std::size_t size) {
  struct {
    std::int32_t fd;
    std::uint32_t client, total, count, index, pad;
    std::uint64_t total_size;
    std::uint32_t words[129];  // the handles begin after the mapping type, where there is one
  } request{};
  if (!read(caller, caller.argument, request)) return refuse(EFAULT);
  const std::size_t first = size == 2608 ? 1 : 0;
  for (std::size_t i = 0; i < std::min<std::size_t>(request.count, 128); ++i)
    apply({.kind = Kind::exported,
           .process = caller.process,
           .client = request.client,
           .handle = request.words[first + i]});
  let_through();
}

void Hold::Inside::on_mmap(const Caller& caller, std::uint64_t length) {
  if (processes.kind_of(caller.tid, caller.fd) != FileKind::uvm) return let_through();
  const std::uint64_t bytes = length > ~0ULL - 4095 ? ~0ULL : (length + 4095) / 4096 * 4096;
  const std::uint32_t gpu = book().home_of(caller.process);
  if (settings.memory && bytes > room(gpu)) {
    reconcile();
    if (bytes > room(gpu)) {
      ++record.refused;
      return refuse(ENOMEM);
    }
  }
  const auto process = book().processes().find(caller.process);
  const std::uint64_t before = process != book().processes().end() ? process->second.managed : 0;
  record.sequence = journal.sequence();
  auto& place = *std::min_element(std::begin(record.pending), std::end(record.pending),
                                  [](const Pending& a, const Pending& b) { return a.until_ns < b.until_ns; });
  place = {.bytes = bytes, .until_ns = monotonic_ns() + pending_ns, .process = caller.process, .pad = 0};
  record.stage.store(Stage::performing, std::memory_order_release);
  apply({.kind = Kind::managed,
         .gpu = static_cast<std::uint8_t>(gpu),
         .process = caller.process,
         .bytes = guard::add_saturating(before, bytes)});
  record.stage.store(Stage::answering, std::memory_order_release);
  let_through();
}

// ---- after an arbiter that died

// Three things can be half done. Received: nothing was, so it is handled now. Performing: the driver's answer
// is in the record or it is not; when not, it may have acted all the same, so an allocation is freed and made
// again, and a free is made again. Answering: only the answer may be missing.
void Hold::Inside::recover() {
  if (record.call.arch == 0) return clear();  // or half cleared
  const Stage stage = record.stage.load(std::memory_order_acquire);
  Caller caller{.tid = static_cast<int>(record.call.tid),
                .fd = static_cast<int>(record.call.args[0]),
                .argument = record.call.args[2]};
  const bool alive = listener.alive(record.call.id);
  if (stage == Stage::received) {
    if (alive) handle();
    return clear();
  }
  const auto process = caller.tid != 0 ? processes.process_of(caller.tid)
                                       : Result<std::uint32_t>(Error(Errc::gone, "no thread"));
  meet();
  if (!process.ok() || (!alive && stage == Stage::answering)) return clear();
  caller.process = *process;
  if (record.call.number == SYS_mmap) {
    if (!logged && alive) {
      handle();
    } else {
      let_through();
    }
    return clear();
  }
  const bool old = (record.call.args[1] >> 16U & 0x3fffU) == sizeof(abi::AllocOld);
  const std::uint32_t number = record.call.args[1] & 0xffU;
  if (number == abi::esc_alloc && (record.request.alloc.cls == abi::class_device_memory)) {
    if (stage == Stage::answering) {
      finish_memory(caller, 0);
    } else if (!alive) {
      if (record.known == 0) take_back(file_of(caller));
    } else if (status_of(record, old) == unanswered) {
      if (record.known == 0) {
        abi::Free request{.root = record.request.alloc.root,
                          .parent = record.request.alloc.parent,
                          .handle = record.request.alloc.handle,
                          .status = 0};
        const Unprivileged as_the_tenant;
        if (auto* file = file_of(caller))
          file->perform(abi::request(abi::esc_free, sizeof request), &request);
      }
      std::memcpy(record.params, record.params_before, sizeof(abi::MemoryParams));
      finish_memory(caller, 1);
    } else {
      finish_memory(caller, 0);
    }
  } else if (number == abi::esc_free) {
    if (stage == Stage::performing && record.request.free.status == unanswered) {
      record.known = 2;
      auto* file = file_of(caller);
      if (file == nullptr || perform(*file, &record.request.free) < 0)
        record.request.free.status = abi::ok;  // went away
    }
    finish_free(caller, 0);
  } else if (alive) {
    handle();  // refusals and answers that changed nothing
  }
  clear();
}

// ---- the front

Hold::Hold(std::unique_ptr<Inside> inside) : inside_(std::move(inside)) {}
Hold::~Hold() = default;

Result<std::unique_ptr<Hold>> Hold::make(UniqueFd listener, guard::Page& page, Settings settings) {
  void* at = settings.inflight;
  UniqueFd own;
  if (at == nullptr) {
    BH_TRY(own, make_inflight());
    BH_TRY(at, map_inflight(own.get()));
  }
  auto& record = *static_cast<Record*>(at);
  if (record.magic != 0 && record.magic != record_magic)
    return Error(Errc::corrupt, "the hold's record is of another version", "restart the tenant");
  record.magic = record_magic;
  // A descriptor for each process, thread and driver file of the tenant.
  rlimit files{};
  if (::getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < files.rlim_max) {
    files.rlim_cur = std::min<rlim_t>(files.rlim_max, 65536);
    ::setrlimit(RLIMIT_NOFILE, &files);
  }
  auto inside = std::make_unique<Inside>(std::move(listener), page, std::move(settings), record);
  if (own) {
    inside->own_memory = std::move(own);
    inside->own_record = at;
  }
  Inside& in = *inside;
  in.ended.reset(::epoll_create1(EPOLL_CLOEXEC));
  for (const int fd : {in.processes.epoll(), in.closer.fd()}) {
    epoll_event event{};
    event.events = EPOLLIN;
    if (::epoll_ctl(in.ended.get(), EPOLL_CTL_ADD, fd, &event) != 0)
      return errno_error("watch processes", errno);
  }
  std::vector<std::uint32_t> gone;
  for (const auto& [number, process] : in.book().processes())
    if (!in.processes.adopt(number, process.pid, process.start_time)) gone.push_back(number);
  for (const auto& [number, process] : in.book().processes())
    for (const int fd : in.book().files_of(number))
      if (std::find(gone.begin(), gone.end(), number) == gone.end()) in.processes.control_file(number, fd);
  for (const auto number : gone) {
    // Its files may live on in a child. The copy that would tell died with the arbiter before, but the driver
    // knows.
    for (const int fd : in.book().files_of(number)) {
      const auto clients = in.book().clients_of(number, fd);
      if (clients.empty()) continue;
      const auto heir = in.processes.find_heir(fd, [client = clients.front()](const rm::DriverFile& file) {
        abi::Control probe{};
        probe.client = probe.object = client;
        probe.command = harmless_command;
        const int code = file.perform(abi::request(abi::esc_control, sizeof probe), &probe);
        return code >= 0 && probe.status != abi::err_invalid_client;
      });
      in.meet();
      if (heir != 0)
        in.apply({.kind = Kind::moved,
                  .process = number,
                  .cls = heir,
                  .source_handle = static_cast<std::uint32_t>(fd),
                  .fd = fd});
    }
    in.apply({.kind = Kind::process_gone, .process = number});
  }
  in.recover();
  in.reconcile();
  in.publish();
  in.relist();
  return std::unique_ptr<Hold>(new Hold(std::move(inside)));
}

int Hold::listener() const { return inside_->listener.fd(); }
int Hold::processes_fd() const { return inside_->ended.get(); }

Status Hold::pump() {
  Inside& in = *inside_;
  in.bury(false);
  for (unsigned i = 0; i < calls_a_pump; ++i) {
    if (auto got = in.listener.receive(in.record.call); !got.ok()) {
      if (got.error().code() == Errc::not_found) break;
      if (got.error().code() != Errc::gone) return got;
      // The filter goes early in a process's exit: its files and pidfd follow.
      in.bury(true);
      in.relist();
      return in.processes.all().empty() ? got : ok_status();
    }
    in.handle();
    in.clear();
  }
  in.relist();
  return ok_status();
}

std::span<const Group> Hold::groups() const { return inside_->groups; }
std::uint64_t Hold::generation() const { return inside_->generation; }
std::span<const Process> Hold::processes() const {
  auto& listed = inside_->listed;
  listed.clear();
  for (const auto& [number, process] : inside_->processes.all())
    listed.push_back({process.pid, process.start_time});
  return listed;
}
std::uint64_t Hold::used(std::uint32_t gpu) const { return inside_->used(gpu); }
std::uint64_t Hold::managed(std::uint32_t gpu) const { return inside_->book().managed(gpu); }
std::uint64_t Hold::refused() const { return inside_->record.refused; }
std::uint64_t Hold::escapes() const { return inside_->record.escapes; }
std::uint64_t Hold::self_set() const { return inside_->record.self_set; }

namespace {
Error no_group(const Group& group) {
  return Error(Errc::gone,
               fmt::format("channel group {:#x} of process {} is no more", group.handle, group.pid));
}
}  // namespace

rm::DriverFile* Hold::file_of(const Group& group) {
  const auto owner = inside_->book().owner_of(group.client);
  if (!owner || !inside_->book().knows(group.client, group.handle)) return nullptr;
  return inside_->processes.control_file(owner->first, owner->second);
}

Result<std::uint64_t> Hold::slice_us(const Group& group) {
  auto* file = file_of(group);
  if (file == nullptr) return no_group(group);
  return file->timeslice_us(group.client, group.handle);
}

Status Hold::set_slice_us(const Group& group, std::uint64_t us) {
  auto* file = file_of(group);
  if (file == nullptr) return no_group(group);
  return file->set_timeslice_us(group.client, group.handle, us);
}

Status Hold::set_on(const Group& group, bool on) {
  auto* file = file_of(group);
  if (file == nullptr) return no_group(group);
  return file->set_channels(group.client, group.subdevice, group.channels, on);
}

Status Hold::force_on(const Group& group) {
  // Enabling what runs does nothing, so that the number of disables need not be known.
  constexpr int most_nested = 16;
  for (int i = 0; i < most_nested; ++i) BH_CHECK(set_on(group, true));
  return ok_status();
}

void Hold::charge_beyond(std::uint32_t gpu, std::uint64_t bytes) {
  if (gpu >= ledger::max_gpus) return;
  inside_->record.beyond[gpu].store(bytes, std::memory_order_relaxed);
  inside_->publish();
}

void Hold::reconcile() {
  inside_->reconcile();
  inside_->relist();
}

}  // namespace bulkhead::hold
