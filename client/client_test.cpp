// Against a real server: daemon/http over TLS and a Unix socket.
#include "client/client.hpp"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "base/fd.hpp"
#include "daemon/http/http.hpp"

namespace bulkhead::client {
namespace {

namespace fs = std::filesystem;
using namespace std::chrono_literals;

struct Served : ::testing::Test {
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "client.XXXXXX").string();
    folder = ::mkdtemp(name.data());
    ::setenv("HOME", folder.c_str(), 1);
    for (const char* one :
         {"XDG_CONFIG_HOME", "BULKHEAD_URL", "BULKHEAD_TOKEN", "BULKHEAD_FINGERPRINT", "BULKHEAD_CA"})
      ::unsetenv(one);
    auto made = http::ensure_certificate(folder / "c.pem", folder / "k.pem", {"127.0.0.1"});
    ASSERT_TRUE(made.ok());
    fingerprint = *made;
    auto bound = http::Server::bind(
        {.listen = http::Listen{.address = "127.0.0.1", .port = 0},
         .tls = http::Tls{.certificate_file = folder / "c.pem", .key_file = folder / "k.pem"},
         .socket = folder / "s"},
        [](const http::Request& request, const std::shared_ptr<http::Reply>& reply) {
          answer(request, reply);
        });
    ASSERT_TRUE(bound.ok()) << bound.error().message();
    server = std::move(*bound);
    thread = std::thread([this] { server->run(); });
  }
  void TearDown() override {
    if (server) server->stop(0ms);
    if (thread.joinable()) thread.join();
    fs::remove_all(folder);
  }
  static void answer(const http::Request& request, const std::shared_ptr<http::Reply>& reply) {
    if (request.path == "/events") {
      const auto stream = reply->stream();
      const auto from = request.header("last-event-id");
      const std::string first = from.empty() ? "1" : std::string(from) + "0";
      stream->send(
          std::make_shared<const std::string>("id: " + first + "\ndata: {\"a\":\ndata: 1}\n\n: beat\n\n"));
      stream->send(std::make_shared<const std::string>("id: 99\r\ndata: {\"a\":2}\r\n\r\n"));
      if (from == "7") stream->close();
      return;
    }
    if (request.path == "/html") return reply->answer({.type = "text/html", .body = "<p>"});
    if (request.path == "/no")
      return reply->answer(
          {.status = 409,
           .type = "application/problem+json",
           .body =
               R"({"type":"x","title":"t","status":409,"code":"no-room","detail":"no slice","reasons":["all busy"],"ways":["at 14:05"]})"});
    if (request.path == "/never") {
      static std::shared_ptr<http::Reply> kept;
      kept = reply;
      return;
    }
    Json out{{"path", request.path},
             {"method", request.method},
             {"body", request.body},
             {"token", std::string(request.header("authorization"))}};
    reply->answer({.headers = {{"ETag", "\"3\""}}, .body = out.dump()});
  }
  Target tls() const {
    return {.url = "https://127.0.0.1:" + std::to_string(server->port()), .fingerprint = fingerprint};
  }
  Target local() const { return {.url = "unix:" + (folder / "s").string()}; }
  static std::unique_ptr<Client> open(Target target, std::chrono::milliseconds timeout = 10s) {
    auto out = Client::connect(std::move(target), timeout);
    EXPECT_TRUE(out.ok());
    return std::move(*out);
  }

  fs::path folder;
  std::string fingerprint;
  std::unique_ptr<http::Server> server;
  std::thread thread;
};

TEST_F(Served, ACallGoesOverTlsAndOverTheSocketAndComesBackWithItsTag) {
  for (auto target : {tls(), local()}) {
    target.token = "bh_x";
    const auto client = open(target);
    for (int round = 0; round < 3; ++round) {  // on one kept connection
      const auto got = client->call("POST", "/x/a%20b?c=d", Json{{"k", 1}}, {{"Idempotency-Key", "k"}});
      ASSERT_TRUE(got.ok()) << got.error().message();
      EXPECT_EQ(got->status, 200);
      EXPECT_EQ(got->etag, "\"3\"");
      EXPECT_EQ(got->body["path"], "/x/a b");
      EXPECT_EQ(got->body["body"], "{\"k\":1}");
      EXPECT_EQ(got->body["token"], "Bearer bh_x");
    }
  }
  EXPECT_EQ(server->counts().connections, 2U);
}

