// lab_write FILE TEXT: one write(2) as the kernel sees it; FILE "&7" is descriptor 7, open already; "\n" in
// TEXT is a line end. Prints "ok" or the errno's name; exit 0 or 1. -t FILE TEXT puts the milliseconds behind
// it.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

int main(int argc, char** argv) {
  const bool timed = argc > 3 && std::strcmp(argv[1], "-t") == 0;
  if (argc < 3) return 64;
  const char* file = argv[timed ? 2 : 1];
  std::string text = argv[timed ? 3 : 2];
  for (std::size_t at = 0; (at = text.find("\\n", at)) != std::string::npos; ++at) text.replace(at, 2, "\n");
  const auto start = std::chrono::steady_clock::now();
  int error = 0;
  const int fd = file[0] == '&' ? std::atoi(file + 1) : open(file, O_WRONLY | O_CLOEXEC);
  if (fd < 0 || write(fd, text.data(), text.size()) < 0) error = errno;
  const auto took =
      std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start);
  std::printf("%s", error != 0 ? strerrorname_np(error) : "ok");
  if (timed) std::printf(" %lld", static_cast<long long>(took.count()));
  std::printf("\n");
  return error != 0;
}
