// What an action is: its name, its words, its opposite, its JSON.
#include <algorithm>
#include <array>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/plan/plan.hpp"

namespace bulkhead::plan {

namespace {

template <class... Ts>
struct Overloaded : Ts... {
  using Ts::operator()...;
};
template <class... Ts>
Overloaded(Ts...) -> Overloaded<Ts...>;

// NVML_COMPUTE_INSTANCE_PROFILE_* by compute slices (nvml.h); 1 slice "rev1" is 7.
struct ComputeRow {
  unsigned profile, slices;
};
constexpr std::array<ComputeRow, 8> compute_rows = {
    {{0, 1}, {1, 2}, {2, 3}, {3, 4}, {4, 7}, {5, 8}, {6, 6}, {7, 1}}};

unsigned slices_of(unsigned profile) {
  for (const auto& row : compute_rows) {
    if (row.profile == profile) return row.slices;
  }
  return 0;
}
unsigned compute_profile_of(unsigned slices) {
  for (const auto& row : compute_rows) {
    if (row.slices == slices) return row.profile;
  }
  return 0;
}
// The "3" of "3g.40gb".
unsigned compute_slices_in(std::string_view profile) {
  const auto end = profile.find('g');
  const auto slices = end == std::string_view::npos ? std::nullopt : parse_u64(profile.substr(0, end));
  return slices && *slices <= 64 ? static_cast<unsigned>(*slices) : 0;
}

std::string name_of_gpu(const Uuid& uuid, const inventory::Host* host) {
  if (host != nullptr) {
    for (const auto& gpu : host->gpus) {
      if (gpu.uuid == uuid) return fmt::format("gpu {}", gpu.index);
    }
  }
  return printable(uuid.text, 64);
}

std::string span_of(const mig::Placement& place) {
  return place.size <= 1 ? fmt::format("{}", place.start)
                         : fmt::format("{}-{}", place.start, place.end() - 1);
}

std::string watts_of(Milliwatts power) {
  return power.count % 1000 == 0 ? fmt::format("{} W", power.count / 1000)
                                 : fmt::format("{:.1f} W", static_cast<double>(power.count) / 1000);
}

std::string clocks_of(const std::optional<spec::ClockLock>& lock) {
  return lock ? fmt::format("{}-{} MHz", lock->low.count, lock->high.count) : "unlocked";
}

Json json_of(const mig::Placement& place) { return Json{{"start", place.start}, {"size", place.size}}; }
Json json_of(const std::optional<spec::ClockLock>& lock) {
  return lock ? Json{{"low_mhz", lock->low.count}, {"high_mhz", lock->high.count}} : Json(nullptr);
}
void put_target(Json& out, const passthrough::Target& target) {
  out["function"] = target.function.str();
  out["vf"] = target.vf ? Json(*target.vf) : Json(nullptr);
}
std::string driver_step(const SetDriver& a) {
  const auto name = [](const std::string& driver) {
    return driver.empty() ? "no driver" : driver == "*" ? "the host's own driver" : printable(driver, 40);
  };
  const std::string where = passthrough::str(a.target);
  if (a.before.driver == a.after.driver) {
    return a.after.driver_override.empty()
               ? fmt::format("{}: {} is not held to it any more", where, name(a.after.driver))
               : fmt::format("{}: hold it to {}", where, printable(a.after.driver_override, 40));
  }
  // Only what goes back to the host is replugged; giving it away again finds it anew where it is missing.
  const bool replugged = a.replug && a.after.driver_override != passthrough::vfio_driver;
  return fmt::format("{}: {} (was {}){}", where, name(a.after.driver), name(a.before.driver),
                     replugged ? ", removed from the bus and found anew" : "");
}
Json json_of(const std::optional<std::string>& text) { return text ? Json(*text) : Json(nullptr); }

// ---- reading back, with every field checked: a journal is a file that somebody may have touched
class Fields {
 public:
  explicit Fields(const Json& json) : json_(json) {}

