// Sockets are driven by epoll and OpenSSL directly; Beast parses. Beast's own streams (Asio's ssl::stream)
// were not taken: four buffers of 17 KiB a connection are most of what a watcher may cost, and each answer
// would pass two of them. Here an idle connection holds no buffer, a request is parsed where it was
// decrypted, and an answer is one write.
#include "daemon/http/http.hpp"

#include <openssl/err.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <deque>
#include <exception>
#include <mutex>
#include <unordered_map>

#include <fmt/format.h>
#include <boost/beast/core/string.hpp>
#include <boost/beast/http/basic_parser.hpp>
#include <boost/beast/http/error.hpp>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/text.hpp"
#include "daemon/http/listen.hpp"
#include "daemon/http/target.hpp"
#include "daemon/http/tls.hpp"

namespace bulkhead::http {

std::string_view Request::header(std::string_view lower_name) const {
  for (const auto& [name, value] : headers) {
    if (name == lower_name) return value;
  }
  return {};
}

std::optional<std::string> Request::asked(std::string_view name) const {
  for (const auto& [key, value] : query) {
    if (key == name) return value;
  }
  return std::nullopt;
}

namespace {

namespace beast = boost::beast;

constexpr std::size_t piece = 16 << 10;       // what one TLS record holds, and one read takes
constexpr std::size_t kept_buffer = 1 << 20;  // of the shared buffer of answers
constexpr std::size_t headers_at_most = 100;
constexpr std::size_t chunk_line = 4 << 10;  // a chunk's size with its extensions; trailers
constexpr std::size_t discarded = 1 << 20;   // after an answer that refuses a body
constexpr std::int64_t linger_ms = 2000;
constexpr int events_at_once = 256, accepts_at_once = 64, reads_at_once = 8;
constexpr int stream_buffer = 64 << 10;         // of the kernel, for one stream
constexpr std::size_t watcher_talk = 64 << 10;  // bytes a watcher may send after its request

std::int64_t now_ms() { return static_cast<std::int64_t>(monotonic_ns() / 1'000'000); }

std::string_view title_of(int status) {
  switch (status) {
    case 200:
      return "OK";
    case 201:
      return "Created";
    case 202:
      return "Accepted";
    case 204:
      return "No Content";
    case 304:
      return "Not Modified";
    case 400:
      return "Bad Request";
    case 401:
      return "Unauthorized";
    case 403:
      return "Forbidden";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 406:
      return "Not Acceptable";
    case 408:
      return "Request Timeout";
    case 409:
      return "Conflict";
    case 410:
      return "Gone";
    case 412:
      return "Precondition Failed";
    case 413:
      return "Content Too Large";
    case 415:
      return "Unsupported Media Type";
    case 417:
      return "Expectation Failed";
    case 422:
      return "Unprocessable Content";
    case 428:
      return "Precondition Required";
    case 429:
      return "Too Many Requests";
    case 431:
      return "Request Header Fields Too Large";
    case 500:
      return "Internal Server Error";
    case 501:
      return "Not Implemented";
    case 503:
      return "Service Unavailable";
    case 505:
      return "HTTP Version Not Supported";
    default:
      return status < 300 ? "OK" : status < 400 ? "Redirect" : status < 500 ? "Refused" : "Failed";
  }
}

// `code` and `detail` are ours: nothing a stranger sent is ever said back.
Response problem(int status, std::string_view code, std::string_view detail) {
  std::vector<std::pair<std::string, std::string>> headers;
  if (status == 503) headers.emplace_back("Retry-After", "1");
  return {
      status, "application/problem+json", std::move(headers),
      fmt::format(
          R"({{"type":"https://bulkhead.dev/problems/{}","title":"{}","status":{},"code":"{}","detail":"{}"}})",
          code, title_of(status), status, code, detail)};
}

struct Refusal {
  int status = 0;
  std::string_view code = {}, detail = {};
};

bool same(std::string_view a, std::string_view lower_b) {
  return a.size() == lower_b.size() && std::equal(a.begin(), a.end(), lower_b.begin(), [](char x, char y) {
           return (x >= 'A' && x <= 'Z' ? static_cast<char>(x + 32) : x) == y;
         });
}

// Beast's parser writing straight into a Request, stricter than it where two readers of the same bytes could
// disagree on where a request ends or what it says.
class Parser final : public beast::http::basic_parser<true> {
 public:
  explicit Parser(const Limits& limits) : limits_(limits) {
    header_limit(static_cast<std::uint32_t>(limits.header));
    body_limit(limits.body);
    eager(true);
  }

  // How many of `bytes` were used; sets refusal() on a request that ends here.
  std::size_t take(std::string_view bytes) {
    input_ = bytes;
    beast::error_code failed;
    const std::size_t used = put({bytes.data(), bytes.size()}, failed);
    if (!failed || failed == beast::http::error::need_more) {
      const std::size_t left = bytes.size() - used;
      if (!is_done() && is_header_done() && left > chunk_line)
        refuse(400, "invalid", "A chunk's line is too long.");
      return used;
    }
    if (refusal_.status != 0) return used;
    using beast::http::error;
    if (failed == error::body_limit) {
      refuse(413, "too-large", "The body is longer than this server takes.");
    } else if (failed == error::header_limit) {
      refuse(431, "too-large", "The request line and headers are longer than this server takes.");
    } else if (failed == error::bad_version) {
      refuse(505, "invalid", "Only HTTP/1.1 and HTTP/1.0 are spoken here.");
    } else if (failed == error::bad_content_length || failed == error::multiple_content_length) {
      refuse(400, "invalid", "Content-Length is not one number, or not the only length.");
    } else if (failed == error::bad_transfer_encoding) {
      refuse(400, "invalid", "Transfer-Encoding is not just chunked, or not the only length.");
    } else {
      refuse(400, "invalid", "This is not an HTTP request.");
    }
    return used;
  }

  const Refusal& refusal() const { return refusal_; }
  int version() const { return version_; }
  bool expects() const { return expects_; }
  Request& request() { return request_; }
  std::size_t body_bytes() const { return request_.body.size(); }

 private:
  using string_view = beast::string_view;
  using error_code = beast::error_code;

  void refuse(int status, std::string_view code, std::string_view detail) {
    if (refusal_.status == 0) refusal_ = {status, code, detail};
  }
  void refuse(error_code& failed, int status, std::string_view code, std::string_view detail) {
    refuse(status, code, detail);
    failed = beast::http::error::bad_value;
  }

