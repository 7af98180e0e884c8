// The one translation unit with Beast: its parser reads what the server sends. Sockets and TLS are plain, so
// that every wait has a deadline of ours.
#include "client/client.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include <fmt/format.h>
#include <boost/asio/buffer.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>

#include "base/fd.hpp"
#include "base/fields.hpp"
#include "base/text.hpp"

namespace bulkhead::client {

namespace {

namespace fs = std::filesystem;
namespace beast = boost::beast::http;
using Clock = std::chrono::steady_clock;
using Parser = beast::response_parser<beast::string_body>;
using std::chrono::milliseconds;

constexpr std::string_view default_socket = "unix:/run/bulkhead/api.sock",
                           unix_scheme = "unix:", https_scheme = "https://";
constexpr std::chrono::seconds silence{60};  // of a stream: the server sends a comment every 15 s
constexpr std::size_t most_token = 512, most_login = 64 << 10;

std::string env(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::string() : std::string(value);
}

bool plain(std::string_view text) {  // may stand in a header or a request line
  return std::all_of(text.begin(), text.end(), [](unsigned char c) { return c > 0x20 && c < 0x7f; });
}

struct Place {
  std::string path = {};                // of a Unix socket; else:
  std::string host = {}, port = {};     // host without brackets
  std::string authority = "localhost";  // for Host:
  bool local() const { return !path.empty(); }
};

Error no_url(std::string_view text) {
  return Error(Errc::invalid, fmt::format("'{}' is no address of a server", printable(text, 120)),
               "like https://gpu7.example, https://192.0.2.7:8443 or unix:/run/bulkhead/api.sock");
}

Result<Place> place_of(std::string_view url) {
  Place out;
  if (url.starts_with(unix_scheme)) {
    out.path = std::string(url.substr(unix_scheme.size()));
    if (out.path.empty() || out.path.front() != '/' || out.path.find('\0') != std::string::npos)
      return no_url(url);
    if (out.path.size() >= sizeof(sockaddr_un::sun_path))
      return Error(Errc::invalid, fmt::format("{}: longer than a socket's path may be", printable(url, 160)));
    return out;
  }
  if (lower(url.substr(0, https_scheme.size())) != https_scheme || !plain(url)) {
    if (lower(url.substr(0, 7)) == "http://")
      return Error(Errc::invalid, fmt::format("'{}' would send the token unencrypted", printable(url, 120)),
                   "https://..., or unix:/run/bulkhead/api.sock on the host itself");
    return no_url(url);
  }
  auto rest = url.substr(https_scheme.size());
  while (rest.ends_with('/')) rest.remove_suffix(1);
  if (rest.find_first_of("/?#@\\") != std::string_view::npos) return no_url(url);
  std::string_view host = rest, port = "443";
  if (rest.starts_with('[')) {
    const auto end = rest.find(']');
    if (end == std::string_view::npos) return no_url(url);
    host = rest.substr(1, end - 1);
    in6_addr address{};
    if (::inet_pton(AF_INET6, std::string(host).c_str(), &address) != 1) return no_url(url);
    rest.remove_prefix(end + 1);
    if (!rest.empty()) {
      if (rest.front() != ':') return no_url(url);
      port = rest.substr(1);
    }
  } else if (const auto colon = rest.find(':'); colon != std::string_view::npos) {
    host = rest.substr(0, colon);
    port = rest.substr(colon + 1);
  }
  const auto number = parse_u64(port);
  const bool named = std::all_of(host.begin(), host.end(), [](unsigned char c) {
    return std::isalnum(c) != 0 || c == '.' || c == '-' || c == '_' || c == ':';
  });
  if (host.empty() || host.size() > 253 || !named || !number || *number == 0 || *number > 65535)
    return no_url(url);
  out.host = lower(host);
  out.port = std::to_string(*number);
  const bool six = out.host.find(':') != std::string::npos;
  out.authority = fmt::format("{}{}{}:{}", six ? "[" : "", out.host, six ? "]" : "", out.port);
  return out;
}

// ---- the wire
struct FreeSsl {
  void operator()(SSL* ssl) const { SSL_free(ssl); }
  void operator()(SSL_CTX* context) const { SSL_CTX_free(context); }
  void operator()(X509* certificate) const { X509_free(certificate); }
  void operator()(addrinfo* list) const { ::freeaddrinfo(list); }
};
using Ssl = std::unique_ptr<SSL, FreeSsl>;
using SslContext = std::unique_ptr<SSL_CTX, FreeSsl>;

std::string ssl_why() {
  const auto code = ERR_get_error();
  ERR_clear_error();
  if (code == 0) return "the connection was closed";
  const char* reason = ERR_reason_error_string(code);
  return reason == nullptr ? fmt::format("error {:x}", code) : std::string(reason);
}

// OpenSSL writes with write(2): a peer that is gone must not end the program with SIGPIPE, whose disposition
// is the program's own.
class NoPipe {
 public:
  NoPipe() {
    sigemptyset(&pipe_);
    sigaddset(&pipe_, SIGPIPE);
    sigset_t pending;
    sigpending(&pending);
    was_pending_ = sigismember(&pending, SIGPIPE) == 1;
    pthread_sigmask(SIG_BLOCK, &pipe_, &before_);
  }
  NoPipe(const NoPipe&) = delete;
  NoPipe& operator=(const NoPipe&) = delete;
  ~NoPipe() {
    const timespec now{};
    while (!was_pending_ && sigtimedwait(&pipe_, nullptr, &now) < 0 && errno == EINTR) {
    }
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }

