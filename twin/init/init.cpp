#include "twin/init/init.hpp"

#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <systemd/sd-bus.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"
#include "twin/state/state.hpp"

namespace bulkhead::twin::init {

namespace fs = std::filesystem;

namespace {

constexpr const char* manager_path = "/org/freedesktop/systemd1";
constexpr const char* manager = "org.freedesktop.systemd1.Manager";
constexpr const char* unit_interface = "org.freedesktop.systemd1.Unit";
constexpr const char* job_path = "/org/freedesktop/systemd1/job/1";
constexpr std::size_t max_clients = 64;

struct Symbols {
  decltype(&::sd_bus_new) bus_new = nullptr;
  decltype(&::sd_bus_set_fd) set_fd = nullptr;
  decltype(&::sd_bus_set_server) set_server = nullptr;
  decltype(&::sd_bus_set_sender) set_sender = nullptr;
  decltype(&::sd_bus_set_anonymous) set_anonymous = nullptr;
  decltype(&::sd_bus_start) start = nullptr;
  decltype(&::sd_bus_add_filter) add_filter = nullptr;
  decltype(&::sd_bus_process) process = nullptr;
  decltype(&::sd_bus_get_fd) get_fd = nullptr;
  decltype(&::sd_bus_get_events) get_events = nullptr;
  decltype(&::sd_bus_flush) flush = nullptr;
  decltype(&::sd_bus_close) close = nullptr;
  decltype(&::sd_bus_unref) unref = nullptr;
  decltype(&::sd_bus_send) send = nullptr;
  decltype(&::sd_bus_emit_signal) emit_signal = nullptr;
  decltype(&::sd_bus_reply_method_errorf) reply_error = nullptr;
  decltype(&::sd_bus_message_new_method_return) new_return = nullptr;
  decltype(&::sd_bus_message_append) append = nullptr;
  decltype(&::sd_bus_message_open_container) open_container = nullptr;
  decltype(&::sd_bus_message_close_container) close_container = nullptr;
  decltype(&::sd_bus_message_read) read = nullptr;
  decltype(&::sd_bus_message_read_strv) read_strv = nullptr;
  decltype(&::sd_bus_message_get_type) get_type = nullptr;
  decltype(&::sd_bus_message_get_path) get_path = nullptr;
  decltype(&::sd_bus_message_get_interface) get_interface = nullptr;
  decltype(&::sd_bus_message_get_member) get_member = nullptr;
  decltype(&::sd_bus_message_unref) message_unref = nullptr;
  decltype(&::sd_bus_path_encode) path_encode = nullptr;
  decltype(&::sd_bus_path_decode) path_decode = nullptr;
};

const char* fill(void* library, Symbols& s) {
#define BH_FIND(field, name)                                             \
  s.field = reinterpret_cast<decltype(s.field)>(::dlsym(library, name)); \
  if (s.field == nullptr) return name
  BH_FIND(bus_new, "sd_bus_new");
  BH_FIND(set_fd, "sd_bus_set_fd");
  BH_FIND(set_server, "sd_bus_set_server");
  BH_FIND(set_sender, "sd_bus_set_sender");
  BH_FIND(set_anonymous, "sd_bus_set_anonymous");
  BH_FIND(start, "sd_bus_start");
  BH_FIND(add_filter, "sd_bus_add_filter");
  BH_FIND(process, "sd_bus_process");
  BH_FIND(get_fd, "sd_bus_get_fd");
  BH_FIND(get_events, "sd_bus_get_events");
  BH_FIND(flush, "sd_bus_flush");
  BH_FIND(close, "sd_bus_close");
  BH_FIND(unref, "sd_bus_unref");
  BH_FIND(send, "sd_bus_send");
  BH_FIND(emit_signal, "sd_bus_emit_signal");
  BH_FIND(reply_error, "sd_bus_reply_method_errorf");
  BH_FIND(new_return, "sd_bus_message_new_method_return");
  BH_FIND(append, "sd_bus_message_append");
  BH_FIND(open_container, "sd_bus_message_open_container");
  BH_FIND(close_container, "sd_bus_message_close_container");
  BH_FIND(read, "sd_bus_message_read");
  BH_FIND(read_strv, "sd_bus_message_read_strv");
  BH_FIND(get_type, "sd_bus_message_get_type");
  BH_FIND(get_path, "sd_bus_message_get_path");
  BH_FIND(get_interface, "sd_bus_message_get_interface");
  BH_FIND(get_member, "sd_bus_message_get_member");
  BH_FIND(message_unref, "sd_bus_message_unref");
  BH_FIND(path_encode, "sd_bus_path_encode");
  BH_FIND(path_decode, "sd_bus_path_decode");
#undef BH_FIND
  return nullptr;
}

bool known(const Unit& unit) { return unit.used != 0 && unit.loaded != 0; }

const char* active_of(const Unit& unit) {
  return unit.failed != 0 ? "failed" : unit.active != 0 ? "active" : "inactive";
}
const char* sub_of(const Unit& unit) {
  return unit.failed != 0 ? "failed" : unit.active != 0 ? "running" : "dead";
}

bool is_fabric_manager(std::string_view name) { return name.find("fabricmanager") != std::string_view::npos; }

// The process. One thread; State::units is the truth, this only answers for it.
class Server {
 public:
  Server(Symbols symbols, std::unique_ptr<StateFile> state, UniqueFd socket, fs::path directory,
         Options options)
      : s_(symbols),
        state_(std::move(state)),
        socket_(std::move(socket)),
        directory_(std::move(directory)),
        options_(options) {}