TEST_F(Served, ACertificateThatNobodyKnownSignedIsRefusedAndAPinnedOneTaken) {
  auto target = tls();
  target.fingerprint.clear();
  target.token = "bh_secret";
  const auto got = open(target)->call("GET", "/x", std::nullopt);
  ASSERT_FALSE(got.ok());
  EXPECT_EQ(got.error().code(), Errc::permission);
  EXPECT_NE(got.error().hint().find("bulkhead login"), std::string::npos);
  const auto shown = fingerprint_of(target);
  ASSERT_TRUE(shown.ok());
  EXPECT_EQ(*shown, fingerprint);
  target.ca_file = folder / "c.pem";
  EXPECT_TRUE(open(target)->call("GET", "/x", std::nullopt).ok()) << "signed by the authority that was named";
}

TEST_F(Served, AnotherCertificateThanThePinnedOneGetsNoToken) {
  auto target = tls();
  target.token = "bh_secret";
  target.fingerprint[0] = target.fingerprint[0] == '0' ? '1' : '0';
  const auto got = open(target)->call("GET", "/x", std::nullopt);
  ASSERT_FALSE(got.ok());
  EXPECT_EQ(got.error().code(), Errc::permission);
  EXPECT_EQ(got.error().message().find("bh_secret"), std::string::npos);
  EXPECT_EQ(server->counts().requests, 0U);
}

TEST_F(Served, AProblemIsAnAnswerAndItsErrorHasReasonsAndWays) {
  const auto got = open(local())->call("GET", "/no", std::nullopt);
  ASSERT_TRUE(got.ok());
  EXPECT_EQ(got->status, 409);
  const auto error = problem_error(*got);
  EXPECT_EQ(error.code(), Errc::no_capacity);
  EXPECT_EQ(error.message(), "no slice\n  all busy");
  EXPECT_EQ(error.hint(), "at 14:05");
}

TEST_F(Served, WhatIsNotOursIsSaidToBeSo) {
  const auto got = open(local())->call("GET", "/html", std::nullopt);
  ASSERT_FALSE(got.ok());
  EXPECT_EQ(got.error().code(), Errc::corrupt);
}

TEST_F(Served, AnAnswerThatNeverComesIsWaitedForNoLongerThanSaid) {
  const auto got = open(local(), 100ms)->call("GET", "/never", std::nullopt);
  ASSERT_FALSE(got.ok());
  EXPECT_EQ(got.error().code(), Errc::timeout);
}

TEST_F(Served, AStreamIsFollowedFromAnEventOnUntilItIsEnough) {
  for (const auto& target : {tls(), local()}) {
    std::vector<std::pair<std::int64_t, Json>> seen;
    const auto done = open(target)->follow("/events", 4, [&](std::int64_t id, const Json& event) {
      if (id != 0) seen.emplace_back(id, event);
      return seen.size() < 2;
    });
    ASSERT_TRUE(done.ok()) << done.error().message();
    ASSERT_EQ(seen.size(), 2U);
    EXPECT_EQ(seen[0].first, 40);
    EXPECT_EQ(seen[0].second["a"], 1);
    EXPECT_EQ(seen[1].first, 99);
  }
}

TEST_F(Served, AStreamThatEndsSaysComeBackAndOneThatIsRefusedSaysWhy) {
  const auto ended = open(local())->follow("/events", 7, [](std::int64_t, const Json&) { return true; });
  ASSERT_FALSE(ended.ok());
  EXPECT_EQ(ended.error().code(), Errc::unavailable);
  const auto refused = open(local())->follow("/no", -1, [](std::int64_t, const Json&) { return true; });
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code(), Errc::no_capacity);
}