 private:
  sigset_t pipe_{}, before_{};
  bool was_pending_ = false;
};

enum class Ready { yes, late, interrupted };

Ready wait_for(int fd, short events, Clock::time_point until) {
  const auto left = std::chrono::duration_cast<milliseconds>(until - Clock::now()).count();
  if (left <= 0) return Ready::late;
  pollfd one{.fd = fd, .events = events, .revents = 0};
  const int got = ::poll(&one, 1, static_cast<int>(std::min<std::int64_t>(left + 1, 3'600'000)));
  if (got > 0) return Ready::yes;
  return got < 0 && errno == EINTR ? Ready::interrupted : Ready::late;
}

Error too_late(const std::string& where) {
  return Error(Errc::timeout, fmt::format("{} did not answer in time", where),
               "bulkhead doctor, or try again");
}

std::string hex_of(const unsigned char* bytes, std::size_t size) {
  std::string out;
  for (std::size_t i = 0; i < size; ++i) out += fmt::format("{:02x}", bytes[i]);
  return out;
}

std::string shown_by(SSL* ssl) {
  const std::unique_ptr<X509, FreeSsl> certificate(SSL_get1_peer_certificate(ssl));
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned size = 0;
  if (!certificate || X509_digest(certificate.get(), EVP_sha256(), digest.data(), &size) != 1) return {};
  return hex_of(digest.data(), size);
}

class Wire {
 public:
  // `blind`: any certificate will do; to be shown, before anything is sent.
  static Result<std::unique_ptr<Wire>> open(const Place& place, const Target& target, SSL_CTX* context,
                                            bool blind, Clock::time_point until) {
    auto out = std::unique_ptr<Wire>(new Wire);
    out->where_ = target.url;
    if (place.local()) {
      BH_CHECK(out->join_local(place));
      return out;
    }
    BH_CHECK(out->join(place, until));
    BH_CHECK(out->greet(place, target, context, blind, until));
    return out;
  }
  ~Wire() {
    if (ssl_ && greeted_) {
      const NoPipe quiet;
      SSL_shutdown(ssl_.get());
      ERR_clear_error();
    }
  }
  Wire(const Wire&) = delete;
  Wire& operator=(const Wire&) = delete;

  std::string fingerprint() const { return shown_by(ssl_.get()); }

  Status send(std::string_view bytes, Clock::time_point until) {
    while (!bytes.empty()) {
      short events = POLLOUT;
      if (ssl_) {
        const NoPipe quiet;
        ERR_clear_error();
        std::size_t sent = 0;
        const int done = SSL_write_ex(ssl_.get(), bytes.data(), bytes.size(), &sent);
        if (done == 1) {
          bytes.remove_prefix(sent);
          continue;
        }
        const int why = SSL_get_error(ssl_.get(), done);
        if (why != SSL_ERROR_WANT_READ && why != SSL_ERROR_WANT_WRITE)
          return Error(Errc::unavailable, fmt::format("{}: {}", where_, ssl_why()));
        if (why == SSL_ERROR_WANT_READ) events = POLLIN;
      } else {
        const auto sent = ::send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
        if (sent >= 0) {
          bytes.remove_prefix(static_cast<std::size_t>(sent));
          continue;
        }
        if (errno == EINTR) continue;
        if (errno != EAGAIN)
          return Error(Errc::unavailable, fmt::format("{}: {}", where_, std::strerror(errno)));
      }
      if (wait_for(fd_.get(), events, until) == Ready::late && Clock::now() >= until) return too_late(where_);
    }
    return ok_status();
  }

