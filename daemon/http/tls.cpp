#include "daemon/http/tls.hpp"

#include <fcntl.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/x509v3.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <arpa/inet.h>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include <fmt/format.h>

#include "base/fd.hpp"
#include "base/text.hpp"

namespace bulkhead::http {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t pem_bytes = 1 << 20;
constexpr long two_years = 730L * 24 * 3600;
constexpr std::size_t names_at_most = 64;

struct Free {
  void operator()(BIO* p) const { BIO_free_all(p); }
  void operator()(X509* p) const { X509_free(p); }
  void operator()(EVP_PKEY* p) const { EVP_PKEY_free(p); }
  void operator()(X509_EXTENSION* p) const { X509_EXTENSION_free(p); }
  void operator()(BIGNUM* p) const { BN_free(p); }
  void operator()(GENERAL_NAMES* p) const { GENERAL_NAMES_free(p); }
};
template <class T>
using Owned = std::unique_ptr<T, Free>;

std::string reason() {
  const unsigned long code = ERR_peek_last_error();
  const char* text = code == 0 ? nullptr : ERR_reason_error_string(code);
  ERR_clear_error();
  return text == nullptr ? "unknown" : text;
}

constexpr int reads_of_a_step = 4;
thread_local int reads_left = 0;

// The socket below TLS. OpenSSL's own would write(2) and raise SIGPIPE.
int socket_write(BIO* bio, const char* data, int size) {
  const auto fd = static_cast<int>(reinterpret_cast<std::intptr_t>(BIO_get_data(bio)));
  BIO_clear_retry_flags(bio);
  const ssize_t n = ::send(fd, data, static_cast<std::size_t>(size), MSG_NOSIGNAL);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) BIO_set_retry_write(bio);
  return static_cast<int>(n);
}

int socket_read(BIO* bio, char* data, int size) {
  const auto fd = static_cast<int>(reinterpret_cast<std::intptr_t>(BIO_get_data(bio)));
  BIO_clear_retry_flags(bio);
  if (--reads_left < 0) {
    BIO_set_retry_read(bio);
    return -1;
  }
  const ssize_t n = ::recv(fd, data, static_cast<std::size_t>(size), 0);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) BIO_set_retry_read(bio);
  return static_cast<int>(n);
}

long socket_control(BIO*, int command, long, void*) { return command == BIO_CTRL_FLUSH ? 1 : 0; }

const BIO_METHOD* socket_method() {
  static const BIO_METHOD* const method = [] {
    BIO_METHOD* made = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "socket");
    if (made == nullptr) return static_cast<BIO_METHOD*>(nullptr);
    BIO_meth_set_write(made, socket_write);
    BIO_meth_set_read(made, socket_read);
    BIO_meth_set_ctrl(made, socket_control);
    return made;
  }();
  return method;
}

int choose_protocol(SSL*, const unsigned char** out, unsigned char* out_size, const unsigned char* offered,
                    unsigned offered_size, void*) {
  static constexpr unsigned char ours[] = "\x08http/1.1";
  unsigned char* chosen = nullptr;
  if (SSL_select_next_proto(&chosen, out_size, ours, sizeof ours - 1, offered, offered_size) !=
      OPENSSL_NPN_NEGOTIATED) {
    return SSL_TLSEXT_ERR_ALERT_FATAL;
  }
  *out = chosen;
  return SSL_TLSEXT_ERR_OK;
}

// A password would be asked for on a terminal that a daemon does not have.
int no_password(char*, int, int, void*) { return -1; }

Error file_error(const std::string& what, const std::string& file) {
  if (::access(file.c_str(), R_OK) != 0) return errno_error(what + " " + file, errno);
  return Error(Errc::invalid, fmt::format("{} {}: {}", what, file, reason()));
}

Owned<X509> read_certificate(const std::string& file) {
  const auto text = read_file(file, pem_bytes);
  if (!text.ok()) return nullptr;
  const Owned<BIO> bio(BIO_new_mem_buf(text.value().data(), static_cast<int>(text.value().size())));
  return Owned<X509>(bio ? PEM_read_bio_X509(bio.get(), nullptr, no_password, nullptr) : nullptr);
}

std::string fingerprint(const X509* certificate) {
  unsigned char hash[EVP_MAX_MD_SIZE];
  unsigned size = 0;
  if (X509_digest(certificate, EVP_sha256(), hash, &size) != 1) return {};
  std::string out;
  for (unsigned i = 0; i < size; ++i) out += fmt::format("{:02x}", hash[i]);
  return out;
}

