// An HTTP/1.1 server for one thread: TLS 1.3 and a Unix socket, JSON requests and event streams, and bounds
// on everything a stranger can send or hold. It knows nothing of tenants: a handler answers, at once or
// later, from any thread.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/result.hpp"

namespace bulkhead::http {

struct Peer {
  std::string from = {};  // "192.0.2.7:40112" or "uid 1000 pid 4711"
  // Without the port: what limits count by. Of IPv6 the /64 ("2001:db8:1:2::/64"): whoever has one address
  // has the others. "uid 1000" of a Unix socket.
  std::string address = {};
  bool tls = false;
  std::optional<std::uint32_t> uid = {};  // of a Unix socket: the kernel's word
  std::string certificate = {};  // SHA-256 of a client certificate that our CA signed, hex; empty: none
};

// HEAD comes as HEAD; the body of its answer is left out, its length said. A header that may be there once
// (Host, Authorization, Content-Type, Idempotency-Key, If-Match, Last-Event-ID, lengths) is there at most
// once; path, query and headers are UTF-8 without control bytes (but tabs in headers); trailers of a chunked
// body are dropped.
struct Request {
  std::string method = {}, path = {};  // path: decoded, normalised; "/api/v1/leases/7"
  std::string target = {};             // as sent
  std::vector<std::pair<std::string, std::string>> query = {};    // decoded, in order
  std::vector<std::pair<std::string, std::string>> headers = {};  // names in lower case
  std::string body = {};
  Peer peer = {};

  std::string_view header(std::string_view lower_name) const;     // the first; empty: none
  std::optional<std::string> asked(std::string_view name) const;  // of the query
};

struct Response {
  int status = 200;
  std::string type = "application/json";
  std::vector<std::pair<std::string, std::string>> headers = {};
  std::string body = {};
};

// One open event stream. Thread-safe; what a slow reader has not taken is bounded: beyond it the stream is
// closed (the reader comes back with Last-Event-ID).
class Stream {
 public:
  virtual ~Stream() = default;
  // False: the reader is gone or was too slow. `frame`: complete SSE text, shared between streams.
  virtual bool send(std::shared_ptr<const std::string> frame) = 0;
  virtual void close() = 0;
};

// The way back to one request. Exactly one of answer() and stream() is called, from any thread; a Reply that
// is dropped answers 500.
class Reply {
 public:
  virtual ~Reply() = default;
  virtual void answer(Response response) = 0;
  // Answers 200 text/event-stream and keeps it open, with a comment line every `heartbeat`.
  virtual std::shared_ptr<Stream> stream() = 0;
};

// Runs on the server's thread: must not block.
using Handler = std::function<void(Request request, std::shared_ptr<Reply> reply)>;

struct Limits {
  std::size_t body = 1 << 20;     // bytes; beyond: 413 before the body is read, when it says so itself
  std::size_t header = 16 << 10;  // bytes of request line and headers together
  std::size_t connections = 4096, connections_of_one = 256;  // of one address (Unix sockets: of one uid)
  std::chrono::milliseconds header_time{
      10'000};  // from the first byte to the last of the headers; also for the TLS handshake
  std::chrono::milliseconds body_time{30'000};   // of a whole body
  std::chrono::milliseconds idle_time{75'000};   // between requests
  std::chrono::milliseconds write_time{30'000};  // without one byte taken
  std::size_t requests = 10'000;                 // on one connection
  std::size_t waiting_frames = 256;              // of one stream
  std::size_t bodies = 128 << 20;                // bytes of all bodies being read; beyond: 503
  std::chrono::milliseconds heartbeat{15'000};
};

struct Listen {
  std::string address = "0.0.0.0";
  std::uint16_t port = 443;  // 0: any free one (tests); Server::port() says which
};
struct Tls {
  std::string certificate_file = {}, key_file = {};  // PEM; read again on reload()
  std::string client_ca_file = {};                   // empty: no client certificates are asked for
};
struct Settings {
  std::optional<Listen> listen = {};
  std::optional<Tls> tls = {};       // without: plain HTTP is refused unless the address is loopback
  std::string socket = {};           // path of the Unix socket; empty: none
  std::uint32_t socket_mode = 0666;  // who may connect; what they may do is asked by uid
  // The server's to close once bind() has succeeded.
  std::vector<int> inherited = {};  // listening descriptors of systemd (LISTEN_FDS): TCP ones are TLS
  Limits limits = {};
};

struct Counts {  // since start
  std::uint64_t connections = 0, open = 0, requests = 0, refused = 0, timed_out = 0, streams = 0;
  std::map<int, std::uint64_t> by_status = {};
};

class Server {
 public:
  // Binds. Errc::permission for a port below 1024 without the right: the hint says what to type.
  static Result<std::unique_ptr<Server>> bind(Settings settings, Handler handler);
  virtual ~Server() = default;
  virtual std::uint16_t port() const = 0;
  // Serves until stop(); on the calling thread.
  virtual void run() = 0;
  // Any thread, also a signal handler's: no new connections; those with a request under way get `grace`,
  // streams are closed.
  virtual void stop(std::chrono::milliseconds grace) = 0;
  virtual Status reload() = 0;  // certificates, for new connections
  virtual Counts counts() const = 0;
  virtual void every(std::chrono::milliseconds period, std::function<void()> what) = 0;  // before run()
};

// A self-signed certificate (P-256, two years, subjectAltName of the host name, localhost and the addresses
// given), made when the files are not there: the embedded case. Key file mode 0600. Returns the certificate's
// SHA-256, hex.
Result<std::string> ensure_certificate(const std::string& certificate_file, const std::string& key_file,
                                       const std::vector<std::string>& names);

}  // namespace bulkhead::http