  // Empty: the end. `interrupted` is said through Errc::in_use only where asked for.
  struct Piece {
    std::string_view bytes = {};
    bool end = false, nothing = false;  // nothing: until then, or a signal came
  };
  Result<Piece> receive(Clock::time_point until, bool stop_on_signal) {
    for (;;) {
      short events = POLLIN;
      if (ssl_) {
        const NoPipe quiet;
        ERR_clear_error();
        std::size_t got = 0;
        const int done = SSL_read_ex(ssl_.get(), buffer_.data(), buffer_.size(), &got);
        if (done == 1) return Piece{.bytes = {buffer_.data(), got}};
        const int why = SSL_get_error(ssl_.get(), done);
        if (why == SSL_ERROR_ZERO_RETURN) return Piece{.end = true};
        if (why != SSL_ERROR_WANT_READ && why != SSL_ERROR_WANT_WRITE) {
          greeted_ = false;  // no shutdown after a fatal error
          return Error(Errc::unavailable, fmt::format("{}: {}", where_, ssl_why()));
        }
        if (why == SSL_ERROR_WANT_WRITE) events = POLLOUT;
      } else {
        const auto got = ::recv(fd_.get(), buffer_.data(), buffer_.size(), 0);
        if (got > 0) return Piece{.bytes = {buffer_.data(), static_cast<std::size_t>(got)}};
        if (got == 0) return Piece{.end = true};
        if (errno != EINTR && errno != EAGAIN)
          return Error(Errc::unavailable, fmt::format("{}: {}", where_, std::strerror(errno)));
      }
      const auto ready = wait_for(fd_.get(), events, until);
      if (ready == Ready::late || (ready == Ready::interrupted && stop_on_signal))
        return Piece{.nothing = true};
    }
  }

 private:
  Wire() = default;

  Status join_local(const Place& place) {
    fd_.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!fd_) return errno_error("socket", errno);
    sockaddr_un to{};
    to.sun_family = AF_UNIX;
    std::memcpy(to.sun_path, place.path.c_str(), place.path.size() + 1);
    if (::connect(fd_.get(), reinterpret_cast<const sockaddr*>(&to), sizeof to) == 0) return ok_status();
    const int err = errno;
    const auto what = fmt::format("{}: {}", place.path, std::strerror(err));
    if (err == ENOENT || err == ECONNREFUSED)
      return Error(Errc::unavailable, fmt::format("no daemon listens at {}", place.path),
                   "on the GPU host: systemctl start bulkhead, or: bulkhead serve\n"
                   "from elsewhere: bulkhead login https://HOST");
    if (err == EACCES)
      return Error(Errc::permission, what, "bulkhead login https://HOST takes a token instead");
    return Error(err == EAGAIN ? Errc::unavailable : Errc::io, what);
  }

