#include "daemon/http/http.hpp"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <thread>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "daemon/http/target.hpp"

namespace bulkhead::http {
namespace {

namespace fs = std::filesystem;
using namespace std::chrono_literals;

struct Folder {
  Folder() {
    std::string name = (fs::temp_directory_path() / "http.XXXXXX").string();
    path = ::mkdtemp(name.data());
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() { fs::remove_all(path); }
  std::string operator/(std::string_view name) const { return (path / name).string(); }
  fs::path path;
};

// A stranger's end: bytes in, bytes out, no library that would forbid what a stranger does.
class Client {
 public:
  static Client tcp(std::uint16_t port) {
    Client out;
    out.fd_.reset(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in to = {};
    to.sin_family = AF_INET;
    to.sin_port = htons(port);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    out.join(reinterpret_cast<const sockaddr*>(&to), sizeof to);
    return out;
  }
  static Client local(const std::string& path) {
    Client out;
    out.fd_.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un to = {};
    to.sun_family = AF_UNIX;
    std::memcpy(to.sun_path, path.c_str(), path.size() + 1);
    out.join(reinterpret_cast<const sockaddr*>(&to), sizeof to);
    return out;
  }
  static Client tls(std::uint16_t port, const std::string& certificate = {}, const std::string& key = {},
                    int highest = 0) {
    Client out = tcp(port);
    SSL_CTX* context = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_max_proto_version(context, highest);
    if (!certificate.empty()) {
      SSL_CTX_use_certificate_file(context, certificate.c_str(), SSL_FILETYPE_PEM);
      SSL_CTX_use_PrivateKey_file(context, key.c_str(), SSL_FILETYPE_PEM);
    }
    out.ssl_.reset(SSL_new(context));
    SSL_CTX_free(context);
    SSL_set_fd(out.ssl_.get(), out.fd_.get());
    out.shaken_ = SSL_connect(out.ssl_.get()) == 1;
    ERR_clear_error();
    return out;
  }

  bool shaken() const { return shaken_; }
  int fd() const { return fd_.get(); }
  SSL* ssl() const { return ssl_.get(); }

  // False: the server has gone.
  bool say(std::string_view text) {
    while (!text.empty()) {
      const ssize_t n = ssl_ ? SSL_write(ssl_.get(), text.data(), static_cast<int>(text.size()))
                             : ::send(fd_.get(), text.data(), text.size(), MSG_NOSIGNAL);
      if (n <= 0) return false;
      text.remove_prefix(static_cast<std::size_t>(n));
    }
    return true;
  }
  // Some bytes; empty at the end, or after ten seconds of nothing.
  std::string some() {
    char bytes[16384];
    const ssize_t n =
        ssl_ ? SSL_read(ssl_.get(), bytes, sizeof bytes) : ::recv(fd_.get(), bytes, sizeof bytes, 0);
    ERR_clear_error();
    return n > 0 ? std::string(bytes, static_cast<std::size_t>(n)) : std::string();
  }
  std::string until(std::string_view what) {
    while (heard_.find(what) == std::string::npos) {
      const std::string more = some();
      if (more.empty()) break;
      heard_ += more;
    }
    const auto at = heard_.find(what);
    std::string out = heard_.substr(0, at == std::string::npos ? at : at + what.size());
    heard_.erase(0, out.size());
    return out;
  }
  std::string rest() {
    std::string out = std::exchange(heard_, {});
    for (std::string more = some(); !more.empty(); more = some()) out += more;
    return out;
  }
  // One whole answer.
  std::string answer(bool head = false) {
    std::string out = until("\r\n\r\n");
    const auto at = out.find("Content-Length: ");
    if (head || at == std::string::npos) return out;
    const auto size = static_cast<std::size_t>(std::atoll(out.c_str() + at + 16));
    while (heard_.size() < size) {
      const std::string more = some();
      if (more.empty()) break;
      heard_ += more;
    }
    out += heard_.substr(0, size);
    heard_.erase(0, size);
    return out;
  }
  std::string ask(std::string_view text) { return say(text) ? answer() : std::string(); }
  bool over() { return heard_.empty() && some().empty(); }

 private:
  struct Free {
    void operator()(SSL* ssl) const { SSL_free(ssl); }
  };
  void join(const sockaddr* to, socklen_t size) {
    ::signal(SIGPIPE, SIG_IGN);  // SSL_write to a server that has closed
    const timeval patience{10, 0};
    ::setsockopt(fd_.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    ::setsockopt(fd_.get(), SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    EXPECT_EQ(::connect(fd_.get(), to, size), 0) << std::strerror(errno);
  }
  UniqueFd fd_ = {};
  std::unique_ptr<SSL, Free> ssl_ = {};
  std::string heard_ = {};
  bool shaken_ = false;
};

int status_of(const std::string& answer) {
  return answer.starts_with("HTTP/1.1 ") ? std::atoi(answer.c_str() + 9) : 0;
}
std::string body_of(const std::string& answer) {
  const auto at = answer.find("\r\n\r\n");
  return at == std::string::npos ? std::string() : answer.substr(at + 4);
}
bool has(const std::string& text, std::string_view what) { return text.find(what) != std::string::npos; }

// The real server on loopback and a Unix socket, with bounds short enough to reach.
class Served : public ::testing::Test {
 protected:
  void start(const std::function<void(Settings&)>& change = {}) {
    const auto made = ensure_certificate(folder / "certificate", folder / "key", {});
    ASSERT_TRUE(made.ok()) << made.error().message();
    Settings settings;
    settings.listen = Listen{"127.0.0.1", 0};
    settings.tls = Tls{folder / "certificate", folder / "key", {}};
    settings.socket = folder / "socket";
    settings.limits.idle_time = 10'000ms;
    if (change) change(settings);
    auto bound = Server::bind(settings, [this](Request request, std::shared_ptr<Reply> reply) {
      handle(std::move(request), std::move(reply));
    });
    ASSERT_TRUE(bound.ok()) << bound.error().message();
    server = std::move(bound).value();
    thread = std::thread([this] { server->run(); });
  }
  void TearDown() override {
    if (thread.joinable()) {
      server->stop(0ms);
      thread.join();
    }
    for (auto& one : late) one.join();
  }

  void handle(Request request, std::shared_ptr<Reply> reply) {
    if (request.path == "/throw") throw std::runtime_error("a handler's own fault");
    if (request.path == "/drop") return;
    if (request.path == "/watch") {
      const std::lock_guard lock(mutex);
      streams.push_back(reply->stream());
      return;
    }
    if (request.path == "/late") {
      const std::string said = request.query.empty() ? "late" : request.query.front().second;
      late.emplace_back([reply, said] {
        std::this_thread::sleep_for(20ms);
        reply->answer({200, "text/plain", {}, said});
      });
      return;
    }
    if (request.path == "/big") return reply->answer({200, "text/plain", {}, std::string(32 << 20, 'b')});
    if (request.path == "/split") {
      return reply->answer({200, "text/plain", {{"X-Evil", "a\r\nSet-Cookie: b"}, {"X-Good", "g"}}, ""});
    }
    std::string said = fmt::format("{} {} body={} from={} uid={} tls={} certificate={}", request.method,
                                   request.path, request.body.size(), request.peer.address,
                                   request.peer.uid ? static_cast<int>(*request.peer.uid) : -1,
                                   request.peer.tls, request.peer.certificate);
    for (const auto& [name, value] : request.query) said += fmt::format(" {}={}", name, value);
    if (!request.header("x-trailer").empty()) said += " trailer";
    reply->answer({200, "text/plain", {}, said});
  }
  std::shared_ptr<Stream> stream_of(Client& client) {
    EXPECT_EQ(status_of(client.until("\r\n\r\n")), 200);
    const std::lock_guard lock(mutex);
    return streams.back();
  }
  Client local() { return Client::local(folder / "socket"); }
  Client tls() { return Client::tls(server->port()); }

  Folder folder;
  std::unique_ptr<Server> server;
  std::thread thread;
  std::mutex mutex;
  std::vector<std::shared_ptr<Stream>> streams;
  std::vector<std::thread> late;
};

using Http = Served;

constexpr const char* plain_get = "GET /a HTTP/1.1\r\nHost: x\r\n\r\n";

TEST_F(Http, AnswersOverTlsAndOverTheUnixSocketAndKnowsWhoAsks) {
  start();
  Client far = tls();
  ASSERT_TRUE(far.shaken());
  EXPECT_STREQ(SSL_get_version(far.ssl()), "TLSv1.3");
  for (int i = 0; i < 3; ++i) {
    const std::string answer = far.ask("GET //api/./v1/l%65ases/?a=1+2&b=%26 HTTP/1.1\r\nHost: x\r\n\r\n");
    EXPECT_EQ(status_of(answer), 200);
    EXPECT_EQ(body_of(answer),
              "GET /api/v1/leases body=0 from=127.0.0.1 uid=-1 tls=true certificate= a=1 2 b=&");
    EXPECT_TRUE(has(answer, "Cache-Control: no-store\r\n") &&
                has(answer, "X-Content-Type-Options: nosniff\r\n") &&
                has(answer, "Strict-Transport-Security: ") && has(answer, "Date: "));
  }
  const std::string answer = local().ask("POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello");
  EXPECT_EQ(body_of(answer),
            fmt::format("POST /b body=5 from=uid {0} uid={0} tls=false certificate=", ::getuid()));
  EXPECT_FALSE(has(answer, "Strict-Transport-Security"));
  EXPECT_EQ(server->counts().requests, 4U);
  EXPECT_EQ(server->counts().by_status.at(200), 4U);
}

TEST_F(Http, RefusesOlderTlsAndSaysHttpsToPlainHttp) {
  start();
  EXPECT_FALSE(Client::tls(server->port(), {}, {}, TLS1_2_VERSION).shaken());
  Client plain = Client::tcp(server->port());
  EXPECT_EQ(status_of(plain.ask(plain_get)), 400);
  Client garbage = Client::tcp(server->port());
  garbage.say({"\x16\x03\x01\x00\x05hello", 10});
  garbage.rest();
  EXPECT_EQ(status_of(tls().ask(plain_get)), 200);
}

TEST_F(Http, RefusesWhatTwoReadersCouldReadInTwoWays) {
  start();
  const std::string host = "Host: x\r\n";
  const std::vector<std::pair<std::string, int>> sent = {
      {"nonsense\r\n\r\n", 400},
      {"GET  /a HTTP/1.1\r\n" + host + "\r\n", 400},
      {"GET /a HTTP/2.0\r\n" + host + "\r\n", 505},
      {"GET /a HTTP/1.1\r\n\r\n", 400},
      {"GET /a HTTP/1.1\r\n" + host + host + "\r\n", 400},
      {"GET /a HTTP/1.1\r\n" + host + "Authorization: a\r\nAuthorization: b\r\n\r\n", 400},
      {"POST /a HTTP/1.1\r\n" + host + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
       400},
      {"POST /a HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
       400},
      {"POST /a HTTP/1.1\r\n" + host + "Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd", 400},
      {"POST /a HTTP/1.1\r\n" + host + "Content-Length: 4, 4\r\n\r\nabcd", 400},
      {"POST /a HTTP/1.1\r\n" + host + "Content-Length: +4\r\n\r\nabcd", 400},
      {"POST /a HTTP/1.1\r\n" + host + "Content-Length: 99999999999999999999\r\n\r\nabcd", 400},
      {"POST /a HTTP/1.1\r\n" + host + "Content-Length : 4\r\n\r\nabcd", 400},
      {"POST /a HTTP/1.1\r\n" + host + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400},
      {"POST /a HTTP/1.1\r\n" + host + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400},
      {"POST /a HTTP/1.0\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
      {"POST /a HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\nxyz\r\n\r\n", 400},
      {"POST /a HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n2\r\nabcd\r\n\r\n", 400},
      {"POST /a HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n1;" + std::string(6000, 'x'), 400},
      {"GET /a HTTP/1.1\r\n" + host + "X: a\r\n b\r\n\r\n", 400},
      {"GET /a HTTP/1.1\r\n" + host + "X:\r\n\tb\r\n\r\n", 400},
      {"GET /a HTTP/1.1\r\n" + host + "X:\r\n \r\n\r\n", 400},
      {"GET /a HTTP/1.1\r\n" + host + "X: a\nY: b\r\n\r\n", 400},
      {"GET /a HTTP/1.1\r\n" + host + std::string("X: a\0b\r\n\r\n", 10), 400},
      {"GET /a HTTP/1.1\r\n" + host + "X: \xff\xfe\r\n\r\n", 400},
      {"GET /a HTTP/1.1\r\n" + host + "Expect: 200-ok\r\n\r\n", 417},
      {"GET /../etc HTTP/1.1\r\n" + host + "\r\n", 400},
      {"GET /a/%2e%2E/b HTTP/1.1\r\n" + host + "\r\n", 400},
      {"GET /a%00 HTTP/1.1\r\n" + host + "\r\n", 400},
      {"CONNECT x:443 HTTP/1.1\r\n" + host + "\r\n", 400},
  };
  for (const auto& [text, status] : sent) {
    Client client = local();
    // A request smuggled behind is never answered.
    client.say(text + "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n");
    const std::string answer = client.rest();
    EXPECT_EQ(status_of(answer), status) << text.substr(0, 200) << "\n" << answer;
    EXPECT_TRUE(has(answer, "application/problem+json") && has(answer, "Connection: close"))
        << text.substr(0, 200);
    EXPECT_FALSE(has(answer, "smuggled")) << text.substr(0, 200);
  }
  EXPECT_EQ(server->counts().requests, 0U);
}

TEST_F(Http, RefusesLongBodiesUnreadAndTakesShortOnesInAnyPieces) {
  start();
  Client known = tls();
  const std::string refused = known.ask("POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n");
  EXPECT_EQ(status_of(refused), 413);
  // A client that goes on sending all the same still reads the answer.
  Client stubborn = local();
  stubborn.say("POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n" +
               std::string(300'000, 'x'));
  EXPECT_EQ(status_of(stubborn.rest()), 413);
  Client chunked = local();
  chunked.say("POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n40000000\r\n");
  EXPECT_EQ(status_of(chunked.rest()), 413);
  Client many = local();
  many.say("POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
  for (int i = 0; i < 40 && many.say("8000\r\n" + std::string(0x8000, 'x') + "\r\n"); ++i) {
  }
  EXPECT_EQ(status_of(many.rest()), 413);

  Client patient = tls();
  patient.say("POST /a HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n");
  EXPECT_EQ(patient.until("\r\n\r\n"), "HTTP/1.1 100 Continue\r\n\r\n");
  EXPECT_TRUE(has(patient.ask("hello"), "body=5 "));
  const std::string pieces =
      "POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\nTrailer: X-Trailer\r\n\r\n"
      "3;name=\"v\"\r\nabc\r\nA\r\n0123456789\r\n0\r\nX-Trailer: 1\r\n\r\n";
  for (const char c : pieces) patient.say({&c, 1});
  const std::string answer = patient.answer();
  EXPECT_TRUE(has(answer, "body=13 ") && !has(answer, " trailer")) << answer;
}

TEST_F(Http, BoundsTheHeaders) {
  start();
  Client line = local();
  line.say("GET /" + std::string(20'000, 'a') + " HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(status_of(line.rest()), 431);
  Client endless = local();
  endless.say("GET /a HTTP/1.1\r\nHost: x\r\nX: " + std::string(20'000, 'a'));
  EXPECT_EQ(status_of(endless.rest()), 431);
  // Small ones, one after another: the sum counts.
  Client many = local();
  many.say("GET /a HTTP/1.1\r\nHost: x\r\n");
  for (int i = 0; i < 200 && many.say(fmt::format("X-{}: {}\r\n", i, std::string(i < 50 ? 1 : 400, 'v')));
       ++i) {
  }
  EXPECT_EQ(status_of(many.rest()), 431);
  Client tiny = local();
  std::string text = "GET /a HTTP/1.1\r\nHost: x\r\n";
  for (int i = 0; i < 150; ++i) text += "A:b\r\n";
  tiny.say(text + "\r\n");
  EXPECT_EQ(status_of(tiny.rest()), 431);
}

TEST_F(Http, SpeaksHttp10HeadOptionsAndPipelines) {
  start([](Settings& settings) { settings.limits.requests = 6; });
  Client old = local();
  old.say("GET /old HTTP/1.0\r\n\r\n");
  EXPECT_TRUE(has(old.rest(), "GET /old"));
  Client kept = local();
  EXPECT_TRUE(has(kept.ask("GET /old HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"), "Connection: keep-alive"));
  kept.say("HEAD /h HTTP/1.1\r\nHost: x\r\n\r\n");
  const std::string head = kept.answer(true);
  EXPECT_TRUE(status_of(head) == 200 && !has(head, "Content-Length: 0")) << head;
  EXPECT_TRUE(has(kept.ask("OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n"), "OPTIONS * "));
  EXPECT_TRUE(has(kept.ask("GET http://x.example/abs?q HTTP/1.1\r\nHost: x\r\n\r\n"), "GET /abs "));
  // In order, also where the first answer comes late; the sixth request is the connection's last.
  kept.say(
      "GET /late?a=first HTTP/1.1\r\nHost: x\r\n\r\nGET /second HTTP/1.1\r\nHost: x\r\n\r\n"
      "GET /third HTTP/1.1\r\nHost: x\r\n\r\n");
  const std::string all = kept.rest();
  EXPECT_TRUE(has(all, "first") && has(all, "GET /second") && all.find("first") < all.find("/second")) << all;
  EXPECT_TRUE(has(all, "Connection: close") && !has(all, "/third"));
  // A sender that is done sending still gets all its answers.
  Client half = local();
  half.say("GET /late?a=first HTTP/1.1\r\nHost: x\r\n\r\nGET /second HTTP/1.1\r\nHost: x\r\n\r\n");
  ::shutdown(half.fd(), SHUT_WR);
  const std::string both = half.rest();
  EXPECT_TRUE(has(both, "first") && has(both, "GET /second")) << both;
  Client close = tls();
  close.say("GET /a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  EXPECT_EQ(status_of(close.rest()), 200);
}

TEST_F(Http, AnswersForHandlersThatThrowOrForget) {
  start();
  Client client = tls();
  for (const auto* path : {"/throw", "/drop"}) {
    EXPECT_EQ(status_of(client.ask(fmt::format("GET {} HTTP/1.1\r\nHost: x\r\n\r\n", path))), 500) << path;
  }
  EXPECT_EQ(body_of(client.ask("GET /late HTTP/1.1\r\nHost: x\r\n\r\n")), "late");
  const std::string split = client.ask("GET /split HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_TRUE(has(split, "X-Good: g") && !has(split, "Set-Cookie")) << split;
  // The asker leaves before the answer comes.
  { tls().say("GET /late HTTP/1.1\r\nHost: x\r\n\r\n"); }
  { local().say("GET /late HTTP/1.1\r\nHost: x\r\n\r\n"); }
  EXPECT_EQ(status_of(client.ask(plain_get)), 200);
}

TEST_F(Http, ClosesTheSlowWhileOthersAreServed) {
  start([](Settings& settings) {
    settings.limits.header_time = 150ms;
    settings.limits.body_time = 150ms;
    settings.limits.idle_time = 150ms;
    settings.limits.write_time = 150ms;
  });
  Client shaking = Client::tcp(server->port());
  shaking.say("\x16\x03\x01");
  Client silent = tls();
  Client header = tls();
  header.say("GET /a HTTP/1.1\r\nHost: x\r\nX: ");
  Client body = local();
  body.say("POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nab");
  Client reader = local();
  const int small = 4096;
  ::setsockopt(reader.fd(), SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
  reader.say("GET /big HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(status_of(local().ask(plain_get)), 200);
  Client idle = local();
  EXPECT_EQ(status_of(idle.ask(plain_get)), 200);
  EXPECT_TRUE(shaking.over());
  EXPECT_TRUE(silent.over());
  EXPECT_EQ(status_of(header.rest()), 408);
  EXPECT_EQ(status_of(body.rest()), 408);
  EXPECT_TRUE(idle.over());
  while (server->counts().open > 0) std::this_thread::sleep_for(5ms);
  EXPECT_LT(reader.rest().size(), std::size_t{32} << 20);
  EXPECT_EQ(server->counts().timed_out, 5U);
}

TEST_F(Http, DeliversABigAnswerWhole) {
  start();
  Client client = tls();
  const std::string answer = client.ask("GET /big HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(body_of(answer).size(), std::size_t{32} << 20);
  EXPECT_EQ(status_of(client.ask(plain_get)), 200);
}

TEST_F(Http, BoundsTheConnectionsOfOneAndOfAll) {
  start([](Settings& settings) {
    settings.limits.connections = 3;
    settings.limits.connections_of_one = 2;
  });
  Client first = local(), second = local();
  EXPECT_EQ(status_of(first.ask(plain_get)), 200);
  EXPECT_EQ(status_of(second.ask(plain_get)), 200);
  EXPECT_TRUE(local().over());
  Client far = tls();
  EXPECT_EQ(status_of(far.ask(plain_get)), 200);
  EXPECT_FALSE(tls().shaken());
  { Client gone = std::move(first); }
  while (server->counts().open > 2) std::this_thread::sleep_for(1ms);
  EXPECT_EQ(status_of(local().ask(plain_get)), 200);
  EXPECT_EQ(server->counts().refused, 2U);
}

TEST_F(Http, StreamsFramesToManyAndCutsTheSlow) {
  start([](Settings& settings) {
    settings.limits.heartbeat = 100ms;
    settings.limits.waiting_frames = 16;
  });
  const std::string watch = "GET /watch HTTP/1.1\r\nHost: x\r\n\r\n";
  Client near = local(), far = tls(), slow = local();
  std::vector<std::shared_ptr<Stream>> open;
  for (Client* client : {&near, &far, &slow}) {
    client->say(watch);
    open.push_back(stream_of(*client));
  }
  const auto frame = std::make_shared<const std::string>("id: 1\ndata: {}\n\n");
  for (const auto& stream : open) EXPECT_TRUE(stream->send(frame));
  EXPECT_EQ(near.until("{}\n\n"), *frame);
  EXPECT_EQ(far.until("{}\n\n"), *frame);
  EXPECT_EQ(far.until(":\n\n"), ":\n\n");
  // Nobody reads the third: its frames are dropped, it is closed, the others do not notice.
  const auto big = std::make_shared<const std::string>("data: " + std::string(60'000, 'x') + "\n\n");
  int sent = 0;
  while (open[2]->send(big) && sent < 100'000) ++sent;
  EXPECT_LT(sent, 100'000);
  EXPECT_FALSE(open[2]->send(frame));
  EXPECT_TRUE(open[1]->send(frame));
  EXPECT_TRUE(has(far.until("{}\n\n"), *frame));
  EXPECT_LT(slow.rest().size(), static_cast<std::size_t>(sent + 1) * big->size());
  // A reader that leaves is noticed by whoever writes.
  { Client gone = std::move(near); }
  while (open[0]->send(frame)) std::this_thread::sleep_for(1ms);
  open[1]->close();
  far.rest();
  EXPECT_TRUE(far.over());
  EXPECT_FALSE(open[1]->send(frame));
  EXPECT_EQ(server->counts().streams, 3U);
}

TEST_F(Http, StopsAfterTheAnswersUnderWay) {
  start();
  Client idle = tls(), working = local(), watching = local();
  EXPECT_EQ(status_of(idle.ask(plain_get)), 200);
  watching.say("GET /watch HTTP/1.1\r\nHost: x\r\n\r\n");
  const auto stream = stream_of(watching);
  stream->send(std::make_shared<const std::string>("data: last\n\n"));
  working.say("GET /late?a=done HTTP/1.1\r\nHost: x\r\n\r\n");
  while (server->counts().requests < 3) std::this_thread::sleep_for(1ms);
  server->stop(5'000ms);
  EXPECT_TRUE(has(working.rest(), "done"));
  EXPECT_TRUE(has(watching.rest(), "data: last"));
  EXPECT_TRUE(idle.over());
  working = Client(), watching = Client(), idle = Client();
  thread.join();
  EXPECT_FALSE(fs::exists(folder / "socket"));
  EXPECT_FALSE(stream->send(std::make_shared<const std::string>("data: later\n\n")));
}

TEST_F(Http, RunsWhatIsDueAndReadsCertificatesAgain) {
  std::atomic<int> rounds = 0;
  start();
  server->stop(0ms);
  thread.join();
  server.reset();
  Settings settings;
  settings.listen = Listen{"127.0.0.1", 0};
  settings.tls = Tls{folder / "certificate", folder / "key", {}};
  auto bound = Server::bind(settings, [this](Request request, std::shared_ptr<Reply> reply) {
    handle(std::move(request), std::move(reply));
  });
  ASSERT_TRUE(bound.ok());
  server = std::move(bound).value();
  server->every(5ms, [&] {
    if (++rounds == 2) throw std::runtime_error("once");
  });
  thread = std::thread([this] { server->run(); });
  Client before = tls();
  fs::remove(folder / "certificate");
  EXPECT_FALSE(server->reload().ok());
  EXPECT_TRUE(tls().shaken());  // the old one still serves
  fs::remove(folder / "key");
  ASSERT_TRUE(ensure_certificate(folder / "certificate", folder / "key", {"fresh.example"}).ok());
  ASSERT_TRUE(server->reload().ok());
  Client after = tls();
  X509* shown = SSL_get0_peer_certificate(after.ssl());
  ASSERT_NE(shown, nullptr);
  EXPECT_EQ(X509_check_host(shown, "fresh.example", 0, 0, nullptr), 1);
  EXPECT_EQ(status_of(before.ask(plain_get)), 200);
  while (rounds < 4) std::this_thread::sleep_for(1ms);
}

// Makes a key and a certificate for it, signed by another pair or by itself.
struct Pair {
  EVP_PKEY* key = EVP_EC_gen("P-256");
  X509* certificate = X509_new();
  Pair(const std::string& name, const Pair* by, bool authority) {
    ASN1_INTEGER_set(X509_get_serialNumber(certificate), by == nullptr ? 1 : 2);
    X509_set_version(certificate, 2);
    X509_gmtime_adj(X509_getm_notBefore(certificate), -60);
    X509_gmtime_adj(X509_getm_notAfter(certificate), 3600);
    X509_NAME_add_entry_by_txt(X509_get_subject_name(certificate), "CN", MBSTRING_UTF8,
                               reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
    X509_set_issuer_name(certificate, X509_get_subject_name(by == nullptr ? certificate : by->certificate));
    X509_set_pubkey(certificate, key);
    X509_EXTENSION* basic = X509V3_EXT_conf_nid(nullptr, nullptr, NID_basic_constraints,
                                                authority ? "critical,CA:TRUE" : "CA:FALSE");
    X509_add_ext(certificate, basic, -1);
    X509_EXTENSION_free(basic);
    X509_sign(certificate, by == nullptr ? key : by->key, EVP_sha256());
  }
  Pair(const Pair&) = delete;
  Pair& operator=(const Pair&) = delete;
  ~Pair() {
    X509_free(certificate);
    EVP_PKEY_free(key);
  }
  void save(const std::string& certificate_file, const std::string& key_file) const {
    FILE* out = std::fopen(certificate_file.c_str(), "we");
    PEM_write_X509(out, certificate);
    std::fclose(out);
    out = std::fopen(key_file.c_str(), "we");
    PEM_write_PrivateKey(out, key, nullptr, nullptr, 0, nullptr, nullptr);
    std::fclose(out);
  }
};

TEST_F(Http, TakesClientCertificatesOfItsCaOnly) {
  const Pair ours("our CA", nullptr, true), theirs("our CA", nullptr, true);
  const Pair friendly("friend", &ours, false), hostile("friend", &theirs, false),
      alone("friend", nullptr, false);
  ours.save(folder / "ca", folder / "ca.key");
  friendly.save(folder / "friend", folder / "friend.key");
  hostile.save(folder / "hostile", folder / "hostile.key");
  alone.save(folder / "alone", folder / "alone.key");
  start([this](Settings& settings) { settings.tls->client_ca_file = folder / "ca"; });
  const std::string known =
      Client::tls(server->port(), folder / "friend", folder / "friend.key").ask(plain_get);
  unsigned char hash[EVP_MAX_MD_SIZE];
  unsigned size = 0;
  X509_digest(friendly.certificate, EVP_sha256(), hash, &size);
  std::string expected = "certificate=";
  for (unsigned i = 0; i < size; ++i) expected += fmt::format("{:02x}", hash[i]);
  EXPECT_TRUE(body_of(known).ends_with(expected)) << known;
  EXPECT_TRUE(body_of(tls().ask(plain_get)).ends_with("certificate="));
  EXPECT_EQ(Client::tls(server->port(), folder / "hostile", folder / "hostile.key").ask(plain_get), "");
  EXPECT_EQ(Client::tls(server->port(), folder / "alone", folder / "alone.key").ask(plain_get), "");
  EXPECT_EQ(server->counts().requests, 2U);
}

TEST_F(Http, SaysWhoIsInTheWayAndReplacesOnlyWhatIsDead) {
  start();
  const auto refused = [](Settings settings) {
    auto bound = Server::bind(std::move(settings), [](Request, std::shared_ptr<Reply>) {});
    EXPECT_FALSE(bound.ok());
    return bound.ok() ? Error(Errc::io, "bound") : std::move(bound).error();
  };
  Settings taken;
  taken.listen = Listen{"127.0.0.1", server->port()};
  const Error port = refused(taken);
  EXPECT_EQ(port.code(), Errc::in_use);
  EXPECT_TRUE(has(port.message(), fmt::format("in use by pid {} (", ::getpid()))) << port.message();
  EXPECT_TRUE(has(port.hint(), "--listen")) << port.hint();
  Settings socket;
  socket.socket = folder / "socket";
  EXPECT_TRUE(has(refused(socket).message(), fmt::format("in use by pid {}", ::getpid())));
  EXPECT_EQ(status_of(local().ask(plain_get)), 200);
  Settings file;
  file.socket = folder / "key";
  EXPECT_EQ(refused(file).code(), Errc::in_use);
  Settings open;
  open.listen = Listen{"0.0.0.0", 0};
  EXPECT_TRUE(has(refused(open).message(), "loopback only"));
  Settings name;
  name.listen = Listen{"no.such.name", 0};
  EXPECT_EQ(refused(name).code(), Errc::invalid);
  EXPECT_EQ(refused(Settings{}).code(), Errc::invalid);
  if (::getuid() != 0) {
    std::ifstream first("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    int start_of_free = 0;
    if (first >> start_of_free && start_of_free > 1) {
      Settings low;
      low.listen = Listen{"127.0.0.1", 1};
      const Error right = refused(low);
      EXPECT_EQ(right.code(), Errc::permission);
      EXPECT_TRUE(has(right.hint(), "CAP_NET_BIND_SERVICE"));
    }
  }
  // What a killed daemon left is replaced, and has the mode asked for.
  UniqueFd dead(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un at = {};
  at.sun_family = AF_UNIX;
  std::memcpy(at.sun_path, (folder / "dead").c_str(), (folder / "dead").size() + 1);
  ASSERT_EQ(::bind(dead.get(), reinterpret_cast<const sockaddr*>(&at), sizeof at), 0);
  dead.reset();
  Settings replaced;
  replaced.socket = folder / "dead";
  replaced.socket_mode = 0660;
  auto bound = Server::bind(replaced, [](Request, std::shared_ptr<Reply>) {});
  ASSERT_TRUE(bound.ok()) << bound.error().message();
  struct stat made = {};
  ASSERT_EQ(::stat((folder / "dead").c_str(), &made), 0);
  EXPECT_EQ(made.st_mode & 0777, 0660U);
}

TEST_F(Http, ServesInheritedSockets) {
  const int tcp = ::socket(AF_INET, SOCK_STREAM, 0), local_fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_in at = {};
  at.sin_family = AF_INET;
  at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(::bind(tcp, reinterpret_cast<const sockaddr*>(&at), sizeof at), 0);
  sockaddr_un near = {};
  near.sun_family = AF_UNIX;
  std::memcpy(near.sun_path, (folder / "given").c_str(), (folder / "given").size() + 1);
  ASSERT_EQ(::bind(local_fd, reinterpret_cast<const sockaddr*>(&near), sizeof near), 0);
  ASSERT_EQ(::listen(tcp, 16) + ::listen(local_fd, 16), 0);
  start([&](Settings& settings) {
    settings.listen.reset();
    settings.inherited = {tcp, local_fd};
  });
  EXPECT_EQ(status_of(tls().ask(plain_get)), 200);
  EXPECT_TRUE(has(Client::local(folder / "given").ask(plain_get), "uid="));
  TearDown();
  server.reset();
  EXPECT_TRUE(fs::exists(folder / "given"));  // systemd's, not ours
}

TEST(HttpCertificate, IsMadeOnceBothOrNone) {
  const Folder folder;
  const std::string certificate = folder / "certificate", key = folder / "key";
  const auto made = ensure_certificate(certificate, key, {"node7.example", "192.0.2.7", "2001:db8::7"});
  ASSERT_TRUE(made.ok()) << made.error().message();
  EXPECT_EQ(made.value().size(), 64U);
  EXPECT_EQ(ensure_certificate(certificate, key, {}).value_or("none"), made.value());
  struct stat mode = {};
  ASSERT_EQ(::stat(key.c_str(), &mode), 0);
  EXPECT_EQ(mode.st_mode & 0777, 0600U);
  FILE* in = std::fopen(certificate.c_str(), "re");
  X509* read = PEM_read_X509(in, nullptr, nullptr, nullptr);
  std::fclose(in);
  ASSERT_NE(read, nullptr);
  EXPECT_EQ(X509_check_host(read, "node7.example", 0, 0, nullptr), 1);
  EXPECT_EQ(X509_check_host(read, "localhost", 0, 0, nullptr), 1);
  EXPECT_EQ(X509_check_ip_asc(read, "192.0.2.7", 0), 1);
  EXPECT_EQ(X509_check_ip_asc(read, "2001:db8::7", 0), 1);
  EXPECT_EQ(X509_check_ip_asc(read, "127.0.0.1", 0), 1);
  EXPECT_EQ(X509_check_host(read, "elsewhere.example", 0, 0, nullptr), 0);
  X509_free(read);
  // Killed between the two: the next start finishes it, and a lone file of somebody's stays untouched.
  fs::rename(certificate, certificate + ".new");
  EXPECT_EQ(ensure_certificate(certificate, key, {}).value_or("none"), made.value());
  fs::remove(key);
  const auto lone = ensure_certificate(certificate, key, {});
  ASSERT_FALSE(lone.ok());
  EXPECT_EQ(lone.error().code(), Errc::conflict);
  EXPECT_FALSE(fs::exists(key));
  EXPECT_FALSE(ensure_certificate(folder / "c2", folder / "k2", {"two words"}).ok());
  EXPECT_FALSE(fs::exists(folder / "c2") || fs::exists(folder / "k2"));
}

TEST(HttpTarget, HasOneSpellingForEachPath) {
  const auto path = [](std::string_view sent) {
    const auto target = parse_target(sent);
    return target ? target->path : std::string("refused");
  };
  EXPECT_EQ(path("/"), "/");
  EXPECT_EQ(path("//a///b/./c/"), "/a/b/c");
  EXPECT_EQ(path("/%61%62?x"), "/ab");
  EXPECT_EQ(path("/%252e%252e/a"), "/%2e%2e/a");
  EXPECT_EQ(path("/caf%C3%A9"), "/caf\xC3\xA9");
  EXPECT_EQ(path("https://host?x"), "/");
  for (const std::string_view sent :
       {"",        "a",          "/..",           "/a/../b", "/%2e%2e/",  "/.%2E", "/a%2fb", "/a%5cb",
        "/a\\b",   "/a%00b",     "/a%0a",         "/%",      "/%4",       "/%zz",  "/#a",    "/\xC3\xA9",
        "/%C0%AF", "/%ED%A0%80", "/%F5%80%80%80", "/%C3",    "http:///a", "*a",    "/a b",   "/a\tb",
        "/?a=%00", "/?%ff"}) {
    EXPECT_EQ(path(sent), "refused") << sent;
  }
  const auto asked = parse_target("/a?x=1&&y&x=%26+%2B&=z");
  ASSERT_TRUE(asked);
  const std::vector<std::pair<std::string, std::string>> expected = {
      {"x", "1"}, {"y", ""}, {"x", "& +"}, {"", "z"}};
  EXPECT_EQ(asked->query, expected);
  std::string many = "/?";
  for (int i = 0; i < 300; ++i) many += "a&";
  EXPECT_EQ(path(many), "refused");
}

}  // namespace
}  // namespace bulkhead::http