  void on_request_impl(beast::http::verb, string_view method, string_view target, int version,
                       error_code& failed) override {
    version_ = version;
    bytes_ += method.size() + target.size() + 12;
    if (bytes_ > limits_.header) return refuse(failed, 431, "too-large", "The request line is too long.");
    request_.method.assign(method.data(), method.size());
    request_.target.assign(target.data(), target.size());
  }

  // A value continued on the next line is read in two ways by the programs of this world.
  bool folded(std::string_view name, std::string_view value) const {
    const char* const end = input_.data() + input_.size();
    const char* at = name.data() + name.size() + 1;
    const auto skip = [&] {
      while (at < end && (*at == ' ' || *at == '\t')) ++at;
    };
    skip();
    if (!value.empty()) {
      if (value.data() != at) return true;  // the parser's own copy, or on a later line
      at += value.size();
      skip();
    }
    return end - at < 3 || at[0] != '\r' || at[1] != '\n' || at[2] == ' ' || at[2] == '\t';
  }

  void on_field_impl(beast::http::field known, string_view name_sent, string_view value_sent,
                     error_code& failed) override {
    const std::string_view name(name_sent.data(), name_sent.size()),
        value(value_sent.data(), value_sent.size());
    bytes_ += name.size() + value.size() + 4;
    if (bytes_ > limits_.header || ++fields_ > headers_at_most) {
      return refuse(failed, 431, "too-large", "The headers are longer or more than this server takes.");
    }
    if (headers_done_) return;  // trailers say nothing
    if (folded(name, value)) return refuse(failed, 400, "invalid", "A header is continued on a second line.");
    if (!valid_utf8(value)) return refuse(failed, 400, "invalid", "A header is not UTF-8.");
    using beast::http::field;
    int only_once = -1;
    switch (known) {
      case field::host:
        only_once = 0;
        break;
      case field::content_length:
        only_once = 1;
        if (value.find_first_not_of("0123456789") != std::string_view::npos) {
          return refuse(failed, 400, "invalid", "Content-Length is not one number.");
        }
        break;
      case field::transfer_encoding:
        only_once = 2;
        if (!same(value, "chunked")) {
          return refuse(failed, 400, "invalid", "The only Transfer-Encoding understood is chunked.");
        }
        if (version_ < 11) return refuse(failed, 400, "invalid", "HTTP/1.0 has no Transfer-Encoding.");
        break;
      case field::expect:
        only_once = 3;
        if (!same(value, "100-continue"))
          return refuse(failed, 417, "invalid", "Only 100-continue can be expected.");
        expects_ = version_ >= 11;
        break;
      case field::authorization:
        only_once = 4;
        break;
      case field::content_type:
        only_once = 5;
        break;
      case field::if_match:
        only_once = 6;
        break;
      default:
        if (known == field::unknown && same(name, "idempotency-key")) only_once = 7;
        if (known == field::unknown && same(name, "last-event-id")) only_once = 8;
        break;
    }
    if (only_once >= 0) {
      if ((seen_ & (1U << only_once)) != 0) {
        return refuse(failed, 400, "invalid", "A header that may be there once is there twice.");
      }
      seen_ |= 1U << only_once;
    }
    request_.headers.emplace_back(lower(name), value);
  }

  void on_header_impl(error_code& failed) override {
    headers_done_ = true;
    if (version_ == 11 && (seen_ & 1U) == 0) {
      refuse(failed, 400, "invalid", "HTTP/1.1 needs a Host header.");
    }
  }
  void on_body_init_impl(const boost::optional<std::uint64_t>&, error_code&) override {}
  std::size_t on_body_impl(string_view body, error_code&) override {
    request_.body.append(body.data(), body.size());
    return body.size();
  }
  void on_chunk_header_impl(std::uint64_t, string_view, error_code&) override {}
  std::size_t on_chunk_body_impl(std::uint64_t, string_view body, error_code&) override {
    request_.body.append(body.data(), body.size());
    return body.size();
  }
  void on_finish_impl(error_code&) override {}
  void on_response_impl(int, string_view, int, error_code&) override {}

  const Limits& limits_;
  std::string_view input_ = {};
  Request request_ = {};
  Refusal refusal_ = {};
  std::size_t bytes_ = 0, fields_ = 0;
  unsigned seen_ = 0;
  int version_ = 11;
  bool headers_done_ = false, expects_ = false;
};

class StreamEnd;

// The way into the loop from other threads. Outlives the server: a late answer finds it shut.
class Inbox {
 public:
  struct Answer {
    std::uint64_t connection = 0, serial = 0;
    Response response = {};
    std::shared_ptr<StreamEnd> stream = {};  // instead of a response
  };

  Inbox() : wake_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {}

  int descriptor() const { return wake_.get(); }
  void own() { owner_.store(::pthread_self(), std::memory_order_relaxed); }
  // Of the loop: answers to this connection are for immediate().
  void handling(std::uint64_t connection, std::uint64_t serial) { handling_ = {connection, serial}; }
  std::optional<Answer>& immediate() { return immediate_; }

  void answer(Answer answer) {
    if (here() && handling_.first == answer.connection && handling_.second == answer.serial) {
      immediate_ = std::move(answer);
      return;
    }
    const std::lock_guard lock(mutex_);
    if (shut_) return;
    answers_.push_back(std::move(answer));
    wake();
  }

  void flush(std::shared_ptr<StreamEnd> stream) {
    const std::lock_guard lock(mutex_);
    if (shut_) return;
    streams_.push_back(std::move(stream));
    wake();
  }

  // Safe in a signal handler.
  void knock() const {
    const std::uint64_t one = 1;
    const int before = errno;
    [[maybe_unused]] const auto n = ::write(wake_.get(), &one, sizeof one);
    errno = before;
  }

  void take(bool knocked, std::vector<Answer>& answers, std::vector<std::shared_ptr<StreamEnd>>& streams) {
    const std::lock_guard lock(mutex_);
    if (knocked) {
      std::uint64_t seen = 0;
      [[maybe_unused]] const auto n = ::read(wake_.get(), &seen, sizeof seen);
    }
    awake_ = false;
    answers.swap(answers_);
    streams.swap(streams_);
  }

  void shut() {
    std::vector<Answer> answers;
    std::vector<std::shared_ptr<StreamEnd>> streams;
    const std::lock_guard lock(mutex_);
    shut_ = true;
    answers.swap(answers_);
    streams.swap(streams_);
  }

