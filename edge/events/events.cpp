#include "edge/events/events.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include <fmt/format.h>
#include <nvml.h>

#include "base/clock.hpp"
#include "base/text.hpp"

namespace bulkhead::events {

namespace {

constexpr unsigned wait_ms = 1000;
constexpr std::uint64_t silence_ns = 10'000'000'000;
constexpr unsigned most_gpus = 256;
constexpr unsigned long long xid_event = 0x8;  // nvml.h nvmlEventTypeXidCriticalError

enum class Kind : std::uint32_t { alive, ready, event, trouble };

// What goes through the pipe: smaller than PIPE_BUF, so each write is whole.
struct Record {
  Kind kind = Kind::alive;
  std::uint32_t domain = 0, bus = 0, device = 0;
  std::uint32_t gpu_instance = 0, compute_instance = 0;
  std::uint64_t xid = 0;
  std::int64_t wall_ms = 0;
  char text[200] = {};
};
static_assert(sizeof(Record) < 512);

class Follower {
 public:
  Follower(int out, std::string library) : out_(out), library_(std::move(library)) {}

  int run() {
    library_handle_ =
        ::dlopen(library_.empty() ? "libnvidia-ml.so.1" : library_.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library_handle_ == nullptr) return trouble("the driver's library cannot be loaded");
    const auto init = find<decltype(::nvmlInit_v2)>("nvmlInit_v2");
    const auto create = find<decltype(::nvmlEventSetCreate)>("nvmlEventSetCreate");
    const auto enlist = find<decltype(::nvmlDeviceRegisterEvents)>("nvmlDeviceRegisterEvents");
    const auto wait = find<decltype(::nvmlEventSetWait_v2)>("nvmlEventSetWait_v2");
    const auto count = find<decltype(::nvmlDeviceGetCount_v2)>("nvmlDeviceGetCount_v2");
    const auto by_index = find<decltype(::nvmlDeviceGetHandleByIndex_v2)>("nvmlDeviceGetHandleByIndex_v2");
    pci_ = find<decltype(::nvmlDeviceGetPciInfo_v3)>("nvmlDeviceGetPciInfo_v3");
    words_ = find<decltype(::nvmlErrorString)>("nvmlErrorString");
    if (init == nullptr || create == nullptr || enlist == nullptr || wait == nullptr || count == nullptr ||
        by_index == nullptr || pci_ == nullptr)
      return trouble("the driver's library has no events");
    if (const auto code = init(); code != NVML_SUCCESS) return trouble("nvmlInit", code);
    nvmlEventSet_t set = nullptr;
    if (const auto code = create(&set); code != NVML_SUCCESS) return trouble("nvmlEventSetCreate", code);
    unsigned gpus = 0;
    if (const auto code = count(&gpus); code != NVML_SUCCESS) return trouble("nvmlDeviceGetCount", code);
    unsigned enlisted = 0;
    for (unsigned i = 0; i < std::min(gpus, most_gpus); ++i) {
      nvmlDevice_t device = nullptr;
      auto code = by_index(i, &device);
      if (code == NVML_SUCCESS) code = enlist(device, xid_event, set);
      if (code == NVML_SUCCESS)
        ++enlisted;
      else
        trouble(fmt::format("events of GPU {}", i).c_str(), code);
    }
    if (enlisted == 0) return trouble("no GPU of this driver has events");
    say({.kind = Kind::ready, .xid = enlisted});
    nvmlReturn_t before = NVML_SUCCESS;
    for (;;) {
      nvmlEventData_t data = {};
      const auto code = wait(set, &data, wait_ms);
      if (code == NVML_SUCCESS) {
        event(data);
      } else if (code == NVML_ERROR_TIMEOUT) {
        say({.kind = Kind::alive});
      } else {
        // NVML_ERROR_GPU_IS_LOST stays while one is lost; the others' events may still come.
        if (code != before) trouble("nvmlEventSetWait", code);
        say({.kind = Kind::alive});
        ::usleep(200'000);
      }
      before = code;
    }
  }

 private:
  template <class F>
  F* find(const char* name) const {
    return reinterpret_cast<F*>(::dlsym(library_handle_, name));
  }
  void say(const Record& record) const {
    while (::write(out_, &record, sizeof record) < 0)
      if (errno != EINTR) ::_exit(0);  // nobody reads any more
  }
  int trouble(const char* what) const {
    Record record{.kind = Kind::trouble};
    std::strncpy(record.text, what, sizeof record.text - 1);
    say(record);
    return 1;
  }
  int trouble(const char* what, nvmlReturn_t code) const {
    const char* said = words_ != nullptr ? words_(code) : nullptr;
    return trouble(said != nullptr
                       ? fmt::format("{}: {}", what, printable(std::string_view(said), 120)).c_str()
                       : fmt::format("{}: nvmlReturn {}", what, int{code}).c_str());
  }
  void event(const nvmlEventData_t& data) {
    if ((data.eventType & xid_event) == 0) return;
    Record record{.kind = Kind::event,
                  .gpu_instance = data.gpuInstanceId,
                  .compute_instance = data.computeInstanceId,
                  .xid = data.eventData,
                  .wall_ms = wall_now().time_since_epoch().count()};
    nvmlPciInfo_t pci = {};
    // Asked now, not before: a GPU may have been taken off and found again elsewhere. One that is lost does
    // not say where it was, and what it last said stands.
    if (pci_(data.device, &pci) == NVML_SUCCESS) {
      const auto known = std::ranges::find(places_, data.device, &Place::device);
      const Place place{data.device, pci.domain, pci.bus, pci.device};
      if (known != places_.end())
        *known = place;
      else if (places_.size() < most_gpus)
        places_.push_back(place);
    }
    const auto known = std::ranges::find(places_, data.device, &Place::device);
    if (known == places_.end()) {
      trouble(fmt::format("Xid {} of a GPU that does not say which it is", data.eventData).c_str());
      return;
    }
    record.domain = known->domain;
    record.bus = known->bus;
    record.device = known->slot;
    say(record);
  }

  struct Place {
    nvmlDevice_t device = nullptr;
    std::uint32_t domain = 0, bus = 0, slot = 0;
  };
  int out_;
  std::string library_;
  void* library_handle_ = nullptr;
  nvmlReturn_t (*pci_)(nvmlDevice_t, nvmlPciInfo_t*) = nullptr;
  const char* (*words_)(nvmlReturn_t) = nullptr;
  std::vector<Place> places_;
};

}  // namespace

int follow(int out, const std::string& library) { return Follower(out, library).run(); }

Result<Watch> Watch::spawn(const std::string& program, const std::string& verb, const std::string& library) {
  int ends[2] = {-1, -1};
  if (::pipe2(ends, O_CLOEXEC) != 0) return errno_error("make a pipe", errno);
  Watch out;
  out.pipe_.reset(ends[0]);
  UniqueFd write_end(ends[1]);
  if (::fcntl(ends[0], F_SETFL, O_NONBLOCK) != 0) return errno_error("set a pipe", errno);
  (void)::fcntl(ends[1], F_SETPIPE_SZ, 1 << 20);
  // Between fork and exec of a process with threads only what is safe in a signal handler is called.
  std::array<const char*, 7> words = {"bulkhead",  verb.c_str(),    "--fd", "3",
                                      "--library", library.c_str(), nullptr};
  if (library.empty()) words[4] = nullptr;
  const auto parent = ::getpid();
  const UniqueFd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
  out.child_ = ::fork();
  if (out.child_ < 0) return errno_error("start the follower of events", errno);
  if (out.child_ == 0) {
    (void)::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(0);
    sigset_t none;
    ::sigemptyset(&none);
    (void)::sigprocmask(SIG_SETMASK, &none, nullptr);
    if (null) ::dup2(null.get(), 0), ::dup2(null.get(), 1);
    if (write_end.get() == 3)
      (void)::fcntl(3, F_SETFD, 0);
    else if (::dup2(write_end.get(), 3) != 3)
      ::_exit(1);
    (void)::syscall(SYS_close_range, 4U, ~0U, 0U);
    ::execv(program.c_str(), const_cast<char* const*>(words.data()));
    ::_exit(127);
  }
  out.heard_ns_ = monotonic_ns();
  return out;
}

Result<Watch> Watch::start(const std::string& library) {
  int ends[2] = {-1, -1};
  if (::pipe2(ends, O_CLOEXEC) != 0) return errno_error("make a pipe", errno);
  Watch out;
  out.pipe_.reset(ends[0]);
  UniqueFd write_end(ends[1]);
  if (::fcntl(ends[0], F_SETFL, O_NONBLOCK) != 0) return errno_error("set a pipe", errno);
  (void)::fcntl(ends[1], F_SETPIPE_SZ, 1 << 20);  // a storm waits here while the reader works
  const auto parent = ::getpid();
  out.child_ = ::fork();
  if (out.child_ < 0) return errno_error("start the follower of events", errno);
  if (out.child_ == 0) {
    (void)::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(0);
    // Ctrl-C is the parent's to answer; it ends us.
    (void)::signal(SIGINT, SIG_IGN);
    (void)::signal(SIGTERM, SIG_DFL);
    (void)::signal(SIGPIPE, SIG_IGN);
    ::_exit(Follower(write_end.get(), library).run());
  }
  out.heard_ns_ = monotonic_ns();
  return out;
}

Watch::Watch(Watch&& other) noexcept
    : pipe_(std::move(other.pipe_)),
      child_(std::exchange(other.child_, -1)),
      gpus_(other.gpus_),
      heard_ns_(other.heard_ns_),
      silent_(other.silent_) {}

Watch::~Watch() {
  if (child_ <= 0) return;
  (void)::kill(child_, SIGKILL);
  // One inside the kernel's driver dies when that lets it: it is not waited for longer than this.
  for (int i = 0; i < 50 && ::waitpid(child_, nullptr, WNOHANG) == 0; ++i) ::usleep(10'000);
}

Watch::Batch Watch::read() {
  Batch out;
  if (!pipe_) return out;
  while (out.events.size() < 10'000) {
    Record record;
    const auto n = ::read(pipe_.get(), &record, sizeof record);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) break;
    if (n != static_cast<ssize_t>(sizeof record)) {
      pipe_.reset();
      gpus_ = 0;
      out.said.emplace_back("the driver's events end here: their follower has ended");
      return out;
    }
    heard_ns_ = monotonic_ns();
    if (silent_) out.said.emplace_back("the driver answers again");
    silent_ = false;
    switch (record.kind) {
      case Kind::alive:
        break;
      case Kind::ready:
        gpus_ = static_cast<unsigned>(record.xid);
        out.ready = true;
        break;
      case Kind::event: {
        ErrorEvent event{.gpu = {record.domain, static_cast<std::uint8_t>(record.bus),
                                 static_cast<std::uint8_t>(record.device), 0},
                         .xid = record.xid,
                         .wall_ms = record.wall_ms};
        // nvml.h: 0xFFFFFFFF where MIG is off, and where the error is the whole GPU's.
        if (record.gpu_instance < 0xffffU) event.gpu_instance = record.gpu_instance;
        if (record.compute_instance < 0xffffU) event.compute_instance = record.compute_instance;
        out.events.push_back(event);
        break;
      }
      case Kind::trouble:
        record.text[sizeof record.text - 1] = '\0';
        out.said.push_back(printable(std::string_view(record.text), sizeof record.text));
        break;
    }
  }
  if (!silent_ && monotonic_ns() - heard_ns_ > silence_ns) {
    silent_ = true;
    out.said.emplace_back("the driver has not answered for 10 s: its events do not come meanwhile");
  }
  return out;
}

}  // namespace bulkhead::events