bool add_name(GENERAL_NAMES* names, const std::string& name) {
  unsigned char address[16];
  GENERAL_NAME* made = GENERAL_NAME_new();
  if (made == nullptr) return false;
  const int bytes = ::inet_pton(AF_INET, name.c_str(), address) == 1    ? 4
                    : ::inet_pton(AF_INET6, name.c_str(), address) == 1 ? 16
                                                                        : 0;
  ASN1_STRING* value = bytes > 0 ? ASN1_OCTET_STRING_new() : ASN1_IA5STRING_new();
  const bool set = value != nullptr &&
                   (bytes > 0 ? ASN1_STRING_set(value, address, bytes)
                              : ASN1_STRING_set(value, name.data(), static_cast<int>(name.size()))) == 1;
  if (!set) {
    ASN1_STRING_free(value);
    GENERAL_NAME_free(made);
    return false;
  }
  GENERAL_NAME_set0_value(made, bytes > 0 ? GEN_IPADD : GEN_DNS, value);
  if (sk_GENERAL_NAME_push(names, made) > 0) return true;
  GENERAL_NAME_free(made);
  return false;
}

bool add_extension(X509* certificate, int nid, const char* value) {
  X509V3_CTX context;
  X509V3_set_ctx_nodb(&context);
  X509V3_set_ctx(&context, certificate, certificate, nullptr, nullptr, 0);
  const Owned<X509_EXTENSION> extension(X509V3_EXT_conf_nid(nullptr, &context, nid, value));
  return extension && X509_add_ext(certificate, extension.get(), -1) == 1;
}

bool is_dns_name(const std::string& name) {
  return !name.empty() && name.size() <= 253 &&
         name.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.*_") ==
             std::string::npos;
}

Owned<X509> self_signed(EVP_PKEY* key, const std::vector<std::string>& names) {
  Owned<X509> certificate(X509_new());
  const Owned<BIGNUM> serial(BN_new());
  const Owned<GENERAL_NAMES> alternatives(sk_GENERAL_NAME_new_null());
  if (!certificate || !serial || !alternatives) return nullptr;
  for (const auto& name : names) {
    if (!add_name(alternatives.get(), name)) return nullptr;
  }
  // A subject's common name ends at 64 bytes; clients look at the alternatives only.
  const std::string common = names.front().substr(0, 64);
  X509_NAME* subject = X509_get_subject_name(certificate.get());
  const bool made =
      X509_set_version(certificate.get(), 2) == 1 &&
      BN_rand(serial.get(), 159, BN_RAND_TOP_ANY, BN_RAND_BOTTOM_ANY) == 1 &&
      BN_to_ASN1_INTEGER(serial.get(), X509_get_serialNumber(certificate.get())) != nullptr &&
      // An hour back: the clocks of a cluster differ.
      X509_gmtime_adj(X509_getm_notBefore(certificate.get()), -3600) != nullptr &&
      X509_gmtime_adj(X509_getm_notAfter(certificate.get()), two_years) != nullptr &&
      X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_UTF8,
                                 reinterpret_cast<const unsigned char*>(common.data()),
                                 static_cast<int>(common.size()), -1, 0) == 1 &&
      X509_set_issuer_name(certificate.get(), subject) == 1 && X509_set_pubkey(certificate.get(), key) == 1 &&
      add_extension(certificate.get(), NID_basic_constraints, "critical,CA:FALSE") &&
      add_extension(certificate.get(), NID_key_usage, "critical,digitalSignature") &&
      add_extension(certificate.get(), NID_ext_key_usage, "serverAuth") &&
      add_extension(certificate.get(), NID_subject_key_identifier, "hash") &&
      X509_add1_ext_i2d(certificate.get(), NID_subject_alt_name, alternatives.get(), 0, X509V3_ADD_DEFAULT) ==
          1 &&
      X509_sign(certificate.get(), key, EVP_sha256()) > 0;
  return made ? std::move(certificate) : nullptr;
}