 private:
  bool here() const { return ::pthread_equal(owner_.load(std::memory_order_relaxed), ::pthread_self()) != 0; }
  void wake() {
    if (awake_) return;
    awake_ = true;
    knock();
  }

  UniqueFd wake_;
  std::atomic<pthread_t> owner_{};
  std::pair<std::uint64_t, std::uint64_t> handling_{};
  std::optional<Answer> immediate_ = {};
  std::mutex mutex_;
  bool awake_ = false, shut_ = false;
  std::vector<Answer> answers_;
  std::vector<std::shared_ptr<StreamEnd>> streams_;
};

// What writers put in and the loop takes out.
class StreamEnd final : public Stream, public std::enable_shared_from_this<StreamEnd> {
 public:
  StreamEnd(std::shared_ptr<Inbox> inbox, std::uint64_t id, std::size_t limit)
      : connection(id), inbox_(std::move(inbox)), limit_(limit) {}

  bool send(std::shared_ptr<const std::string> frame) override {
    bool tell = false, taken = false;
    {
      const std::lock_guard lock(mutex_);
      if (over_) return false;
      if (frames_.size() >= limit_) {
        over_ = cut_ = true;
        frames_.clear();
      } else {
        frames_.push_back(std::move(frame));
        taken = true;
      }
      tell = !std::exchange(told_, true);
    }
    if (tell) inbox_->flush(shared_from_this());
    return taken;
  }

  void close() override {
    {
      const std::lock_guard lock(mutex_);
      if (over_) return;
      over_ = true;
      if (std::exchange(told_, true)) return;
    }
    inbox_->flush(shared_from_this());
  }

  // The loop's side. Appends frames to `out` until it holds a piece.
  struct Taken {
    bool last = false;  // nothing comes after this
    bool cut = false;   // the reader was too slow: what it has not taken is dropped
  };
  Taken take(std::string& out) {
    const std::lock_guard lock(mutex_);
    told_ = false;
    while (!frames_.empty() && out.size() < piece) {
      out += *frames_.front();
      frames_.pop_front();
    }
    return {over_ && frames_.empty(), cut_};
  }
  void gone() {
    const std::lock_guard lock(mutex_);
    over_ = true;
    frames_.clear();
  }

  const std::uint64_t connection;

 private:
  const std::shared_ptr<Inbox> inbox_;
  const std::size_t limit_;
  std::mutex mutex_;
  std::deque<std::shared_ptr<const std::string>> frames_;
  bool over_ = false, cut_ = false, told_ = false;
};

class OneReply final : public Reply {
 public:
  OneReply(std::shared_ptr<Inbox> inbox, std::uint64_t connection, std::uint64_t serial, std::size_t frames)
      : inbox_(std::move(inbox)), connection_(connection), serial_(serial), frames_(frames) {}
  OneReply(const OneReply&) = delete;
  OneReply& operator=(const OneReply&) = delete;
  ~OneReply() override {
    if (given_.exchange(true)) return;
    try {
      inbox_->answer({connection_, serial_, problem(500, "internal", "The request got no answer."), {}});
    } catch (...) {  // no memory: the connection's end of patience closes it
    }
  }

  void answer(Response response) override {
    if (!given_.exchange(true)) inbox_->answer({connection_, serial_, std::move(response), {}});
  }
  std::shared_ptr<Stream> stream() override {
    auto end = std::make_shared<StreamEnd>(inbox_, connection_, frames_);
    if (given_.exchange(true)) {
      end->gone();
    } else {
      inbox_->answer({connection_, serial_, {}, end});
    }
    return end;
  }

 private:
  const std::shared_ptr<Inbox> inbox_;
  const std::uint64_t connection_, serial_;
  const std::size_t frames_;
  std::atomic<bool> given_ = false;
};

enum class Phase : std::uint8_t { handshake, reading, waiting, writing, streaming, lingering, closed };

struct Connection {
  UniqueFd fd = {};
  SslPointer ssl = {};
  std::uint64_t id = 0;      // slot and generation
  std::uint64_t serial = 0;  // of the request under way
  Phase phase = Phase::reading;
  bool keep = true;  // after this answer
  bool head = false, continued = false, queued = false;
  bool old = false;    // HTTP/1.0
  bool blank = false;  // an empty line before a request was skipped
  std::uint32_t interest = 0;
  std::size_t requests = 0, talked = 0;
  std::size_t held = 0;  // bytes of a body counted in Loop::bodies_
  std::int64_t deadline = 0, overall = 0, heartbeat = 0;
  std::string in = {};   // bytes of the next request
  std::string out = {};  // what the kernel did not take
  std::size_t out_at = 0;
  Peer peer = {};
  std::string counted = {};  // the name it is counted by
  std::optional<Parser> parser = {};
  std::shared_ptr<StreamEnd> stream = {};
};

enum class Io : std::uint8_t { done, later, over };

class Loop final : public Server {
 public:
  Loop(Settings settings, Handler handler)
      : settings_(std::move(settings)), limits_(settings_.limits), handler_(std::move(handler)) {}
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;
  ~Loop() override {
    for (auto& slot : slots_) {
      if (slot.connection && slot.connection->stream) slot.connection->stream->gone();
    }
    inbox_->shut();
    for (const auto& listener : listeners_) remove_socket(listener);
  }

  Status open();

  std::uint16_t port() const override { return port_; }
  void run() override;
  void stop(std::chrono::milliseconds grace) override {
    grace_.store(std::max<std::int64_t>(grace.count(), 0), std::memory_order_relaxed);
    stopping_.store(true, std::memory_order_release);
    inbox_->knock();
  }
  Status reload() override {
    if (!settings_.tls) return ok_status();
    BH_TRY(auto fresh, make_context(*settings_.tls));
    const std::lock_guard lock(context_mutex_);
    context_ = std::move(fresh);
    return ok_status();
  }
  Counts counts() const override;
  void every(std::chrono::milliseconds period, std::function<void()> what) override {
    const std::int64_t each = std::max<std::int64_t>(period.count(), 1);
    jobs_.push_back({each, now_ms() + each, std::move(what)});
  }

 private:
  struct Slot {
    std::unique_ptr<Connection> connection = {};
    std::uint32_t generation = 0;
  };
  struct Job {
    std::int64_t period = 0, next = 0;
    std::function<void()> what = {};
  };

