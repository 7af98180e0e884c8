#include "core/spec/spec.hpp"

namespace bulkhead::spec {

namespace {

Json described(Json schema, const char* words) {
  schema["description"] = words;
  return schema;
}
Json object(Json properties, Json required = Json::array()) {
  Json out{{"type", "object"}, {"additionalProperties", false}, {"properties", std::move(properties)}};
  if (!required.empty()) out["required"] = std::move(required);
  return out;
}
Json list(Json items) { return Json{{"type", "array"}, {"items", std::move(items)}}; }
Json pattern(const char* regex) { return Json{{"type", "string"}, {"pattern", regex}}; }
Json whole(unsigned low, unsigned high) {
  return Json{{"type", "integer"}, {"minimum", low}, {"maximum", high}};
}
Json either(Json a, Json b) { return Json{{"anyOf", Json::array({std::move(a), std::move(b)})}}; }
Json one_or_more(const Json& item) {
  Json many = list(item);
  many["minItems"] = 1;
  return either(item, many);
}

}  // namespace

Json schema() {
  const Json profile = pattern("^([Mm][Ii][Gg] )?[0-9]{1,2}[gG]\\.[0-9]{1,4}[gG][bB]([+-][A-Za-z0-9.]+)?$");
  const Json compute = Json{{"enum", {"1c", "2c", "3c", "4c", "6c", "7c", "8c"}}};
  const Json unit = pattern("^[A-Za-z0-9_:@\\\\][A-Za-z0-9_.:@\\\\-]*$");

  Json select = object({
      {"all", described(Json{{"const", true}}, "every GPU; stands alone")},
      {"index",
       described(one_or_more(either(whole(0, 63), pattern("^[0-9]+(-[0-9]+)?( *, *[0-9]+(-[0-9]+)?)*$"))),
                 "NVML indices: 3 or \"0-3,6\"")},
      {"uuid", described(one_or_more(pattern("^GPU-[A-Za-z0-9-]+$")), "as nvidia-smi -L prints it")},
      {"pci", described(one_or_more(pattern("^([0-9A-Fa-f]+:)?[0-9A-Fa-f]+:[0-9A-Fa-f]+\\.[0-7]$")),
                        "PCI address, 0000:1b:00.0")},
      {"model", described(one_or_more(Json{{"type", "string"}, {"minLength", 1}}),
                          "shell pattern over the model name: \"*H100*\"")},
      {"pci_id", described(one_or_more(pattern("^[0-9A-Fa-f]{1,4}:[0-9A-Fa-f]{1,4}$")),
                           "PCI vendor:device, \"10de:2330\"")},
  });
  select["minProperties"] = 1;

  Json slice = object({{"profile", profile},
                       {"at", described(whole(0, 63), "start in memory slices")},
                       {"count", described(whole(1, 64), "this many of them; not with at")},
                       {"compute", described(one_or_more(compute),
                                             "compute instances; left out: one that fills the instance")}},
                      {"profile"});

  Json rule = object(
      {{"select", described(std::move(select), "which GPUs; all given keys must match")},
       {"mode", described(Json{{"enum", {"mig", "share", "exclusive", "passthrough"}}},
                          "MIG instances, software slices, the whole GPU, or the whole GPU for a virtual "
                          "machine")},
       {"layout", described(either(list(either(profile, std::move(slice))), Json{{"const", "dynamic"}}),
                            "the MIG instances of each selected GPU; only with mode mig. dynamic: they come "
                            "and go with leases")},
       {"power_limit_w", described(Json{{"type", "number"}, {"minimum", 1}, {"maximum", 10000}}, "watts")},
       {"clocks", object({{"lock_mhz", described(either(whole(1, 10000), Json{{"type", "array"},
                                                                              {"items", whole(1, 10000)},
                                                                              {"minItems", 2},
                                                                              {"maxItems", 2}}),
                                                 "graphics clock, or [low, high], in MHz")}},
                         {"lock_mhz"})},
       {"persistence", described(Json{{"type", "boolean"}}, "persistence mode")}},
      {"select", "mode"});
  rule["if"] = Json{{"properties", {{"mode", {{"const", "mig"}}}}}};
  rule["then"] = Json{{"required", {"layout"}}};
  rule["else"] = Json{{"not", {{"required", {"layout"}}}}};
  const auto absent = [](const char* key) { return Json{{"not", {{"required", {key}}}}}; };
  rule["allOf"] = Json::array(
      {Json{{"if", {{"properties", {{"mode", {{"const", "passthrough"}}}}}}},
            {"then", {{"allOf", {absent("power_limit_w"), absent("clocks"), absent("persistence")}}}}}});

  Json device = object(
      {{"pci", described(one_or_more(pattern("^([0-9A-Fa-f]+:)?[0-9A-Fa-f]+:[0-9A-Fa-f]+\\.[0-7]$")),
                         "PCI address, 0000:1b:00.0")},
       {"mode", described(Json{{"enum", {"passthrough", "host"}}},
                          "passthrough: with its whole IOMMU group for a virtual machine; with sriov, its "
                          "virtual functions are. host: back to its own driver")},
       {"sriov", object({{"vfs", described(whole(0, 65535), "how many virtual functions")}}, {"vfs"})}},
      {"pci"});
  device["anyOf"] =
      Json::array({Json{{"required", Json::array({"mode"})}}, Json{{"required", Json::array({"sriov"})}}});
  const Json vfio =
      object({{"owner", described(pattern("^[A-Za-z0-9_.][A-Za-z0-9_.-]*$"),
                                  "user that may open VFIO's device files")},
              {"mode", described(Json{{"anyOf", Json::array({pattern("^0?6[0246]0$"),
                                                             Json{{"enum", {600, 620, 640, 660}}}})}},
                                 "octal: \"0600\" or \"0660\"")}});
  Json unit_rule = object(
      {{"name", unit}, {"enabled", {{"type", "boolean"}}}, {"active", {{"type", "boolean"}}}}, {"name"});
  Json modprobe = object(
      {{"name", described(pattern("^[A-Za-z0-9_-][A-Za-z0-9_.-]*\\.conf$"), "file below /etc/modprobe.d")},
       {"lines", list(pattern("^ *(#|options|blacklist|install|alias|softdep|remove)"))}},
      {"name", "lines"});
  Json host = object(
      {{"kernel_args", described(list(pattern("^[A-Za-z0-9_.,:;/+@%][A-Za-z0-9_.,:;=/+@%-]*$")),
                                 "arguments of the kernel's command line")},
       {"cpu_governor",
        Json{{"enum", {"performance", "powersave", "schedutil", "ondemand", "conservative", "userspace"}}}},
       {"fabric_manager",
        object({{"unit", unit}, {"port", described(whole(1, 65535), "TCP port that must answer")}})},
       {"units", list(either(unit, std::move(unit_rule)))},
       {"modprobe", list(std::move(modprobe))},
       {"vfio", vfio}});

  const Json power = pattern("^ *[0-9]{1,7}(\\.[0-9]{1,3})? *(W|kW|MW) *$");
  const Json rate = pattern("^ *[0-9]{1,7}(\\.[0-9]{1,3})? *(W|kW|MW) */s *$");
  const Json protect = object(
      {{"mode", described(Json{{"enum", {"observe", "act"}}},
                          "observe: say what would be done; act: do it. Left out: observe")},
       {"ceiling", described(whole(40, 110), "temperature of a GPU in C that is not to be passed; 85")},
       {"guard", described(whole(0, 30), "K kept of the part's own margin (T.Limit); 5")},
       {"harshest", described(Json{{"enum", {"hold", "power", "clocks", "pause", "drain", "fence"}}},
                              "the harshest action that may be taken; pause")},
       {"node_power", described(power, "what the whole node may draw, with its unit: 10kW")},
       {"rest_power", described(power, "what the node draws beside its GPUs, where no BMC tells")},
       {"rack", object({{"power", described(power, "what the rack may draw")},
                        {"nodes", described(whole(1, 256), "nodes that share it in equal parts")}},
                       {"power", "nodes"})},
       {"ramp",
        described(either(rate, object({{"rate", rate}, {"burst", power}}, {"rate"})),
                  "how fast the node's power may change: 2kW/s; starts of leases are staggered by it")},
       {"cooling", described(power, "heat that the cooling takes away from this node")}});

  const Json heal = object(
      {{"mode", described(Json{{"enum", {"observe", "suggest", "act"}}},
                          "observe: say what would be done; suggest: with the commands; act: do it")},
       {"most_an_hour", described(whole(0, 100), "acts without a person, of the whole host; 4")},
       {"keep_healthy", described(whole(0, 64), "GPUs that must still serve; 1")},
       {"relapse_hours", described(whole(1, 720), "the same fault within this time: the next act; 24")}});

  Json out{{"$schema", "http://json-schema.org/draft-07/schema#"}, {"title", "bulkhead node file"}};
  out.update(object({{"apiVersion", {{"const", "bulkhead/v1"}}},
                     {"kind", {{"const", "Node"}}},
                     {"metadata", object({{"name", pattern("^[A-Za-z0-9_.+-]{1,128}$")}})},
                     {"gpus", list(std::move(rule))},
                     {"devices", list(std::move(device))},
                     {"host", std::move(host)},
                     {"protect", described(protect, "what is done about heat, power and broken parts")},
                     {"heal", described(heal, "what is done about faults")}},
                    {"apiVersion", "kind"}));
  return out;
}

}  // namespace bulkhead::spec