Status write_new(const std::string& path, BIO* content, mode_t mode) {
  char* data = nullptr;
  const long size = BIO_get_mem_data(content, &data);
  ::unlink(path.c_str());  // of one that was killed here; the folder is locked
  UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode));
  if (!fd) return errno_error("create " + path, errno);
  std::string_view rest(data, static_cast<std::size_t>(size));
  int failed = ::fchmod(fd.get(), mode) == 0 ? 0 : errno;
  while (failed == 0 && !rest.empty()) {
    const ssize_t n = ::write(fd.get(), rest.data(), rest.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0)
      failed = n == 0 ? EIO : errno;
    else
      rest.remove_prefix(static_cast<std::size_t>(n));
  }
  if (failed == 0 && ::fsync(fd.get()) != 0) failed = errno;
  if (failed == 0) return ok_status();
  ::unlink(path.c_str());
  return errno_error("write " + path, failed);
}

std::string folder_of(const std::string& file) {
  const std::string folder = fs::path(file).parent_path().string();
  return folder.empty() ? "." : folder;
}

Status sync_folder(const std::string& file) {
  const UniqueFd folder(::open(folder_of(file).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder || ::fsync(folder.get()) != 0) return errno_error("sync " + folder_of(file), errno);
  return ok_status();
}

bool there(const std::string& path) {
  struct stat found = {};
  return ::lstat(path.c_str(), &found) == 0;
}

// The last step, taken again by the next start when this one is killed within: the key first, so a
// certificate never stands without its key.
Status put_in_place(const std::string& certificate_file, const std::string& key_file) {
  for (const auto& file : {key_file, certificate_file}) {
    const std::string fresh = file + ".new";
    if (there(file)) continue;
    if (::link(fresh.c_str(), file.c_str()) != 0) return errno_error("create " + file, errno);
    BH_CHECK(sync_folder(file));
  }
  ::unlink((key_file + ".new").c_str());
  ::unlink((certificate_file + ".new").c_str());
  return ok_status();
}

bool pair_matches(const std::string& certificate_file, const std::string& key_file) {
  const auto certificate = read_certificate(certificate_file);
  const auto text = read_file(key_file, pem_bytes);
  if (!certificate || !text.ok()) return false;
  const Owned<BIO> bio(BIO_new_mem_buf(text.value().data(), static_cast<int>(text.value().size())));
  const Owned<EVP_PKEY> key(bio ? PEM_read_bio_PrivateKey(bio.get(), nullptr, no_password, nullptr)
                                : nullptr);
  const bool matches = key && X509_check_private_key(certificate.get(), key.get()) == 1;
  ERR_clear_error();
  return matches;
}

}  // namespace