  void accept_from(std::size_t listener);
  void admit(UniqueFd fd, const Listener& listener, const sockaddr_storage& from);
  void on_event(Connection& c, std::uint32_t events);
  void shake_hands(Connection& c);
  void read_more(Connection& c, bool leftover);
  void take(Connection& c, std::string_view bytes);
  std::size_t parse(Connection& c, std::string_view bytes);
  void dispatch(Connection& c);
  void deliver(Connection& c, Inbox::Answer answer);
  void send_answer(Connection& c, Response response);
  void refuse(Connection& c, const Refusal& refusal);
  void start_stream(Connection& c, std::shared_ptr<StreamEnd> stream);
  void flush_stream(Connection& c);
  void talk(Connection& c);
  void write_out(Connection& c, std::string_view bytes);
  void continue_out(Connection& c);
  void answered(Connection& c);
  void finish(Connection& c);
  void discard(Connection& c);
  void close(Connection& c);
  void tick();
  void drain();
  void expire(Connection& c);
  void take_inbox(bool knocked);
  Io receive(Connection& c, std::size_t& got);
  Io transmit(Connection& c, std::string_view bytes, std::size_t& sent);
  void interest(Connection& c, std::uint32_t events);
  void again(Connection& c) {
    if (!std::exchange(c.queued, true)) again_.push_back(c.id);
  }
  Connection* find(std::uint64_t id) {
    const std::size_t slot = id & 0xffffffff;
    if (slot >= slots_.size() || !slots_[slot].connection) return nullptr;
    Connection* c = slots_[slot].connection.get();
    return c->id == id && c->phase != Phase::closed ? c : nullptr;
  }
  const std::string& date();
  // Whatever a step throws (no memory, mostly) costs that one connection.
  template <class Step>
  void guarded(Connection& c, Step step) {
    try {
      step();
    } catch (...) {
      close(c);
    }
  }

  const Settings settings_;
  const Limits limits_;
  const Handler handler_;
  const std::shared_ptr<Inbox> inbox_ = std::make_shared<Inbox>();
  std::vector<Listener> listeners_;
  std::uint16_t port_ = 0;
  UniqueFd epoll_, spare_;
  mutable std::mutex context_mutex_;
  SslContext context_;
  std::vector<Slot> slots_;
  std::vector<std::uint32_t> free_;
  std::vector<std::uint64_t> dead_, again_, again_now_;
  std::unordered_map<std::string, std::size_t> of_one_;
  std::size_t open_connections_ = 0, bodies_ = 0;
  std::vector<Job> jobs_;
  std::vector<Inbox::Answer> answers_;
  std::vector<std::shared_ptr<StreamEnd>> flushes_;
  std::int64_t now_ = 0, tick_ms_ = 1000, next_tick_ = 0, drain_until_ = 0;
  bool draining_ = false;
  std::time_t date_at_ = 0;
  std::string date_, scratch_ = std::string(piece, '\0'), out_, frames_;
  std::atomic<bool> stopping_ = false;
  std::atomic<std::int64_t> grace_ = 0;
  std::atomic<std::uint64_t> accepted_ = 0, open_ = 0, requests_ = 0, refused_ = 0, timed_out_ = 0,
                             streams_ = 0;
  std::array<std::atomic<std::uint64_t>, 600> by_status_{};
};

Status Loop::open() {
  if (inbox_->descriptor() < 0) return errno_error("eventfd", errno);
  // A descriptor a connection and some for the rest of the program, as far as the host lets us.
  rlimit files = {};
  if (::getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < limits_.connections + 256) {
    files.rlim_cur = std::min<rlim_t>(files.rlim_max, limits_.connections + 256);
    ::setrlimit(RLIMIT_NOFILE, &files);
  }
  // First all that may fail without a trace in the world.
  if (settings_.tls) {
    BH_TRY(context_, make_context(*settings_.tls));
  }
  for (const int fd : settings_.inherited) {
    BH_TRY(auto listener, adopt(fd, limits_));
    listeners_.push_back(std::move(listener));
  }
  if (settings_.listen) {
    BH_TRY(auto listener, listen_tcp(*settings_.listen, limits_));
    listeners_.push_back(std::move(listener));
  }
  for (const auto& listener : listeners_) {
    if (listener.local) continue;
    if (!settings_.tls && !listener.loopback) {
      return Error(Errc::invalid,
                   "plain HTTP is served on loopback only: tokens would cross the network readable",
                   "give a certificate and key, or listen on 127.0.0.1");
    }
    BH_TRY(port_, port_of(listener.fd.get()));
  }
  if (!settings_.socket.empty()) {
    BH_TRY(auto listener, listen_local(settings_.socket, settings_.socket_mode));
    listeners_.push_back(std::move(listener));
  }
  if (listeners_.empty())
    return Error(Errc::invalid, "nothing to listen on", "give an address or a socket path");

  epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  spare_.reset(::eventfd(0, EFD_CLOEXEC));
  if (!epoll_ || !spare_) return errno_error("epoll", errno);
  epoll_event event = {};
  event.events = EPOLLIN;
  event.data.u64 = UINT64_MAX;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, inbox_->descriptor(), &event) != 0)
    return errno_error("epoll", errno);
  for (std::size_t i = 0; i < listeners_.size(); ++i) {
    event.data.u64 = UINT64_MAX - 1 - i;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, listeners_[i].fd.get(), &event) != 0) {
      return errno_error("epoll", errno);
    }
  }
  // One coarse clock for all bounds: a quarter of the shortest, at most a second.
  std::int64_t shortest = 4000;
  for (const auto bound :
       {limits_.header_time, limits_.body_time, limits_.idle_time, limits_.write_time, limits_.heartbeat}) {
    shortest = std::min<std::int64_t>(shortest, bound.count());
  }
  tick_ms_ = std::clamp<std::int64_t>(shortest / 4, 10, 1000);
  return ok_status();
}

