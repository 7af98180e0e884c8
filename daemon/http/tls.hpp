// OpenSSL 3: the server's context, and bytes of a connection through it.
#pragma once

#include <openssl/ssl.h>

#include <memory>
#include <string>

#include "base/result.hpp"
#include "daemon/http/http.hpp"

namespace bulkhead::http {

struct FreeSsl {
  void operator()(SSL* ssl) const { SSL_free(ssl); }
  void operator()(SSL_CTX* context) const { SSL_CTX_free(context); }
};
using SslContext = std::shared_ptr<SSL_CTX>;
using SslPointer = std::unique_ptr<SSL, FreeSsl>;

Result<SslContext> make_context(const Tls& tls);
// A server's end over `fd`, which stays the caller's. Null: out of memory.
SslPointer make_ssl(SSL_CTX* context, int fd);
// Before each step of reading. A peer that sends nothing but KeyUpdates would keep OpenSSL reading inside one
// call for as long as it likes; after a few reads the step ends as if nothing more had come.
void allow_reads();
// SHA-256 in hex of the client's certificate; empty without one, or when our CA did not sign it.
std::string client_certificate(SSL* ssl);

}  // namespace bulkhead::http
