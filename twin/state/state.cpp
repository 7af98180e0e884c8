#include "twin/state/state.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <string>
#include <type_traits>

#include <fmt/format.h>

#include "base/fd.hpp"

namespace bulkhead::twin {

static_assert(std::is_trivially_copyable_v<State>, "State lives in a shared mapping");
static_assert(std::atomic<std::uint32_t>::is_always_lock_free);

namespace {

constexpr char magic[8] = {'b', 'h', 't', 'w', 'i', 'n', '\n', '\0'};
constexpr std::size_t header_bytes = 4096;
constexpr std::size_t copy_bytes = (sizeof(State) + 4095) / 4096 * 4096;
constexpr std::size_t file_bytes = header_bytes + 2 * copy_bytes;

struct Header {
  char magic_bytes[8];
  std::uint32_t version;
  std::uint32_t current;      // 0 or 1; stored last
  std::uint64_t state_bytes;  // sizeof(State): another build's layout is refused, never misread
  std::uint64_t checksum[2];  // of each copy, checked when the file is opened
};

// Four lanes of multiply-and-rotate: a checksum against damage, not against an adversary.
std::uint64_t checksum_of(const State& state) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(&state);
  std::uint64_t lanes[4] = {0x9e3779b97f4a7c15U, 0xc2b2ae3d27d4eb4fU, 0x165667b19e3779f9U,
                            0x27d4eb2f165667c5U};
  std::size_t at = 0;
  for (; at + 32 <= sizeof(State); at += 32) {
    std::uint64_t words[4];
    std::memcpy(words, bytes + at, 32);
    for (int lane = 0; lane < 4; ++lane) {
      lanes[lane] = (lanes[lane] ^ words[lane]) * 0x9fb21c651e98df25U;
      lanes[lane] ^= lanes[lane] >> 29U;
    }
  }
  std::uint64_t sum = lanes[0] ^ (lanes[1] * 3) ^ (lanes[2] * 5) ^ (lanes[3] * 7);
  for (; at < sizeof(State); ++at) sum = (sum ^ bytes[at]) * 0x100000001b3U;
  return sum;
}

// What no code of ours writes; an index out of bounds here would be a crash in every client.
std::string_view nonsense_in(const State& state) {
  if (state.version != state_version) return "the version inside differs from the header's";
  if (state.gpu_count > max_gpus) return "more GPUs than there is room for";
  if (state.chip_count > max_chips) return "more chips than there is room for";
  for (std::size_t g = 0; g < state.gpu_count; ++g) {
    if (state.gpus[g].chip >= state.chip_count) return "a GPU of a chip that is not there";
  }
  for (std::size_t c = 0; c < state.chip_count; ++c) {
    if (state.chips[c].profile_count > max_profiles) return "more MIG profiles than there is room for";
    if (state.chips[c].field_count > max_fields) return "more field values than there is room for";
    if (state.chips[c].clock_memory_count > 4) return "more memory clocks than there is room for";
    if (state.chips[c].nvlinks > max_nvlinks) return "more NVLinks than there is room for";
    for (std::size_t p = 0; p < state.chips[c].profile_count; ++p) {
      if (state.chips[c].profiles[p].start_count > 16) return "more placements than there is room for";
    }
  }
  return {};
}

constexpr const char* remake_hint =
    "make it again: bulkhead twin down --dir DIR; bulkhead twin up PROFILE --dir DIR";

}  // namespace

bool set_lock(int fd, short type) {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  int rc = 0;
  do {
    rc = ::fcntl(fd, F_OFD_SETLKW, &lock);
  } while (rc != 0 && errno == EINTR);
  return rc == 0;
}

// The kernel's lock is between open file descriptions, so threads that share one need the mutex as well, and
// a child after fork, which shares its parent's, opens the file anew before its first use.
struct StateFile::Mapped {
  std::filesystem::path path;
  UniqueFd fd;
  bool writable = false;
  pid_t owner = 0;
  void* memory = MAP_FAILED;
  std::unique_ptr<std::mutex> mutex = std::make_unique<std::mutex>();

  Mapped() = default;
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;
  ~Mapped() {
    if (memory != MAP_FAILED) ::munmap(memory, file_bytes);
  }

  Header& header() const { return *static_cast<Header*>(memory); }
  State& copy(std::uint32_t which) const {
    return *reinterpret_cast<State*>(static_cast<char*>(memory) + header_bytes + which * copy_bytes);
  }
  std::uint32_t current() const {
    return std::atomic_ref<std::uint32_t>(header().current).load(std::memory_order_acquire) & 1U;
  }

