#include "core/lease/lease.hpp"

#include <map>
#include <set>

#include <gtest/gtest.h>

namespace bulkhead::lease {
namespace {

constexpr std::array all_states{State::requested, State::queued, State::preparing, State::active,
                                State::releasing, State::ended,  State::failed};
constexpr std::array all_events{Event::wait,     Event::place,   Event::ready,   Event::cannot,
                                Event::withdraw, Event::release, Event::expire,  Event::deadline,
                                Event::preempt,  Event::lost,    Event::scrubbed};

TEST(Lease, what_is_over_stays_over) {
  for (const State state : all_states)
    for (const Event event : all_events)
      EXPECT_TRUE(!over(state) || !next(state, event)) << name_of(state) << ' ' << name_of(event);
}

TEST(Lease, nothing_that_held_something_ends_without_being_scrubbed_or_lost) {
  for (const Transition& one : transitions()) {
    if (!holds(one.from) || holds(one.to)) continue;
    // Out of preparing: the preparation itself takes back what it made before it says that it cannot, or that
    // it waits again.
    EXPECT_TRUE(one.event == Event::scrubbed || one.event == Event::lost || one.from == State::preparing)
        << one.what;
  }
}

TEST(Lease, every_state_is_reached_and_every_life_can_end) {
  std::set<State> reached{State::requested};
  for (std::size_t before = 0; before != reached.size();) {
    before = reached.size();
    for (const Transition& one : transitions())
      if (reached.contains(one.from)) reached.insert(one.to);
  }
  EXPECT_EQ(reached.size(), all_states.size());
  std::set<State> ends{State::ended, State::failed};
  for (std::size_t before = 0; before != ends.size();) {
    before = ends.size();
    for (const Transition& one : transitions())
      if (ends.contains(one.to)) ends.insert(one.from);
  }
  EXPECT_EQ(ends.size(), all_states.size());
}

TEST(Lease, an_event_means_one_thing_in_a_state) {
  std::set<std::pair<State, Event>> seen;
  for (const Transition& one : transitions())
    EXPECT_TRUE(seen.insert({one.from, one.event}).second) << one.what;
}

TEST(Lease, only_a_prepared_lease_becomes_active) {
  for (const Transition& one : transitions())
    EXPECT_TRUE(one.to != State::active || (one.from == State::preparing && one.event == Event::ready));
}

TEST(Lease, an_ask_comes_back_as_it_was_written) {
  const Json json = *parse_json(
      R"({"class":"mig","profile":"3g.40gb","count":2,"topology":"spread","ttlSeconds":600,"wait":true,
    "deadline":1800000000000,"priority":-5,"preemptible":true,"models":["*H100*"],"label":"night"})");
  const auto ask = parse_ask(json);
  ASSERT_TRUE(ask.ok()) << ask.error().message();
  EXPECT_EQ(ask->profile, "3g.40gb");
  EXPECT_EQ(ask->topology, Topology::spread);
  const auto again = parse_ask(to_json(*ask));
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(*ask, *again);
}

TEST(Lease, every_mistake_of_an_ask_is_told_at_once) {
  const auto ask = parse_ask(*parse_json(
      R"({"class":"share","count":0,"ttlSeconds":1,"topolgy":"any","weight":5000,"profile":"1g.10gb"})"));
  ASSERT_FALSE(ask.ok());
  for (const char* word : {"count:", "ttlSeconds:", "topolgy: no such key; did you mean 'topology'",
                           "weight:", "profile: is for class mig", "memory: is missing"})
    EXPECT_NE(ask.error().message().find(word), std::string::npos) << word << "\n" << ask.error().message();
}

TEST(Lease, a_number_that_cannot_work_is_refused_by_its_name) {
  const std::string share = R"({"class":"share","memory":1073741824)";
  for (const auto& [key, values] : std::map<std::string, std::vector<std::string>>{
           {"memory",
            {"0", "20", "-1", "1048576", "67108863", "1125899906842625", "18446744073709551616", "1e9"}},
           {"weight", {"0", "-1", "1001", "4294967297", "18446744073709551617", "1.5", "\"7\""}},
           {"count", {"0", "-1", "65", "1000000000", "4294967297", "1e9"}},
           {"ttlSeconds", {"0", "9", "-60", "7776001", "18446744073709551615", "1e3"}},
           {"priority", {"-101", "101", "9223372036854775808"}},
           {"deadline", {"-1", "253402300800000", "18446744073709551616"}}})
    for (const auto& value : values) {
      // The last of two keys of one name would count: the memory of `share` is left out where it is at hand.
      const std::string head = key == "memory" ? R"({"class":"share")" : share;
      const auto ask = parse_ask(*parse_json(head + ",\"" + key + "\":" + value + "}"));
      ASSERT_FALSE(ask.ok()) << key << " " << value;
      EXPECT_NE(ask.error().message().find(key + ": "), std::string::npos) << ask.error().message();
    }
  const auto small = parse_ask(*parse_json(R"({"class":"share","memory":20})"));
  EXPECT_NE(small.error().message().find("the smallest share is 64 MiB"), std::string::npos);
  const auto least = parse_ask(*parse_json(R"({"class":"share","memory":67108864})"));
  ASSERT_TRUE(least.ok()) << least.error().message();
  EXPECT_EQ(*least->memory, smallest_share);
}

TEST(Lease, an_ask_without_a_class_is_not_guessed) {
  EXPECT_FALSE(parse_ask(Json::object()).ok());
  EXPECT_FALSE(parse_ask(Json::array()).ok());
  EXPECT_FALSE(parse_ask(Json(7)).ok());
}

Lease whole() {
  Lease lease;
  lease.id = 7;
  lease.tenant = "blue";
  lease.user = "ann";
  lease.ask.profile = "1g.10gb";
  lease.state = State::active;
  lease.created = WallTime(std::chrono::milliseconds(1'700'000'000'000));
  lease.active_since = lease.created;
  lease.expires = lease.created + std::chrono::seconds(600);
  Part part;
  part.gpu = {"GPU-1"};
  part.device = {"MIG-1"};
  part.profile = "1g.10gb";
  part.start = 2;
  part.gpu_instance = 9;
  part.compute_instance = 0;
  part.generation = 41;
  part.memory = mebibytes(9984);
  part.device_nodes = {"/dev/nvidia0"};
  part.cdi = "bulkhead.dev/slice=l7-0";
  part.made = true;
  lease.parts = {part, part};
  lease.reason = "granted";
  lease.ways = {"wait"};
  lease.version = 3;
  return lease;
}

TEST(Lease, a_record_comes_back_exactly) {
  const Json json = to_json(whole());
  const auto again = parse(json);
  ASSERT_TRUE(again.ok()) << again.error().message();
  EXPECT_EQ(to_json(*again), json);
}

TEST(Lease, a_record_of_a_share_from_before_there_was_a_smallest_is_read) {
  Json json = to_json(whole());
  json["ask"] = Json{{"class", "share"}, {"memory", 1048576}, {"weight", 1}};
  EXPECT_TRUE(parse(json).ok());
}

TEST(Lease, a_damaged_record_is_refused_with_its_keys) {
  Json json = to_json(whole());
  json["state"] = "half";
  json["parts"][1]["start"] = -1;
  const auto bad = parse(json);
  ASSERT_FALSE(bad.ok());
  EXPECT_NE(bad.error().message().find("parts[1].start"), std::string::npos);
  EXPECT_NE(bad.error().message().find("state:"), std::string::npos);
}

TEST(Lease, a_program_of_a_lease_without_devices_sees_none) {
  Lease lease = whole();
  lease.parts.clear();
  const auto none = environment(lease);
  EXPECT_EQ(none.front(), (std::pair<std::string, std::string>("CUDA_VISIBLE_DEVICES", "")));
  const auto two = environment(whole());
  EXPECT_EQ(two.front().second, "MIG-1,MIG-1");
}

TEST(Lease, a_renewal_never_shortens) {
  const Lease lease = whole();
  const WallTime now = lease.created;
  EXPECT_EQ(*renewed(lease, std::chrono::seconds(60), now), *lease.expires);
  EXPECT_EQ(*renewed(lease, std::chrono::seconds(6000), now), now + std::chrono::seconds(6000));
  EXPECT_FALSE(renewed(lease, std::chrono::seconds(1), now).ok());
  EXPECT_FALSE(renewed(lease, longest + std::chrono::seconds(1), now).ok());
}

TEST(Lease, every_class_says_what_it_does_not_isolate) {
  for (const Class cls : {Class::mig, Class::share, Class::exclusive, Class::passthrough}) {
    const auto words = guarantees(cls);
    ASSERT_FALSE(words.empty());
    EXPECT_EQ(words.back().rfind("not isolated:", 0), 0U) << words.back();
  }
}

}  // namespace
}  // namespace bulkhead::lease
