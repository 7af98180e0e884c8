#include "edge/systemd/systemd.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <systemd/sd-bus.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"

namespace bulkhead::systemd {

namespace {

constexpr const char* service = "org.freedesktop.systemd1";
constexpr const char* manager_path = "/org/freedesktop/systemd1";
constexpr const char* manager = "org.freedesktop.systemd1.Manager";
constexpr const char* unit_interface = "org.freedesktop.systemd1.Unit";
constexpr std::uint64_t call_usec =
    10'000'000;  // systemd answers a question at once; a job is waited for apart
constexpr useconds_t poll_usec = 20'000;

// What is used of libsystemd, by name. Every symbol is in version 221 (2015) already.
struct Symbols {
  decltype(&::sd_bus_new) bus_new = nullptr;
  decltype(&::sd_bus_set_address) set_address = nullptr;
  decltype(&::sd_bus_start) start = nullptr;
  decltype(&::sd_bus_open_system) open_system = nullptr;
  decltype(&::sd_bus_flush_close_unref) close = nullptr;
  decltype(&::sd_bus_call) call = nullptr;
  decltype(&::sd_bus_message_new_method_call) new_call = nullptr;
  decltype(&::sd_bus_message_append) append = nullptr;
  decltype(&::sd_bus_message_append_strv) append_strv = nullptr;
  decltype(&::sd_bus_message_read) read = nullptr;
  decltype(&::sd_bus_message_unref) unref = nullptr;
  decltype(&::sd_bus_get_property_string) property_string = nullptr;
  decltype(&::sd_bus_get_property) property = nullptr;
  decltype(&::sd_bus_error_free) error_free = nullptr;
};

template <class F>
bool find(void* library, const char* name, F& out) {
  out = reinterpret_cast<F>(::dlsym(library, name));
  return out != nullptr;
}

// nullptr and the missing name when libsystemd is too old.
const char* fill(void* library, Symbols& s) {
#define BH_FIND(field, name) \
  if (!find(library, name, s.field)) return name
  BH_FIND(bus_new, "sd_bus_new");
  BH_FIND(set_address, "sd_bus_set_address");
  BH_FIND(start, "sd_bus_start");
  BH_FIND(open_system, "sd_bus_open_system");
  BH_FIND(close, "sd_bus_flush_close_unref");
  BH_FIND(call, "sd_bus_call");
  BH_FIND(new_call, "sd_bus_message_new_method_call");
  BH_FIND(append, "sd_bus_message_append");
  BH_FIND(append_strv, "sd_bus_message_append_strv");
  BH_FIND(read, "sd_bus_message_read");
  BH_FIND(unref, "sd_bus_message_unref");
  BH_FIND(property_string, "sd_bus_get_property_string");
  BH_FIND(property, "sd_bus_get_property");
  BH_FIND(error_free, "sd_bus_error_free");
#undef BH_FIND
  return nullptr;
}

// A D-Bus address value: everything but these bytes is %-escaped.
std::string escape(std::string_view path) {
  std::string out;
  for (const char c : path) {
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                       std::strchr("-_/.\\", c) != nullptr;
    out += plain ? std::string(1, c) : fmt::format("%{:02x}", static_cast<unsigned char>(c));
  }
  return out;
}

}  // namespace

struct Systemd::Bus {
  void* library = nullptr;
  Symbols s = {};
  sd_bus* bus = nullptr;
  UniqueFd directory = {};  // keeps a short name for a socket whose path is longer than a socket address

  ~Bus() {
    if (bus != nullptr) s.close(bus);
    if (library != nullptr) ::dlclose(library);
  }

  Error error(std::string_view what, int code, const sd_bus_error& bus_error) const {
    const std::string name = bus_error.name != nullptr ? bus_error.name : "";
    const std::string said =
        printable(bus_error.message != nullptr ? bus_error.message : std::strerror(-code));
    Errc errc = Errc::io;
    if (name == "org.freedesktop.systemd1.NoSuchUnit") {
      errc = Errc::not_found;
    } else if (name == "org.freedesktop.DBus.Error.AccessDenied" ||
               name.ends_with("InteractiveAuthorizationRequired") || code == -EACCES || code == -EPERM) {
      errc = Errc::permission;
    } else if (code == -ETIMEDOUT || name == "org.freedesktop.DBus.Error.NoReply" ||
               name == "org.freedesktop.DBus.Error.Timeout") {
      errc = Errc::timeout;
    } else if (code == -ENOTCONN || code == -ECONNRESET || code == -EPIPE ||
               name == "org.freedesktop.DBus.Error.Disconnected") {
      errc = Errc::unavailable;
    }
    return Error(errc, fmt::format("systemd: {}: {}", what, said),
                 errc == Errc::permission ? "run as root" : "", -code);
  }