  void after_fork() {
    if (owner == ::getpid()) return;
    // The parent may have been inside a call when it forked: its mutex is left as it is, for ever.
    static_cast<void>(mutex.release());
    mutex = std::make_unique<std::mutex>();
    const auto again = fmt::format("/proc/self/fd/{}", fd.get());
    UniqueFd fresh(::open(again.c_str(), (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC));
    if (fresh) fd = std::move(fresh);
    owner = ::getpid();
  }
};

Status StateFile::create(const std::filesystem::path& path, const State& state) {
  BH_ASSERT(nonsense_in(state).empty());
  std::string content(file_bytes, '\0');
  Header header{};
  std::memcpy(header.magic_bytes, magic, sizeof magic);
  header.version = state_version;
  header.state_bytes = sizeof(State);
  header.checksum[0] = checksum_of(state);
  std::memcpy(content.data(), &header, sizeof header);
  std::memcpy(content.data() + header_bytes, &state, sizeof state);
  // Every user of the pretend machine may ask its GPUs, as with /dev/nvidiactl; what needs root, the driver
  // refuses.
  return write_file_atomic(path, content, 0666);
}

Result<std::unique_ptr<StateFile>> StateFile::open(const std::filesystem::path& path) {
  auto mapped = std::make_unique<Mapped>();
  mapped->path = path;
  mapped->writable = true;
  mapped->fd.reset(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (!mapped->fd && (errno == EACCES || errno == EROFS)) {
    mapped->writable = false;
    mapped->fd.reset(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  }
  if (!mapped->fd) {
    return errno_error(fmt::format("open twin state {}", path.string()), errno)
        .with_hint("start the twin first: bulkhead twin up PROFILE");
  }
  const auto refuse = [&](std::string_view why) {
    return Error(Errc::corrupt, fmt::format("twin state {}: {}", path.string(), why), remake_hint);
  };
  struct stat info {};
  if (::fstat(mapped->fd.get(), &info) != 0) return errno_error(fmt::format("stat {}", path.string()), errno);
  if (!S_ISREG(info.st_mode)) return refuse("not a regular file");
  if (static_cast<std::size_t>(info.st_size) < sizeof(Header)) {
    return refuse(fmt::format("{} bytes long, too short for a header", info.st_size));
  }
  Header header{};
  if (::pread(mapped->fd.get(), &header, sizeof header, 0) != static_cast<ssize_t>(sizeof header)) {
    return errno_error(fmt::format("read {}", path.string()), errno);
  }
  if (std::memcmp(header.magic_bytes, magic, sizeof magic) != 0) return refuse("not a twin's state file");
  if (header.version != state_version || header.state_bytes != sizeof(State)) {
    return refuse(fmt::format("made by another build (version {}, {} bytes; this one: version {}, {} bytes)",
                              header.version, header.state_bytes, state_version, sizeof(State)));
  }
  if (static_cast<std::size_t>(info.st_size) != file_bytes) {
    return refuse(fmt::format("{} bytes long instead of {}", info.st_size, file_bytes));
  }
  mapped->memory = ::mmap(nullptr, file_bytes, PROT_READ | (mapped->writable ? PROT_WRITE : 0), MAP_SHARED,
                          mapped->fd.get(), 0);
  if (mapped->memory == MAP_FAILED) return errno_error(fmt::format("map {}", path.string()), errno);
  mapped->owner = ::getpid();

  if (!set_lock(mapped->fd.get(), F_RDLCK)) return errno_error(fmt::format("lock {}", path.string()), errno);
  const std::uint32_t which = mapped->current();
  const bool sound = checksum_of(mapped->copy(which)) == mapped->header().checksum[which];
  const std::string_view nonsense =
      sound ? nonsense_in(mapped->copy(which)) : "its checksum does not match: damaged";
  set_lock(mapped->fd.get(), F_UNLCK);
  if (!nonsense.empty()) return refuse(nonsense);

  std::unique_ptr<StateFile> file(new StateFile);
  file->mapped_ = std::move(mapped);
  return file;
}

StateFile::~StateFile() = default;

void StateFile::read(const std::function<void(const State&)>& look) const {
  Mapped& m = *mapped_;
  m.after_fork();
  // Two readers of one description cannot both hold and release its one lock, so the mutex serialises them
  // here.
  const std::unique_lock guard(*m.mutex);
  struct Unlock {
    int fd;
    ~Unlock() { set_lock(fd, F_UNLCK); }
  } unlock{m.fd.get()};
  set_lock(m.fd.get(), F_RDLCK);
  look(m.copy(m.current()));
}

bool StateFile::write(const std::function<bool(State&)>& change) {
  Mapped& m = *mapped_;
  m.after_fork();
  if (!m.writable) return false;
  const std::unique_lock guard(*m.mutex);
  struct Unlock {
    int fd;
    ~Unlock() { set_lock(fd, F_UNLCK); }
  } unlock{m.fd.get()};
  if (!set_lock(m.fd.get(), F_WRLCK)) return false;
  const std::uint32_t now = m.current();
  const std::uint32_t next = now ^ 1U;
  State& state = m.copy(next);
  std::memcpy(static_cast<void*>(&state), &m.copy(now), sizeof(State));
  if (!change(state)) return false;
  m.header().checksum[next] = checksum_of(state);
  std::atomic_ref<std::uint32_t>(m.header().current).store(next, std::memory_order_release);
  return true;
}

}  // namespace bulkhead::twin