Result<SslContext> make_context(const Tls& tls) {
  ERR_clear_error();
  struct stat key = {};
  if (::stat(tls.key_file.c_str(), &key) != 0) return errno_error("TLS key " + tls.key_file, errno);
  if ((key.st_mode & 0007) != 0) {
    return Error(Errc::invalid, fmt::format("TLS key {}: readable by everybody", tls.key_file),
                 "type `chmod 600 " + tls.key_file + "`, and make a new key if anybody may have read it");
  }
  SslContext context(SSL_CTX_new(TLS_server_method()), FreeSsl{});
  if (!context) return Error(Errc::io, "TLS: " + reason());
  SSL_CTX* raw = context.get();
  SSL_CTX_set_default_passwd_cb(raw, no_password);
  if (SSL_CTX_set_min_proto_version(raw, TLS1_3_VERSION) != 1) return Error(Errc::io, "TLS 1.3: " + reason());
  // No resumption: a resumed session would carry a client certificate past a reload of the CA, and tickets
  // cost two records a connection. No early data: it can be replayed.
  SSL_CTX_set_session_cache_mode(raw, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_options(raw, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION);
  SSL_CTX_set_num_tickets(raw, 0);
  SSL_CTX_set_max_early_data(raw, 0);
  SSL_CTX_set_mode(
      raw, SSL_MODE_RELEASE_BUFFERS | SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
  SSL_CTX_set_read_ahead(raw, 1);  // one read(2) a record, not two
  SSL_CTX_set_alpn_select_cb(raw, choose_protocol, nullptr);
  if (SSL_CTX_use_certificate_chain_file(raw, tls.certificate_file.c_str()) != 1) {
    return file_error("TLS certificate", tls.certificate_file);
  }
  if (SSL_CTX_use_PrivateKey_file(raw, tls.key_file.c_str(), SSL_FILETYPE_PEM) != 1 ||
      SSL_CTX_check_private_key(raw) != 1) {
    return file_error("TLS key", tls.key_file);
  }
  if (!tls.client_ca_file.empty()) {
    STACK_OF(X509_NAME)* names = SSL_load_client_CA_file(tls.client_ca_file.c_str());
    if (names == nullptr || SSL_CTX_load_verify_file(raw, tls.client_ca_file.c_str()) != 1) {
      sk_X509_NAME_pop_free(names, X509_NAME_free);
      return file_error("CA of clients", tls.client_ca_file);
    }
    SSL_CTX_set_client_CA_list(raw, names);
    // Whoever shows a certificate shows a good one, or the handshake ends; nobody has to.
    SSL_CTX_set_verify(raw, SSL_VERIFY_PEER, nullptr);
    SSL_CTX_set_verify_depth(raw, 8);
  }
  return context;
}

SslPointer make_ssl(SSL_CTX* context, int fd) {
  SslPointer ssl(SSL_new(context));
  BIO* bio = socket_method() == nullptr ? nullptr : BIO_new(socket_method());
  if (!ssl || bio == nullptr) {
    BIO_free(bio);
    return nullptr;
  }
  BIO_set_data(bio, reinterpret_cast<void*>(static_cast<std::intptr_t>(fd)));
  BIO_set_init(bio, 1);
  SSL_set_bio(ssl.get(), bio, bio);
  SSL_set_accept_state(ssl.get());
  return ssl;
}

void allow_reads() { reads_left = reads_of_a_step; }

std::string client_certificate(SSL* ssl) {
  const X509* certificate = SSL_get0_peer_certificate(ssl);
  if (certificate == nullptr || SSL_get_verify_result(ssl) != X509_V_OK) return {};
  return fingerprint(certificate);
}

Result<std::string> ensure_certificate(const std::string& certificate_file, const std::string& key_file,
                                       const std::vector<std::string>& names) {
  ERR_clear_error();
  const UniqueFd folder(::open(folder_of(key_file).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder || ::flock(folder.get(), LOCK_EX) != 0)
    return errno_error("lock " + folder_of(key_file), errno);
  if (!there(certificate_file) && there(key_file) && pair_matches(certificate_file + ".new", key_file)) {
    BH_CHECK(put_in_place(certificate_file, key_file));
  }
  if (there(certificate_file) != there(key_file)) {
    return Error(Errc::conflict,
                 fmt::format("{} is there, {} is not", there(key_file) ? key_file : certificate_file,
                             there(key_file) ? certificate_file : key_file),
                 "put both in place, or move the one away: then both are made");
  }
  if (!there(certificate_file)) {
    std::vector<std::string> all;
    char host[256] = "";
    if (::gethostname(host, sizeof host - 1) == 0 && is_dns_name(host)) all.emplace_back(host);
    for (const auto& name : {"localhost", "127.0.0.1", "::1"}) all.emplace_back(name);
    unsigned char address[16];
    for (const auto& name : names) {
      if (!is_dns_name(name) && ::inet_pton(AF_INET6, name.c_str(), address) != 1) {
        return Error(Errc::invalid,
                     fmt::format("'{}' is neither a host name nor an address", printable(name, 64)));
      }
      if (std::find(all.begin(), all.end(), name) == all.end()) all.push_back(name);
    }
    if (all.size() > names_at_most) return Error(Errc::invalid, "more than 64 names in one certificate");
    const Owned<EVP_PKEY> key(EVP_EC_gen("P-256"));
    const auto certificate = key ? self_signed(key.get(), all) : nullptr;
    const Owned<BIO> key_text(BIO_new(BIO_s_mem())), certificate_text(BIO_new(BIO_s_mem()));
    if (!certificate || !key_text || !certificate_text ||
        PEM_write_bio_PKCS8PrivateKey(key_text.get(), key.get(), nullptr, nullptr, 0, nullptr, nullptr) !=
            1 ||
        PEM_write_bio_X509(certificate_text.get(), certificate.get()) != 1) {
      return Error(Errc::io, "make a certificate: " + reason());
    }
    BH_CHECK(write_new(key_file + ".new", key_text.get(), 0600));
    BH_CHECK(write_new(certificate_file + ".new", certificate_text.get(), 0644));
    BH_CHECK(put_in_place(certificate_file, key_file));
  }
  const auto certificate = read_certificate(certificate_file);
  if (!certificate) return file_error("TLS certificate", certificate_file);
  return fingerprint(certificate.get());
}

}  // namespace bulkhead::http