  Status join(const Place& place, Clock::time_point until) {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_ADDRCONFIG;
    in_addr four{};
    in6_addr six{};
    if (::inet_pton(AF_INET, place.host.c_str(), &four) == 1 ||
        ::inet_pton(AF_INET6, place.host.c_str(), &six) == 1)
      hints.ai_flags = AI_NUMERICHOST;
    addrinfo* raw = nullptr;
    if (const int why = ::getaddrinfo(place.host.c_str(), place.port.c_str(), &hints, &raw); why != 0)
      return Error(Errc::unavailable, fmt::format("{}: {}", place.host, ::gai_strerror(why)),
                   "is the name right? bulkhead login --help");
    const std::unique_ptr<addrinfo, FreeSsl> list(raw);
    std::string why = "no address";
    unsigned tried = 0;
    for (const addrinfo* at = list.get(); at != nullptr && tried < 8; at = at->ai_next, ++tried) {
      fd_.reset(::socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
      if (!fd_) continue;
      int err = 0;
      if (::connect(fd_.get(), at->ai_addr, at->ai_addrlen) != 0) err = errno;
      if (err == EINPROGRESS) {
        Ready ready = Ready::interrupted;
        while (ready == Ready::interrupted) ready = wait_for(fd_.get(), POLLOUT, until);
        socklen_t size = sizeof err;
        if (ready == Ready::late)
          err = ETIMEDOUT;
        else if (::getsockopt(fd_.get(), SOL_SOCKET, SO_ERROR, &err, &size) != 0)
          err = errno;
      }
      if (err == 0) return ok_status();
      why = std::strerror(err);
    }
    return Error(Errc::unavailable, fmt::format("{}: {}", where_, why),
                 "is bulkhead serve running there, and the port open?");
  }

  Status greet(const Place& place, const Target& target, SSL_CTX* context, bool blind,
               Clock::time_point until) {
    ssl_.reset(SSL_new(context));
    if (!ssl_ || SSL_set_fd(ssl_.get(), fd_.get()) != 1) return Error(Errc::io, "tls: " + ssl_why());
    in_addr four{};
    in6_addr six{};
    const bool number = ::inet_pton(AF_INET, place.host.c_str(), &four) == 1 ||
                        ::inet_pton(AF_INET6, place.host.c_str(), &six) == 1;
    bool set = true;
    if (number)
      set = X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl_.get()), place.host.c_str()) == 1;
    else
      set = SSL_set1_host(ssl_.get(), place.host.c_str()) == 1 &&
            SSL_set_tlsext_host_name(ssl_.get(), place.host.c_str()) == 1;
    if (!set) return Error(Errc::invalid, "tls: " + ssl_why());
    const bool pinned = !target.fingerprint.empty();
    SSL_set_verify(ssl_.get(), blind || pinned ? SSL_VERIFY_NONE : SSL_VERIFY_PEER, nullptr);
    for (;;) {
      int done = 0, why = 0;
      {
        const NoPipe quiet;
        ERR_clear_error();
        done = SSL_connect(ssl_.get());
        if (done == 1) break;
        why = SSL_get_error(ssl_.get(), done);
      }
      if (why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE) {
        if (wait_for(fd_.get(), why == SSL_ERROR_WANT_READ ? POLLIN : POLLOUT, until) == Ready::late)
          return too_late(where_);
        continue;
      }
      const long verdict = SSL_get_verify_result(ssl_.get());
      if (!blind && !pinned && verdict != X509_V_OK) {
        ERR_clear_error();
        return Error(Errc::permission,
                     fmt::format("{}: its certificate is not to be trusted: {}", where_,
                                 X509_verify_cert_error_string(verdict)),
                     fmt::format("bulkhead login {}   shows its fingerprint and pins it", target.url));
      }
      return Error(Errc::unavailable, fmt::format("{}: no TLS 1.3: {}", where_, ssl_why()));
    }
    if (!blind && pinned) {
      const auto shown = shown_by(ssl_.get());
      if (shown.size() != target.fingerprint.size() ||
          CRYPTO_memcmp(shown.data(), target.fingerprint.data(), shown.size()) != 0)
        return Error(
            Errc::permission,
            fmt::format("{}: it shows another certificate than the one that is pinned (now sha256 {})",
                        where_, shown),
            "someone may be in between. If it was renewed, ask its administrator for the fingerprint, then:\n"
            "bulkhead login " +
                target.url + " --fingerprint SHA256");
    }
    greeted_ = true;
    return ok_status();
  }

  std::string where_ = {};
  UniqueFd fd_ = {};
  Ssl ssl_ = {};  // after fd_: it goes first
  bool greeted_ = false;
  std::array<char, 32 << 10> buffer_{};
};

Result<SslContext> make_context(const Target& target) {
  SslContext out(SSL_CTX_new(TLS_client_method()));
  if (!out || SSL_CTX_set_min_proto_version(out.get(), TLS1_3_VERSION) != 1)
    return Error(Errc::unsupported, "tls: " + ssl_why());
  SSL_CTX_set_mode(out.get(), SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER |
                                  SSL_MODE_RELEASE_BUFFERS);
  // A server may end a connection without a goodbye; what it said has a length or a last chunk of its own.
  SSL_CTX_set_options(out.get(), SSL_OP_IGNORE_UNEXPECTED_EOF | SSL_OP_NO_RENEGOTIATION);
  if (!target.ca_file.empty()) {
    if (SSL_CTX_load_verify_locations(out.get(), target.ca_file.c_str(), nullptr) != 1)
      return Error(Errc::invalid, fmt::format("{}: no certificates in it: {}", target.ca_file, ssl_why()),
                   "a PEM file, like /etc/ssl/certs/ca-certificates.crt");
  } else {
    SSL_CTX_set_default_verify_paths(out.get());
    ERR_clear_error();
  }
  if (!target.certificate_file.empty()) {
    const auto& key = target.key_file.empty() ? target.certificate_file : target.key_file;
    if (SSL_CTX_use_certificate_chain_file(out.get(), target.certificate_file.c_str()) != 1)
      return Error(Errc::invalid, fmt::format("{}: {}", target.certificate_file, ssl_why()),
                   "a PEM certificate");
    if (SSL_CTX_use_PrivateKey_file(out.get(), key.c_str(), SSL_FILETYPE_PEM) != 1 ||
        SSL_CTX_check_private_key(out.get()) != 1)
      return Error(Errc::invalid, fmt::format("{}: {}", key, ssl_why()), "the PEM key of the certificate");
  }
  return out;
}

