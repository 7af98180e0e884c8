// A client of the API for bench/api.py: many connections over TLS 1.3 in one thread, so that what is measured
// is the daemon and not an interpreter. Speaks the wire alone; shares no code with the daemon.
//
//   api_load watch ADDRESS PORT TOKENS N ROUNDS METHOD PATH BODY   N watchers, then ROUNDS changes, one at a
//   time api_load cycle ADDRESS PORT TOKENS N SECONDS BODY              N connections create and release
//   leases api_load get ADDRESS PORT TOKENS N SECONDS RATE PATH           RATE requests a second over N
//   connections
//
// TOKENS: a file, one bearer token a line; connections take them in turn. Connections come from 127.0.0.2 on,
// at most 100 from one address. Prints one JSON object.
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/json.hpp"

namespace {

using namespace bulkhead;
using Clock = std::chrono::steady_clock;
double ms_since(Clock::time_point from) {
  return std::chrono::duration<double, std::milli>(Clock::now() - from).count();
}

[[noreturn]] void die(const std::string& what) {
  std::fprintf(stderr, "api_load: %s\n", what.c_str());
  std::exit(1);
}

struct Free {
  void operator()(SSL* ssl) const { SSL_free(ssl); }
};

struct Connection {
  std::size_t index = 0;
  int fd = -1;
  std::unique_ptr<SSL, Free> ssl = {};
  bool shaken = false, stream = false;
  std::string out = {}, in = {};
  std::function<void(int status, std::string_view body)> answered = {};  // of a request
  std::function<void()> heard = {};                                      // of a stream: bytes came
};

class Loop {
 public:
  Loop(std::string address, int port, std::vector<std::string> tokens)
      : address_(std::move(address)),
        port_(port),
        tokens_(std::move(tokens)),
        context_(SSL_CTX_new(TLS_client_method())) {
    SSL_CTX_set_min_proto_version(context_, TLS1_3_VERSION);
    SSL_CTX_set_mode(context_, SSL_MODE_RELEASE_BUFFERS);
    epoll_ = ::epoll_create1(EPOLL_CLOEXEC);
  }
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;
  ~Loop() { SSL_CTX_free(context_); }

  Connection& add(std::size_t index) {
    auto& made = connections_.emplace_back(std::make_unique<Connection>());
    made->index = index;
    open(*made);
    return *made;
  }

  void ask(Connection& c, std::string_view method, std::string_view path, std::string_view body,
           std::string_view header = {}) {
    c.out += std::string(method) + " " + std::string(path) +
             " HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + tokens_[c.index % tokens_.size()] +
             "\r\n";
    if (!body.empty())
      c.out += "Content-Type: application/json\r\nContent-Length: " + std::to_string(body.size()) + "\r\n";
    c.out += std::string(header) + "\r\n" + std::string(body);
    step(c);
  }

  void turn(int timeout_ms) {
    epoll_event events[256];
    const int n = ::epoll_wait(epoll_, events, 256, timeout_ms);
    for (int i = 0; i < n; ++i) step(*static_cast<Connection*>(events[i].data.ptr));
  }

  std::size_t reconnects = 0;