  void run() {
    while (true) {
      struct stat info {};
      if (::stat((directory_ / "state.bin").c_str(), &info) != 0) return;  // the twin is gone
      follow_fabric_manager();
      std::vector<pollfd> fds = {{socket_.get(), POLLIN, 0}, {port_ ? port_.get() : -1, POLLIN, 0}};
      for (const auto& client : clients_) {
        const int events = s_.get_events(client->bus);
        fds.push_back({s_.get_fd(client->bus), static_cast<short>(events > 0 ? events : POLLIN), 0});
      }
      const int ready = ::poll(fds.data(), fds.size(), 500);
      if (ready < 0 && errno != EINTR) return;
      if (ready <= 0) continue;
      if (fds[1].revents != 0)
        UniqueFd(::accept4(port_.get(), nullptr, nullptr, SOCK_CLOEXEC));  // answered, that is all
      for (auto& client : clients_) {
        int code = 0;
        while ((code = s_.process(client->bus, nullptr)) > 0) {
        }
        if (code < 0) client->gone = true;
      }
      std::erase_if(clients_, [](const auto& client) { return client->gone; });
      if (fds[0].revents != 0) accept();
    }
  }

 private:
  struct Client {
    Server* server = nullptr;
    sd_bus* bus = nullptr;
    bool gone = false;
    Client() = default;
    Client(const Client&) = delete;
    Client& operator=(const Client&) = delete;
    ~Client() {
      if (bus == nullptr) return;
      server->s_.flush(bus);
      server->s_.close(bus);
      server->s_.unref(bus);
    }
  };

  bool broken() const {
    bool off = false;
    state_->read([&](const State& state) {
      for (const Fault& fault : state.faults)
        off = off || (fault.kind == FaultKind::no_systemd && fault.remaining != 0);
    });
    return off;
  }

  void accept() {
    UniqueFd fd(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!fd || clients_.size() >= max_clients || broken()) return;
    auto client = std::make_unique<Client>();
    client->server = this;
    sd_id128_t id{};
    for (unsigned i = 0; i < sizeof id.bytes; ++i) id.bytes[i] = static_cast<std::uint8_t>(i + 1);
    if (s_.bus_new(&client->bus) < 0) return;
    const int raw = fd.get();
    if (s_.set_fd(client->bus, raw, raw) < 0) return;
    fd.release();
    // As systemd's own private socket: a server without a bus behind it, speaking under systemd's name.
    if (s_.set_server(client->bus, 1, id) < 0 || s_.set_sender(client->bus, "org.freedesktop.systemd1") < 0 ||
        s_.add_filter(client->bus, nullptr, on_message, client.get()) < 0 || s_.start(client->bus) < 0) {
      return;
    }
    clients_.push_back(std::move(client));
  }