void Loop::run() {
  inbox_->own();
  std::array<epoll_event, events_at_once> events;
  now_ = now_ms();
  next_tick_ = now_ + tick_ms_;
  while (!draining_ || (open_connections_ > 0 && now_ < drain_until_)) {
    std::int64_t until = next_tick_;
    for (const auto& job : jobs_) until = std::min(until, job.next);
    if (draining_) until = std::min(until, drain_until_);
    const std::int64_t wait = again_.empty() ? std::clamp<std::int64_t>(until - now_, 0, 1000) : 0;
    const int n = ::epoll_wait(epoll_.get(), events.data(), events_at_once, static_cast<int>(wait));
    now_ = now_ms();
    bool knocked = false;
    for (int i = 0; i < n; ++i) {
      const auto& event = events[static_cast<std::size_t>(i)];
      if (event.data.u64 == UINT64_MAX) {
        knocked = true;
      } else if (event.data.u64 >= UINT64_MAX - 1 - listeners_.size()) {
        accept_from(static_cast<std::size_t>(UINT64_MAX - 1 - event.data.u64));
      } else if (Connection* c = find(event.data.u64)) {
        guarded(*c, [&] { on_event(*c, event.events); });
      }
    }
    again_now_.swap(again_);
    for (const auto id : again_now_) {
      if (Connection* c = find(id)) {
        c->queued = false;
        guarded(*c, [&] { read_more(*c, true); });
      }
    }
    again_now_.clear();
    // Handlers put answers and frames in while they run here, without a knock of their own being seen yet.
    if (n > 0) take_inbox(knocked);
    if (stopping_.load(std::memory_order_acquire) && !draining_) drain();
    if (now_ >= next_tick_) {
      next_tick_ = now_ + tick_ms_;
      tick();
    }
    for (auto& job : jobs_) {
      if (now_ < job.next) continue;
      job.next = now_ + job.period;
      try {
        job.what();
      } catch (...) {  // theirs; the next round comes
      }
    }
    for (const auto id : dead_) {
      auto& slot = slots_[id & 0xffffffff];
      slot.connection.reset();
      free_.push_back(static_cast<std::uint32_t>(id & 0xffffffff));
    }
    dead_.clear();
  }
  for (auto& slot : slots_) {
    if (slot.connection && slot.connection->phase != Phase::closed) close(*slot.connection);
  }
}

void Loop::accept_from(std::size_t index) {
  if (index >= listeners_.size() || draining_) return;
  const Listener& listener = listeners_[index];
  for (int i = 0; i < accepts_at_once; ++i) {
    sockaddr_storage from = {};
    socklen_t size = sizeof from;
    UniqueFd fd(::accept4(listener.fd.get(), reinterpret_cast<sockaddr*>(&from), &size,
                          SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!fd) {
      if ((errno == EMFILE || errno == ENFILE) && spare_) {
        // No descriptor left: turn the caller away instead of leaving it, and epoll, waiting for ever.
        spare_.reset();
        fd.reset(::accept4(listener.fd.get(), nullptr, nullptr, SOCK_CLOEXEC));
        fd.reset();
        spare_.reset(::eventfd(0, EFD_CLOEXEC));
        ++refused_;
        continue;
      }
      return;  // taken back by the caller, or nothing there
    }
    ++accepted_;
    try {
      admit(std::move(fd), listener, from);
    } catch (...) {
      ++refused_;
    }
  }
}

void Loop::admit(UniqueFd fd, const Listener& listener, const sockaddr_storage& from) {
  auto made = std::make_unique<Connection>();
  Connection& c = *made;
  if (listener.local) {
    ucred credentials = {};
    socklen_t size = sizeof credentials;
    if (::getsockopt(fd.get(), SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) {
      ++refused_;
      return;
    }
    c.peer.uid = credentials.uid;
    c.peer.from = fmt::format("uid {} pid {}", credentials.uid, credentials.pid);
    c.peer.address = fmt::format("uid {}", credentials.uid);
  } else {
    Caller caller = name_caller(from);
    c.peer.from = std::move(caller.from);
    c.peer.address = std::move(caller.address);
    c.peer.tls = settings_.tls.has_value();
  }
  const auto others = of_one_.find(c.peer.address);
  if (open_connections_ >= limits_.connections ||
      (others != of_one_.end() && others->second >= limits_.connections_of_one)) {
    ++refused_;
    return;  // closed at once: an answer would cost a handshake
  }
  c.deadline = now_ + limits_.header_time.count();
  if (c.peer.tls) {
    const SslContext context = [&] {
      const std::lock_guard lock(context_mutex_);
      return context_;
    }();
    c.ssl = make_ssl(context.get(), fd.get());
    if (!c.ssl) {
      ++refused_;
      return;
    }
    c.phase = Phase::handshake;
  }
  if (free_.empty()) {
    slots_.emplace_back();
    free_.push_back(static_cast<std::uint32_t>(slots_.size() - 1));
  }
  const std::uint32_t index = free_.back();
  Slot& slot = slots_[index];
  // The two highest numbers of a slot's place mark our own descriptors; no generation reaches them.
  slot.generation = (slot.generation + 1) & 0x7fffffff;
  c.id = (std::uint64_t{slot.generation} << 32) | index;
  c.interest = EPOLLIN;
  epoll_event event = {};
  event.events = c.interest;
  event.data.u64 = c.id;
  c.counted = c.peer.address;
  dead_.reserve(dead_.size() + slots_.size() + 1);
  free_.reserve(slots_.size());
  std::size_t& count = of_one_[c.counted];
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd.get(), &event) != 0) {
    if (count == 0) of_one_.erase(c.counted);
    ++refused_;
    return;
  }
  ++count;
  c.fd = std::move(fd);
  free_.pop_back();
  ++open_connections_;
  open_.store(open_connections_, std::memory_order_relaxed);
  slot.connection = std::move(made);
}

void Loop::close(Connection& c) {
  if (c.phase == Phase::closed) return;
  c.phase = Phase::closed;
  if (c.stream) c.stream->gone();
  c.stream.reset();
  bodies_ -= std::exchange(c.held, 0);
  c.ssl.reset();
  c.fd.reset();  // leaves epoll with it
  if (const auto found = of_one_.find(c.counted); found != of_one_.end() && --found->second == 0)
    of_one_.erase(found);
  --open_connections_;
  open_.store(open_connections_, std::memory_order_relaxed);
  dead_.push_back(c.id);
}

void Loop::interest(Connection& c, std::uint32_t events) {
  if (c.interest == events) return;
  c.interest = events;
  epoll_event event = {};
  event.events = events;
  event.data.u64 = c.id;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, c.fd.get(), &event) != 0) close(c);
}

