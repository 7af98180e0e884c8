#include <algorithm>
#include <charconv>
#include <deque>
#include <functional>
#include <map>

#include <fmt/format.h>

#include "base/text.hpp"
#include "core/replay/replay.hpp"
#include "core/replay/table.hpp"

namespace bulkhead::replay {

namespace {

// Names of texts in order of appearance, 0 is "".
class Names {
 public:
  explicit Names(std::size_t most) : most_(most) { index_.emplace("", 0U); }
  // Nothing: there are as many as may be.
  std::optional<unsigned> of(std::string_view text) {
    // Rows tend to repeat what the row before them said.
    if (text == list_[last_]) return last_;
    if (const auto found = index_.find(text); found != index_.end()) return last_ = found->second;
    if (list_.size() == most_) return std::nullopt;
    last_ = static_cast<unsigned>(list_.size());
    list_.emplace_back(text);
    index_.emplace(std::string(text), last_);
    return last_;
  }
  std::vector<std::string> take() && { return std::move(list_); }

 private:
  std::size_t most_;
  unsigned last_ = 0;
  std::vector<std::string> list_ = {""};
  std::map<std::string, unsigned, std::less<>> index_;
};

bool fits_on_a_line(std::string_view text) {
  return text.size() <= kMostName && std::all_of(text.begin(), text.end(), [](char c) {
           return static_cast<unsigned char>(c) >= 0x20 && c != 0x7f;
         });
}

class Reader {
 public:
  Reader(const Table& table, Mistakes& mistakes) : table_(table), mistakes_(mistakes) {}
  void new_row() { good_ = true; }
  bool good() const { return good_; }

  void wrong(std::string_view column, std::string_view what) {
    mistakes_.at(table_.line(), fmt::format("{}: {}", column, what));
    good_ = false;
  }

  std::int64_t number(std::size_t column, std::string_view name, std::int64_t most = kMostAmount) {
    std::string_view text = table_.field(column);
    // A tool that met an empty cell once writes the whole column as 8.0.
    if (const std::size_t dot = text.find('.');
        dot != std::string_view::npos && dot > 0 &&
        text.find_first_not_of('0', dot + 1) == std::string_view::npos)
      text = text.substr(0, dot);
    std::int64_t value = 0;
    const auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), value);
    const bool read = !text.empty() && end == text.data() + text.size();
    if (read && failed == std::errc{} && value >= 0 && value <= most) return value;
    if (table_.field(column).empty())
      wrong(name, "empty; wanted a whole number");
    else if (read && (failed == std::errc::result_out_of_range || value > most) && text.front() != '-')
      wrong(name, fmt::format("{} is above {}", printable(text, 40), most));
    else
      wrong(name, fmt::format("\"{}\" is not a whole number from 0", printable(table_.field(column), 40)));
    return 0;
  }

  unsigned text_of(Names& names, std::string_view name, std::string_view text) {
    if (!fits_on_a_line(text)) {
      wrong(name, fmt::format("\"{}\" is too long or has control characters", printable(text, 40)));
      return 0;
    }
    const auto index = names.of(text);
    if (!index) wrong(name, fmt::format("\"{}\" is one too many different ones", printable(text, 40)));
    return index.value_or(0);
  }

 private:
  const Table& table_;
  Mistakes& mistakes_;
  bool good_ = true;
};

// "|A||B" means "A|B".
std::string_view without_gaps(std::string_view spec, std::string& scratch) {
  if (spec.empty() ||
      (spec.front() != '|' && spec.back() != '|' && spec.find("||") == std::string_view::npos))
    return spec;
  scratch.clear();
  for (std::size_t i = 0; i < spec.size(); ++i) {
    if (spec[i] == '|' && (scratch.empty() || scratch.back() == '|')) continue;
    scratch += spec[i];
  }
  if (!scratch.empty() && scratch.back() == '|') scratch.pop_back();
  return scratch;
}

bool within(std::string_view part, std::string_view text) {
  const std::less_equal<> not_after;
  return not_after(text.data(), part.data()) &&
         not_after(part.data() + part.size(), text.data() + text.size());
}

}  // namespace

std::uint64_t NodeList::gpus() const {
  std::uint64_t sum = 0;
  for (const Node& node : nodes) sum += node.gpus;
  return sum;
}

Result<NodeList> parse_nodes(std::string_view text) {
  enum { name, cpu, memory, gpu, model };
  const Column columns[] = {
      {{"sn", "name"}}, {{"cpu_milli"}}, {{"memory_mib"}}, {{"gpu"}}, {{"model"}, false}};
  Mistakes mistakes;
  Table table(text, columns, mistakes);
  Reader reader(table, mistakes);
  Names models(kMostModels);
  NodeList list;
  std::vector<std::size_t> lines;
  while (table.next()) {
    reader.new_row();
    if (list.nodes.size() == kMostNodes) {
      mistakes.at(table.line(), fmt::format("more than {} nodes", kMostNodes));
      break;
    }
    Node node;
    node.cpu_milli = reader.number(cpu, "cpu_milli");
    node.memory_mib = reader.number(memory, "memory_mib");
    node.gpus = static_cast<unsigned>(reader.number(gpu, "gpu", kMostGpusPerNode));
    node.model = reader.text_of(models, "model", table.field(model));
    if (table.field(name).empty() || !fits_on_a_line(table.field(name)))
      reader.wrong("sn", fmt::format("\"{}\" is no name for a node", printable(table.field(name), 40)));
    if (!reader.good()) continue;
    node.name = table.field(name);
    list.nodes.push_back(std::move(node));
    lines.push_back(table.line());
  }
  std::vector<std::size_t> order(list.nodes.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return list.nodes[a].name < list.nodes[b].name; });
  for (std::size_t i = 1; i < order.size(); ++i)
    if (list.nodes[order[i]].name == list.nodes[order[i - 1]].name)
      mistakes.at(lines[order[i]],
                  fmt::format("sn: {} is on line {} already", printable(list.nodes[order[i]].name, 40),
                              lines[order[i - 1]]));
  if (mistakes.none() && list.nodes.empty()) mistakes.at(0, "no nodes below the heading");
  if (!mistakes.none()) return std::move(mistakes.error()).in("list of nodes");
  list.models = std::move(models).take();
  return list;
}