  static int on_message(sd_bus_message* m, void* user, sd_bus_error*) {
    auto* client = static_cast<Client*>(user);
    return client->server->answer(*client, m);
  }

  // ---- answers
  int answer(Client& client, sd_bus_message* m) {
    std::uint8_t type = 0;
    if (s_.get_type(m, &type) < 0 || type != SD_BUS_MESSAGE_METHOD_CALL) return 0;
    const std::string path = text(s_.get_path(m));
    const std::string interface = text(s_.get_interface(m));
    const std::string member = text(s_.get_member(m));
    if (interface == "org.freedesktop.DBus.Properties") return properties(m, path, member);
    if (interface == manager && path == manager_path) return call(client, m, member);
    if (interface == "org.freedesktop.DBus.Peer") return 0;
    return unknown(m, member);
  }

  int unknown(sd_bus_message* m, const std::string& member) {
    return s_.reply_error(m, "org.freedesktop.DBus.Error.UnknownMethod", "The twin's systemd has no %s.",
                          member.c_str()) < 0
               ? -EIO
               : 1;
  }

  int call(Client& client, sd_bus_message* m, const std::string& member) {
    if (member == "LoadUnit" || member == "GetUnit") {
      const char* name = nullptr;
      if (s_.read(m, "s", &name) < 0) return bad(m);
      if (member == "GetUnit" && !find(name)) return no_such_unit(m, name, "not loaded");
      return reply(m, [&](sd_bus_message* r) { return s_.append(r, "o", object(name).c_str()); });
    }
    if (member == "StartUnit" || member == "StopUnit" || member == "RestartUnit" ||
        member == "TryRestartUnit" || member == "ReloadOrRestartUnit") {
      const char* name = nullptr;
      const char* mode = nullptr;
      if (s_.read(m, "ss", &name, &mode) < 0) return bad(m);
      return job(client, m, name, member != "StopUnit");
    }
    if (member == "EnableUnitFiles" || member == "DisableUnitFiles" || member == "EnableUnitFilesWithFlags" ||
        member == "DisableUnitFilesWithFlags") {
      return enable(m, member);
    }
    if (member == "GetUnitFileState") {
      const char* name = nullptr;
      if (s_.read(m, "s", &name) < 0) return bad(m);
      const auto unit = find(name);
      if (!unit) return no_such_file(m, name);
      return reply(m, [&](sd_bus_message* r) {
        return s_.append(r, "s", unit->enabled != 0 ? "enabled" : "disabled");
      });
    }
    if (member == "ListUnits" || member == "ListUnitsByPatterns" || member == "ListUnitsByNames" ||
        member == "ListUnitsFiltered")
      return list(m);
    if (member == "Reload" || member == "Subscribe" || member == "Unsubscribe" || member == "ResetFailed") {
      return reply(m, [](sd_bus_message*) { return 0; });
    }
    if (member == "ResetFailedUnit") {
      const char* name = nullptr;
      if (s_.read(m, "s", &name) < 0) return bad(m);
      change(name, [](Unit& unit) { unit.failed = 0; });
      return reply(m, [](sd_bus_message*) { return 0; });
    }
    return unknown(m, member);
  }

  int job(Client& client, sd_bus_message* m, const std::string& name, bool on) {
    if (!find(name)) return no_such_unit(m, name, "not found");
    change(name, [&](Unit& unit) {
      unit.active = on ? 1U : 0U;
      unit.failed = 0;
    });
    if (is_fabric_manager(name)) {
      follow_fabric_manager();
      if (on) register_fabric();
    }
    const int code = reply(m, [&](sd_bus_message* r) { return s_.append(r, "o", job_path); });
    const auto unit = find(name);
    const char* result = on && unit && unit->active == 0 ? "failed" : "done";
    s_.emit_signal(client.bus, manager_path, manager, "JobRemoved", "uoss", 1U, job_path, name.c_str(),
                   result);
    return code;
  }