void Loop::on_event(Connection& c, std::uint32_t events) {
  if ((events & (EPOLLERR | EPOLLHUP)) != 0 && (events & EPOLLIN) == 0) return close(c);
  switch (c.phase) {
    case Phase::handshake:
      return shake_hands(c);
    case Phase::reading:
      return read_more(c, false);
    case Phase::waiting:
      if ((events & (EPOLLERR | EPOLLHUP)) != 0) return close(c);
      return interest(c, 0);  // the next request waits for its turn, in the kernel
    case Phase::writing:
      if ((events & (EPOLLERR | EPOLLHUP)) != 0) return close(c);
      return continue_out(c);
    case Phase::streaming:
      if ((events & EPOLLOUT) != 0) continue_out(c);
      if (c.phase == Phase::streaming && (events & ~std::uint32_t{EPOLLOUT}) != 0) talk(c);
      return;
    case Phase::lingering:
      return discard(c);
    case Phase::closed:
      return;
  }
}

void Loop::shake_hands(Connection& c) {
  ERR_clear_error();
  allow_reads();
  const int done = SSL_do_handshake(c.ssl.get());
  if (done == 1) {
    c.peer.certificate = client_certificate(c.ssl.get());
    c.phase = Phase::reading;
    c.deadline = now_ + limits_.header_time.count();
    interest(c, EPOLLIN);
    if (c.phase == Phase::reading && SSL_has_pending(c.ssl.get()) == 1) read_more(c, false);
    return;
  }
  switch (SSL_get_error(c.ssl.get(), done)) {
    case SSL_ERROR_WANT_READ:
      return interest(c, EPOLLIN);
    case SSL_ERROR_WANT_WRITE:
      return interest(c, EPOLLOUT);
    default:
      break;
  }
  if (ERR_GET_REASON(ERR_peek_last_error()) == SSL_R_HTTP_REQUEST) {
    c.ssl.reset();
    c.keep = false;
    c.peer.tls = false;
    return refuse(c, {400, "invalid", "This port speaks HTTPS: write https:// in the address."});
  }
  ++refused_;
  close(c);
}

// Into scratch_.
Io Loop::receive(Connection& c, std::size_t& got) {
  got = 0;
  if (!c.ssl) {
    const ssize_t n = ::recv(c.fd.get(), scratch_.data(), scratch_.size(), 0);
    if (n > 0) {
      got = static_cast<std::size_t>(n);
      return Io::done;
    }
    return n < 0 && (errno == EAGAIN || errno == EINTR) ? Io::later : Io::over;
  }
  ERR_clear_error();
  allow_reads();
  if (SSL_read_ex(c.ssl.get(), scratch_.data(), scratch_.size(), &got) == 1) return Io::done;
  const int why = SSL_get_error(c.ssl.get(), 0);
  return why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE ? Io::later : Io::over;
}

Io Loop::transmit(Connection& c, std::string_view bytes, std::size_t& sent) {
  sent = 0;
  while (sent < bytes.size()) {
    const std::string_view rest = bytes.substr(sent);
    if (!c.ssl) {
      const ssize_t n = ::send(c.fd.get(), rest.data(), rest.size(), MSG_NOSIGNAL);
      if (n < 0) return errno == EAGAIN || errno == EINTR ? Io::later : Io::over;
      sent += static_cast<std::size_t>(n);
      continue;
    }
    std::size_t n = 0;
    ERR_clear_error();
    if (SSL_write_ex(c.ssl.get(), rest.data(), rest.size(), &n) != 1) {
      const int why = SSL_get_error(c.ssl.get(), 0);
      return why == SSL_ERROR_WANT_WRITE || why == SSL_ERROR_WANT_READ ? Io::later : Io::over;
    }
    sent += n;
  }
  return Io::done;
}

void Loop::read_more(Connection& c, bool leftover) {
  // Also where the kernel tells first, and has only the sender's end to tell: the next request lies with us.
  if ((leftover || c.queued) && c.phase == Phase::reading && !c.in.empty()) take(c, {});
  for (int turn = 0; c.phase == Phase::reading; ++turn) {
    if (turn == reads_at_once) return again(c);
    std::size_t got = 0;
    const Io io = receive(c, got);
    if (io == Io::later) return;
    if (io == Io::over) return close(c);
    take(c, {scratch_.data(), got});
    if (c.phase != Phase::reading) return;
    if (c.ssl ? SSL_has_pending(c.ssl.get()) == 0 : got < scratch_.size()) return;
  }
}

// Parses what came, after what was left of before. Answers do not touch scratch_, so `bytes` may lie there.
void Loop::take(Connection& c, std::string_view bytes) {
  std::string before;
  std::string_view rest = bytes;
  if (!c.in.empty()) {
    before.swap(c.in);
    before.append(bytes);
    rest = before;
  }
  while (c.phase == Phase::reading && !rest.empty()) {
    const std::size_t used = parse(c, rest);
    rest.remove_prefix(used);
    if (c.phase == Phase::reading && c.parser && used == 0) break;  // needs more
  }
  if (c.phase == Phase::closed || c.phase == Phase::lingering) return;
  if (!rest.empty()) {
    if (rest.data() == before.data()) {
      c.in.swap(before);
    } else {
      c.in.assign(rest);
    }
  }
}

std::size_t Loop::parse(Connection& c, std::string_view bytes) {
  std::size_t used = 0;
  if (!c.parser) {
    // Some clients end a body with a line of their own.
    if (c.requests > 0 && bytes.starts_with("\r\n") && !std::exchange(c.blank, true)) return 2;
    c.parser.emplace(limits_);
    c.continued = false;
    c.deadline = now_ + limits_.header_time.count();
  }
  Parser& parser = *c.parser;
  const bool had_header = parser.is_header_done();
  used = parser.take(bytes);
  if (parser.refusal().status != 0) {
    const Refusal refusal = parser.refusal();
    c.head = parser.request().method == "HEAD";
    refuse(c, refusal);
    return used;
  }
  if (!parser.is_header_done()) return used;
  if (!parser.is_done()) {
    if (!had_header) c.deadline = now_ + limits_.body_time.count();
    bodies_ += parser.body_bytes() - c.held;
    c.held = parser.body_bytes();
    if (bodies_ > limits_.bodies) {
      refuse(c, {503, "unavailable", "Too many bodies are being read at once; try again."});
      return used;
    }
    if (parser.expects() && !std::exchange(c.continued, true) && c.held == 0) {
      static constexpr std::string_view go_on = "HTTP/1.1 100 Continue\r\n\r\n";
      std::size_t sent = 0;
      // 25 bytes that find no room belong to nobody who reads.
      if (transmit(c, go_on, sent) != Io::done) close(c);
    }
    return used;
  }
  dispatch(c);
  return used;
}