Result<PodList> parse_pods(std::string_view text) {
  enum { cpu, memory, num, milli, spec, created, deleted, name };
  const Column columns[] = {{{"cpu_milli"}},
                            {{"memory_mib"}},
                            {{"num_gpu"}},
                            {{"gpu_milli"}},
                            {{"gpu_spec"}, false},
                            {{"creation_time"}, false},
                            {{"deletion_time"}, false},
                            {{"name"}, false}};
  Mistakes mistakes;
  Table table(text, columns, mistakes);
  Reader reader(table, mistakes);
  Names specs(kMostSpecs);
  PodList list;
  list.timed = table.has(created) && table.has(deleted);
  std::string scratch;
  std::vector<std::string_view> names;
  std::deque<std::string> unquoted;
  while (table.next()) {
    reader.new_row();
    if (list.pods.size() == kMostPods) {
      mistakes.at(table.line(), fmt::format("more than {} pods", kMostPods));
      break;
    }
    Pod pod;
    pod.cpu_milli = reader.number(cpu, "cpu_milli");
    pod.memory_mib = reader.number(memory, "memory_mib");
    pod.num_gpu = static_cast<unsigned>(reader.number(num, "num_gpu", kMostGpusPerPod));
    if (pod.num_gpu > 0) {
      pod.gpu_milli = static_cast<unsigned>(reader.number(milli, "gpu_milli", 1000));
      pod.spec = reader.text_of(specs, "gpu_spec", without_gaps(table.field(spec), scratch));
      if (reader.good() && pod.gpu_milli == 0) reader.wrong("gpu_milli", "0 of a GPU; wanted 1 to 1000");
      if (reader.good() && pod.num_gpu > 1 && pod.gpu_milli != 1000)
        reader.wrong("gpu_milli",
                     fmt::format("{} of each of {} GPUs; a share is of one GPU, several are whole (1000)",
                                 pod.gpu_milli, pod.num_gpu));
    }
    if (list.timed) {
      pod.created = reader.number(created, "creation_time");
      if (!table.field(deleted).empty()) {
        pod.deleted = reader.number(deleted, "deletion_time");
        if (reader.good() && *pod.deleted < pod.created)
          reader.wrong("deletion_time",
                       fmt::format("{} is before the creation, {}", *pod.deleted, pod.created));
      }
    }
    if (!reader.good()) continue;
    list.pods.push_back(pod);
    if (!table.has(name)) continue;
    // A name that had quotes in it lies in the table's own memory, which the next row takes.
    const std::string_view said = table.field(name);
    names.push_back(within(said, text) ? said : std::string_view(unquoted.emplace_back(said)));
  }
  if (mistakes.none() && list.pods.empty()) mistakes.at(0, "no pods below the heading");
  if (!mistakes.none()) return std::move(mistakes.error()).in("list of pods");
  list.specs = std::move(specs).take();
  if (!std::is_sorted(names.begin(), names.end())) {
    list.by_name.resize(names.size());
    for (std::uint32_t i = 0; i < names.size(); ++i) list.by_name[i] = i;
    std::stable_sort(list.by_name.begin(), list.by_name.end(),
                     [&](std::uint32_t a, std::uint32_t b) { return names[a] < names[b]; });
  }
  return list;
}

Result<NodeList> enlarge(const NodeList& list, std::size_t nodes) {
  if (nodes > kMostNodes) return Error(Errc::invalid, fmt::format("{} nodes; at most {}", nodes, kMostNodes));
  if (list.nodes.empty()) return Error(Errc::invalid, "no nodes to repeat");
  NodeList out;
  out.models = list.models;
  out.nodes.reserve(nodes);
  for (std::size_t i = 0; i < nodes; ++i) {
    out.nodes.push_back(list.nodes[i % list.nodes.size()]);
    if (const std::size_t copy = i / list.nodes.size(); copy > 0)
      out.nodes.back().name += fmt::format("~{}", copy);
  }
  return out;
}

Result<std::size_t> nodes_for_gpus(const NodeList& list, std::uint64_t gpus) {
  const std::uint64_t round = list.gpus();
  if (round == 0) return Error(Errc::invalid, "the list of nodes has no GPU");
  std::uint64_t left = gpus % round;
  std::uint64_t nodes = gpus / round;
  nodes = nodes > kMostNodes ? kMostNodes + 1 : nodes * list.nodes.size();
  for (std::size_t i = 0; left > 0; ++i, ++nodes) left -= std::min<std::uint64_t>(left, list.nodes[i].gpus);
  if (nodes > kMostNodes)
    return Error(Errc::invalid, fmt::format("{} GPUs would take more than {} nodes", gpus, kMostNodes));
  return static_cast<std::size_t>(nodes);
}

}  // namespace bulkhead::replay
