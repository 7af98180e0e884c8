#include "cli/api.hpp"

#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <cstdio>

#include <fmt/format.h>
#include <CLI/App.hpp>

#include "base/text.hpp"

namespace bulkhead::cli::api {

void add_url(CLI::App& app, std::string& url) {
  app.add_option(
         "--url", url,
         "The server, https://HOST:PORT or unix:FILE (default: BULKHEAD_URL, the login, this host's socket)")
      ->type_name("URL");
}

Result<std::unique_ptr<Client>> connect(const std::string& url) {
  BH_TRY(auto target, client::target(url.empty() ? std::nullopt : std::optional(url)));
  return Client::connect(std::move(target));
}

Result<Json> document(const Client& client, Result<Answer> answer) {
  if (!answer.ok()) return std::move(answer).error();
  if (answer->status >= 200 && answer->status < 300) return std::move(answer->body);
  auto error = client::problem_error(*answer);
  const bool local = client.target().url.starts_with("unix:");
  if (answer->status == 401) {
    return std::move(error).with_hint(
        local ? "the daemon does not know this user: name it under `local` in serve.yaml, or use a token: "
                "bulkhead login https://HOST"
              : fmt::format(
                    "bulkhead login {}   with a token that is good; an administrator makes one: bulkhead "
                    "token create",
                    client.target().url));
  }
  if (answer->status == 403 && error.hint().empty())
    return std::move(error).with_hint(
        "ask an administrator; with another token that may: bulkhead login --help");
  return error;
}

Result<Json> get(Client& client, std::string_view path) {
  return document(client, client.call("GET", path, std::nullopt));
}

Result<Json> all(Client& client, const std::string& path, std::size_t most) {
  Json out = Json::array();
  std::string after;
  const char* mark = path.find('?') == std::string::npos ? "?" : "&";
  while (out.size() < most) {
    BH_TRY(
        const Json page,
        get(client, fmt::format("{}{}limit={}{}", path, mark, std::min<std::size_t>(most - out.size(), 200),
                                after.empty() ? "" : "&after=" + client::segment(after))));
    const auto items = page.find("items");
    if (items == page.end() || !items->is_array())
      return Error(Errc::corrupt, "the server's page has no items");
    for (const auto& one : *items)
      if (one.is_object()) out.push_back(one);
    auto next = text(page, "next");
    if (next.empty() || next == after || items->empty()) break;
    after = std::move(next);
  }
  return out;
}

int refused(const Context& context, std::string_view verb, const Error& error) {
  const int code = fail(context, Error(error).in(verb));
  return error.code() == Errc::no_capacity ? exit_findings : code;
}

std::string text(const Json& object, const char* key) {
  if (!object.is_object()) return {};
  const auto at = object.find(key);
  return at != object.end() && at->is_string() ? printable(at->get_ref<const std::string&>(), 2048)
                                               : std::string();
}

std::int64_t number(const Json& object, const char* key) {
  if (!object.is_object()) return 0;
  const auto at = object.find(key);
  return at != object.end() && at->is_number_integer() ? at->get<std::int64_t>() : 0;
}

std::string span(std::int64_t seconds) {
  if (seconds < 60) return fmt::format("{}s", seconds);
  if (seconds < 3600) return fmt::format("{}m", seconds / 60);
  if (seconds < 48 * 3600)
    return seconds % 3600 < 60 ? fmt::format("{}h", seconds / 3600)
                               : fmt::format("{}h {}m", seconds / 3600, seconds % 3600 / 60);
  return fmt::format("{}d", seconds / 86'400);
}

std::string when(std::string_view rfc3339) {
  tm parts{};
  const std::string copy(rfc3339);
  const char* end = ::strptime(copy.c_str(), "%Y-%m-%dT%H:%M:%S", &parts);
  if (end == nullptr) return printable(rfc3339, 40);
  const auto at = ::timegm(&parts), now = ::time(nullptr);
  if (at == now) return "now";
  return at > now ? "in " + span(at - now) : span(now - at) + " ago";
}

bool over(std::string_view state) { return state == "ended" || state == "failed"; }

Result<std::uint64_t> seconds_of(const std::string& text) {
  if (text.ends_with('d')) {
    const auto days = parse_u64(std::string_view(text).substr(0, text.size() - 1));
    if (days && *days <= 90) return *days * 86'400;
    return Error(Errc::invalid, fmt::format("{} is no number of days up to 90", printable(text, 40)),
                 "like 30m, 8h or 7d");
  }
  BH_TRY(const auto ns, parse_duration(text));
  return ns / 1'000'000'000;
}

volatile std::sig_atomic_t Asked::to_stop = 0;

Asked::Asked() {
  to_stop = 0;
  struct sigaction ask = {};
  ask.sa_handler = [](int number) { to_stop = number; };
  sigaction(SIGINT, &ask, &interrupt_);
  sigaction(SIGTERM, &ask, &terminate_);
}
Asked::~Asked() {
  sigaction(SIGINT, &interrupt_, nullptr);
  sigaction(SIGTERM, &terminate_, nullptr);
}

std::string id_of_lease(const Json& lease) { return std::to_string(number(lease, "id")); }

bool confirm(std::string_view question) {
  if (::isatty(STDIN_FILENO) == 0) return false;
  std::fputs(fmt::format("{} [y/N] ", question).c_str(), stderr);
  std::array<char, 64> line{};
  if (std::fgets(line.data(), line.size(), stdin) == nullptr) return false;
  const auto said = lower(trim(line.data()));
  return said == "y" || said == "yes";
}

std::string fresh_key() {
  std::array<unsigned char, 16> bytes{};
  std::string out;
  if (::getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) return out;
  for (const auto byte : bytes) out += fmt::format("{:02x}", byte);
  return out;
}

}  // namespace bulkhead::cli::api