  // A call of the manager with up to two strings, or with a list of one file when `files`.
  struct Reply {
    const Symbols* s = nullptr;
    sd_bus_message* message = nullptr;
    Reply() = default;
    Reply(const Symbols* symbols, sd_bus_message* m) : s(symbols), message(m) {}
    Reply(Reply&& other) noexcept : s(other.s), message(std::exchange(other.message, nullptr)) {}
    Reply& operator=(Reply&&) = delete;
    Reply(const Reply&) = delete;
    Reply& operator=(const Reply&) = delete;
    ~Reply() {
      if (message != nullptr) s->unref(message);
    }
  };
  template <class Fill>
  Result<Reply> call(const std::string& what, const char* member, Fill&& fill_in) {
    sd_bus_message* raw = nullptr;
    int code = s.new_call(bus, &raw, service, manager_path, manager, member);
    if (code < 0) return error(what, code, {});
    const Reply request(&s, raw);
    code = fill_in(raw);
    if (code < 0) return error(what, code, {});
    sd_bus_error bus_error{};
    sd_bus_message* answer = nullptr;
    code = s.call(bus, raw, call_usec, &bus_error, &answer);
    if (code < 0) {
      Error failed = error(what, code, bus_error);
      s.error_free(&bus_error);
      return failed;
    }
    return Reply(&s, answer);
  }

  Result<std::string> unit_path(const std::string& name) {
    // LoadUnit, unlike GetUnit, also answers for units that are not in memory: a stopped one, an unknown one.
    BH_TRY(const Reply reply, call("load " + name, "LoadUnit",
                                   [&](sd_bus_message* m) { return s.append(m, "s", name.c_str()); }));
    const char* path = nullptr;
    const int code = s.read(reply.message, "o", &path);
    if (code < 0) return error("load " + name, code, {});
    return std::string(path);
  }

  Result<std::string> text(const std::string& path, const char* property_name) {
    char* value = nullptr;
    sd_bus_error bus_error{};
    const int code =
        s.property_string(bus, service, path.c_str(), unit_interface, property_name, &bus_error, &value);
    if (code < 0) {
      Error failed = error(fmt::format("read {}", property_name), code, bus_error);
      s.error_free(&bus_error);
      return failed;
    }
    std::string out = printable(value != nullptr ? value : "");
    std::free(value);
    return out;
  }

  // The number of the unit's queued or running job; 0: none.
  Result<std::uint32_t> job(const std::string& path) {
    sd_bus_error bus_error{};
    sd_bus_message* raw = nullptr;
    int code = s.property(bus, service, path.c_str(), unit_interface, "Job", &bus_error, &raw, "(uo)");
    const Reply reply(&s, raw);
    std::uint32_t id = 0;
    const char* job_path = nullptr;
    if (code >= 0) code = s.read(raw, "(uo)", &id, &job_path);
    if (code < 0) {
      Error failed = error("read Job", code, bus_error);
      s.error_free(&bus_error);
      return failed;
    }
    return id;
  }

  // Polling rather than JobRemoved: the signal needs a subscription on the bus and none on the private
  // socket, and one lost leaves us waiting; a job lasts seconds.
  Status run(const std::string& name, const char* member, const char* verb, std::string_view wanted,
             unsigned deadline_ms) {
    const std::uint64_t deadline = monotonic_ns() + std::uint64_t{deadline_ms} * 1'000'000;
    const std::string what = fmt::format("{} {}", verb, name);
    BH_TRY(const Reply reply,
           call(what, member, [&](sd_bus_message* m) { return s.append(m, "ss", name.c_str(), "replace"); }));
    BH_TRY(const std::string path, unit_path(name));
    while (true) {
      BH_TRY(const std::uint32_t id, job(path));
      BH_TRY(const std::string active, text(path, "ActiveState"));
      const bool moving =
          id != 0 || active == "activating" || active == "deactivating" || active == "reloading";
      if (!moving) {
        // A unit that was stopped may rest as "failed": it does not run, which is what was asked.
        if (active == wanted || (wanted == "inactive" && active == "failed")) return ok_status();
        return Error(Errc::io, fmt::format("systemd: {}: the job ended with the unit {}", what, active),
                     fmt::format("journalctl -u {} -n 20", name));
      }
      if (monotonic_ns() > deadline) {
        return Error(Errc::timeout,
                     fmt::format("systemd: {}: still {} after {} s", what, active, deadline_ms / 1000),
                     fmt::format("systemctl status {}", name));
      }
      ::usleep(poll_usec);
    }
  }

