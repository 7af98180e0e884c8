// What the server costs on top of the bytes: authenticated GETs of a document over 64 kept connections, plain
// and TLS 1.3, against a floor in the same run: a loop that reads up to the empty line and writes the same
// bytes back, parsing nothing, asking nobody, on one thread as the server is. Both arms are asked by one and
// the same client, in turns; medians of the rounds.
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/crypto.h>
#include <openssl/sha.h>
#include <openssl/ssl.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "daemon/http/http.hpp"

namespace {

using namespace bulkhead;
using Clock = std::chrono::steady_clock;

constexpr std::size_t connections = 64, rounds = 9, document_bytes = 1391;  // a lease's document
constexpr auto round_time = std::chrono::milliseconds(700);
constexpr std::string_view token =
    "bh_0123456789abcdef_0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

[[noreturn]] void stop(std::string_view what) {
  std::fprintf(stderr, "bench_http: %.*s: %s\n", static_cast<int>(what.size()), what.data(),
               std::strerror(errno));
  std::exit(1);
}

using Digest = std::array<unsigned char, SHA256_DIGEST_LENGTH>;
Digest digest(std::string_view text) {
  Digest out{};
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), out.data());
  return out;
}

struct FreeSsl {
  void operator()(SSL* ssl) const { SSL_free(ssl); }
};
struct FreeContext {
  void operator()(SSL_CTX* context) const { SSL_CTX_free(context); }
};
using Context = std::unique_ptr<SSL_CTX, FreeContext>;

// One end of a connection, never blocking.
struct End {
  UniqueFd fd = {};
  std::unique_ptr<SSL, FreeSsl> ssl = {};
  std::string in = {}, out = {};
  bool shaken = false;
  Clock::time_point asked = {};

  // False: it is gone. `in` has what came.
  bool take() {
    std::array<char, 8192> piece;
    while (true) {
      if (ssl && !shaken && !shake()) return false;
      if (ssl && !shaken) return true;
      const auto got = ssl ? SSL_read(ssl.get(), piece.data(), piece.size())
                           : static_cast<int>(::read(fd.get(), piece.data(), piece.size()));
      if (got > 0) {
        in.append(piece.data(), static_cast<std::size_t>(got));
        if (static_cast<std::size_t>(got) < piece.size()) return true;
        continue;
      }
      if (ssl) return SSL_get_error(ssl.get(), got) == SSL_ERROR_WANT_READ;
      return got < 0 && (errno == EAGAIN || errno == EINTR);
    }
  }
  bool give(std::string_view text) {
    out.append(text);
    while (!out.empty()) {
      const auto sent = ssl ? SSL_write(ssl.get(), out.data(), static_cast<int>(out.size()))
                            : static_cast<int>(::send(fd.get(), out.data(), out.size(), MSG_NOSIGNAL));
      // What both arms say fits a socket's buffer: it is taken whole, or the run is void.
      if (sent <= 0) return false;
      out.erase(0, static_cast<std::size_t>(sent));
    }
    return true;
  }
  bool shake() {
    const int done = SSL_do_handshake(ssl.get());
    shaken = done == 1;
    if (shaken) return true;
    const int why = SSL_get_error(ssl.get(), done);
    return why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE;
  }
};

void never_block(int fd) {
  const int on = 1;
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  if (::fcntl(fd, F_SETFL, O_NONBLOCK) != 0) stop("fcntl");
}

sockaddr_in loopback(std::uint16_t port) {
  sockaddr_in out{};
  out.sin_family = AF_INET;
  out.sin_port = htons(port);
  out.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return out;
}

