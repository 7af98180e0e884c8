// The twin's /dev/nvidiactl is a regular file, on which the kernel answers every ioctl with ENOTTY: this library,
// preloaded by `bulkhead twin run`, answers then. The system call is always made first, so that a seccomp supervisor
// sees what it would see with the real driver, and may answer itself.
//
// A guest in any program: it prints nothing, keeps errno, and costs a program that has no GPU one comparison a call.
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>

#include "abi/rm/rm.hpp"
#include "twin/rm/rm.hpp"

namespace {

namespace fs = std::filesystem;
using bulkhead::twin::rm::Driver;

struct Twin {
  dev_t device = 0;  // of its nvidiactl
  ino_t inode = 0;
  std::unique_ptr<Driver> driver;
};

// Never freed: another thread may be inside, and programs make calls after static destructors have run.
std::atomic<Twin*> the_twin{nullptr};

// The twin whose driver file `fd` is; null when it is none.
Driver* driver_of(int fd) {
  const char* root = std::getenv("BULKHEAD_ROOT");
  if (root == nullptr || *root != '/') return nullptr;
  struct stat file {};
  if (::fstat(fd, &file) != 0 || !S_ISREG(file.st_mode)) return nullptr;
  struct stat control {};
  if (::stat((std::string(root) + "/dev/nvidiactl").c_str(), &control) != 0 || control.st_ino != file.st_ino ||
      control.st_dev != file.st_dev) {
    return nullptr;
  }
  Twin* known = the_twin.load(std::memory_order_acquire);
  // Another inode: the twin was made anew while this program ran on.
  if (known != nullptr && known->inode == control.st_ino && known->device == control.st_dev) return known->driver.get();
  auto made = std::make_unique<Twin>();
  made->device = control.st_dev;
  made->inode = control.st_ino;
  auto driver = Driver::open(fs::path(root).parent_path());
  if (!driver.ok()) return nullptr;
  made->driver = std::move(driver).value();
  if (the_twin.compare_exchange_strong(known, made.get(), std::memory_order_acq_rel)) known = made.release();
  return known->driver.get();
}

}  // namespace

extern "C" [[gnu::visibility("default")]] int ioctl(int fd, unsigned long request, ...) noexcept {
  va_list arguments;
  va_start(arguments, request);
  void* argument = va_arg(arguments, void*);
  va_end(arguments);
  const int before = errno;
  const long answer = ::syscall(SYS_ioctl, fd, request, argument);
  if (answer != -1 || errno != ENOTTY || ((request >> 8U) & 0xffU) != bulkhead::abi::ioctl_magic)
    return static_cast<int>(answer);
  Driver* driver = driver_of(fd);
  const int code = driver != nullptr ? driver->ioctl_on(fd, request, argument) : -ENOTTY;
  errno = code < 0 ? -code : before;
  return code < 0 ? -1 : code;
}