  int enable(sd_bus_message* m, const std::string& member) {
    const bool on = member.starts_with("Enable");
    char** names = nullptr;
    if (s_.read_strv(m, &names) < 0) return bad(m);
    std::vector<std::string> list;
    for (char** at = names; at != nullptr && *at != nullptr; ++at) {
      list.emplace_back(*at);
      std::free(*at);
    }
    std::free(names);
    for (const auto& name : list) {
      if (!find(name)) return no_such_file(m, name);
    }
    std::vector<std::string> changed;
    for (const auto& name : list) {
      change(name, [&](Unit& unit) {
        if ((unit.enabled != 0) != on) changed.push_back(name);
        unit.enabled = on ? 1U : 0U;
      });
    }
    return reply(m, [&](sd_bus_message* r) {
      int code = on ? s_.append(r, "b", 1) : 0;
      if (code >= 0) code = s_.open_container(r, 'a', "(sss)");
      for (const auto& name : changed) {
        const std::string link = "/etc/systemd/system/multi-user.target.wants/" + name;
        const std::string target = "/lib/systemd/system/" + name;
        if (code >= 0)
          code = s_.append(r, "(sss)", on ? "symlink" : "unlink", link.c_str(), on ? target.c_str() : "");
      }
      return code >= 0 ? s_.close_container(r) : code;
    });
  }

  int list(sd_bus_message* m) {
    std::vector<Unit> units;
    state_->read([&](const State& state) {
      for (const Unit& unit : state.units) {
        if (known(unit)) units.push_back(unit);
      }
    });
    return reply(m, [&](sd_bus_message* r) {
      int code = s_.open_container(r, 'a', "(ssssssouso)");
      for (const Unit& unit : units) {
        if (code >= 0) {
          code = s_.append(r, "(ssssssouso)", unit.name.bytes, unit.description.bytes, "loaded",
                           active_of(unit), sub_of(unit), "", object(unit.name.view()).c_str(), 0U, "", "/");
        }
      }
      return code >= 0 ? s_.close_container(r) : code;
    });
  }

  int properties(sd_bus_message* m, const std::string& path, const std::string& member) {
    const char* interface = nullptr;
    const char* wanted = "";
    const bool all = member == "GetAll";
    if (!all && member != "Get") return unknown(m, member);
    if ((all ? s_.read(m, "s", &interface) : s_.read(m, "ss", &interface, &wanted)) < 0) return bad(m);
    if (path == manager_path) {
      const std::vector<Property> values = {{"Version", "s", "252 (bulkhead twin)"},
                                            {"SystemState", "s", "running"},
                                            {"Virtualization", "s", ""}};
      return answer_properties(m, values, all, wanted);
    }
    char* decoded = nullptr;
    if (s_.path_decode(path.c_str(), "/org/freedesktop/systemd1/unit", &decoded) <= 0 || decoded == nullptr)
      return unknown(m, member);
    const std::string name = decoded;
    std::free(decoded);
    const auto unit = find(name);
    const std::string description = unit ? std::string(unit->description.view()) : name;
    const std::string fragment = unit ? "/lib/systemd/system/" + name : "";
    const std::vector<Property> values = {
        {"Id", "s", name},
        {"Description", "s", description},
        {"LoadState", "s", unit ? "loaded" : "not-found"},
        {"ActiveState", "s", unit ? active_of(*unit) : "inactive"},
        {"SubState", "s", unit ? sub_of(*unit) : "dead"},
        {"UnitFileState", "s",
         !unit                ? ""
         : unit->enabled != 0 ? "enabled"
                              : "disabled"},
        {"UnitFilePreset", "s", "disabled"},
        {"FragmentPath", "s", fragment},
        {"SourcePath", "s", ""},
        {"Following", "s", ""},
        {"Result", "s", unit && unit->failed != 0 ? "exit-code" : "success"},
        {"Names", "as", name},
        {"TriggeredBy", "as", ""},
        {"Triggers", "as", ""},
        {"DropInPaths", "as", ""},
        {"NeedDaemonReload", "b", ""},
        {"CanStart", "b", "1"},
        {"CanStop", "b", "1"},
        {"CanReload", "b", ""},
        {"Transient", "b", ""},
        {"Job", "(uo)", ""},
        {"MainPID", "u", ""},
        {"ControlPID", "u", ""},
    };
    return answer_properties(m, values, all, wanted);
  }