 private:
  void open(Connection& c) {
    c.fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in from = {}, to = {};
    from.sin_family = to.sin_family = AF_INET;
    // All of 127/8 is this host.
    from.sin_addr.s_addr = htonl(0x7f000002U + static_cast<std::uint32_t>(c.index / 100));
    const int one = 1;
    ::setsockopt(c.fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    if (::bind(c.fd, reinterpret_cast<const sockaddr*>(&from), sizeof from) != 0) die("bind");
    to.sin_port = htons(static_cast<std::uint16_t>(port_));
    ::inet_pton(AF_INET, address_.c_str(), &to.sin_addr);
    if (::connect(c.fd, reinterpret_cast<const sockaddr*>(&to), sizeof to) != 0)
      die("connect: " + std::string(std::strerror(errno)));
    ::setsockopt(c.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    c.ssl.reset(SSL_new(context_));
    SSL_set_fd(c.ssl.get(), c.fd);
    if (SSL_connect(c.ssl.get()) != 1)
      die("TLS handshake of connection " + std::to_string(c.index) + " failed");
    ::fcntl(c.fd, F_SETFL, ::fcntl(c.fd, F_GETFL) | O_NONBLOCK);
    c.in.clear();
    epoll_event event = {};
    event.events = EPOLLIN;
    event.data.ptr = &c;
    ::epoll_ctl(epoll_, EPOLL_CTL_ADD, c.fd, &event);
  }

  void close(Connection& c) {
    c.ssl.reset();
    ::close(c.fd);
    c.fd = -1;
  }

  void step(Connection& c) {
    while (!c.out.empty()) {
      const int n = SSL_write(c.ssl.get(), c.out.data(), static_cast<int>(c.out.size()));
      if (n <= 0) break;
      c.out.erase(0, static_cast<std::size_t>(n));
    }
    char bytes[16384];
    for (;;) {
      const int n = SSL_read(c.ssl.get(), bytes, sizeof bytes);
      if (n > 0) {
        c.in.append(bytes, static_cast<std::size_t>(n));
        if (n < static_cast<int>(sizeof bytes) && SSL_pending(c.ssl.get()) == 0) break;
        continue;
      }
      const int why = SSL_get_error(c.ssl.get(), n);
      if (why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE) break;
      if (c.stream) die("a stream ended: " + c.in.substr(0, 300));
      if (!c.in.empty() || c.answered)
        die("connection " + std::to_string(c.index) + " ended with a request under way");
      return;
    }
    if (c.stream) {
      if (!c.in.empty()) c.heard();
      return;
    }
    for (;;) {
      const auto end = c.in.find("\r\n\r\n");
      if (end == std::string::npos) return;
      const std::string_view head = std::string_view(c.in).substr(0, end);
      const auto length = head.find("\r\nContent-Length: ");
      const std::size_t size = length == std::string_view::npos
                                   ? 0
                                   : static_cast<std::size_t>(std::atoll(head.data() + length + 18));
      if (c.in.size() < end + 4 + size) return;
      const int status = std::atoi(c.in.c_str() + 9);
      const bool over = head.find("\r\nConnection: close") != std::string_view::npos;
      const std::string body = c.in.substr(end + 4, size);
      c.in.erase(0, end + 4 + size);
      if (over) {
        ++reconnects;
        close(c);
        open(c);
      }
      auto then = std::exchange(c.answered, nullptr);
      if (!then) die("an answer that nobody waits for");
      then(status, body);
    }
  }

  const std::string address_;
  const int port_;
  const std::vector<std::string> tokens_;
  SSL_CTX* context_;
  int epoll_ = -1;
  std::vector<std::unique_ptr<Connection>> connections_;
};

double percentile(std::vector<double>& of, double part) {
  if (of.empty()) return 0;
  std::sort(of.begin(), of.end());
  return of[std::min(of.size() - 1, static_cast<std::size_t>(part * static_cast<double>(of.size())))];
}

Json times(std::vector<double>& ms) {
  return {{"n", ms.size()},
          {"p50", percentile(ms, 0.5)},
          {"p99", percentile(ms, 0.99)},
          {"most", percentile(ms, 1)}};
}

// Rounds of: wait until all is quiet, make one change, note when each watcher has its event.
Json watch(Loop& loop, std::size_t watchers, int rounds, std::string_view method, std::string_view path,
           const std::string& body) {
  std::vector<Connection*> all;
  for (std::size_t i = 0; i < watchers; ++i) {
    Connection& c = loop.add(i);
    c.stream = true;
    c.heard = [] {};
    loop.ask(c, "GET", "/api/v1/events", "");
    all.push_back(&c);
    if (i % 50 == 49) loop.turn(0);
  }
  const auto opened = Clock::now();
  const auto is_open = [](const Connection* c) { return c->in.find("\r\n\r\n") != std::string::npos; };
  while (!std::all_of(all.begin(), all.end(), is_open)) {
    if (ms_since(opened) > 20'000) die("not every stream was opened");
    loop.turn(50);
  }
  for (const Connection* c : all)
    if (!c->in.starts_with("HTTP/1.1 200")) die("a watcher was refused: " + c->in.substr(0, 400));
  Connection& changer = loop.add(watchers);
  std::fprintf(stderr, "open\n");
  std::string word;
  // The parent measures the daemon's memory now, and says go on.
  char line[16];
  if (std::fgets(line, sizeof line, stdin) == nullptr) die("no word to go on");
  std::vector<double> acknowledged, first, last, each;
  for (int round = 0; round < rounds; ++round) {
    for (const auto quiet = Clock::now(); ms_since(quiet) < 300;) loop.turn(20);
    std::size_t have = 0;
    std::vector<double> at;
    const auto start = Clock::now();
    for (Connection* c : all) {
      c->in.clear();
      c->heard = [&have, &at, c, start, had = false]() mutable {
        if (had || c->in.find("data:") == std::string::npos || c->in.find("\n\n") == std::string::npos)
          return;
        had = true, ++have;
        at.push_back(ms_since(start));
      };
    }
    bool answered = false;
    changer.answered = [&](int status, std::string_view said) {
      if (status / 100 != 2) die("the change was refused: " + std::string(said));
      acknowledged.push_back(ms_since(start));
      answered = true;
    };
    std::string text = body;
    if (const auto mark = text.find("@ROUND"); mark != std::string::npos)
      text.replace(mark, 6, std::to_string(round));
    loop.ask(changer, method, path, text);
    while (have < watchers || !answered) {
      if (ms_since(start) > 10'000)
        die("after 10 s only " + std::to_string(have) + " watchers have the change");
      loop.turn(50);
    }
    first.push_back(*std::min_element(at.begin(), at.end()));
    last.push_back(*std::max_element(at.begin(), at.end()));
    each.insert(each.end(), at.begin(), at.end());
  }
  return {{"watchers", watchers},
          {"acknowledged_ms", times(acknowledged)},
          {"first_ms", times(first)},
          {"all_ms", times(last)},
          {"each_ms", times(each)}};
}

Json cycle(Loop& loop, std::size_t connections, double seconds, const std::string& body) {
  std::vector<double> creates, releases, pairs;
  std::size_t refused = 0, inactive = 0;
  std::string last_refusal;
  const auto start = Clock::now();
  struct One {
    Connection* c = nullptr;
    Clock::time_point begun = {}, asked = {};
    bool under_way = false;
    std::optional<Clock::time_point> again = {};  // who was refused comes back in a moment
  };
  std::vector<One> all(connections);
  bool stop = false;
  std::function<void(One&)> create = [&](One& one) {
    one.under_way = !stop;
    if (stop) return;
    one.begun = one.asked = Clock::now();
    one.c->answered = [&](int status, std::string_view said) {
      if (status != 201) {
        ++refused;
        last_refusal = said;
        if (status != 409 && status != 429 && status != 503) die("create: " + std::string(said));
        one.again = Clock::now() + std::chrono::milliseconds(5);
        return;
      }
      creates.push_back(ms_since(one.asked));
      const auto lease = parse_json(said);
      if (!lease.ok()) die("create answered no JSON");
      if (lease->value("state", "") != "active") ++inactive;
      one.asked = Clock::now();
      one.c->answered = [&](int ended, std::string_view told) {
        if (ended / 100 != 2) die("release: " + std::string(told));
        releases.push_back(ms_since(one.asked));
        pairs.push_back(ms_since(one.begun));
        create(one);
      };
      loop.ask(*one.c, "DELETE", "/api/v1/leases/" + std::to_string(lease->value("id", 0LL)), "");
    };
    loop.ask(*one.c, "POST", "/api/v1/leases", body);
  };
  for (std::size_t i = 0; i < connections; ++i) all[i].c = &loop.add(i);
  for (auto& one : all) create(one);
  const auto come_back = [&] {
    for (auto& one : all) {
      if (!one.again || Clock::now() < *one.again) continue;
      one.again.reset();
      create(one);
    }
  };
  while (ms_since(start) < seconds * 1000) {
    loop.turn(1);
    come_back();
  }
  const double took = ms_since(start) / 1000;
  const std::size_t done = pairs.size();
  stop = true;
  while (std::any_of(all.begin(), all.end(), [](const One& one) { return one.under_way; })) {
    loop.turn(1);
    come_back();
  }
  return {{"connections", connections},
          {"seconds", took},
          {"pairs", done},
          {"pairs_per_s", static_cast<double>(done) / took},
          {"refused", refused},
          {"not_active_in_answer", inactive},
          {"create_ms", times(creates)},
          {"release_ms", times(releases)},
          {"pair_ms", times(pairs)},
          {"last_refusal", last_refusal.substr(0, 300)}};
}

// At a pace, whatever the answers take.
Json get(Loop& loop, std::size_t connections, double seconds, double rate, const std::string& path) {
  std::vector<Connection*> idle;
  for (std::size_t i = 0; i < connections; ++i) idle.push_back(&loop.add(i));
  std::vector<double> took;
  std::size_t sent = 0, wrong = 0, late = 0;
  const auto start = Clock::now();
  while (ms_since(start) < seconds * 1000) {
    const auto due = static_cast<std::size_t>(ms_since(start) / 1000 * rate);
    while (sent < due) {
      if (idle.empty()) {
        ++late;
        break;
      }
      ++sent;
      Connection* c = idle.back();
      idle.pop_back();
      c->answered = [&, c, asked = Clock::now()](int status, std::string_view) {
        took.push_back(ms_since(asked));
        if (status != 200) ++wrong;
        idle.push_back(c);
      };
      loop.ask(*c, "GET", path, "");
    }
    loop.turn(2);
  }
  return {{"sent", sent}, {"not_200", wrong}, {"no_connection_free", late}, {"ms", times(took)}};
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  if (words.size() < 6) die("see the head of bench/api_load.cpp for what to type");
  rlimit files = {};
  ::getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &files);
  std::vector<std::string> tokens;
  std::ifstream file(words[3]);
  for (std::string line; std::getline(file, line);)
    if (!line.empty()) tokens.push_back(line);
  if (tokens.empty()) die("no tokens in " + words[3]);
  Loop loop(words[1], std::atoi(words[2].c_str()), std::move(tokens));
  const auto n = static_cast<std::size_t>(std::atoll(words[4].c_str()));
  Json out;
  if (words[0] == "watch" && words.size() == 9)
    out = watch(loop, n, std::atoi(words[5].c_str()), words[6], words[7], words[8]);
  else if (words[0] == "cycle" && words.size() == 7)
    out = cycle(loop, n, std::atof(words[5].c_str()), words[6]);
  else if (words[0] == "get" && words.size() == 8)
    out = get(loop, n, std::atof(words[5].c_str()), std::atof(words[6].c_str()), words[7]);
  else
    die("see the head of bench/api_load.cpp for what to type");
  out["reconnects"] = loop.reconnects;
  std::printf("%s\n", out.dump().c_str());
  return 0;
}