  Status file(const std::string& name, bool on) {
    const std::string what = fmt::format("{} {}", on ? "enable" : "disable", name);
    BH_TRY(const Reply reply, call(what, on ? "EnableUnitFiles" : "DisableUnitFiles", [&](sd_bus_message* m) {
             std::string copy = name;
             char* list[] = {copy.data(), nullptr};
             const int code = s.append_strv(m, list);
             if (code < 0) return code;
             return on ? s.append(m, "bb", 0, 1) : s.append(m, "b", 0);  // runtime, and force when enabling
           }));
    // As systemctl does: links changed on disk, the manager reads them again.
    BH_TRY(const Reply reloaded, call("reload", "Reload", [](sd_bus_message*) { return 0; }));
    return ok_status();
  }
};

Systemd::Systemd() : bus_(std::make_unique<Bus>()) {}
Systemd::~Systemd() = default;

Result<std::unique_ptr<Systemd>> Systemd::connect(const std::filesystem::path& root) {
  std::unique_ptr<Systemd> made(new Systemd());
  Bus& b = *made->bus_;
  const std::filesystem::path socket = root / "run/systemd/private";
  const bool here = std::filesystem::path(root).lexically_normal() == "/";
  const bool private_socket = ::geteuid() == 0 && ::access(socket.c_str(), F_OK) == 0;
  if (!private_socket && !here) {
    // Never the bus of this machine when another one was meant.
    return Error(Errc::unavailable, fmt::format("systemd: {} is not there", socket.string()));
  }
  b.library = ::dlopen("libsystemd.so.0", RTLD_NOW | RTLD_LOCAL);
  if (b.library == nullptr)
    return Error(Errc::unavailable, fmt::format("systemd: {}", printable(::dlerror())),
                 "apt install libsystemd0");
  if (const char* missing = fill(b.library, b.s); missing != nullptr) {
    return Error(Errc::unsupported, fmt::format("systemd: libsystemd.so.0 has no {}", missing));
  }
  int code = 0;
  if (private_socket) {
    std::string path = socket.string();
    if (path.size() > 100) {  // sun_path holds 108 bytes
      b.directory.reset(::open(socket.parent_path().c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
      if (!b.directory) return errno_error("systemd: open " + socket.parent_path().string(), errno);
      path = fmt::format("/proc/self/fd/{}/private", b.directory.get());
    }
    code = b.s.bus_new(&b.bus);
    if (code >= 0) code = b.s.set_address(b.bus, ("unix:path=" + escape(path)).c_str());
    if (code >= 0) code = b.s.start(b.bus);
  } else {
    code = b.s.open_system(&b.bus);
  }
  if (code < 0) {
    return Error(Errc::unavailable,
                 fmt::format("systemd: connect to {}: {}",
                             private_socket ? socket.string() : "the system bus", std::strerror(-code)),
                 {}, -code);
  }
  return made;
}

Result<inventory::SystemdUnit> Systemd::unit(const std::string& name) {
  BH_TRY(const std::string path, bus_->unit_path(name));
  inventory::SystemdUnit unit{.name = name};
  BH_TRY(unit.load_state, bus_->text(path, "LoadState"));
  BH_TRY(unit.active_state, bus_->text(path, "ActiveState"));
  BH_TRY(unit.sub_state, bus_->text(path, "SubState"));
  BH_TRY(unit.file_state, bus_->text(path, "UnitFileState"));
  return unit;
}

Status Systemd::start(const std::string& name, unsigned deadline_ms) {
  return bus_->run(name, "StartUnit", "start", "active", deadline_ms);
}
Status Systemd::stop(const std::string& name, unsigned deadline_ms) {
  return bus_->run(name, "StopUnit", "stop", "inactive", deadline_ms);
}
Status Systemd::enable(const std::string& name) { return bus_->file(name, true); }
Status Systemd::disable(const std::string& name) { return bus_->file(name, false); }

}  // namespace bulkhead::systemd