  struct Property {
    const char* name;
    const char* type;
    std::string value;  // "b": empty is false; "u" and "(uo)": zero
  };

  int append_value(sd_bus_message* r, const Property& property) {
    int code = s_.open_container(r, 'v', property.type);
    if (code < 0) return code;
    const std::string_view type = property.type;
    if (type == "s") code = s_.append(r, "s", property.value.c_str());
    if (type == "as")
      code = property.value.empty() ? s_.append(r, "as", 0) : s_.append(r, "as", 1, property.value.c_str());
    if (type == "b") code = s_.append(r, "b", property.value.empty() ? 0 : 1);
    if (type == "u") code = s_.append(r, "u", 0U);
    if (type == "(uo)") code = s_.append(r, "(uo)", 0U, "/");
    return code < 0 ? code : s_.close_container(r);
  }

  int answer_properties(sd_bus_message* m, const std::vector<Property>& values, bool all,
                        const char* wanted) {
    if (all) {
      return reply(m, [&](sd_bus_message* r) {
        int code = s_.open_container(r, 'a', "{sv}");
        for (const auto& property : values) {
          if (code >= 0) code = s_.open_container(r, 'e', "sv");
          if (code >= 0) code = s_.append(r, "s", property.name);
          if (code >= 0) code = append_value(r, property);
          if (code >= 0) code = s_.close_container(r);
        }
        return code >= 0 ? s_.close_container(r) : code;
      });
    }
    for (const auto& property : values) {
      if (std::string_view(property.name) == wanted)
        return reply(m, [&](sd_bus_message* r) { return append_value(r, property); });
    }
    return s_.reply_error(m, "org.freedesktop.DBus.Error.UnknownProperty", "Unknown property %s.", wanted) < 0
               ? -EIO
               : 1;
  }

  template <class Fill>
  int reply(sd_bus_message* m, Fill&& fill_in) {
    sd_bus_message* r = nullptr;
    int code = s_.new_return(m, &r);
    if (code >= 0) code = fill_in(r);
    if (code >= 0) code = s_.send(nullptr, r, nullptr);
    if (r != nullptr) s_.message_unref(r);
    return code < 0 ? code : 1;
  }

  int bad(sd_bus_message* m) {
    return s_.reply_error(m, "org.freedesktop.DBus.Error.InvalidArgs", "Bad arguments.") < 0 ? -EIO : 1;
  }
  int no_such_unit(sd_bus_message* m, const std::string& name, const char* how) {
    return s_.reply_error(m, "org.freedesktop.systemd1.NoSuchUnit", "Unit %s %s.", name.c_str(), how) < 0
               ? -EIO
               : 1;
  }
  int no_such_file(sd_bus_message* m, const std::string& name) {
    return s_.reply_error(m, "org.freedesktop.DBus.Error.FileNotFound", "Unit file %s does not exist.",
                          name.c_str()) < 0
               ? -EIO
               : 1;
  }

  // ---- state
  static std::string text(const char* s) { return s != nullptr ? s : ""; }

  std::string object(std::string_view name) const {
    char* path = nullptr;
    if (s_.path_encode("/org/freedesktop/systemd1/unit", std::string(name).c_str(), &path) < 0 ||
        path == nullptr)
      return "/";
    std::string out = path;
    std::free(path);
    return out;
  }

  std::optional<Unit> find(std::string_view name) const {
    std::optional<Unit> found;
    state_->read([&](const State& state) {
      for (const Unit& unit : state.units) {
        if (known(unit) && unit.name.view() == name) found = unit;
      }
    });
    return found;
  }