// ---- the floor
class Echo {
 public:
  Echo(std::string answer, SSL_CTX* tls) : answer_(std::move(answer)), tls_(tls) {
    listener_.reset(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    auto at = loopback(0);
    socklen_t size = sizeof at;
    if (::bind(listener_.get(), reinterpret_cast<sockaddr*>(&at), size) != 0 ||
        ::listen(listener_.get(), 256) != 0 ||
        ::getsockname(listener_.get(), reinterpret_cast<sockaddr*>(&at), &size) != 0)
      stop("the floor cannot listen");
    port_ = ntohs(at.sin_port);
    thread_ = std::thread([this] { run(); });
  }
  ~Echo() {
    over_ = true;
    thread_.join();
  }
  std::uint16_t port() const { return port_; }

 private:
  void run() {
    const UniqueFd poll(::epoll_create1(EPOLL_CLOEXEC));
    const auto watch = [&](int fd, void* what) {
      epoll_event event{.events = EPOLLIN, .data = {.ptr = what}};
      if (::epoll_ctl(poll.get(), EPOLL_CTL_ADD, fd, &event) != 0) stop("epoll_ctl");
    };
    watch(listener_.get(), nullptr);
    std::vector<std::unique_ptr<End>> ends;
    std::array<epoll_event, 64> events{};
    while (!over_) {
      const int count = ::epoll_wait(poll.get(), events.data(), events.size(), 50);
      for (int i = 0; i < count; ++i) {
        auto* end = static_cast<End*>(events[static_cast<std::size_t>(i)].data.ptr);
        if (end == nullptr) {
          auto fresh = std::make_unique<End>();
          fresh->fd.reset(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
          if (!fresh->fd) continue;
          never_block(fresh->fd.get());
          if (tls_ != nullptr) {
            fresh->ssl.reset(SSL_new(tls_));
            SSL_set_fd(fresh->ssl.get(), fresh->fd.get());
            SSL_set_accept_state(fresh->ssl.get());
          }
          watch(fresh->fd.get(), fresh.get());
          ends.push_back(std::move(fresh));
          continue;
        }
        if (!end->fd) continue;
        if (!end->take()) {
          end->ssl.reset();
          end->fd.reset();
          continue;
        }
        if (end->in.find("\r\n\r\n") == std::string::npos) continue;
        end->in.clear();
        if (!end->give(answer_)) stop("the floor cannot write");
      }
    }
  }

  std::string answer_;
  SSL_CTX* tls_;
  UniqueFd listener_ = {};
  std::uint16_t port_ = 0;
  std::atomic<bool> over_ = false;
  std::thread thread_ = {};
};

// ---- the client
struct Figures {
  double rate = 0, p50 = 0, p99 = 0;  // requests a second, microseconds
};

class Client {
 public:
  Client(std::uint16_t port, SSL_CTX* tls)
      : request_(fmt::format(
            "GET /api/v1/leases/7 HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bench\r\nAccept: */*\r\n"
            "Authorization: Bearer {}\r\n\r\n",
            token)),
        poll_(::epoll_create1(EPOLL_CLOEXEC)) {
    for (std::size_t i = 0; i < connections; ++i) {
      auto end = std::make_unique<End>();
      end->fd.reset(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
      const auto to = loopback(port);
      if (::connect(end->fd.get(), reinterpret_cast<const sockaddr*>(&to), sizeof to) != 0) stop("connect");
      if (tls != nullptr) {
        end->ssl.reset(SSL_new(tls));
        SSL_set_fd(end->ssl.get(), end->fd.get());
        if (SSL_connect(end->ssl.get()) != 1) stop("TLS with the server");
        end->shaken = true;
      }
      never_block(end->fd.get());
      epoll_event event{.events = EPOLLIN, .data = {.ptr = end.get()}};
      if (::epoll_ctl(poll_.get(), EPOLL_CTL_ADD, end->fd.get(), &event) != 0) stop("epoll_ctl");
      ends_.push_back(std::move(end));
    }
  }

  // Each connection asks again as soon as it was answered.
  Figures round() {
    std::vector<double> us;
    us.reserve(200'000);
    const auto began = Clock::now(), until = began + round_time;
    std::size_t open = ends_.size();
    for (auto& end : ends_) ask(*end);
    std::array<epoll_event, 64> events{};
    while (open > 0) {
      const int count = ::epoll_wait(poll_.get(), events.data(), events.size(), 5000);
      if (count == 0) stop("no answer came for five seconds");
      for (int i = 0; i < count; ++i) {
        auto& end = *static_cast<End*>(events[static_cast<std::size_t>(i)].data.ptr);
        if (!end.take()) stop("the server closed a connection");
        if (!whole(end.in)) continue;
        const auto now = Clock::now();
        us.push_back(std::chrono::duration<double, std::micro>(now - end.asked).count());
        end.in.clear();
        if (now < until)
          ask(end);
        else
          --open;
      }
    }
    const double seconds = std::chrono::duration<double>(Clock::now() - began).count();
    std::sort(us.begin(), us.end());
    const auto at = [&](double part) {
      return us[std::min(us.size() - 1, static_cast<std::size_t>(part * static_cast<double>(us.size())))];
    };
    return {.rate = static_cast<double>(us.size()) / seconds, .p50 = at(0.5), .p99 = at(0.99)};
  }
  const std::string& first_answer() {
    ask(*ends_[0]);
    std::array<epoll_event, 1> event{};
    while (!whole(ends_[0]->in)) {
      if (::epoll_wait(poll_.get(), event.data(), 1, 5000) <= 0 || !ends_[0]->take())
        stop("the first answer");
    }
    first_ = std::move(ends_[0]->in);
    ends_[0]->in.clear();
    return first_;
  }

 private:
  void ask(End& end) {
    end.asked = Clock::now();
    if (!end.give(request_)) stop("cannot ask");
  }
  static bool whole(const std::string& in) {
    if (in.size() < 12) return false;
    if (!in.starts_with("HTTP/1.1 200")) {
      std::fprintf(stderr, "bench_http: %.200s\n", in.c_str());
      std::exit(1);
    }
    const auto end = in.find("\r\n\r\n");
    return end != std::string::npos && in.size() >= end + 4 + document_bytes;
  }

  std::string request_;
  UniqueFd poll_;
  std::vector<std::unique_ptr<End>> ends_ = {};
  std::string first_ = {};
};

double median(std::vector<double> all) {
  std::sort(all.begin(), all.end());
  return all[all.size() / 2];
}

// True: at least half of the floor's requests a second.
bool compare(const char* name, std::uint16_t server, std::uint16_t floor, SSL_CTX* tls) {
  Client to_server(server, tls), to_floor(floor, tls);
  (void)to_server.round();  // warm
  (void)to_floor.round();
  std::array<std::vector<double>, 7> all;
  for (std::size_t i = 0; i < rounds; ++i) {
    const auto ours = to_server.round(), theirs = to_floor.round();
    const double values[] = {
        ours.rate, ours.p50, ours.p99, theirs.rate, theirs.p50, theirs.p99, ours.rate / theirs.rate};
    for (std::size_t k = 0; k < all.size(); ++k) all[k].push_back(values[k]);
  }
  const double ratio = median(all[6]);
  std::printf(
      "%-8s  %8.0f/s  p50 %5.0f us  p99 %5.0f us   floor %8.0f/s  p50 %5.0f us  p99 %5.0f us   ratio %.2f  "
      "%s\n",
      name, median(all[0]), median(all[1]), median(all[2]), median(all[3]), median(all[4]), median(all[5]),
      ratio, ratio >= 0.5 ? "holds" : "MISSED");
  return ratio >= 0.5;
}

}  // namespace

int main() {
  std::string folder = (std::filesystem::temp_directory_path() / "bench_http.XXXXXX").string();
  if (::mkdtemp(folder.data()) == nullptr) stop(folder);
  const std::string certificate = folder + "/c.pem", key = folder + "/k.pem";
  if (!http::ensure_certificate(certificate, key, {}).ok()) stop("no certificate");

  const auto known = digest(token);
  const auto document = std::make_shared<const std::string>("{\"id\":7,\"label\":\"" +
                                                            std::string(document_bytes - 19, 'x') + "\"}");
  const auto handler = [&](const http::Request& request, const std::shared_ptr<http::Reply>& reply) {
    const auto said = request.header("authorization");
    const auto theirs = digest(said.starts_with("Bearer ") ? said.substr(7) : "");
    const bool good = CRYPTO_memcmp(theirs.data(), known.data(), known.size()) == 0;
    reply->answer(good
                      ? http::Response{.headers = {{"ETag", "\"3\""}, {"Cache-Control", "private, no-cache"}},
                                       .body = *document}
                      : http::Response{.status = 401});
  };
  const auto limits = http::Limits{.requests = 1'000'000'000};
  auto plain = http::Server::bind({.listen = http::Listen{"127.0.0.1", 0}, .limits = limits}, handler);
  auto over_tls = http::Server::bind({.listen = http::Listen{"127.0.0.1", 0},
                                      .tls = http::Tls{.certificate_file = certificate, .key_file = key},
                                      .limits = limits},
                                     handler);
  if (!plain.ok() || !over_tls.ok()) stop((plain.ok() ? over_tls : plain).error().message());
  std::thread plain_runs([&] { (*plain)->run(); }), tls_runs([&] { (*over_tls)->run(); });

  const Context asks(SSL_CTX_new(TLS_client_method())), answers(SSL_CTX_new(TLS_server_method()));
  for (auto* context : {asks.get(), answers.get()}) SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
  if (SSL_CTX_use_certificate_file(answers.get(), certificate.c_str(), SSL_FILETYPE_PEM) != 1 ||
      SSL_CTX_use_PrivateKey_file(answers.get(), key.c_str(), SSL_FILETYPE_PEM) != 1)
    stop("the floor has no certificate");

  bool good = true;
  {
    const std::string same =
        Client((*plain)->port(), nullptr).first_answer();  // the floor says the same bytes
    Echo floor(same, nullptr), tls_floor(same, answers.get());
    std::printf(
        "GET with a bearer token, %zu kept connections, %zu bytes of JSON, answers of %zu bytes; medians of "
        "%zu rounds\n",
        connections, document_bytes, same.size(), rounds);
    good = compare("plain", (*plain)->port(), floor.port(), nullptr) && good;
    good = compare("TLS 1.3", (*over_tls)->port(), tls_floor.port(), asks.get()) && good;
    std::printf(
        "floor: reads up to the empty line and writes the same bytes, parses nothing; wanted: at least half "
        "of it\n");
  }
  (*plain)->stop(std::chrono::milliseconds(0));
  (*over_tls)->stop(std::chrono::milliseconds(0));
  plain_runs.join();
  tls_runs.join();
  std::filesystem::remove_all(folder);
  return good ? 0 : 1;
}