TEST_F(Served, NothingListensThereSaysWhatToStart) {
  const auto got = open({.url = "unix:" + (folder / "none").string()})->call("GET", "/x", std::nullopt);
  ASSERT_FALSE(got.ok());
  EXPECT_EQ(got.error().code(), Errc::unavailable);
  EXPECT_NE(got.error().hint().find("bulkhead serve"), std::string::npos);
}

TEST_F(Served, TheLoginOfOneServerGoesToNoOther) {
  ASSERT_TRUE(save_login({.url = "https://a.example:443", .token = "bh_a", .fingerprint = fingerprint}).ok());
  struct ::stat seen {};
  ASSERT_EQ(::stat(login_file().c_str(), &seen), 0);
  EXPECT_EQ(seen.st_mode & 0777U, 0600U);
  const auto usual = target(std::nullopt);
  ASSERT_TRUE(usual.ok());
  EXPECT_EQ(usual->url, "https://a.example:443");
  EXPECT_EQ(usual->token, "bh_a");
  EXPECT_EQ(target("https://A.example/")->token, "bh_a");
  EXPECT_EQ(target("https://b.example")->token, "");
  EXPECT_EQ(target("https://b.example")->fingerprint, "");
  ::chmod(login_file().c_str(), 0644);
  EXPECT_EQ(target(std::nullopt).error().code(), Errc::permission) << "others could read the token";
  EXPECT_TRUE(*forget_login());
  EXPECT_FALSE(*forget_login());
  EXPECT_EQ(target(std::nullopt)->url, "unix:/run/bulkhead/api.sock");
}

TEST(Client, AddressesAreTakenApartOrRefused) {
  EXPECT_EQ(*parse_url("https://Gpu7.example/"), "https://gpu7.example:443");
  EXPECT_EQ(*parse_url("https://[::1]:8443"), "https://[::1]:8443");
  for (const char* bad :
       {"", "gpu7", "http://gpu7", "https://", "https://a:0", "https://a:70000", "https://u@a", "https://a/b",
        "https://a b", "unix:", "unix:rel", "https://[zz]", "https://a\r\nX: y"})
    EXPECT_FALSE(parse_url(bad).ok()) << bad;
  EXPECT_EQ(segment("a/../b c"), "a%2F..%2Fb%20c");
  EXPECT_EQ(segment(".."), "%2E%2E");
}

// A server that is a stranger: what it sends without end or sense is bounded.
TEST(Client, AHostileServerIsNotReadWithoutEnd) {
  std::string name = (fs::temp_directory_path() / "client.XXXXXX").string();
  const fs::path folder = ::mkdtemp(name.data());
  UniqueFd listening(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un to{};
  to.sun_family = AF_UNIX;
  const auto path = (folder / "s").string();
  std::memcpy(to.sun_path, path.c_str(), path.size() + 1);
  ASSERT_EQ(::bind(listening.get(), reinterpret_cast<sockaddr*>(&to), sizeof to), 0);
  ASSERT_EQ(::listen(listening.get(), 8), 0);
  const std::string answers[] = {
      "HTTP/1.1 200 OK\r\nX: " + std::string(100'000, 'x'),       // a header without end
      "HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n",  // a body too large
      "SSH-2.0-OpenSSH\r\n",                                      // another protocol
      "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",  // ends early
      "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 200\r\n\r\n" +
          std::string(200, '['),
      "",
  };
  std::thread server([&] {
    for (const auto& answer : answers) {
      UniqueFd one(::accept(listening.get(), nullptr, nullptr));
      std::array<char, 4096> request{};
      (void)!::read(one.get(), request.data(), request.size());
      (void)!::send(one.get(), answer.data(), answer.size(), MSG_NOSIGNAL);
    }
  });
  auto client = Client::connect({.url = "unix:" + path}, 10s);
  ASSERT_TRUE(client.ok());
  for (const auto& answer : answers)
    EXPECT_FALSE((*client)->call("POST", "/x", Json::object()).ok()) << answer.substr(0, 60);
  server.join();
  fs::remove_all(folder);
}

}  // namespace
}  // namespace bulkhead::client