void Loop::dispatch(Connection& c) {
  Parser& parser = *c.parser;
  ++c.requests;
  ++c.serial;
  c.blank = false;
  c.keep = parser.keep_alive() && c.requests < limits_.requests && !draining_;
  const bool old = parser.version() < 11;
  Request request = std::move(parser.request());
  bodies_ -= std::exchange(c.held, 0);
  c.parser.reset();
  c.old = old;
  c.head = request.method == "HEAD";
  auto target = parse_target(request.target);
  if (!target || (target->path == "*" && request.method != "OPTIONS")) {
    c.phase = Phase::waiting;
    return refuse(c, {400, "invalid", "The address in the request line is not one of this server."});
  }
  request.path = std::move(target->path);
  request.query = std::move(target->query);
  request.peer = c.peer;
  requests_.fetch_add(1, std::memory_order_relaxed);
  c.phase = Phase::waiting;
  c.deadline = 0;
  auto reply = std::make_shared<OneReply>(inbox_, c.id, c.serial, limits_.waiting_frames);
  inbox_->handling(c.id, c.serial);
  inbox_->immediate().reset();
  try {
    handler_(std::move(request), std::move(reply));
  } catch (...) {  // the reply, dropped, says 500
  }
  inbox_->handling(0, 0);
  if (auto answer = std::exchange(inbox_->immediate(), std::nullopt)) deliver(c, std::move(*answer));
}

void Loop::deliver(Connection& c, Inbox::Answer answer) {
  if (answer.stream) return start_stream(c, std::move(answer.stream));
  send_answer(c, std::move(answer.response));
}

const std::string& Loop::date() {
  const std::time_t at = std::chrono::system_clock::to_time_t(wall_now());
  if (at != date_at_) {
    date_at_ = at;
    std::tm parts = {};
    ::gmtime_r(&at, &parts);
    char text[64];
    const std::size_t n = std::strftime(text, sizeof text, "%a, %d %b %Y %H:%M:%S GMT", &parts);
    date_.assign(text, n);
  }
  return date_;
}

// No control byte of ours or the handler's ends up in a header.
bool header_safe(std::string_view text) {
  return std::none_of(text.begin(), text.end(),
                      [](char c) { return (c >= 0 && c < 0x20 && c != '\t') || c == 0x7f; });
}

void Loop::send_answer(Connection& c, Response response) {
  if (response.status < 200 || response.status > 599)
    response = problem(500, "internal", "The answer had no status.");
  by_status_[static_cast<std::size_t>(response.status)].fetch_add(1, std::memory_order_relaxed);
  const bool bodiless = response.status == 204 || response.status == 304;
  if (draining_) c.keep = false;
  out_.clear();
  auto to = std::back_inserter(out_);
  fmt::format_to(to, "HTTP/1.1 {} {}\r\nDate: {}\r\n", response.status, title_of(response.status), date());
  if (!bodiless) {
    if (header_safe(response.type)) fmt::format_to(to, "Content-Type: {}\r\n", response.type);
    fmt::format_to(to, "Content-Length: {}\r\n", response.body.size());
  }
  bool cache = false;
  for (const auto& [name, value] : response.headers) {
    if (!header_safe(name) || !header_safe(value)) continue;
    cache = cache || same(name, "cache-control");
    out_.append(name).append(": ").append(value).append("\r\n");
  }
  if (!cache) out_ += "Cache-Control: no-store\r\n";
  out_ += "X-Content-Type-Options: nosniff\r\n";
  if (c.peer.tls) out_ += "Strict-Transport-Security: max-age=31536000\r\n";
  if (!c.keep) {
    out_ += "Connection: close\r\n";
  } else if (c.old) {
    out_ += "Connection: keep-alive\r\n";
  }
  out_ += "\r\n";
  if (!bodiless && !c.head) out_ += response.body;
  c.phase = Phase::writing;
  c.deadline = now_ + limits_.write_time.count();
  // One byte now and then is progress, but not for ever: 64 KiB in each write_time at least.
  c.overall = now_ + limits_.write_time.count() * static_cast<std::int64_t>(1 + out_.size() / (64 << 10));
  write_out(c, out_);
  if (out_.capacity() > kept_buffer) std::string().swap(out_);
}

void Loop::refuse(Connection& c, const Refusal& refusal) {
  ++refused_;
  c.keep = false;
  c.parser.reset();
  bodies_ -= std::exchange(c.held, 0);
  ++c.serial;
  send_answer(c, problem(refusal.status, refusal.code, refusal.detail));
}

// All of `bytes`, or what the kernel takes now; the rest waits in c.out.
void Loop::write_out(Connection& c, std::string_view bytes) {
  std::size_t sent = 0;
  switch (transmit(c, bytes, sent)) {
    case Io::over:
      return close(c);
    case Io::done:
      return answered(c);
    case Io::later:
      break;
  }
  c.out.assign(bytes.substr(sent));
  c.out_at = 0;
  interest(c, c.phase == Phase::streaming ? EPOLLIN | EPOLLOUT : std::uint32_t{EPOLLOUT});
}

void Loop::continue_out(Connection& c) {
  std::size_t sent = 0;
  const Io io = transmit(c, std::string_view(c.out).substr(c.out_at), sent);
  if (io == Io::over) return close(c);
  if (sent > 0) c.deadline = now_ + limits_.write_time.count();
  c.out_at += sent;
  if (io == Io::later) return;
  std::string().swap(c.out);
  c.out_at = 0;
  interest(c, EPOLLIN);
  if (c.phase != Phase::closed) answered(c);
}

// Everything there was to write is with the kernel.
void Loop::answered(Connection& c) {
  if (c.phase == Phase::streaming) return flush_stream(c);
  if (!c.keep) return finish(c);
  c.phase = Phase::reading;
  c.deadline = now_ + limits_.idle_time.count();
  interest(c, EPOLLIN);
  // What the client sent meanwhile lies with us: the kernel will not tell of it.
  if (c.phase == Phase::reading && (!c.in.empty() || (c.ssl && SSL_has_pending(c.ssl.get()) == 1))) again(c);
}