  void read(const char* key, bool& out) {
    if (const Json* value = get(key, &Json::is_boolean, "true or false")) out = value->get<bool>();
  }
  // A key that older journals lack: `out` stays as it is.
  template <class T>
  void read_since(const char* key, T& out) {
    if (json_.is_object() && json_.contains(key)) read(key, out);
  }
  void read(const char* key, unsigned& out) {
    if (const Json* value = get(key, &Json::is_number_unsigned, "a whole number")) {
      const auto wide = value->get<std::uint64_t>();
      if (wide > 0xffffffffU) return wrong(key, "a number below 2^32");
      out = static_cast<unsigned>(wide);
    }
  }
  void read(const char* key, std::optional<unsigned>& out) {
    if (is_null(key)) return;
    unsigned value = 0;
    read(key, value);
    out = value;
  }
  void read(const char* key, Milliwatts& out) {
    if (const Json* value = get(key, &Json::is_number_unsigned, "a whole number"))
      out = Milliwatts(value->get<std::uint64_t>());
  }
  void read(const char* key, std::string& out) {
    if (const Json* value = get(key, &Json::is_string, "text")) {
      const auto& text = value->get_ref<const std::string&>();
      if (text.size() > text_limit) return wrong(key, "shorter text");
      out = text;
    }
  }
  void read(const char* key, std::optional<std::string>& out) {
    if (is_null(key)) return;
    std::string value;
    read(key, value);
    out = std::move(value);
  }
  void read(const char* key, Uuid& out) { read(key, out.text); }
  void read(const char* key, PciAddress& out) {
    std::string text;
    read(key, text);
    if (const auto address = PciAddress::parse(text); address.ok()) {
      out = *address;
    } else {
      wrong(key, "a PCI address");
    }
  }
  // The name ends up in a file of the kernel, which ends at a line's end.
  void read_driver(const char* key, std::string& out) {
    read(key, out);
    if (out.size() > 64 || out.find_first_of("/\n\r ") != std::string::npos) wrong(key, "a driver's name");
  }
  void read(const char* key, mig::Placement& out) {
    if (const Json* value = get(key, &Json::is_object, "a placement")) {
      Fields inner(*value);
      inner.read("start", out.start);
      inner.read("size", out.size);
      adopt(inner, key);
      if (out.size > 64 || out.start > 64) wrong(key, "a placement on a grid of 64");
    }
  }
  void read(const char* key, std::optional<spec::ClockLock>& out) {
    if (is_null(key)) return;
    if (const Json* value = get(key, &Json::is_object, "a range of clocks")) {
      Fields inner(*value);
      spec::ClockLock lock;
      inner.read("low_mhz", lock.low.count);
      inner.read("high_mhz", lock.high.count);
      adopt(inner, key);
      if (lock.low > lock.high) return wrong(key, "a rising range");
      out = lock;
    }
  }
  void read(const char* key, std::vector<unsigned>& out) {
    if (const Json* value = get(key, &Json::is_array, "a list of numbers")) {
      if (value->size() > list_limit) return wrong(key, "a shorter list");
      for (const auto& item : *value) {
        if (!item.is_number_unsigned() || item.get<std::uint64_t>() > 0xffffffffU)
          return wrong(key, "a list of whole numbers");
        out.push_back(static_cast<unsigned>(item.get<std::uint64_t>()));
      }
    }
  }
  void read(const char* key, std::vector<std::string>& out) {
    if (const Json* value = get(key, &Json::is_array, "a list of words")) {
      if (value->size() > list_limit) return wrong(key, "a shorter list");
      for (const auto& item : *value) {
        if (!item.is_string() || item.get_ref<const std::string&>().size() > text_limit)
          return wrong(key, "a list of words");
        out.push_back(item.get<std::string>());
      }
    }
  }

  const std::optional<std::string>& mistake() const { return mistake_; }

 private:
  static constexpr std::size_t text_limit = 1U << 20U;
  static constexpr std::size_t list_limit = 256;