Error not_ours(const std::string& url, std::string_view why) {
  return Error(Errc::corrupt,
               fmt::format("{}: what answers there does not speak bulkhead's API: {}", url, why),
               "is this the address of `bulkhead serve`? bulkhead login --help");
}

Result<Answer> answer_of(const Target& target, const Parser::value_type& message) {
  Answer out;
  out.status = static_cast<int>(message.result_int());
  if (const auto tag = message.find(beast::field::etag); tag != message.end())
    out.etag = std::string(tag->value().data(), tag->value().size());
  if (message.body().empty()) return out;
  std::string type;
  if (const auto at = message.find(beast::field::content_type); at != message.end())
    type = lower(std::string_view(at->value().data(), at->value().size()));
  if (!type.starts_with("application/json") && !type.starts_with("application/problem+json"))
    return not_ours(target.url,
                    fmt::format("status {}, {}", out.status, type.empty() ? "no type" : printable(type, 80)));
  auto body = parse_json(message.body());
  if (!body.ok()) return not_ours(target.url, body.error().message());
  out.body = std::move(*body);
  return out;
}

// What comes as text/event-stream: lines to events, bounded.
class Events {
 public:
  using Each = std::function<bool(std::int64_t, const Json&)>;
  // False: `each` has enough.
  Result<bool> take(std::string_view bytes, const Each& each) {
    for (const char c : bytes) {
      if (c == '\n' && after_return_) {
        after_return_ = false;
        continue;
      }
      after_return_ = c == '\r';
      if (c != '\n' && c != '\r') {
        if (line_.size() + data_.size() >= most_event)
          return Error(Errc::corrupt, fmt::format("an event of more than {} bytes", most_event));
        line_ += c;
        continue;
      }
      BH_TRY(const bool more, line(each));
      line_.clear();
      if (!more) return false;
    }
    return true;
  }

 private:
  Result<bool> line(const Each& each) {
    if (line_.empty()) {
      if (data_.empty()) return true;
      auto json = parse_json(data_);
      data_.clear();
      if (!json.ok()) return std::move(json).error().in("event");
      return each(id_, *json);
    }
    const std::string_view text = line_;
    const auto colon = text.find(':');
    const auto name = text.substr(0, colon);
    auto value = colon == std::string_view::npos ? std::string_view() : text.substr(colon + 1);
    if (value.starts_with(' ')) value.remove_prefix(1);
    if (name == "id") {
      const auto id = parse_i64(value);
      if (!id || *id < 0) return Error(Errc::corrupt, "an event without a number");
      id_ = *id;
    } else if (name == "data") {
      if (!data_.empty()) data_ += '\n';
      data_ += value;
    }
    return true;  // comments and other names mean nothing to us
  }

  std::string line_ = {}, data_ = {};
  std::int64_t id_ = 0;
  bool after_return_ = false;
};

class Speaker : public Client {
 public:
  Speaker(Target target, Place place, SslContext context, milliseconds timeout)
      : target_(std::move(target)),
        place_(std::move(place)),
        context_(std::move(context)),
        timeout_(timeout) {}

  Result<Answer> call(std::string_view method, std::string_view path, const std::optional<Json>& body,
                      const std::vector<std::pair<std::string, std::string>>& headers) override {
    const auto until = Clock::now() + timeout_;
    BH_TRY(const auto request, request_of(method, path, body, headers));
    const bool harmless = method == "GET" || std::any_of(headers.begin(), headers.end(), [](const auto& one) {
                            return lower(one.first) == "idempotency-key";
                          });
    const bool kept = wire_ != nullptr;
    bool began = false;
    auto out = exchange(request, until, began);
    if (out.ok() || !kept || began || !harmless || out.error().code() != Errc::unavailable) return out;
    return exchange(request, until, began);  // the server had closed the kept one
  }