  template <class Change>
  void change(std::string_view name, Change&& how) {
    state_->write([&](State& state) {
      for (Unit& unit : state.units) {
        if (!known(unit) || unit.name.view() != name) continue;
        how(unit);
        return true;
      }
      return false;
    });
  }

  // A started Fabric Manager registers the GPUs with the fabric; those that were registered keep it when it
  // stops.
  void register_fabric() {
    constexpr std::uint32_t completed = 3;      // NVML_GPU_FABRIC_STATE_COMPLETED
    constexpr std::uint32_t not_supported = 0;  // NVML_GPU_FABRIC_STATE_NOT_SUPPORTED
    state_->write([&](State& state) {
      for (std::uint32_t i = 0; i < state.gpu_count && i < max_gpus; ++i) {
        if (state.gpus[i].fabric_state == not_supported) continue;
        state.gpus[i].fabric_state = completed;
        state.gpus[i].fabric_status = 0;
      }
      return true;
    });
  }

  // The port is open exactly while an active unit owns it, whoever changed the state.
  void follow_fabric_manager() {
    if (options_.fabric_manager_port == 0) return;
    std::string active;
    state_->read([&](const State& state) {
      for (const Unit& unit : state.units) {
        if (known(unit) && unit.active != 0 && is_fabric_manager(unit.name.view())) active = unit.name.view();
      }
    });
    if (active.empty()) {
      port_.reset();
      return;
    }
    if (port_) return;
    UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    const int on = 1;
    ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(options_.fabric_manager_port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) == 0 &&
        ::listen(fd.get(), 8) == 0) {
      port_ = std::move(fd);
      return;
    }
    change(active, [](Unit& unit) {
      unit.active = 0;
      unit.failed = 1;
    });
  }

  Symbols s_;
  std::unique_ptr<StateFile> state_;
  UniqueFd socket_;
  UniqueFd port_;
  fs::path directory_;
  Options options_;
  std::vector<std::unique_ptr<Client>> clients_;
};

fs::path run_directory(const fs::path& directory) { return directory / "root/run/systemd"; }
fs::path pid_file(const fs::path& directory) { return directory / "init.pid"; }

// Start time of a process, clock ticks since boot; 0 when there is none. With the pid it names a process for
// ever.
std::uint64_t start_time(int pid) {
  const auto stat = read_file(fmt::format("/proc/{}/stat", pid));
  if (!stat.ok()) return 0;
  const auto close = stat->rfind(')');
  if (close == std::string::npos) return 0;
  const auto fields =
      split(std::string_view(*stat).substr(close + 1), ' ');  // " S ppid ...": field 3 is at 1
  if (fields.size() < 21) return 0;
  return parse_u64(fields[20]).value_or(0);
}

// A socket address of any path length: the directory is reached through its descriptor.
sockaddr_un address_in(int directory_fd) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  fmt::format_to_n(address.sun_path, sizeof address.sun_path - 1, "/proc/self/fd/{}/private", directory_fd);
  return address;
}

}  // namespace

int running(const fs::path& directory) {
  const auto text = read_trimmed(pid_file(directory));
  if (!text.ok()) return 0;
  const auto words = split(*text, ' ');
  if (words.size() != 2) return 0;
  const auto pid = parse_u64(words[0]);
  const auto started = parse_u64(words[1]);
  if (!pid || *pid == 0 || *pid > 1U << 30U || !started) return 0;
  return start_time(static_cast<int>(*pid)) == *started ? static_cast<int>(*pid) : 0;
}

