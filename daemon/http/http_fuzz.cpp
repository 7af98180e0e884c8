// Any bytes on a connection, once as one piece and once cut into pieces: the handler sees the same requests
// both times (no two readers disagree on where a request ends), each as http.hpp promises them, and what
// comes back is a row of HTTP answers. The server runs as it does in the daemon, on a Unix socket.
#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "daemon/http/http.hpp"
#include "daemon/http/target.hpp"

namespace {

using namespace bulkhead;

// Written by the server's thread, read after the connection's end was seen.
std::vector<std::string>& seen() {
  static std::vector<std::string> out;
  return out;
}

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken promise: %s\n", what);
  std::abort();
}

bool clean(std::string_view text, bool tabs) {
  for (const char c : text)
    if ((c >= 0 && c < 0x20 && !(tabs && c == '\t')) || c == 0x7f) return false;
  return http::valid_utf8(text);
}

void handle(http::Request request, const std::shared_ptr<http::Reply>& reply) {
  expect(request.path == "*" || (!request.path.empty() && request.path.front() == '/'),
         "a path starts with /");
  expect(clean(request.path, false), "a path is clean");
  expect(request.body.size() <= 4096, "a body is bounded");
  std::map<std::string, int> times;
  std::string note = fmt::format("{} {}\n", request.method, request.path);
  for (const auto& [name, value] : request.query) {
    expect(clean(name, false) && clean(value, false), "a query is clean");
    note += fmt::format("?{}={}\n", name, value);
  }
  std::size_t bytes = 0;
  for (const auto& [name, value] : request.headers) {
    expect(!name.empty() && clean(name, false) && clean(value, true), "a header is clean");
    for (const char c : name) expect(c < 'A' || c > 'Z', "a header's name is in lower case");
    bytes += name.size() + value.size();
    ++times[name];
    note += fmt::format("{}: {}\n", name, value);
  }
  expect(bytes <= 2048, "headers are bounded");
  for (const char* once : {"host", "authorization", "content-type", "idempotency-key", "if-match",
                           "last-event-id", "content-length", "transfer-encoding"})
    expect(times[once] <= 1, "a header that may be there once is there once");
  expect(times["content-length"] + times["transfer-encoding"] <= 1, "a body has one length");
  seen().push_back(note + request.body);
  if (request.path == "/stream") {
    auto stream = reply->stream();
    stream->send(std::make_shared<const std::string>("id: 1\ndata: {}\n\n"));
    stream->close();
  } else if (request.path == "/later") {
    std::thread([reply] { reply->answer({.status = 200, .body = "{}"}); }).detach();
  } else if (request.path != "/dropped") {
    reply->answer({.status = 200, .body = request.body});
  }
}

const std::string& socket_path() {
  static const std::string path = [] {
    http::Settings settings;
    settings.socket = fmt::format("/tmp/bulkhead-http-fuzz.{}", ::getpid());
    settings.limits.header = 2048;
    settings.limits.body = 4096;
    settings.limits.requests = 20;
    auto server = http::Server::bind(settings, handle);
    if (!server.ok()) {
      std::fprintf(stderr, "%s\n", server.error().message().c_str());
      std::exit(1);
    }
    // Lives as long as the process; its file goes with it.
    std::thread([server = std::move(server).value().release()] { server->run(); }).detach();
    std::atexit([] { ::unlink(socket_path().c_str()); });
    return settings.socket;
  }();
  return path;
}

// What came back, and in seen() what the handler was given.
std::string talk(std::string_view bytes, std::size_t pieces, std::size_t seed) {
  seen().clear();
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, socket_path().c_str(), socket_path().size() + 1);
  expect(fd && ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0,
         "it listens");
  for (std::size_t piece = 0; piece < pieces && !bytes.empty(); ++piece) {
    seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
    const std::size_t size = piece + 1 == pieces ? bytes.size() : 1 + (seed >> 33) % bytes.size();
    ssize_t sent = 0;
    do sent = ::send(fd.get(), bytes.data(), size, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent < 0) break;  // refused and closed
    bytes.remove_prefix(static_cast<std::size_t>(sent));
    int unread = 1;  // the next piece is not sent before this one is taken
    for (int turn = 0; unread > 0 && turn < 10'000 && !bytes.empty(); ++turn) {
      pollfd gone{.fd = fd.get(), .events = 0, .revents = 0};
      if (::ioctl(fd.get(), SIOCOUTQ, &unread) != 0 ||
          (::poll(&gone, 1, 0) > 0 && (gone.revents & POLLHUP) != 0))
        break;
      std::this_thread::yield();
    }
  }
  ::shutdown(fd.get(), SHUT_WR);
  std::string out;
  char buffer[8192];
  for (;;) {
    pollfd ready{.fd = fd.get(), .events = POLLIN, .revents = 0};
    const int events = ::poll(&ready, 1, 4000);
    if (events < 0 && errno == EINTR) continue;  // the fuzzer's own clock
    expect(events > 0, "a connection whose sender is done ends");
    const ssize_t n = ::recv(fd.get(), buffer, sizeof buffer, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    out.append(buffer, static_cast<std::size_t>(n));
  }
  return out;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size > 16'384) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const std::string whole = talk(bytes, 1, 0);
  expect(whole.empty() || whole.starts_with("HTTP/1.1 "), "what comes back is HTTP");
  const auto requests = seen();
  std::size_t seed = size;
  for (const char c : bytes) seed = seed * 31 + static_cast<unsigned char>(c);
  talk(bytes, 4, seed);
  if (requests != seen()) {
    for (const auto& one : requests) std::fprintf(stderr, "as one piece: %s\n", one.c_str());
    for (const auto& one : seen()) std::fprintf(stderr, "in pieces: %s\n", one.c_str());
  }
  expect(requests == seen(), "requests are the same however their bytes arrive");
  return 0;
}