  Status follow(std::string_view path, std::int64_t after,
                const std::function<bool(std::int64_t, const Json&)>& each) override {
    std::vector<std::pair<std::string, std::string>> headers{{"Accept", "text/event-stream"}};
    if (after >= 0) headers.emplace_back("Last-Event-ID", std::to_string(after));
    BH_TRY(const auto request, request_of("GET", path, std::nullopt, headers));
    const auto until = Clock::now() + timeout_;
    BH_TRY(const auto wire, Wire::open(place_, target_, context_.get(), false, until));
    BH_CHECK(wire->send(request, until));
    Parser parser;
    bound(parser);
    parser.eager(true);
    Events events;
    std::string left;
    auto heard = Clock::now();
    bool stream = false;
    for (;;) {
      const auto wait = stream ? Clock::now() + std::chrono::seconds(1) : until;
      BH_TRY(const auto piece, wire->receive(wait, stream));
      if (piece.nothing) {
        if (!stream) return too_late(target_.url);
        if (!each(0, Json())) return ok_status();
        if (Clock::now() - heard > silence)
          return Error(Errc::unavailable, fmt::format("{} went silent", target_.url));
        continue;
      }
      heard = Clock::now();
      if (piece.end) {
        boost::beast::error_code failed;
        parser.put_eof(failed);
        if (!stream && parser.is_done()) return refusal(parser.get());
        return Error(Errc::unavailable, fmt::format("{} ended the stream", target_.url));
      }
      left.append(piece.bytes);
      BH_CHECK(put(parser, left));
      if (!stream && parser.is_header_done()) {
        const auto& message = parser.get();
        const auto type = message.find(beast::field::content_type);
        stream = message.result_int() == 200 && type != message.end() &&
                 type->value().starts_with("text/event-stream");
        if (message.result_int() == 200 && !stream) return not_ours(target_.url, "no stream of events");
        if (stream) parser.body_limit(boost::none);  // what was read is taken out each time
      }
      if (!stream) {
        if (parser.is_done()) return refusal(parser.get());
        continue;
      }
      const std::string got = std::exchange(parser.get().body(), {});
      BH_TRY(const bool more, events.take(got, each));
      if (!more) return ok_status();
      if (parser.is_done()) return Error(Errc::unavailable, fmt::format("{} ended the stream", target_.url));
    }
  }

  const Target& target() const override { return target_; }

 private:
  static void bound(Parser& parser) {
    parser.header_limit(most_header);
    parser.body_limit(most_body);
  }

  Result<std::string> request_of(std::string_view method, std::string_view path,
                                 const std::optional<Json>& body,
                                 const std::vector<std::pair<std::string, std::string>>& headers) const {
    if (!plain(method) || !plain(path) || !path.starts_with('/'))
      return Error(Errc::invalid, fmt::format("'{}' is no path of the API", printable(path, 120)));
    std::string out =
        fmt::format("{} {} HTTP/1.1\r\nHost: {}\r\nUser-Agent: bulkhead\r\n", method, path, place_.authority);
    if (!target_.token.empty()) out += fmt::format("Authorization: Bearer {}\r\n", target_.token);
    for (const auto& [name, value] : headers) {
      const bool clean =
          std::none_of(value.begin(), value.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; });
      if (!plain(name) || !clean)
        return Error(Errc::invalid, fmt::format("header {}: control characters in it", printable(name, 40)));
      out += fmt::format("{}: {}\r\n", name, value);
    }
    if (!body) return out + "\r\n";
    const auto text = body->dump(-1, ' ', false, Json::error_handler_t::replace);
    return out +
           fmt::format("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{}", text.size(), text);
  }

  // Feeds what came; what the parser has not taken stays in `left`.
  Status put(Parser& parser, std::string& left) const {
    std::size_t taken = 0;
    while (taken < left.size() && !parser.is_done()) {
      boost::beast::error_code failed;
      const auto now = parser.put(boost::asio::buffer(left.data() + taken, left.size() - taken), failed);
      taken += now;
      if (failed == beast::error::need_more) break;
      if (failed) return not_ours(target_.url, failed.message());
      if (now == 0) break;
    }
    left.erase(0, taken);
    return ok_status();
  }

  Error refusal(const Parser::value_type& message) const {
    auto answer = answer_of(target_, message);
    return answer.ok() ? problem_error(*answer) : std::move(answer).error();
  }

  Result<Answer> exchange(const std::string& request, Clock::time_point until, bool& began) {
    if (!wire_) {
      BH_TRY(wire_, Wire::open(place_, target_, context_.get(), false, until));
    }
    auto out = talk(request, until, began);
    if (!out.ok()) wire_.reset();
    return out;
  }

  Result<Answer> talk(const std::string& request, Clock::time_point until, bool& began) {
    // A server that refuses early (413, 431) closes while we write: what it said counts, not the broken pipe.
    auto sent = wire_->send(request, until);
    if (!sent.ok() && sent.error().code() == Errc::timeout) return std::move(sent).error();
    Parser parser;
    bound(parser);
    parser.eager(true);
    std::string left;
    for (;;) {
      auto piece = wire_->receive(until, false);
      if (!piece.ok()) return !sent.ok() ? std::move(sent).error() : std::move(piece).error();
      if (piece->nothing) return too_late(target_.url);
      if (piece->end) {
        boost::beast::error_code failed;
        if (began) parser.put_eof(failed);
        if (began && parser.is_done()) break;
        if (!sent.ok()) return std::move(sent).error();
        return Error(Errc::unavailable,
                     fmt::format("{}: the connection ended before the answer did", target_.url),
                     "try again; bulkhead lease list shows what was done");
      }
      began = true;
      left.append(piece->bytes);
      BH_CHECK(put(parser, left));
      if (parser.is_done() && parser.get().result_int() / 100 != 1) break;
      if (parser.is_done()) return not_ours(target_.url, "a provisional answer");
    }
    auto out = answer_of(target_, parser.get());
    if (!parser.keep_alive() || !left.empty() || !sent.ok()) wire_.reset();
    return out;
  }

  Target target_;
  Place place_;
  SslContext context_;
  milliseconds timeout_;
  std::unique_ptr<Wire> wire_ = {};
};

