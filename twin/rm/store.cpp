#include "twin/rm/store.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <string>

#include <fmt/format.h>

#include "twin/state/state.hpp"

namespace bulkhead::twin::rm {

static_assert(std::is_trivially_copyable_v<Page>, "Page lives in a shared mapping");

namespace {

constexpr char magic[8] = {'b', 'h', 't', 'w', 'r', 'm', '\n', '\0'};

struct Saved {
  std::uint64_t offset, size;
};

constexpr std::size_t padded(std::size_t size) { return (size + 7) / 8 * 8; }

// A whole file under another name first, then linked: whoever finds rm.bin finds a finished one.
Status make(const std::filesystem::path& path) {
  static std::atomic<unsigned> count{0};
  const std::string temporary = fmt::format("{}.{}.{}", path.string(), ::getpid(), count.fetch_add(1));
  const UniqueFd fd(::open(temporary.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  if (!fd) return errno_error(fmt::format("make {}", path.string()), errno);
  struct Remove {
    const std::string& name;
    ~Remove() { ::unlink(name.c_str()); }
  } remove{temporary};
  // Every user of the pretend machine may use its GPUs, whatever the umask of the first one says.
  struct {
    char magic_bytes[8];
    std::uint32_t version, pad;
    std::uint64_t size;
  } header{};
  static_assert(offsetof(Page, version) == 8 && offsetof(Page, size) == 16);
  std::memcpy(header.magic_bytes, magic, sizeof magic);
  header.version = page_version;
  header.size = sizeof(Page);
  if (::fchmod(fd.get(), 0666) != 0 || ::ftruncate(fd.get(), sizeof(Page)) != 0 ||
      ::pwrite(fd.get(), &header, sizeof header, 0) != static_cast<ssize_t>(sizeof header) ||
      (::link(temporary.c_str(), path.c_str()) != 0 && errno != EEXIST)) {
    return errno_error(fmt::format("make {}", path.string()), errno);
  }
  return ok_status();
}

}  // namespace

Result<std::unique_ptr<Store>> Store::open(const std::filesystem::path& path) {
  std::unique_ptr<Store> store(new Store);
  store->path_ = path;
  store->fd_.reset(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (!store->fd_ && errno == ENOENT) {
    BH_CHECK(make(path));
    store->fd_.reset(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  }
  if (!store->fd_) return errno_error(fmt::format("open {}", path.string()), errno);
  struct stat info {};
  if (::fstat(store->fd_.get(), &info) != 0) return errno_error(fmt::format("stat {}", path.string()), errno);
  if (static_cast<std::size_t>(info.st_size) != sizeof(Page)) {
    return Error(Errc::corrupt, fmt::format("{}: made by another build", path.string()),
                 "make the twin again: bulkhead twin down --dir DIR; bulkhead twin up PROFILE --dir DIR");
  }
  void* memory = ::mmap(nullptr, sizeof(Page), PROT_READ | PROT_WRITE, MAP_SHARED, store->fd_.get(), 0);
  if (memory == MAP_FAILED) return errno_error(fmt::format("map {}", path.string()), errno);
  store->page_ = static_cast<Page*>(memory);
  store->owner_ = ::getpid();
  const Page& page = *store->page_;
  if (std::memcmp(page.magic, magic, sizeof magic) != 0 || page.version != page_version ||
      page.size != sizeof(Page)) {
    return Error(Errc::corrupt, fmt::format("{}: made by another build", path.string()),
                 "make the twin again: bulkhead twin down --dir DIR; bulkhead twin up PROFILE --dir DIR");
  }
  return store;
}

Store::~Store() {
  if (page_ != nullptr) ::munmap(page_, sizeof(Page));
}

// The kernel's lock is between open file descriptions: threads that share one need the mutex as well, and a
// child after fork, which shares its parent's, opens the file anew. The parent may have been inside a call
// when it forked: its mutex is left as it is, for ever.
void Store::after_fork() {
  if (owner_ == ::getpid()) return;
  static_cast<void>(mutex_.release());
  mutex_ = std::make_unique<std::mutex>();
  const auto again = fmt::format("/proc/self/fd/{}", fd_.get());
  UniqueFd fresh(::open(again.c_str(), O_RDWR | O_CLOEXEC));
  if (!fresh) fresh.reset(::open(path_.c_str(), O_RDWR | O_CLOEXEC));
  if (fresh) fd_ = std::move(fresh);
  owner_ = ::getpid();
}

Store::Lock::Lock(Store& store) : store_(store) {
  store.after_fork();
  threads_ = std::unique_lock(*store.mutex_);
  held_ = set_lock(store.fd_.get(), F_WRLCK);
  if (held_) store.abandon();
}

Store::Lock::~Lock() {
  if (held_) set_lock(store_.fd_.get(), F_UNLCK);
}

// A killed process executes its instructions up to one of them, in order as it sees them itself: the compiler
// is all that may not reorder here, and the lock's hand-over makes them visible to the next holder.
void Store::save(const void* what, std::size_t size) {
  Journal& journal = page_->journal;
  const auto offset =
      static_cast<std::uint64_t>(static_cast<const char*>(what) - reinterpret_cast<const char*>(page_));
  BH_ASSERT(offset < sizeof(Page));
  for (std::uint64_t at = 0; at < journal.bytes;) {
    Saved entry{};
    std::memcpy(&entry, journal.entries + at, sizeof entry);
    if (entry.offset == offset) return;
    at += sizeof entry + padded(entry.size);
  }
  const std::uint64_t at = journal.bytes;
  BH_ASSERT(at + sizeof(Saved) + padded(size) <= journal_bytes);
  const Saved entry{offset, size};
  std::memcpy(journal.entries + at, &entry, sizeof entry);
  std::memcpy(journal.entries + at + sizeof entry, what, size);
  std::atomic_signal_fence(std::memory_order_seq_cst);
  std::atomic_ref<std::uint64_t>(journal.bytes)
      .store(at + sizeof entry + padded(size), std::memory_order_release);
  std::atomic_signal_fence(std::memory_order_seq_cst);
}

void Store::commit() {
  std::atomic_signal_fence(std::memory_order_seq_cst);
  std::atomic_ref<std::uint64_t>(page_->journal.bytes).store(0, std::memory_order_release);
  std::atomic_signal_fence(std::memory_order_seq_cst);
}

// Every region was saved once, so the order does not matter, and undoing twice is undoing once.
void Store::abandon() {
  Journal& journal = page_->journal;
  for (std::uint64_t at = 0; at < journal.bytes;) {
    Saved entry{};
    std::memcpy(&entry, journal.entries + at, sizeof entry);
    std::memcpy(reinterpret_cast<char*>(page_) + entry.offset, journal.entries + at + sizeof entry,
                entry.size);
    at += sizeof entry + padded(entry.size);
  }
  commit();
}

}  // namespace bulkhead::twin::rm