  const Json* get(const char* key, bool (Json::*is)() const noexcept, const char* expected) {
    if (!json_.is_object()) {
      wrong("it", "an object");
      return nullptr;
    }
    const auto at = json_.find(key);
    if (at == json_.end() || !((*at).*is)()) {
      wrong(key, expected);
      return nullptr;
    }
    return &*at;
  }
  bool is_null(const char* key) const {
    if (!json_.is_object()) return false;
    const auto at = json_.find(key);
    return at != json_.end() && at->is_null();
  }
  void wrong(const char* key, const char* expected) {
    if (!mistake_) mistake_ = fmt::format("'{}' must be {}", key, expected);
  }
  void adopt(const Fields& inner, const char* key) {
    if (inner.mistake_ && !mistake_) mistake_ = fmt::format("{}: {}", key, *inner.mistake_);
  }

  const Json& json_;
  std::optional<std::string> mistake_ = {};
};

// One table for both directions would need the fields' names as data; two short functions a kind read better.
Action parse_fields(const SetPersistence&, Fields& f) {
  SetPersistence a;
  f.read("gpu", a.gpu);
  f.read("before", a.before);
  f.read("after", a.after);
  return a;
}
Action parse_fields(const SetMigMode&, Fields& f) {
  SetMigMode a;
  f.read("gpu", a.gpu);
  f.read("before", a.before);
  f.read("after", a.after);
  return a;
}
Action parse_fields(const DestroyInstance&, Fields& f) {
  DestroyInstance a;
  f.read("gpu", a.gpu);
  f.read("gpu_instance", a.gpu_instance);
  f.read("profile", a.profile);
  f.read("profile_id", a.profile_id);
  f.read("place", a.place);
  f.read("compute_profiles", a.compute_profiles);
  return a;
}
Action parse_fields(const CreateInstance&, Fields& f) {
  CreateInstance a;
  f.read("gpu", a.gpu);
  f.read("profile", a.profile);
  f.read("profile_id", a.profile_id);
  f.read("place", a.place);
  f.read("compute_slices", a.compute_slices);
  return a;
}
Action parse_fields(const CreateCompute&, Fields& f) {
  CreateCompute a;
  f.read("gpu", a.gpu);
  f.read("gpu_instance", a.gpu_instance);
  f.read("profile", a.profile);
  f.read("place", a.place);
  f.read("remove", a.remove);
  return a;
}
Action parse_fields(const SetPowerLimit&, Fields& f) {
  SetPowerLimit a;
  f.read("gpu", a.gpu);
  f.read("before_mw", a.before);
  f.read("after_mw", a.after);
  return a;
}
Action parse_fields(const LockClocks&, Fields& f) {
  LockClocks a;
  f.read("gpu", a.gpu);
  f.read("before", a.before);
  f.read("after", a.after);
  return a;
}
Action parse_fields(const SetGovernor&, Fields& f) {
  SetGovernor a;
  f.read("before", a.before);
  f.read("after", a.after);
  return a;
}
Action parse_fields(const SetUnit&, Fields& f) {
  SetUnit a;
  f.read("unit", a.unit);
  f.read("enabled_before", a.enabled_before);
  f.read("enabled_after", a.enabled_after);
  f.read("active_before", a.active_before);
  f.read("active_after", a.active_after);
  f.read("probe_port", a.probe_port);
  return a;
}
Action parse_fields(const SetFile&, Fields& f) {
  SetFile a;
  f.read("path", a.path);
  f.read("before", a.before);
  f.read("after", a.after);
  f.read("then", a.then);
  f.read("then_undo", a.then_undo);
  return a;
}
Action parse_fields(const LoadModules&, Fields& f) {
  LoadModules a;
  f.read("modules", a.modules);
  f.read("before", a.before);
  f.read("after", a.after);
  return a;
}
Action parse_fields(const SetVirtualFunctions&, Fields& f) {
  SetVirtualFunctions a;
  f.read("physical", a.physical);
  f.read("before", a.before);
  f.read("after", a.after);
  f.read("autoprobe_before", a.autoprobe_before);
  f.read("autoprobe_after", a.autoprobe_after);
  return a;
}
Action parse_fields(const SetDriver&, Fields& f) {
  SetDriver a;
  f.read("function", a.target.function);
  f.read("vf", a.target.vf);
  f.read_driver("driver_before", a.before.driver);
  f.read_driver("override_before", a.before.driver_override);
  f.read_driver("driver_after", a.after.driver);
  f.read_driver("override_after", a.after.driver_override);
  f.read_since("replug", a.replug);
  return a;
}
Action parse_fields(const SetPermission&, Fields& f) {
  SetPermission a;
  f.read("function", a.target.function);
  f.read("vf", a.target.vf);
  f.read("owner_before", a.before.owner);
  f.read("mode_before", a.before.mode);
  f.read("owner_after", a.after.owner);
  f.read("mode_after", a.after.mode);
  return a;
}
Action parse_fields(const Prove&, Fields& f) {
  Prove a;
  f.read("function", a.target.function);
  f.read("vf", a.target.vf);
  f.read("forget", a.forget);
  return a;
}

template <std::size_t I = 0>
std::optional<Action> parse_kind(std::string_view kind, Fields& fields) {
  if constexpr (I < std::variant_size_v<Action>) {
    const std::variant_alternative_t<I, Action> blank{};
    if (kind_of(blank) == kind) return parse_fields(blank, fields);
    return parse_kind<I + 1>(kind, fields);
  } else {
    return std::nullopt;
  }
}

}  // namespace

std::string_view kind_of(const Action& action) {
  static constexpr std::array<std::string_view, std::variant_size_v<Action>> names = {
      "set-persistence", "set-mig-mode",          "destroy-instance", "create-instance", "create-compute",
      "set-power-limit", "lock-clocks",           "set-governor",     "set-unit",        "set-file",
      "load-modules",    "set-virtual-functions", "set-driver",       "set-permission",  "prove"};
  return names[action.index()];
}

Action undo_of(const Action& action) {
  return std::visit(
      Overloaded{[](SetPersistence a) -> Action {
                   std::swap(a.before, a.after);
                   return a;
                 },
                 [](SetMigMode a) -> Action {
                   std::swap(a.before, a.after);
                   return a;
                 },
                 [](const DestroyInstance& a) -> Action {
                   CreateInstance undo{a.gpu, a.profile, a.profile_id, a.place, {}};
                   for (const auto profile : a.compute_profiles)
                     undo.compute_slices.push_back(slices_of(profile));
                   return undo;
                 },
                 [](const CreateInstance& a) -> Action {
                   DestroyInstance undo{a.gpu, 0, a.profile, a.profile_id, a.place, {}};
                   for (const auto slices : a.compute_slices)
                     undo.compute_profiles.push_back(compute_profile_of(slices));
                   if (a.compute_slices.empty())
                     undo.compute_profiles.push_back(compute_profile_of(compute_slices_in(a.profile)));
                   return undo;
                 },
                 [](CreateCompute a) -> Action {
                   a.remove = !a.remove;
                   return a;
                 },
                 [](SetPowerLimit a) -> Action {
                   std::swap(a.before, a.after);
                   return a;
                 },
                 [](LockClocks a) -> Action {
                   std::swap(a.before, a.after);
                   return a;
                 },
                 [](SetGovernor a) -> Action {
                   std::swap(a.before, a.after);
                   return a;
                 },
                 [](SetUnit a) -> Action {
                   std::swap(a.enabled_before, a.enabled_after);
                   std::swap(a.active_before, a.active_after);
                   return a;
                 },
                 [](SetFile a) -> Action {
                   std::swap(a.before, a.after);
                   std::swap(a.then, a.then_undo);
                   return a;
                 },
                 [](LoadModules a) -> Action {
                   std::swap(a.before, a.after);
                   return a;
                 },
                 [](SetVirtualFunctions a) -> Action {
                   std::swap(a.before, a.after);
                   std::swap(a.autoprobe_before, a.autoprobe_after);
                   return a;
                 },
                 [](SetDriver a) -> Action {
                   std::swap(a.before, a.after);
                   return a;
                 },
                 [](SetPermission a) -> Action {
                   std::swap(a.before, a.after);
                   return a;
                 },
                 [](Prove a) -> Action {
                   a.forget = !a.forget;
                   return a;
                 }},
      action);
}

std::string describe(const Action& action, const inventory::Host* host) {
  return std::visit(
      Overloaded{
          [&](const SetPersistence& a) {
            return fmt::format("{}: persistence mode {}", name_of_gpu(a.gpu, host), a.after ? "on" : "off");
          },
          [&](const SetMigMode& a) {
            return fmt::format("{}: MIG mode {}", name_of_gpu(a.gpu, host), a.after ? "on" : "off");
          },
          [&](const DestroyInstance& a) {
            return fmt::format("{}: destroy {} at {}", name_of_gpu(a.gpu, host), printable(a.profile, 40),
                               span_of(a.place));
          },
          [&](const CreateInstance& a) {
            std::string text = fmt::format("{}: create {} at {}", name_of_gpu(a.gpu, host),
                                           printable(a.profile, 40), span_of(a.place));
            std::vector<std::string> parts;
            for (const auto slices : a.compute_slices) parts.push_back(fmt::format("{}c", slices));
            return parts.empty() ? text : fmt::format("{} with {}", text, join(parts, ", "));
          },
          [&](const CreateCompute& a) {
            return fmt::format("{}: {} the compute instance of {} (gi {})", name_of_gpu(a.gpu, host),
                               a.remove ? "destroy" : "create", printable(a.profile, 40), a.gpu_instance);
          },
          [&](const SetPowerLimit& a) {
            return fmt::format("{}: power limit {} (was {})", name_of_gpu(a.gpu, host), watts_of(a.after),
                               watts_of(a.before));
          },
          [&](const LockClocks& a) {
            return a.after
                       ? fmt::format("{}: lock clocks to {}", name_of_gpu(a.gpu, host), clocks_of(a.after))
                       : fmt::format("{}: unlock clocks", name_of_gpu(a.gpu, host));
          },
          [](const SetGovernor& a) {
            return fmt::format("host: cpu governor {} (was {})", printable(a.after, 40),
                               printable(a.before, 40));
          },
          [](const SetUnit& a) {
            std::vector<std::string> words;
            if (a.enabled_before != a.enabled_after)
              words.emplace_back(a.enabled_after ? "enable" : "disable");
            if (a.active_before != a.active_after) words.emplace_back(a.active_after ? "start" : "stop");
            if (words.empty()) words.emplace_back("probe");
            return fmt::format("host: {} {}", join(words, " and "), printable(a.unit, 120));
          },
          [](const SetFile& a) {
            std::string text = fmt::format("host: {} {}",
                                           !a.after   ? "remove"
                                           : a.before ? "rewrite"
                                                      : "write",
                                           printable(a.path, 200));
            if (!a.then.empty()) text += fmt::format(", then {}", printable(join(a.then, " "), 300));
            return text;
          },
          [](const LoadModules& a) {
            return fmt::format("host: {} {}", a.after ? "load" : "unload",
                               printable(join(a.modules, " "), 200));
          },
          [](const SetVirtualFunctions& a) {
            return fmt::format("{}: {} virtual function{} (was {}), {}", a.physical.str(), a.after,
                               a.after == 1 ? "" : "s", a.before,
                               a.autoprobe_after ? "for the host's drivers" : "without a driver");
          },
          [](const SetDriver& a) { return driver_step(a); },
          [](const SetPermission& a) {
            return fmt::format("{}: device file for {} with mode {:04o}", passthrough::str(a.target),
                               printable(a.after.owner, 64), a.after.mode);
          },
          [](const Prove& a) {
            return a.forget
                       ? fmt::format("{}: no longer counts as proved", passthrough::str(a.target))
                       : fmt::format("{}: prove it: open, map a page, reset", passthrough::str(a.target));
          }},
      action);
}

Json to_json(const Action& action) {
  Json out{{"kind", kind_of(action)}};
  std::visit(
      Overloaded{
          [&](const SetPersistence& a) {
            out.update(Json{{"gpu", a.gpu.text}, {"before", a.before}, {"after", a.after}});
          },
          [&](const SetMigMode& a) {
            out.update(Json{{"gpu", a.gpu.text}, {"before", a.before}, {"after", a.after}});
          },
          [&](const DestroyInstance& a) {
            out.update(Json{{"gpu", a.gpu.text},
                            {"gpu_instance", a.gpu_instance},
                            {"profile", a.profile},
                            {"profile_id", a.profile_id},
                            {"place", json_of(a.place)},
                            {"compute_profiles", a.compute_profiles}});
          },
          [&](const CreateInstance& a) {
            out.update(Json{{"gpu", a.gpu.text},
                            {"profile", a.profile},
                            {"profile_id", a.profile_id},
                            {"place", json_of(a.place)},
                            {"compute_slices", a.compute_slices}});
          },
          [&](const CreateCompute& a) {
            out.update(Json{{"gpu", a.gpu.text},
                            {"gpu_instance", a.gpu_instance},
                            {"profile", a.profile},
                            {"place", json_of(a.place)},
                            {"remove", a.remove}});
          },
          [&](const SetPowerLimit& a) {
            out.update(Json{{"gpu", a.gpu.text}, {"before_mw", a.before.count}, {"after_mw", a.after.count}});
          },
          [&](const LockClocks& a) {
            out.update(Json{{"gpu", a.gpu.text}, {"before", json_of(a.before)}, {"after", json_of(a.after)}});
          },
          [&](const SetGovernor& a) {
            out.update(Json{{"before", a.before}, {"after", a.after}});
          },
          [&](const SetUnit& a) {
            out.update(Json{{"unit", a.unit},
                            {"enabled_before", a.enabled_before},
                            {"enabled_after", a.enabled_after},
                            {"active_before", a.active_before},
                            {"active_after", a.active_after},
                            {"probe_port", a.probe_port ? Json(*a.probe_port) : Json(nullptr)}});
          },
          [&](const SetFile& a) {
            out.update(Json{{"path", a.path},
                            {"before", json_of(a.before)},
                            {"after", json_of(a.after)},
                            {"then", a.then},
                            {"then_undo", a.then_undo}});
          },
          [&](const LoadModules& a) {
            out.update(Json{{"modules", a.modules}, {"before", a.before}, {"after", a.after}});
          },
          [&](const SetVirtualFunctions& a) {
            out.update(Json{{"physical", a.physical.str()},
                            {"before", a.before},
                            {"after", a.after},
                            {"autoprobe_before", a.autoprobe_before},
                            {"autoprobe_after", a.autoprobe_after}});
          },
          [&](const SetDriver& a) {
            put_target(out, a.target);
            out.update(Json{{"driver_before", a.before.driver},
                            {"override_before", a.before.driver_override},
                            {"driver_after", a.after.driver},
                            {"override_after", a.after.driver_override},
                            {"replug", a.replug}});
          },
          [&](const SetPermission& a) {
            put_target(out, a.target);
            out.update(Json{{"owner_before", a.before.owner},
                            {"mode_before", a.before.mode},
                            {"owner_after", a.after.owner},
                            {"mode_after", a.after.mode}});
          },
          [&](const Prove& a) {
            put_target(out, a.target);
            out["forget"] = a.forget;
          }},
      action);
  return out;
}

Result<Action> action_from_json(const Json& json) {
  if (!json.is_object()) return Error(Errc::corrupt, "an action must be a JSON object");
  const auto kind = json.find("kind");
  if (kind == json.end() || !kind->is_string()) return Error(Errc::corrupt, "an action without a kind");
  const auto& name = kind->get_ref<const std::string&>();
  Fields fields(json);
  auto action = parse_kind(name, fields);
  if (!action) return Error(Errc::corrupt, fmt::format("unknown kind of action '{}'", printable(name, 40)));
  if (fields.mistake()) return Error(Errc::corrupt, fmt::format("action {}: {}", name, *fields.mistake()));
  return *std::move(action);
}

}  // namespace bulkhead::plan