Result<std::optional<Target>> read_login() {
  const auto file = login_file();
  std::error_code failed;
  if (file.empty() || !fs::exists(file, failed)) return std::optional<Target>();
  struct ::stat seen {};
  if (::stat(file.c_str(), &seen) != 0) return errno_error(file, errno);
  const auto again = Error(Errc::corrupt, fmt::format("{}: not as bulkhead login writes it", file),
                           "bulkhead logout, then bulkhead login URL");
  if ((seen.st_mode & 077U) != 0)
    return Error(Errc::permission, fmt::format("{}: others may read it, and a token is in it", file),
                 fmt::format("chmod 600 {}   and, if others were on this host: bulkhead token revoke", file));
  BH_TRY(const auto text, read_file(file, most_login));
  const auto json = parse_json(text, 4);
  if (!json.ok() || !json->is_object()) return again;
  std::vector<std::string> mistakes;
  Fields fields(*json, "", mistakes);
  Target out;
  out.url = fields.text("url", 1024).value_or("");
  out.token = fields.text("token", most_token).value_or("");
  out.fingerprint = fields.text("fingerprint", 64).value_or("");
  out.ca_file = fields.text("caFile", 4096).value_or("");
  out.certificate_file = fields.text("certificateFile", 4096).value_or("");
  out.key_file = fields.text("keyFile", 4096).value_or("");
  if (!mistakes.empty() || out.url.empty() || !plain(out.token)) return again;
  return std::optional<Target>(std::move(out));
}

}  // namespace

Result<std::string> parse_url(std::string_view text) {
  BH_TRY(const auto place, place_of(text));
  return place.local() ? fmt::format("{}{}", unix_scheme, place.path)
                       : fmt::format("{}{}", https_scheme, place.authority);
}

Result<std::string> parse_fingerprint(std::string_view text) {
  std::string out;
  for (const char c : lower(trim(text)))
    if (c != ':') out += c;
  if (out.starts_with("sha256")) out.erase(0, 6);
  if (out.size() != 64 || out.find_first_not_of("0123456789abcdef") != std::string::npos)
    return Error(Errc::invalid, fmt::format("'{}' is no SHA-256 of a certificate", printable(text, 120)),
                 "64 hex digits, on the server: openssl x509 -in CERTIFICATE -noout -fingerprint -sha256");
  return out;
}

std::string login_file() {
  if (const auto config = env("XDG_CONFIG_HOME"); config.starts_with('/'))
    return config + "/bulkhead/login.json";
  const auto home = env("HOME");
  return home.starts_with('/') ? home + "/.config/bulkhead/login.json" : std::string();
}

Status save_login(const Target& target) {
  const auto file = login_file();
  if (file.empty())
    return Error(Errc::not_found, "HOME is not set: there is no place for the login",
                 "BULKHEAD_URL and BULKHEAD_TOKEN do without");
  Json out{{"url", target.url}, {"token", target.token}};
  if (!target.fingerprint.empty()) out["fingerprint"] = target.fingerprint;
  if (!target.ca_file.empty()) out["caFile"] = target.ca_file;
  if (!target.certificate_file.empty()) out["certificateFile"] = target.certificate_file;
  if (!target.key_file.empty()) out["keyFile"] = target.key_file;
  const auto folder = fs::path(file).parent_path();
  std::error_code failed;
  fs::create_directories(folder.parent_path(), failed);
  if (::mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) return errno_error(folder.string(), errno);
  return write_file_atomic(file, dump(out) + "\n", 0600);
}

