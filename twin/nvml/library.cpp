#include "twin/nvml/library.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"
#include "twin/physics/physics.hpp"
#include "twin/rm/rm.hpp"
#include "twin/tree/tree.hpp"

namespace bulkhead::twin::nvml {

namespace {

constexpr std::size_t max_handles = 4096;

// The one process-wide object: what nvmlInit makes, as in the vendor's library.
struct Session {
  std::mutex mutex;
  unsigned users = 0;
  pid_t pid = 0;
  std::filesystem::path directory;
  std::unique_ptr<StateFile> file;
  UniqueFd clients;  // read-locked while NVML is open: a lock of this process, which a child does not inherit
  std::unique_ptr<rm::Driver> driver;  // once something was looked at; none when it cannot be opened
  std::array<Handle, max_gpus> gpus{};
  std::array<Handle, max_handles> others{};
  std::size_t next_other = 0, others_used = 0;
};

// On the heap, not a static object: clients call from atexit handlers, which may run after static
// destructors. It goes when the library is unloaded; a call after that finds a new, uninitialised one.
std::atomic<Session*> the_session{nullptr};

Session& session() {
  Session* now = the_session.load(std::memory_order_acquire);
  if (now != nullptr) return *now;
  auto made = std::make_unique<Session>();
  if (the_session.compare_exchange_strong(now, made.get(), std::memory_order_acq_rel)) return *made.release();
  return *now;
}

[[gnu::destructor]] void unloaded() { delete the_session.exchange(nullptr); }

std::filesystem::path twin_directory() {
  if (const char* named = std::getenv("BULKHEAD_TWIN"); named != nullptr && *named != '\0') return named;
  Dl_info info{};
  if (::dladdr(reinterpret_cast<const void*>(&twin_directory), &info) == 0 || info.dli_fname == nullptr)
    return {};
  return std::filesystem::path(info.dli_fname).parent_path() / "..";
}

nvmlReturn_t open_session(Session& s) {
  s.directory = twin_directory();
  auto file = StateFile::open(s.directory / "state.bin");
  if (!file.ok())
    return file.error().code() == Errc::permission ? NVML_ERROR_NO_PERMISSION : NVML_ERROR_DRIVER_NOT_LOADED;
  s.file = std::move(file).value();
  s.driver.reset();
  s.pid = ::getpid();
  const auto clients = s.directory / "clients";
  s.clients.reset(::open(clients.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
  if (!s.clients) s.clients.reset(::open(clients.c_str(), O_RDONLY | O_CLOEXEC));
  struct flock here {};
  here.l_type = F_RDLCK;
  if (s.clients) (void)::fcntl(s.clients.get(), F_SETLK, &here);
  return NVML_SUCCESS;
}

// ---- faults
bool names(std::string_view planted, std::string_view function) {
  if (planted.empty() || planted == function) return true;
  // "nvmlDeviceGetCount" means its later versions too.
  return function.size() == planted.size() + 3 && function.starts_with(planted) &&
         function[planted.size()] == '_' && function[planted.size() + 1] == 'v';
}

bool concerns_calls(FaultKind kind) {
  return kind == FaultKind::fail_call || kind == FaultKind::hang_call || kind == FaultKind::kill_before ||
         kind == FaultKind::kill_after;
}

std::optional<std::size_t> planted(const State& state, std::string_view function, std::uint32_t gpu) {
  for (std::size_t i = 0; i < max_faults; ++i) {
    const Fault& fault = state.faults[i];
    if (concerns_calls(fault.kind) && fault.remaining != 0 && (fault.gpu == none || fault.gpu == gpu) &&
        names(fault.function.view(), function)) {
      return i;
    }
  }
  return std::nullopt;
}

std::optional<std::size_t> planted(const State& state, FaultKind kind, std::uint32_t gpu) {
  for (std::size_t i = 0; i < max_faults; ++i) {
    const Fault& fault = state.faults[i];
    if (fault.kind == kind && fault.remaining != 0 && (fault.gpu == none || fault.gpu == gpu)) return i;
  }
  return std::nullopt;
}

void use_up(Fault& fault) {
  if (fault.remaining == none) return;
  if (--fault.remaining == 0) fault = Fault{};
}

void sleep_ms(std::uint64_t ms) {
  timespec left{static_cast<time_t>(ms / 1000), static_cast<long>(ms % 1000) * 1000000};
  while (::nanosleep(&left, &left) != 0) {
  }
}

// A call with a fault on it. Runs outside the lock; true when the call itself must still be made.
struct Struck {
  bool proceed = true;
  nvmlReturn_t answer = NVML_SUCCESS;
  bool kill_after = false;
};

Struck strike(Session& s, std::string_view function, std::uint32_t gpu) {
  Fault fault{};
  s.file->write([&](State& state) {
    const auto found = planted(state, function, gpu);
    if (!found) return false;
    fault = state.faults[*found];
    use_up(state.faults[*found]);
    return fault.remaining != none;
  });
  switch (fault.kind) {
    case FaultKind::fail_call:
      return {false, fault.code == 0 ? NVML_ERROR_UNKNOWN : static_cast<nvmlReturn_t>(fault.code), false};
    case FaultKind::hang_call:
      s.mutex.unlock();
      if (fault.delay_ms == 0) {
        for (;;) ::pause();
      }
      sleep_ms(fault.delay_ms);
      s.mutex.lock();
      return {};
    case FaultKind::kill_before:
      ::raise(SIGKILL);
      return {};
    case FaultKind::kill_after:
      return {true, NVML_SUCCESS, true};
    default:
      return {};
  }
}

// ---- handles
const Handle* handle_from(Session& s, const void* pointer) {
  const auto inside = [&](const auto& table) -> const Handle* {
    const auto at = reinterpret_cast<std::uintptr_t>(pointer);
    const auto begin = reinterpret_cast<std::uintptr_t>(table.data());
    if (at < begin || at >= begin + sizeof(table) || (at - begin) % sizeof(Handle) != 0) return nullptr;
    const auto* handle = static_cast<const Handle*>(pointer);
    return handle->gpu == none ? nullptr : handle;
  };
  if (const Handle* gpu = inside(s.gpus)) return gpu;
  return inside(s.others);
}

Handle* remember(Session& s, const Handle& wanted) {
  for (std::size_t i = 0; i < s.others_used; ++i) {
    Handle& h = s.others[i];
    if (h.kind == wanted.kind && h.gpu == wanted.gpu && h.gpu_instance == wanted.gpu_instance &&
        h.compute_instance == wanted.compute_instance && h.born == wanted.born) {
      return &h;
    }
  }
  // A full table forgets the oldest; a process that keeps four thousand dead slices in mind asks again.
  Handle& slot = s.others[s.next_other];
  s.next_other = (s.next_other + 1) % max_handles;
  s.others_used = std::max(s.others_used, s.next_other == 0 ? max_handles : s.next_other);
  slot = wanted;
  return &slot;
}

template <class StateT>
auto* instance_of(StateT& state, const Handle& handle) {
  auto* instance = mig::find(state, handle.gpu, handle.gpu_instance);
  if (instance == nullptr) return instance;
  const bool own = handle.kind == Kind::gpu_instance;
  return own && instance->born != handle.born ? nullptr : instance;
}

template <class InstanceT>
auto* compute_of(InstanceT& instance, const Handle& handle) {
  for (auto& compute : instance.compute) {
    if (compute.used != 0 && compute.id == handle.compute_instance && compute.born == handle.born)
      return &compute;
  }
  return static_cast<decltype(&instance.compute[0])>(nullptr);
}

Device device_at(const State& state, std::uint32_t slot) {
  return Device{&state, slot, &state.gpus[slot], &state.chips[state.gpus[slot].chip], nullptr, nullptr};
}

// What every call begins with; holds the session's mutex while it lives.
class Entered {
 public:
  explicit Entered(Session& s) : session_(s), lock_(s.mutex) {
    if (s.users == 0) {
      code_ = NVML_ERROR_UNINITIALIZED;
    } else if (s.pid != ::getpid()) {
      code_ = open_session(s);  // after fork(): the lock belongs to the parent's open file description
    }
  }
  nvmlReturn_t code() const { return code_; }
  Session& session() { return session_; }

 private:
  Session& session_;
  std::lock_guard<std::mutex> lock_;
  nvmlReturn_t code_ = NVML_SUCCESS;
};

// The recorded driver refreshes its sensors every 100 ms.
constexpr std::uint64_t refresh_ns = 100000000;

bool is_behind(const State& state) {
  return state.realtime != 0 && monotonic_ns() > state.last_step_host_ns + refresh_ns;
}

// What programs hold and keep busy, as of now: the driver frees and counts when somebody comes in.
void follow_driver(Session& s) {
  if (!s.driver) {
    auto driver = rm::Driver::open(s.directory);
    if (!driver.ok()) return;
    s.driver = std::move(driver).value();
  }
  static_cast<void>(s.driver->follow());
}

nvmlReturn_t read_call(const char* function, std::uint32_t gpu, Entered& in,
                       Borrowed<nvmlReturn_t(const State&)> answer) {
  Session& s = in.session();
  nvmlReturn_t code = NVML_SUCCESS;
  bool struck = false;
  bool behind = false;
  const auto look = [&](const State& state) {
    code = state.driver_loaded == 0 ? NVML_ERROR_DRIVER_NOT_LOADED : answer(state);
  };
  s.file->read([&](const State& state) {
    struck = planted(state, function, gpu).has_value();
    behind = is_behind(state);
    if (!struck && !behind) look(state);
  });
  if (behind) {
    follow_driver(s);
    // Sensors move with the host's clock: whoever looks first brings the world up to date.
    s.file->write([](State& state) { return physics::follow(state, monotonic_ns()); });
    if (!struck) s.file->read(look);
  }
  if (!struck) return code;
  const Struck hit = strike(s, function, gpu);
  if (!hit.proceed) return hit.answer;
  if (!s.file) return NVML_ERROR_UNINITIALIZED;  // shut down by another thread while the call hung
  s.file->read(look);
  if (hit.kill_after) ::raise(SIGKILL);
  return code;
}

namespace {
// The driver sees a process end when its files close; the twin looks whether the pid still is that process.
// Those that are only simulated (start time 0) end by `twin detach`.
void forget_ended(State& state) {
  for (Process& process : state.processes) {
    if (process.used == 0 || process.start_time == 0) continue;
    const auto stat = read_file("/proc/" + std::to_string(process.pid) + "/stat", 4096);
    const auto close = stat.ok() ? stat->rfind(')') : std::string::npos;
    bool lives = false;
    if (close != std::string::npos) {
      const auto fields =
          split(trim(std::string_view(*stat).substr(close + 1)), ' ');  // field 3 is fields[0]
      lives = fields.size() > 19 && fields[0] != "Z" && fields[0] != "X" &&
              parse_u64(fields[19]) == process.start_time;
    }
    if (!lives) process = Process{};
  }
}
}  // namespace

nvmlReturn_t write_call(const char* function, std::uint32_t gpu, Entered& in, bool touches_mig,
                        Borrowed<nvmlReturn_t(State&)> change) {
  if (::geteuid() != 0) return NVML_ERROR_NO_PERMISSION;
  Session& s = in.session();
  Struck hit;
  bool struck = false;
  std::uint64_t delay = 0;
  const std::string_view name(function);
  const bool destroys = name == "nvmlGpuInstanceDestroy" || name == "nvmlComputeInstanceDestroy";
  s.file->read([&](const State& state) {
    struck = planted(state, name, gpu).has_value();
    if (destroys) {
      if (const auto slow = planted(state, FaultKind::slow_destroy, gpu))
        delay = state.faults[*slow].delay_ms;
    }
  });
  if (struck) {
    hit = strike(s, name, gpu);
    if (!hit.proceed) return hit.answer;
  }
  if (delay > 0) {
    s.mutex.unlock();
    sleep_ms(delay);
    s.mutex.lock();
  }
  if (!s.file) return NVML_ERROR_UNINITIALIZED;
  nvmlReturn_t code = NVML_SUCCESS;
  s.file->write([&](State& state) {
    if (state.driver_loaded == 0) {
      code = NVML_ERROR_DRIVER_NOT_LOADED;
      return false;
    }
    if (delay > 0) {
      if (const auto slow = planted(state, FaultKind::slow_destroy, gpu)) use_up(state.faults[*slow]);
    }
    forget_ended(state);
    code = change(state);
    const bool half_made = name.starts_with("nvmlDeviceCreateGpuInstance") && code == NVML_SUCCESS;
    if (half_made) {
      if (const auto fault = planted(state, FaultKind::half_made_gi, gpu)) {
        // The board cut the slice and the driver then failed: it stays there, good for nothing but being
        // destroyed.
        GpuInstance* newest = nullptr;
        for (GpuInstance& instance : state.gpus[gpu].instances) {
          if (instance.used != 0 && (newest == nullptr || instance.born > newest->born)) newest = &instance;
        }
        if (newest != nullptr) newest->half_made = 1;
        const auto planned = state.faults[*fault].code;
        use_up(state.faults[*fault]);
        code = planned == 0 ? NVML_ERROR_UNKNOWN : static_cast<nvmlReturn_t>(planned);
        if (touches_mig) (void)refresh_tree(s.directory / "root", state);
        return true;
      }
    }
    if (code != NVML_SUCCESS) return false;
    // Under the lock, so that the tree never shows an older state over a newer one.
    if (touches_mig) (void)refresh_tree(s.directory / "root", state);
    return true;
  });
  if (hit.kill_after) ::raise(SIGKILL);
  return code;
}

}  // namespace

// ---- which GPUs there are
bool enumerated(const State& state, std::uint32_t gpu) {
  return state.gpus[gpu].in_nvml != 0 && !planted(state, FaultKind::lost_from_nvml, gpu);
}

bool off_the_bus(const State& state, std::uint32_t gpu) {
  return state.gpus[gpu].on_pci == 0 || planted(state, FaultKind::off_the_bus, gpu).has_value();
}

bool held_by_others(const State& state, std::uint32_t gpu) {
  const Session& s = session();
  if (!s.clients || !planted(state, FaultKind::other_clients, gpu)) return false;
  struct flock other {};
  other.l_type = F_WRLCK;
  return ::fcntl(s.clients.get(), F_GETLK, &other) == 0 && other.l_type != F_UNLCK;
}

std::uint32_t index_of(const State& state, std::uint32_t gpu) {
  std::uint32_t index = 0;
  for (std::uint32_t g = 0; g < gpu; ++g) index += enumerated(state, g) ? 1U : 0U;
  return index;
}

std::uint32_t slot_at(const State& state, std::uint32_t index) {
  for (std::uint32_t g = 0; g < state.gpu_count; ++g) {
    if (enumerated(state, g) && index-- == 0) return g;
  }
  return none;
}

std::uint64_t memory_of_processes(const State& state, std::uint32_t gpu, std::uint32_t gpu_instance) {
  std::uint64_t bytes = 0;
  for (const Process& process : state.processes) {
    if (process.used != 0 && process.gpu == gpu &&
        (gpu_instance == none || process.gpu_instance == gpu_instance)) {
      bytes += process.memory_bytes;
    }
  }
  return bytes;
}

// ---- the ways a call runs
nvmlReturn_t ask_host(const char* function, bool arguments_ok, Borrowed<nvmlReturn_t(const State&)> answer) {
  Entered in(session());
  if (in.code() != NVML_SUCCESS) return in.code();
  if (!arguments_ok) return NVML_ERROR_INVALID_ARGUMENT;
  return read_call(function, none, in, answer);
}

nvmlReturn_t ask(const char* function, nvmlDevice_t device, bool arguments_ok,
                 Borrowed<nvmlReturn_t(const Device&)> answer, Accept accept) {
  Entered in(session());
  if (in.code() != NVML_SUCCESS) return in.code();
  const Handle* handle = handle_from(in.session(), device);
  if (!arguments_ok || handle == nullptr || (handle->kind != Kind::gpu && handle->kind != Kind::mig_device)) {
    return NVML_ERROR_INVALID_ARGUMENT;
  }
  return read_call(function, handle->gpu, in, [&](const State& state) {
    if (off_the_bus(state, handle->gpu) || !enumerated(state, handle->gpu)) return lost;
    Device found = device_at(state, handle->gpu);
    if (handle->kind == Kind::mig_device) {
      const GpuInstance* instance = instance_of(state, *handle);
      const ComputeInstance* compute = instance == nullptr ? nullptr : compute_of(*instance, *handle);
      if (compute == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
      if (accept == Accept::gpu) return NVML_ERROR_NOT_SUPPORTED;
      found.instance = instance;
      found.compute = compute;
    }
    return answer(found);
  });
}

nvmlReturn_t tell(const char* function, nvmlDevice_t device, bool arguments_ok,
                  Borrowed<nvmlReturn_t(State&, std::uint32_t)> change, bool touches_mig) {
  Entered in(session());
  if (in.code() != NVML_SUCCESS) return in.code();
  const Handle* handle = handle_from(in.session(), device);
  if (!arguments_ok || handle == nullptr || handle->kind != Kind::gpu) return NVML_ERROR_INVALID_ARGUMENT;
  return write_call(function, handle->gpu, in, touches_mig, [&](State& state) {
    if (off_the_bus(state, handle->gpu) || !enumerated(state, handle->gpu)) return lost;
    return change(state, handle->gpu);
  });
}

nvmlReturn_t ask_instance(const char* function, const void* pointer, bool arguments_ok,
                          Borrowed<nvmlReturn_t(const Device&)> answer, bool compute) {
  Entered in(session());
  if (in.code() != NVML_SUCCESS) return in.code();
  const Handle* handle = handle_from(in.session(), pointer);
  const Kind kind = compute ? Kind::compute_instance : Kind::gpu_instance;
  if (!arguments_ok || handle == nullptr || handle->kind != kind) return NVML_ERROR_INVALID_ARGUMENT;
  return read_call(function, handle->gpu, in, [&](const State& state) {
    if (off_the_bus(state, handle->gpu) || !enumerated(state, handle->gpu)) return lost;
    Device found = device_at(state, handle->gpu);
    found.instance = instance_of(state, *handle);
    if (found.instance == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
    if (compute) {
      found.compute = compute_of(*found.instance, *handle);
      if (found.compute == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
    }
    return answer(found);
  });
}

nvmlReturn_t tell_instance(
    const char* function, const void* pointer, bool arguments_ok,
    Borrowed<nvmlReturn_t(State&, std::uint32_t, GpuInstance&, ComputeInstance*)> change, bool compute) {
  Entered in(session());
  if (in.code() != NVML_SUCCESS) return in.code();
  const Handle* handle = handle_from(in.session(), pointer);
  const Kind kind = compute ? Kind::compute_instance : Kind::gpu_instance;
  if (!arguments_ok || handle == nullptr || handle->kind != kind) return NVML_ERROR_INVALID_ARGUMENT;
  return write_call(function, handle->gpu, in, true, [&](State& state) {
    if (off_the_bus(state, handle->gpu) || !enumerated(state, handle->gpu)) return lost;
    GpuInstance* instance = instance_of(state, *handle);
    if (instance == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
    ComputeInstance* found = nullptr;
    if (compute) {
      found = compute_of(*instance, *handle);
      if (found == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
    }
    return change(state, handle->gpu, *instance, found);
  });
}

// Called from inside `ask` and `tell`: the session's mutex is held.
nvmlDevice_t handle_of_gpu(std::uint32_t gpu) {
  Handle& handle = session().gpus[gpu];
  handle = Handle{Kind::gpu, gpu, none, none, 0};
  return reinterpret_cast<nvmlDevice_t>(&handle);
}
nvmlDevice_t handle_of_mig(std::uint32_t gpu, const GpuInstance& instance, const ComputeInstance& compute) {
  return reinterpret_cast<nvmlDevice_t>(
      remember(session(), {Kind::mig_device, gpu, instance.id, compute.id, compute.born}));
}
nvmlGpuInstance_t handle_of(std::uint32_t gpu, const GpuInstance& instance) {
  return reinterpret_cast<nvmlGpuInstance_t>(
      remember(session(), {Kind::gpu_instance, gpu, instance.id, none, instance.born}));
}
nvmlComputeInstance_t handle_of(std::uint32_t gpu, const GpuInstance& instance,
                                const ComputeInstance& compute) {
  return reinterpret_cast<nvmlComputeInstance_t>(
      remember(session(), {Kind::compute_instance, gpu, instance.id, compute.id, compute.born}));
}

std::filesystem::path root_directory() { return session().directory / "root"; }

nvmlReturn_t put(std::string_view text, char* out, std::size_t length) {
  if (length < text.size() + 1) return NVML_ERROR_INSUFFICIENT_SIZE;
  std::memcpy(out, text.data(), text.size());
  out[text.size()] = '\0';
  return NVML_SUCCESS;
}

}  // namespace bulkhead::twin::nvml

// ---- the entry points that make and end a session
using namespace bulkhead::twin;        // NOLINT(google-build-using-namespace): this file is the library
using namespace bulkhead::twin::nvml;  // NOLINT(google-build-using-namespace)

nvmlReturn_t nvmlInitWithFlags(unsigned int flags) {
  Session& s = session();
  const std::lock_guard<std::mutex> lock(s.mutex);
  if (s.users == 0 || s.pid != ::getpid()) {
    if (const nvmlReturn_t code = open_session(s); code != NVML_SUCCESS) return code;
  }
  nvmlReturn_t code = NVML_SUCCESS;
  bool struck = false;
  s.file->read([&](const State& state) {
    struck = planted(state, "nvmlInit_v2", none).has_value();
    if (state.driver_loaded == 0) {
      code = NVML_ERROR_DRIVER_NOT_LOADED;
    } else if ((flags & NVML_INIT_FLAG_NO_GPUS) == 0 && state.gpu_count == 0) {
      code = NVML_ERROR_NOT_FOUND;
    }
  });
  if (struck) {
    if (const Struck hit = strike(s, "nvmlInit_v2", none); !hit.proceed) return hit.answer;
  }
  if (code == NVML_SUCCESS) ++s.users;
  return code;
}
nvmlReturn_t nvmlInit_v2() { return nvmlInitWithFlags(0); }
nvmlReturn_t nvmlInit() { return nvmlInitWithFlags(0); }

nvmlReturn_t nvmlShutdown() {
  Session& s = session();
  const std::lock_guard<std::mutex> lock(s.mutex);
  if (s.users == 0) return NVML_ERROR_UNINITIALIZED;
  if (--s.users == 0) {
    s.file.reset();
    s.driver.reset();
    s.clients.reset();
  }
  return NVML_SUCCESS;
}

const char* nvmlErrorString(nvmlReturn_t result) {
  switch (static_cast<int>(result)) {
    case 0:
      return "Success";
    case 1:
      return "Uninitialized";
    case 2:
      return "Invalid Argument";
    case 3:
      return "Not Supported";
    case 4:
      return "Insufficient Permissions";
    case 5:
      return "Already Initialized";
    case 6:
      return "Not Found";
    case 7:
      return "Insufficient Size";
    case 8:
      return "Insufficient External Power";
    case 9:
      return "Driver Not Loaded";
    case 10:
      return "Timeout";
    case 11:
      return "Interrupt Request Issue";
    case 12:
      return "NVML Shared Library Not Found";
    case 13:
      return "Function Not Found";
    case 14:
      return "Corrupted infoROM";
    case 15:
      return "GPU is lost";
    case 16:
      return "GPU requires reset";
    case 17:
      return "GPU access blocked by the operating system";
    case 18:
      return "Driver/library version mismatch";
    case 19:
      return "In use by another client";
    case 20:
      return "Insufficient Memory";
    case 21:
      return "No data";
    case 22:
      return "Requested operation is not available on target device, because ECC is enabled";
    case 23:
      return "Insufficient Resources";
    case 24:
      return "Requested clock frequency is not supported";
    case 25:
      return "Argument version mismatch";
    case 26:
      return "Deprecated";
    case 27:
      return "System is not in ready state";
    case 28:
      return "GPU not found";
    case 29:
      return "Invalid state";
    default:
      return "Unknown Error";
  }
}
