// bulkhead login, logout: which server, as whom. Tokens are read, kept and never printed.
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>

#include <fmt/format.h>
#include <CLI/App.hpp>

#include "base/fd.hpp"
#include "base/text.hpp"
#include "cli/api.hpp"

namespace bulkhead::cli {

namespace {

constexpr std::size_t most_token = 512;

struct Options {
  std::string url = {}, fingerprint = {}, token_file = {}, ca = {}, certificate = {}, key = {};
  bool unchecked = false, json = false;
};

// Without echo; what was there before comes back also when Ctrl-C ends the program: the echo is off only
// while signals wait.
class Silence {
 public:
  Silence() {
    if (::tcgetattr(STDIN_FILENO, &before_) != 0) return;
    termios now = before_;
    now.c_lflag &= ~static_cast<tcflag_t>(ECHO | ISIG);  // Ctrl-C comes as a byte
    on_ = ::tcsetattr(STDIN_FILENO, TCSAFLUSH, &now) == 0;
  }
  Silence(const Silence&) = delete;
  Silence& operator=(const Silence&) = delete;
  ~Silence() {
    if (on_) ::tcsetattr(STDIN_FILENO, TCSAFLUSH, &before_);
  }

 private:
  termios before_{};
  bool on_ = false;
};

Result<std::string> clean(std::string_view text, const std::string& from) {
  const auto token = trim(text);
  if (token.empty() || token.size() > most_token ||
      !std::all_of(token.begin(), token.end(), [](unsigned char c) { return c > 0x20 && c < 0x7f; }))
    return Error(Errc::invalid, fmt::format("{}: that is no token", from),
                 "one line, as `bulkhead token create` prints it");
  return std::string(token);
}

Result<std::string> read_token(const Options& options) {
  if (!options.token_file.empty() && options.token_file != "-") {
    BH_TRY(const auto text, read_file(options.token_file, 4096));
    return clean(text, options.token_file);
  }
  const bool terminal = ::isatty(STDIN_FILENO) == 1;
  std::string line;
  {
    const Silence quiet;
    if (terminal) std::fputs("token (not shown): ", stderr);
    char c = 0;
    while (line.size() <= 4096) {
      const auto got = ::read(STDIN_FILENO, &c, 1);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0 || c == '\n') break;
      if (terminal && c == 3) return Error(Errc::invalid, "given up");
      line += c;
    }
  }
  if (terminal) std::fputs("\n", stderr);
  return clean(line, terminal ? "typed" : "standard input");
}

std::string spaced(const std::string& fingerprint) {
  std::string out;
  for (std::size_t i = 0; i < fingerprint.size(); i += 2) {
    if (i > 0) out += ':';
    out += fingerprint.substr(i, 2);
  }
  return out;
}

int login(const Context& context, const Options& options) {
  const auto stop = [&](const Error& error) { return fail(context, Error(error).in("login")); };
  auto url = client::parse_url(options.url);
  if (!url.ok()) return stop(url.error());
  client::Target target{.url = *url};
  target.certificate_file = options.certificate;
  target.key_file = options.key;
  for (auto* file : {&target.certificate_file, &target.key_file}) {
    std::error_code failed;
    if (!file->empty()) *file = std::filesystem::absolute(*file, failed).string();
  }
  const bool local = target.url.starts_with("unix:");
  if (!options.ca.empty()) {
    std::error_code failed;
    target.ca_file = std::filesystem::absolute(options.ca, failed).string();
  } else if (!options.fingerprint.empty()) {
    const auto pin = client::parse_fingerprint(options.fingerprint);
    if (!pin.ok()) return stop(pin.error());
    target.fingerprint = *pin;
  } else if (!local) {
    // An authority this host trusts needs no question; else what the server shows is pinned once a person
    // has compared it.
    auto probe = client::Client::connect(target);
    if (!probe.ok()) return stop(probe.error());
    const auto seen = (*probe)->call("GET", "/api/v1/openapi.json", std::nullopt);
    if (!seen.ok()) {
      if (seen.error().code() != Errc::permission) return stop(seen.error());
      const auto shown = client::fingerprint_of(target);
      if (!shown.ok()) return stop(shown.error());
      std::fputs(fmt::format("{} shows a certificate that no authority known here signed.\n"
                             "its SHA-256: {}\n"
                             "on the server: openssl x509 -in CERTIFICATE -noout -fingerprint -sha256\n",
                             target.url, spaced(*shown))
                     .c_str(),
                 stderr);
      if (!api::confirm("are they the same?")) {
        const int code =
            fail(context,
                 Error(Errc::permission, "login: the certificate was not confirmed; nothing was sent or kept",
                       fmt::format("for scripts: bulkhead login {} --fingerprint SHA256 --token-file FILE",
                                   target.url)));
        return ::isatty(STDIN_FILENO) == 1 ? exit_findings : code;
      }
      target.fingerprint = *shown;
    }
  }
  if ((!local && target.certificate_file.empty()) || !options.token_file.empty()) {
    auto token = read_token(options);
    if (!token.ok()) return stop(token.error());
    target.token = std::move(*token);
  }
  Json who;
  if (!options.unchecked) {
    auto client = client::Client::connect(target);
    if (!client.ok()) return stop(client.error());
    auto answer = api::get(**client, "/api/v1/whoami");
    if (!answer.ok())
      return stop(Error(answer.error()).with_hint("nothing was kept. " + answer.error().hint()));
    who = std::move(*answer);
  }
  if (const auto saved = client::save_login(target); !saved.ok()) return stop(saved.error());
  if (options.json)
    return print(dump(Json{{"url", target.url}, {"fingerprint", target.fingerprint}, {"whoami", who}}) +
                 "\n");
  std::string said = fmt::format("logged in to {}", target.url);
  if (!who.is_null()) {
    said += fmt::format(" as {}, {}", api::text(who, "user"), api::text(who, "role"));
    if (const auto tenant = api::text(who, "tenant"); !tenant.empty()) said += fmt::format(" of {}", tenant);
  }
  return print(said + fmt::format("\nkept in {} (mode 0600)\n", client::login_file()));
}

}  // namespace

std::function<int(const Context&)> bind_login(CLI::App& app) {
  auto options = std::make_shared<Options>();
  app.add_option("url", options->url, "https://HOST or https://HOST:PORT, or unix:FILE")->required();
  app.add_option("--token-file", options->token_file,
                 "Read the token from this file, - for standard input (default: asks, without showing it)")
      ->type_name("FILE");
  app.add_option("--fingerprint", options->fingerprint,
                 "SHA-256 of the server's certificate, pinned without a question")
      ->type_name("SHA256");
  app.add_option("--ca", options->ca, "Trust what this authority signed, instead of pinning")
      ->type_name("FILE");
  app.add_option("--certificate", options->certificate, "Client certificate, PEM: instead of a token")
      ->type_name("FILE");
  app.add_option("--key", options->key, "Its key, PEM (default: in the same file)")->type_name("FILE");
  app.add_flag("--unchecked", options->unchecked, "Keep it without asking the server who it is");
  app.add_flag("--json", options->json, "For programs");
  return [options](const Context& context) { return login(context, *options); };
}

std::function<int(const Context&)> bind_logout(CLI::App&) {
  return [](const Context& context) {
    const auto gone = client::forget_login();
    if (!gone.ok()) return fail(context, Error(gone.error()).in("logout"));
    if (!*gone) return print("there was no login\n");
    return print(
        "forgotten on this machine; the token itself still is good: bulkhead token revoke ends it\n");
  };
}

}  // namespace bulkhead::cli