Result<bool> forget_login() {
  const auto file = login_file();
  if (file.empty()) return false;
  if (::unlink(file.c_str()) == 0) return true;
  if (errno == ENOENT || errno == ENOTDIR) return false;
  return errno_error(file, errno);
}

Result<Target> target(const std::optional<std::string>& url) {
  Target out;
  std::string wanted = url.value_or("");
  if (wanted.empty()) wanted = env("BULKHEAD_URL");
  std::optional<Target> login;
  // A login that cannot be read is nobody's business where it is not asked.
  const bool all_said =
      !wanted.empty() && (!env("BULKHEAD_TOKEN").empty() || wanted.starts_with(unix_scheme));
  if (!all_said) {
    BH_TRY(login, read_login());
  }
  if (wanted.empty()) wanted = login ? login->url : std::string(default_socket);
  BH_TRY(out.url, parse_url(wanted));
  if (login && login->url == out.url) out = std::move(*login);
  if (const auto token = env("BULKHEAD_TOKEN"); !token.empty()) out.token = std::string(trim(token));
  if (out.token.size() > most_token || !plain(out.token))
    return Error(Errc::invalid, "BULKHEAD_TOKEN: that is no token", "bulkhead token create prints one");
  if (const auto pin = env("BULKHEAD_FINGERPRINT"); !pin.empty()) {
    auto parsed = parse_fingerprint(pin);
    if (!parsed.ok()) return std::move(parsed).error().in("BULKHEAD_FINGERPRINT");
    out.fingerprint = *parsed;
  }
  if (const auto file = env("BULKHEAD_CA"); !file.empty()) out.ca_file = file, out.fingerprint.clear();
  return out;
}

Result<std::string> fingerprint_of(const Target& target, milliseconds timeout) {
  BH_TRY(const auto place, place_of(target.url));
  if (place.local()) return Error(Errc::invalid, "a Unix socket has no certificate");
  BH_TRY(const auto context, make_context(target));
  BH_TRY(const auto wire, Wire::open(place, target, context.get(), true, Clock::now() + timeout));
  return wire->fingerprint();
}

std::string segment(std::string_view text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (std::isalnum(byte) != 0 || c == '-' || c == '_' || c == '~' ||
        (c == '.' && text != "." && text != ".."))
      out += c;
    else
      out += fmt::format("%{:02X}", byte);
  }
  return out;
}

Result<std::unique_ptr<Client>> Client::connect(Target target, milliseconds timeout) {
  BH_TRY(auto place, place_of(target.url));
  if (target.token.size() > most_token || !plain(target.token))
    return Error(Errc::invalid, "that is no token", "bulkhead token create prints one");
  SslContext context;
  if (!place.local()) {
    BH_TRY(context, make_context(target));
  }
  return std::unique_ptr<Client>(
      std::make_unique<Speaker>(std::move(target), std::move(place), std::move(context), timeout));
}

Error problem_error(const Answer& answer) {
  const auto problem = api::v1::parse_problem(answer.body);
  if (!problem.ok())
    return Error(Errc::corrupt, fmt::format("the server answered {} and no reason", answer.status));
  static constexpr std::pair<std::string_view, Errc> codes[] = {
      {"invalid", Errc::invalid},         {"unauthorized", Errc::permission}, {"forbidden", Errc::permission},
      {"not-found", Errc::not_found},     {"conflict", Errc::conflict},       {"stale", Errc::conflict},
      {"quota", Errc::no_capacity},       {"no-room", Errc::no_capacity},     {"too-large", Errc::invalid},
      {"unavailable", Errc::unavailable}, {"too-many", Errc::in_use}};
  Errc code = Errc::io;
  for (const auto& [name, value] : codes)
    if (problem->code == name) code = value;
  std::string message = printable(problem->detail.empty() ? problem->title : problem->detail, 4096);
  for (const auto& reason : problem->reasons) message += "\n  " + printable(reason, 2048);
  std::string hint;
  for (const auto& way : problem->ways) hint += printable(way, 2048) + "\n";
  hint += printable(problem->hint, 2048);
  while (hint.ends_with('\n')) hint.pop_back();
  return Error(code, std::move(message), std::move(hint));
}

}  // namespace bulkhead::client
