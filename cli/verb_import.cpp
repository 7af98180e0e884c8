#include <algorithm>
#include <filesystem>
#include <memory>
#include <system_error>

#include <fmt/format.h>
#include <CLI/App.hpp>
#include <CLI/Option.hpp>

#include "base/fd.hpp"
#include "base/limits.hpp"
#include "base/text.hpp"
#include "cli/cli.hpp"
#include "core/spec/spec.hpp"

namespace bulkhead::cli {

namespace {

struct Arguments {
  std::string format = {};
  std::filesystem::path file = {};
  std::string config = {};
  std::filesystem::path out = {};
  bool json = false;
};

void remark(const spec::Imported& imported) {
  for (const auto& text : imported.remarks) {
    std::fputs(fmt::format("bulkhead: import: {}: {}\n", imported.name, text).c_str(), stderr);
  }
}

int write_all(const Context& context, const std::vector<spec::Imported>& all,
              const std::filesystem::path& out) {
  std::error_code error;
  std::filesystem::create_directories(out, error);
  if (error)
    return fail(context,
                errno_error(fmt::format("import: create {}", printable(out.string(), 200)), error.value()));
  std::string report;
  for (const auto& imported : all) {
    const auto path = out / (imported.name + ".yaml");
    if (auto written = write_file_atomic(path, spec::to_yaml(imported.node)); !written.ok()) {
      return fail(context, std::move(written).error().in("import"));
    }
    report += fmt::format("{}\n", printable(path.string(), 4096));
  }
  return print(report);
}

int run(const Context& context, const Arguments& arguments) {
  if (arguments.format != "mig-parted") {
    return fail(context,
                Error(Errc::invalid,
                      fmt::format("import: '{}' is not a known format", printable(arguments.format, 40)),
                      "try: bulkhead import mig-parted FILE"));
  }
  auto text = read_file(arguments.file, limits::node_file_bytes);
  if (!text.ok())
    return fail(context, std::move(text).error().in("import").with_hint(
                             "name mig-parted's file: bulkhead import mig-parted config.yaml"));
  auto answer = spec::import_mig_parted(text.value());
  if (const auto* mistakes = std::get_if<std::vector<spec::Mistake>>(&answer)) {
    const std::string shown = printable(arguments.file.string(), 4096);
    std::fputs(spec::render(*mistakes, shown).c_str(), stderr);
    return fail(context, Error(Errc::invalid,
                               fmt::format("import: {} has {} mistake{}; nothing was written", shown,
                                           mistakes->size(), mistakes->size() == 1 ? "" : "s"),
                               "what mig-parted reads: version: v1, then mig-configs: {NAME: [...]}"));
  }
  auto& all = std::get<std::vector<spec::Imported>>(answer);
  if (!arguments.config.empty()) {
    std::vector<std::string_view> names;
    for (const auto& imported : all) names.push_back(imported.name);
    const auto at = std::find_if(all.begin(), all.end(),
                                 [&](const spec::Imported& i) { return i.name == arguments.config; });
    if (at == all.end()) {
      const auto meant = closest(arguments.config, names);
      return fail(context, Error(Errc::not_found,
                                 fmt::format("import: no configuration '{}' in the file",
                                             printable(arguments.config, 80)),
                                 meant.empty() ? "without --config all are converted"
                                               : fmt::format("did you mean: --config {}", meant)));
    }
    std::vector<spec::Imported> one{std::move(*at)};
    all = std::move(one);
  }
  for (const auto& imported : all) remark(imported);
  if (!arguments.out.empty()) return write_all(context, all, arguments.out);
  if (arguments.json) {
    Json list = Json::array();
    for (const auto& imported : all) {
      list.push_back(Json{{"name", imported.name},
                          {"node_file", spec::to_yaml(imported.node)},
                          {"remarks", imported.remarks}});
    }
    return print(dump(list) + "\n");
  }
  if (all.size() == 1) return print(spec::to_yaml(all.front().node));
  std::string listed = fmt::format(
      "{} configurations; --config NAME prints one, --out DIR writes each to a file:\n", all.size());
  for (const auto& imported : all) listed += fmt::format("  {}\n", imported.name);
  return print(listed);
}

}  // namespace

std::function<int(const Context&)> bind_import(CLI::App& app) {
  auto arguments = std::make_shared<Arguments>();
  app.add_option("format", arguments->format, "What the file is: mig-parted")->required();
  app.add_option("file", arguments->file, "The file to convert")->type_name("FILE")->required();
  app.add_option("--config", arguments->config, "Only this named configuration");
  app.add_option("--out", arguments->out, "Write DIR/NAME.yaml for each configuration")->type_name("DIR");
  app.add_flag("--json", arguments->json, "Names, node files and remarks, for programs");
  return [arguments](const Context& context) { return run(context, *arguments); };
}

}  // namespace bulkhead::cli
