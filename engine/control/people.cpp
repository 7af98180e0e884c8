// Who may: rights, tenants, tokens, and what is written of them.
#include <openssl/crypto.h>
#include <openssl/rand.h>

#include <algorithm>

#include <fmt/format.h>

#include "base/text.hpp"
#include "engine/control/inside.hpp"

namespace bulkhead::control {

namespace {

using access::Resource;
using access::Verb;
using access::Whose;

constexpr std::size_t user_bytes = 128, note_bytes = 200, id_digits = 16, secret_digits = 64;
constexpr std::size_t key_bytes = 128, hex_digits = 64;
constexpr std::size_t most_tokens = 100'000, most_tenants = 10'000;
constexpr unsigned refused_a_minute = 600;  // lines of the audit log that strangers can cause
constexpr std::uint64_t minute_ns = 60'000'000'000;

bool is_hex(std::string_view text, std::size_t digits) {
  return text.size() == digits && std::all_of(text.begin(), text.end(), [](char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
         });
}
bool printable_text(std::string_view text, std::size_t most) {
  return text.size() <= most && std::all_of(text.begin(), text.end(), [](char c) {
           return static_cast<unsigned char>(c) >= 0x20 && c != 0x7f;
         });
}

std::string random_hex(std::size_t digits) {
  std::array<unsigned char, secret_digits / 2> bytes{};
  const int done = RAND_bytes(bytes.data(), static_cast<int>(digits / 2));
  BH_ASSERT(done == 1);
  std::string text;
  for (std::size_t i = 0; i < digits / 2; ++i) text += fmt::format("{:02x}", bytes[i]);
  OPENSSL_cleanse(bytes.data(), bytes.size());
  return text;
}

User seen(const book::Token& token) {
  User user{.id = token.id,
            .user = token.user,
            .tenant = token.tenant,
            .note = token.note,
            .created = token.created,
            .expires = token.expires,
            .revoked = token.revoked,
            .certificate = !token.certificate.empty()};
  if (const auto role = access::parse_role(token.role); role.ok()) user.role = *role;
  return user;
}
Json json_of(const User& user) {
  Json out{{"id", user.id},
           {"user", user.user},
           {"tenant", user.tenant},
           {"role", access::name_of(user.role)},
           {"note", user.note},
           {"created", user.created.time_since_epoch().count()},
           {"certificate", user.certificate}};
  if (user.expires) out["expires"] = user.expires->time_since_epoch().count();
  if (user.revoked) out["revoked"] = user.revoked->time_since_epoch().count();
  return out;
}

bool good(const book::Token& token, WallTime now) {
  return !token.revoked && (!token.expires || now < *token.expires);
}

std::optional<book::Hash> hash_of(std::string_view hex) {
  book::Hash hash{};
  if (hex.size() != hex_digits) return std::nullopt;
  for (std::size_t i = 0; i < hash.size(); ++i) {
    const auto byte = parse_u64(hex.substr(2 * i, 2), 16);
    if (!byte) return std::nullopt;
    hash[i] = static_cast<std::uint8_t>(*byte);
  }
  return hash;
}

}  // namespace

const Caller& daemon_caller() {
  static const Caller caller{.user = "bulkhead", .role = access::Role::operate};
  return caller;
}

std::optional<Caller> Control::authenticate(std::string_view bearer, std::string_view certificate) const {
  const auto index = inside_->token_index.load();
  if (!index) return std::nullopt;
  const WallTime now = inside_->now_wall();
  const auto caller_of = [&](const book::Token& token) -> std::optional<Caller> {
    const auto role = access::parse_role(token.role);
    if (!role.ok() || !good(token, now)) return std::nullopt;
    return Caller{.user = token.user, .tenant = token.tenant, .role = *role};
  };
  if (!bearer.empty()) {
    constexpr std::string_view before = "bh_";
    if (bearer.size() != before.size() + id_digits + 1 + secret_digits || !bearer.starts_with(before) ||
        bearer[before.size() + id_digits] != '_')
      return std::nullopt;
    const auto id = bearer.substr(before.size(), id_digits);
    const auto secret = book::sha256(bearer.substr(before.size() + id_digits + 1));
    // The id is public. An unknown one costs the same compare, against what no secret hashes to.
    static const book::Hash nobody{};
    const auto token = index->by_id.find(id);
    const bool there = token != index->by_id.end() && token->second.certificate.empty();
    const auto& stored = there ? token->second.secret : nobody;
    const bool same = CRYPTO_memcmp(stored.data(), secret.data(), secret.size()) == 0;
    if (!there || !same) return std::nullopt;
    return caller_of(token->second);
  }
  if (!certificate.empty()) {
    // A fingerprint is no secret: the TLS handshake has proven the key that belongs to it.
    const auto id = index->by_certificate.find(lower(certificate));
    if (id == index->by_certificate.end()) return std::nullopt;
    const auto token = index->by_id.find(id->second);
    if (token == index->by_id.end()) return std::nullopt;
    return caller_of(token->second);
  }
  return std::nullopt;
}

std::optional<Refusal> Control::Inside::denied(const Caller& caller, Right right, const std::string& owner,
                                               const std::string& what) const {
  const auto whose = !owner.empty() && owner == caller.tenant ? Whose::own : Whose::others;
  if (access::may(caller.role, right.verb, right.resource, whose)) return std::nullopt;
  // Who may not even read it learns nothing of it.
  if (right.verb != Verb::create && !access::may(caller.role, Verb::read, right.resource, whose) &&
      access::may(caller.role, Verb::read, right.resource, Whose::own))
    return Refusal{.why = Denied::not_found, .what = fmt::format("there is no {}", what)};
  return Refusal{.why = Denied::forbidden,
                 .what = fmt::format(
                     "the role {} may not {} {}", access::name_of(caller.role), access::name_of(right.verb),
                     whose == Whose::own ? fmt::format("its own {}", access::name_of(right.resource))
                                         : fmt::format("{}", access::name_of(right.resource)))};
}

// What the driver and the disk say is full of the host's names: paths, processes, other GPUs.
std::string Control::Inside::trouble_for(const Caller& caller) const {
  if (access::may(caller.role, access::Verb::read, Resource::gpus, access::Whose::others))
    return disk_trouble.empty() ? driver_trouble : disk_trouble;
  return "the host cannot be changed now; its operators are told why";
}

void Control::Inside::note(Turn& turn, const Caller& caller, std::string verb, const std::string& what,
                           std::string tenant, std::string outcome, Json detail) {
  turn.batch.audit.push_back(
      {.at = turn.now,
       .user = caller.user.substr(0, book::name_bytes),
       .role = &caller == &daemon_caller() ? "" : std::string(access::name_of(caller.role)),
       .tenant = std::move(tenant),
       .from = caller.from.substr(0, book::name_bytes),
       .verb = std::move(verb),
       .what = printable(what, book::text_bytes / 2),  // a line that does not fit would take its batch along
       .outcome = std::move(outcome),
       .detail = std::move(detail)});
}

void Control::Inside::note_refusal(Turn& turn, const Caller& caller, const std::string& verb,
                                   const std::string& what, const Refusal& refusal,
                                   const std::string& tenant) {
  if (!worth_a_line(turn, caller.tenant)) return;
  Json detail{{"why", refusal.what.substr(0, book::text_bytes)}};
  if (!refusal.reasons.empty()) {
    detail["reasons"] = Json::array();
    for (const auto& reason : refusal.reasons) {
      if (detail["reasons"].size() == 16) break;
      detail["reasons"].push_back(reason.substr(0, 1024));
    }
  }
  note(turn, caller, verb, what, tenant, fmt::format("refused: {}", name_of(refusal.why)), std::move(detail));
}

// A flood of refused requests must not fill the disk with lines: beyond a number a minute of one tenant
// (those of none count as one) they are counted.
bool Control::Inside::worth_a_line(Turn& turn, const std::string& tenant) {
  const std::uint64_t minute = monotonic_ns() / minute_ns;
  Flood& flood = floods[live.tenants.contains(tenant) ? tenant : std::string()];
  if (minute != flood.minute) {
    const auto dropped = flood.dropped;
    flood = {.minute = minute};
    if (dropped > 0)
      note(turn, daemon_caller(), "refuse", "access", tenant, "done", Json{{"notWritten", dropped}});
  }
  if (flood.count >= refused_a_minute) {
    ++flood.dropped;
    return false;
  }
  ++flood.count;
  return true;
}

void Control::Inside::refused(Turn& turn, const Caller& caller, const std::string& verb,
                              const std::string& what, const std::string& why) {
  if (!worth_a_line(turn, caller.tenant)) return;
  note(turn, caller, printable(verb, 100), "access/" + printable(what, 400), caller.tenant, "refused",
       Json{{"why", printable(why, 400)}});
}

// ---- tenants
void Control::Inside::set_tenant(Turn& turn, const std::string& name,
                                 std::shared_ptr<const tenant::Tenant> next) {
  const auto set = [this, name](const std::shared_ptr<const tenant::Tenant>& value) {
    if (value)
      live.tenants[name] = value;
    else
      live.tenants.erase(name);
  };
  const auto old = live.tenants.find(name);
  turn.undo.push_back([set, was = old == live.tenants.end() ? nullptr : old->second] { set(was); });
  set(next);
  set_nominals();
}

std::optional<Answer<Json>> Control::Inside::said_before(const Turn& turn, const Caller& caller,
                                                         const Once& once, book::Key& key) const {
  if (once.key.empty()) return std::nullopt;
  const auto request = hash_of(once.request);
  const bool good = once.key.size() <= key_bytes && std::all_of(once.key.begin(), once.key.end(),
                                                                [](char c) { return c > 0x20 && c < 0x7f; });
  if (!good || !request)
    return Refusal{.why = Denied::invalid,
                   .what = fmt::format("the idempotency key: 1 to {} printable characters", key_bytes)};
  // The same words of two callers are two keys.
  key = {.user = book::hex(book::sha256(caller.user + "\n" + caller.tenant)),
         .key = once.key,
         .request = *request,
         .at = turn.now};
  std::optional<book::Key> first;
  if (const auto at = turn.keys.find({key.user, key.key}); at != turn.keys.end()) {
    first = at->second;
  } else {
    auto kept = book->key(key.user, key.key);
    if (!kept.ok()) return Refusal{.why = Denied::unavailable, .what = kept.error().message()};
    first = std::move(*kept);
  }
  if (!first || first->at + settings.key_keep <= turn.now) return std::nullopt;
  if (first->request != key.request)
    return Refusal{.why = Denied::conflict,
                   .what = "this idempotency key was used with another request",
                   .ways = {"a new request takes a new key"}};
  auto json = parse_json(first->body);
  if (!json.ok()) return Refusal{.why = Denied::unavailable, .what = json.error().message()};
  return std::move(*json);
}

void Control::Inside::keep_answer(Turn& turn, book::Key key, const Json& answer) const {
  if (key.key.empty()) return;
  key.status = 201;
  key.body = answer.dump(-1, ' ', false, Json::error_handler_t::replace);
  turn.keys[{key.user, key.key}] = key;
  turn.batch.keys.push_back(std::move(key));
}

void Control::Inside::put_tenant(Turn& turn, const Caller& caller, tenant::Tenant wanted,
                                 std::optional<std::int64_t> version, const Once& once,
                                 const Then<tenant::Tenant>& then) {
  const std::string what = fmt::format("tenant/{}", printable(wanted.name, 80));
  const auto refuse = [&](Refusal refusal) {
    note_refusal(turn, caller, "put", what, refusal, "");
    turn.after.push_back([then, refusal = std::move(refusal)] { then(refusal); });
  };
  const auto name = tenant::parse_name(wanted.name);
  if (!name.ok()) return refuse({.why = Denied::invalid, .what = name.error().message()});
  const auto old = live.tenants.find(*name);
  const bool there = old != live.tenants.end();
  const auto right = !there ? Right{Verb::create, Resource::tenants} : Right{Verb::change, Resource::tenants};
  if (auto no = denied(caller, right, *name, what)) return refuse(std::move(*no));
  book::Key key;
  if (auto before = said_before(turn, caller, once, key)) {
    if (auto* no = std::get_if<Refusal>(&*before)) return refuse(std::move(*no));
    auto tenant = tenant::parse_tenant(std::get<Json>(*before));
    if (!tenant.ok()) return refuse({.why = Denied::unavailable, .what = tenant.error().message()});
    turn.after.push_back([then, tenant = std::move(*tenant)] { then(tenant); });
    return;
  }
  if (version && *version == 0 && there)
    return refuse({.why = Denied::conflict, .what = fmt::format("there is a tenant {} already", *name)});
  if (version && *version != 0 && (!there || old->second->version != *version))
    return refuse({.why = Denied::conflict,
                   .what = there ? fmt::format("tenant {} has version {}, not {}: it was changed meanwhile",
                                               *name, old->second->version, *version)
                                 : fmt::format("there is no tenant {}", *name)});
  if (!there && live.tenants.size() >= most_tenants)
    return refuse(
        {.why = Denied::too_many, .what = fmt::format("there are {} tenants already", most_tenants)});
  if (wanted.weight < tenant::min_weight || wanted.weight > tenant::max_weight)
    return refuse(
        {.why = Denied::invalid,
         .what = fmt::format("weight: must be from {} to {}", tenant::min_weight, tenant::max_weight)});
  if (!printable_text(wanted.note, note_bytes))
    return refuse({.why = Denied::invalid,
                   .what = fmt::format("note: at most {} bytes without control characters", note_bytes)});
  if (there && !(wanted.quota == old->second->quota))
    if (auto no = denied(caller, {Verb::change, Resource::quotas}, *name, what))
      return refuse(std::move(*no));
  wanted.created = there ? old->second->created : turn.now;
  wanted.version = there ? old->second->version + 1 : 1;
  const Json body = tenant::to_json(wanted);
  turn.batch.tenants.push_back({.name = *name, .body = body});
  note(turn, caller, there ? "change" : "create", what, *name, "done", body);
  set_tenant(turn, *name, std::make_shared<const tenant::Tenant>(wanted));
  keep_answer(turn, std::move(key), body);
  retry_queue = true;
  turn.after.push_back([then, wanted] { then(wanted); });
}

void Control::Inside::end_tenant(Turn& turn, const Caller& caller, const std::string& name,
                                 const Then<tenant::Tenant>& then) {
  const std::string what = fmt::format("tenant/{}", printable(name, 80));
  const auto refuse = [&](Refusal refusal) {
    note_refusal(turn, caller, "end", what, refusal, "");
    turn.after.push_back([then, refusal = std::move(refusal)] { then(refusal); });
  };
  const auto old = live.tenants.find(name);
  if (auto no = denied(caller, {Verb::end, Resource::tenants}, name, what)) return refuse(std::move(*no));
  if (old == live.tenants.end())
    return refuse(
        {.why = Denied::not_found, .what = fmt::format("there is no tenant {}", printable(name, 80))});
  const auto holding = live.held.find(name);
  if (holding != live.held.end() && holding->second.leases > 0) {
    std::vector<std::string> ids;
    for (const auto& [id, entry] : entries) {
      if (entry.lease->tenant != name) continue;
      ids.push_back(std::to_string(id));
      if (ids.size() == 16) break;
    }
    return refuse({.why = Denied::conflict,
                   .what = fmt::format("tenant {} has {} lease{}", name, holding->second.leases,
                                       holding->second.leases == 1 ? "" : "s"),
                   .ways = {fmt::format("release them first: {}", join(ids, ", "))}});
  }
  const tenant::Tenant gone = *old->second;
  turn.batch.tenants_gone.push_back(name);
  std::vector<book::Token> ended;
  for (const auto& [id, token] : tokens.by_id) {
    if (token.tenant != name || token.revoked) continue;
    ended.push_back(token);
    ended.back().revoked = turn.now;
  }
  for (const auto& token : ended) {
    set_token(turn, token);
    note(turn, caller, "revoke", "token/" + token.id, name, "done", json_of(seen(token)));
  }
  note(turn, caller, "end", what, name, "done", tenant::to_json(gone));
  set_tenant(turn, name, nullptr);
  turn.after.push_back([then, gone] { then(gone); });
}

// ---- tokens
void Control::Inside::set_token(Turn& turn, const book::Token& token) {
  turn.batch.tokens.push_back(token);
  const auto old = tokens.by_id.find(token.id);
  if (old == tokens.by_id.end()) {
    turn.undo.push_back([this, id = token.id, certificate = token.certificate] {
      tokens.by_id.erase(id);
      if (!certificate.empty()) tokens.by_certificate.erase(certificate);
    });
  } else {
    turn.undo.push_back([this, was = old->second] { tokens.by_id[was.id] = was; });
  }
  tokens.by_id[token.id] = token;
  if (!token.certificate.empty()) tokens.by_certificate[token.certificate] = token.id;
  // Before the answer: who is told that a token is revoked may rely on it.
  turn.after.insert(turn.after.begin(), [this] { publish_tokens(); });
}

void Control::Inside::publish_tokens() { token_index.store(std::make_shared<const TokenIndex>(tokens)); }

void Control::Inside::create_token(Turn& turn, const Caller& caller, const AskToken& ask,
                                   const Then<NewToken>& then) {
  const auto refuse = [&](Refusal refusal) {
    note_refusal(turn, caller, "create", "token", refusal, ask.tenant.substr(0, 63));
    turn.after.push_back([then, refusal = std::move(refusal)] { then(refusal); });
  };
  if (auto no = denied(caller, {Verb::create, Resource::tokens}, ask.tenant, "token"))
    return refuse(std::move(*no));
  if (ask.user.empty() || !printable_text(ask.user, user_bytes))
    return refuse({.why = Denied::invalid,
                   .what = fmt::format("user: 1 to {} bytes without control characters", user_bytes)});
  if (!printable_text(ask.note, note_bytes))
    return refuse({.why = Denied::invalid,
                   .what = fmt::format("note: at most {} bytes without control characters", note_bytes)});
  if (ask.role == access::Role::tenant && ask.tenant.empty())
    return refuse(
        {.why = Denied::invalid, .what = "tenant: is missing: a token of the role tenant names one"});
  if (!ask.tenant.empty() && !live.tenants.contains(ask.tenant))
    return refuse({.why = Denied::invalid,
                   .what = fmt::format("tenant: there is no tenant {}", printable(ask.tenant, 80))});
  if (ask.ttl && (ask.ttl->count() < 1 || *ask.ttl > std::chrono::hours(24 * 3660)))
    return refuse({.why = Denied::invalid, .what = "ttlSeconds: from 1 to ten years"});
  const std::string certificate = lower(ask.certificate);
  if (!certificate.empty() && !is_hex(certificate, secret_digits))
    return refuse({.why = Denied::invalid, .what = "certificate: its SHA-256, 64 hex digits"});
  if (const auto old = tokens.by_certificate.find(certificate); old != tokens.by_certificate.end()) {
    if (const auto token = tokens.by_id.find(old->second);
        token != tokens.by_id.end() && good(token->second, turn.now))
      return refuse({.why = Denied::conflict,
                     .what = fmt::format("token {} has this certificate already", old->second),
                     .ways = {fmt::format("revoke it first: bulkhead token revoke {}", old->second)}});
  }
  if (tokens.by_id.size() >= most_tokens)
    return refuse({.why = Denied::too_many, .what = fmt::format("there are {} tokens already", most_tokens)});
  book::Token token{.id = random_hex(id_digits),
                    .user = ask.user,
                    .role = std::string(access::name_of(ask.role)),
                    .tenant = ask.tenant,
                    .certificate = certificate,
                    .created = turn.now,
                    .note = ask.note};
  if (ask.ttl) token.expires = turn.now + *ask.ttl;
  std::string secret;
  if (certificate.empty()) {
    const std::string half = random_hex(secret_digits);
    token.secret = book::sha256(half);
    secret = fmt::format("bh_{}_{}", token.id, half);
  }
  set_token(turn, token);
  note(turn, caller, "create", "token/" + token.id, token.tenant, "done", json_of(seen(token)));
  turn.after.push_back([then, token, secret] { then(NewToken{.user = seen(token), .secret = secret}); });
}

void Control::Inside::revoke_token(Turn& turn, const Caller& caller, const std::string& id,
                                   const Then<User>& then) {
  const std::string what = fmt::format("token/{}", printable(id, 40));
  const auto refuse = [&](Refusal refusal) {
    note_refusal(turn, caller, "revoke", what, refusal, "");
    turn.after.push_back([then, refusal = std::move(refusal)] { then(refusal); });
  };
  const auto old = tokens.by_id.find(id);
  if (auto no = denied(caller, {Verb::end, Resource::tokens},
                       old == tokens.by_id.end() ? "" : old->second.tenant, what))
    return refuse(std::move(*no));
  if (old == tokens.by_id.end())
    return refuse({.why = Denied::not_found, .what = fmt::format("there is no token {}", printable(id, 80))});
  book::Token token = old->second;
  if (!token.revoked) {
    token.revoked = turn.now;
    set_token(turn, token);
    note(turn, caller, "revoke", what, token.tenant, "done", json_of(seen(token)));
  }
  turn.after.push_back([then, token] { then(seen(token)); });
}

void Control::Inside::list_tokens(Turn& turn, const Caller& caller, const Then<std::vector<User>>& then) {
  if (auto no = denied(caller, {Verb::read, Resource::tokens}, "", "tokens")) {
    note_refusal(turn, caller, "read", "token", *no, "");
    turn.after.push_back([then, no = std::move(*no)] { then(no); });
    return;
  }
  std::vector<User> all;
  for (const auto& [id, token] : tokens.by_id) all.push_back(seen(token));
  turn.after.push_back([then, all = std::move(all)] { then(all); });
}

void Control::Inside::reread(Turn& turn, const Caller& caller, const Then<bool>& then) {
  const auto refuse = [&](Refusal refusal) {
    note_refusal(turn, caller, "reload", "host", refusal, "");
    turn.after.push_back([then, refusal = std::move(refusal)] { then(refusal); });
  };
  if (auto no = denied(caller, {Verb::change, Resource::settings}, "", "host")) return refuse(std::move(*no));
  if (!settings.node_file.empty()) {
    // The old one stays in force where the new one has a mistake.
    if (const auto read = read_node_file(); !read.ok())
      return refuse({.why = Denied::invalid, .what = read.error().message()});
  }
  note(turn, caller, "reload", "host", "", "done", Json::object());
  turn.after.push_back([this, then] {
    reload = true;
    next_look = 0;
    then(true);
  });
}

void Control::Inside::drain(Turn& turn, const Caller& caller, bool on, const Then<bool>& then) {
  if (auto no = denied(caller, {Verb::change, Resource::settings}, "", "host")) {
    note_refusal(turn, caller, "drain", "host", *no, "");
    turn.after.push_back([then, no = std::move(*no)] { then(no); });
    return;
  }
  if (live.draining != on) {
    turn.undo.push_back([this, was = live.draining] { live.draining = was; });
    live.draining = on;
    retry_queue = true;
    turn.batch.settings.emplace_back("draining", on);
    note(turn, caller, on ? "drain" : "undrain", "host", "", "done", Json::object());
  }
  turn.after.push_back([then, on] { then(on); });
}

void Control::Inside::cordon(Turn& turn, const Caller& caller, const Uuid& gpu,
                             const std::optional<std::string>& why, const Then<PoolGpu>& then) {
  const std::string what = "gpu/" + printable(gpu.text, 96);
  const std::string verb = why ? "cordon" : "uncordon";
  const auto refuse = [&](Refusal refusal) {
    note_refusal(turn, caller, verb, what, refusal, "");
    turn.after.push_back([then, refusal = std::move(refusal)] { then(refusal); });
  };
  if (auto no = denied(caller, {Verb::change, Resource::gpus}, "", what)) return refuse(std::move(*no));
  const auto known =
      std::find_if(gpus.begin(), gpus.end(), [&](const GpuFacts& facts) { return facts.uuid == gpu; });
  // A cordon of one that is gone for good can be taken back; a new one would never be seen.
  if (known == gpus.end() && (why || !cordons.contains(gpu.text)))
    return refuse({.why = Denied::not_found,
                   .what = fmt::format("there is no GPU {}", printable(gpu.text, 64)),
                   .ways = {"bulkhead gpus --json lists them"}});
  if (why && (why->empty() || !printable_text(*why, most_why)))
    return refuse(
        {.why = Denied::invalid,
         .what = fmt::format("a cordon needs a reason, of one line and at most {} bytes", most_why)});
  const bool stands = cordons.contains(gpu.text);
  if (stands != why.has_value()) {
    auto next = cordons;
    if (why)
      next[gpu.text] = {.why = *why, .by = caller.user, .since = turn.now};
    else
      next.erase(gpu.text);
    Json kept = Json::object();
    for (const auto& [uuid, one] : next)
      kept[uuid] = Json{{"why", one.why}, {"by", one.by}, {"since", one.since.time_since_epoch().count()}};
    const auto put = [this](const std::map<std::string, Cordon>& to) {
      cordons = to;
      for (placement::GpuNo number = 0; number < gpus.size(); ++number) set_door(number);
      retry_queue = true;
    };
    turn.undo.push_back([put, was = cordons] { put(was); });
    put(next);
    turn.batch.settings.emplace_back("cordons", std::move(kept));
    note(turn, caller, verb, what, "", "done", why ? Json{{"why", *why}} : Json::object());
  }
  turn.after.push_back([this, then, gpu] {
    for (placement::GpuNo number = 0; number < gpus.size(); ++number)
      if (gpus[number].uuid == gpu) return then(pool_gpu(number));
    then(PoolGpu{.gpu = gpu, .pool = "none", .why = "it is not there"});
  });
}

void Control::Inside::evict(Turn& turn, const Caller& caller, std::int64_t id, const std::string& why,
                            const Then<lease::Lease>& then) {
  const auto refuse = [&](Refusal refusal) {
    note_refusal(turn, caller, "evict", lease_name(id), refusal, "");
    turn.after.push_back([then, refusal = std::move(refusal)] { then(refusal); });
  };
  std::shared_ptr<const lease::Lease> lease;
  if (auto no = denied(caller, {Verb::change, Resource::gpus}, "", lease_name(id)))
    return refuse(std::move(*no));
  if (auto no = find_lease(caller, Verb::end, id, std::nullopt, lease)) return refuse(std::move(*no));
  if (why.empty() || !printable_text(why, most_why))
    return refuse(
        {.why = Denied::invalid,
         .what = fmt::format("who loses a lease is told why, in one line of at most {} bytes", most_why)});
  switch (lease->state) {
    case lease::State::requested:
    case lease::State::queued:
      step(turn, caller, id, lease::Event::withdraw, why);
      break;
    case lease::State::preparing:
      end_holding(turn, caller, id, lease::Event::withdraw, why);
      break;
    case lease::State::active:
      end_holding(turn, caller, id, lease::Event::release, why);
      break;
    case lease::State::releasing:
    case lease::State::ended:
    case lease::State::failed:
      break;
  }
  const auto now = live.leases.find(id);
  turn.after.push_back([then, lease = now == live.leases.end() ? lease : now->second] { then(*lease); });
}

}  // namespace bulkhead::control