Status start(const fs::path& directory, const Options& options) {
  if (running(directory) != 0) return ok_status();
  const std::string what = "twin: start systemd";
  void* library = ::dlopen("libsystemd.so.0", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr)
    return Error(Errc::unavailable, fmt::format("{}: {}", what, printable(::dlerror())),
                 "apt install libsystemd0");
  Symbols symbols;
  if (const char* missing = fill(library, symbols); missing != nullptr) {
    return Error(Errc::unsupported, fmt::format("{}: libsystemd.so.0 has no {}", what, missing));
  }
  BH_TRY(auto state, StateFile::open(directory / "state.bin"));
  const fs::path run = run_directory(directory);
  std::error_code failed;
  fs::create_directories(run / "system", failed);  // sd_booted(3) looks for it
  if (failed) return errno_error(fmt::format("{}: create {}", what, run.string()), failed.value());
  const UniqueFd at(::open(run.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!at) return errno_error(fmt::format("{}: open {}", what, run.string()), errno);
  UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) return errno_error(what, errno);
  ::unlink((run / "private").c_str());
  const sockaddr_un address = address_in(at.get());
  if (::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
      ::listen(socket.get(), 16) != 0) {
    return errno_error(fmt::format("{}: listen on {}", what, (run / "private").string()), errno);
  }

  // Twice forked: the process belongs to no terminal and to nobody who would have to wait for it.
  int ready[2];
  if (::pipe2(ready, O_CLOEXEC) != 0) return errno_error(what, errno);
  const UniqueFd ready_read(ready[0]);
  UniqueFd ready_write(ready[1]);
  const pid_t child = ::fork();
  if (child < 0) return errno_error(what, errno);
  if (child == 0) {
    ::setsid();
    const pid_t server = ::fork();
    if (server != 0) ::_exit(server < 0 ? 1 : 0);
    ::prctl(PR_SET_NAME, "twin-systemd");
    ::signal(SIGPIPE, SIG_IGN);
    ::signal(SIGTERM, SIG_DFL);
    const int null = ::open("/dev/null", O_RDWR);
    for (int fd = 0; fd < 3; ++fd) ::dup2(null, fd);
    // Whatever else the caller had open (a pipe that somebody reads to its end) is let go.
    std::vector<unsigned> keep = {0, 1, 2, static_cast<unsigned>(socket.get()),
                                  static_cast<unsigned>(ready_write.get())};
    std::sort(keep.begin(), keep.end());
    for (std::size_t i = 0; i < keep.size(); ++i) {
      const unsigned first = keep[i] + 1;
      const unsigned last = i + 1 < keep.size() ? keep[i + 1] - 1 : ~0U;
      if (first <= last) ::syscall(SYS_close_range, first, last, 0U);
    }
    auto own_state = StateFile::open(directory / "state.bin");
    if (!own_state.ok()) ::_exit(1);
    const std::string pid = fmt::format("{} {}\n", ::getpid(), start_time(::getpid()));
    if (!write_file_atomic(pid_file(directory), pid).ok()) ::_exit(1);
    (void)!::write(ready_write.get(), "1", 1);
    ready_write.reset();
    Server(symbols, std::move(*own_state), std::move(socket), directory, options).run();
    ::_exit(0);
  }
  ready_write.reset();
  ::waitpid(child, nullptr, 0);
  char byte = 0;
  ssize_t got = 0;
  do {
    got = ::read(ready_read.get(), &byte, 1);
  } while (got < 0 && errno == EINTR);
  if (got != 1) return Error(Errc::io, fmt::format("{}: the process ended at once", what));
  return ok_status();
}

Status stop(const fs::path& directory) {
  const int pid = running(directory);
  if (pid != 0) {
    const UniqueFd process(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
    // Asked again with the pidfd in hand: now the pid cannot be another's.
    if (process && running(directory) == pid) {
      ::syscall(SYS_pidfd_send_signal, process.get(), SIGTERM, nullptr, 0);
      pollfd end = {process.get(), POLLIN, 0};
      if (::poll(&end, 1, 2000) == 0) {
        ::syscall(SYS_pidfd_send_signal, process.get(), SIGKILL, nullptr, 0);
        ::poll(&end, 1, 2000);
      }
    }
  }
  ::unlink(pid_file(directory).c_str());
  ::unlink((run_directory(directory) / "private").c_str());
  return ok_status();
}

}  // namespace bulkhead::twin::init