// An answer that closes: the reader gets all of it before our end goes, even while it still sends.
void Loop::finish(Connection& c) {
  if (c.ssl) {
    ERR_clear_error();
    SSL_shutdown(c.ssl.get());
    c.ssl.reset();
  }
  std::string().swap(c.in);
  c.phase = Phase::lingering;
  c.talked = 0;
  c.deadline = now_ + std::min(linger_ms, limits_.idle_time.count());
  if (::shutdown(c.fd.get(), SHUT_WR) != 0) return close(c);
  interest(c, EPOLLIN);
  if (c.phase == Phase::lingering) discard(c);
}

void Loop::discard(Connection& c) {
  for (int turn = 0; turn < reads_at_once; ++turn) {
    const ssize_t n = ::recv(c.fd.get(), scratch_.data(), scratch_.size(), MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) return close(c);
    c.talked += static_cast<std::size_t>(n);
    if (c.talked > discarded) return close(c);
  }
}

void Loop::start_stream(Connection& c, std::shared_ptr<StreamEnd> stream) {
  by_status_[200].fetch_add(1, std::memory_order_relaxed);
  streams_.fetch_add(1, std::memory_order_relaxed);
  const int size = stream_buffer;
  ::setsockopt(c.fd.get(), SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
  c.keep = false;
  c.talked = 0;
  c.phase = Phase::streaming;
  c.deadline = 0;
  c.stream = std::move(stream);
  c.heartbeat = now_ + limits_.heartbeat.count();
  std::string().swap(c.in);
  out_ =
      "HTTP/1.1 200 OK\r\nDate: " + date() +
      "\r\nContent-Type: text/event-stream\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n";
  if (c.peer.tls) out_ += "Strict-Transport-Security: max-age=31536000\r\n";
  // Ends with the connection: frames are shared between streams and go out as they are.
  out_ += "Connection: close\r\n\r\n";
  c.deadline = now_ + limits_.write_time.count();
  if (c.head) c.stream->gone();
  interest(c, EPOLLIN);
  if (c.phase == Phase::streaming) write_out(c, out_);
}

void Loop::flush_stream(Connection& c) {
  while (c.phase == Phase::streaming && c.out.empty()) {
    frames_.clear();
    const StreamEnd::Taken taken = c.stream->take(frames_);
    if (taken.cut) return close(c);
    if (frames_.empty()) {
      c.deadline = 0;
      if (taken.last) {
        c.stream->gone();
        c.stream.reset();
        finish(c);
      }
      return;
    }
    std::size_t sent = 0;
    const Io io = transmit(c, frames_, sent);
    if (io == Io::over) return close(c);
    c.heartbeat = now_ + limits_.heartbeat.count();
    if (io == Io::later) {
      c.deadline = now_ + limits_.write_time.count();
      c.out.assign(frames_, sent);
      c.out_at = 0;
      interest(c, EPOLLIN | EPOLLOUT);
    }
    if (frames_.capacity() > kept_buffer) std::string().swap(frames_);
  }
}

// A watcher has nothing to say; its end is what is read here.
void Loop::talk(Connection& c) {
  std::size_t got = 0;
  const Io io = receive(c, got);
  c.talked += got;
  if (io == Io::over || c.talked > watcher_talk) close(c);
}

void Loop::take_inbox(bool knocked) {
  inbox_->take(knocked, answers_, flushes_);
  for (auto& answer : answers_) {
    Connection* c = find(answer.connection);
    if (c == nullptr || c->serial != answer.serial || c->phase != Phase::waiting) {
      if (answer.stream) answer.stream->gone();
      continue;
    }
    guarded(*c, [&] { deliver(*c, std::move(answer)); });
  }
  answers_.clear();
  for (auto& stream : flushes_) {
    Connection* c = find(stream->connection);
    if (c == nullptr || c->stream != stream) {
      // Not begun yet: its frames go out with its head. Or gone, and says so itself.
      continue;
    }
    guarded(*c, [&] { flush_stream(*c); });
  }
  flushes_.clear();
}

void Loop::expire(Connection& c) {
  ++timed_out_;
  if (c.phase == Phase::reading && c.parser && c.parser->request().method.size() > 0) {
    return refuse(c, {408, "invalid", "The request took too long to arrive."});
  }
  close(c);
}

void Loop::tick() {
  static const auto heartbeat = std::make_shared<const std::string>(":\n\n");
  for (auto& slot : slots_) {
    if (!slot.connection || slot.connection->phase == Phase::closed) continue;
    Connection& c = *slot.connection;
    guarded(c, [&] {
      if (c.deadline != 0 && now_ >= c.deadline) {
        // Between requests, and after an answer, time is up without anybody's fault.
        const bool quiet =
            c.phase == Phase::lingering || (c.phase == Phase::reading && !c.parser && c.requests > 0);
        return quiet ? close(c) : expire(c);
      }
      if (c.phase == Phase::writing && now_ >= c.overall) return expire(c);
      if (c.phase == Phase::streaming && c.out.empty() && now_ >= c.heartbeat) {
        c.stream->send(heartbeat);
        flush_stream(c);
      }
    });
  }
}

void Loop::drain() {
  draining_ = true;
  drain_until_ = now_ + grace_.load(std::memory_order_relaxed);
  for (auto& listener : listeners_) {
    remove_socket(listener);
    listener.fd.reset();
  }
  for (auto& slot : slots_) {
    if (!slot.connection || slot.connection->phase == Phase::closed) continue;
    Connection& c = *slot.connection;
    guarded(c, [&] {
      c.keep = false;
      if (c.phase == Phase::streaming) {
        c.stream->close();
        flush_stream(c);
      } else if (c.phase == Phase::reading && !c.parser) {
        finish(c);
      } else if (c.phase == Phase::handshake) {
        close(c);
      }
    });
  }
}

Counts Loop::counts() const {
  Counts out;
  out.connections = accepted_, out.open = open_, out.requests = requests_;
  out.refused = refused_, out.timed_out = timed_out_, out.streams = streams_;
  for (std::size_t i = 0; i < by_status_.size(); ++i) {
    if (const auto n = by_status_[i].load(std::memory_order_relaxed); n > 0)
      out.by_status[static_cast<int>(i)] = n;
  }
  return out;
}

}  // namespace

Result<std::unique_ptr<Server>> Server::bind(Settings settings, Handler handler) {
  auto loop = std::make_unique<Loop>(std::move(settings), std::move(handler));
  BH_CHECK(loop->open());
  return std::unique_ptr<Server>(std::move(loop));
}

}  // namespace bulkhead::http
