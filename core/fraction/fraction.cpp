#include "core/fraction/fraction.hpp"

#include <algorithm>
#include <bit>
#include <limits>
#include <string>
#include <string_view>
#include <utility>

#include "core/fraction/value.hpp"

namespace bulkhead::fraction {
namespace {

bool well_formed(const Task& task) {
  if (task.cpu_milli < 0 || task.cpu_milli > kMostAmount) return false;
  if (task.memory_mib < 0 || task.memory_mib > kMostAmount) return false;
  if (task.gpu_memory_mib < 0 || task.gpu_memory_mib > kMostAmount) return false;
  if (task.num_gpu > kMostGpus) return false;
  if (task.num_gpu == 0) return true;
  return task.gpu_milli > 0 && task.gpu_milli <= kWhole && (task.num_gpu == 1 || task.gpu_milli == kWhole);
}

}  // namespace

Learner::Learner(std::size_t shapes, std::size_t window)
    : shapes_(std::clamp<std::size_t>(shapes, 1, 4096)), window_(std::max<std::size_t>(window, 1)) {
  table_.reserve(shapes_);
}

void Learner::saw(const Task& task) {
  if (!well_formed(task)) return;
  if (++since_ >= window_) {
    since_ = 0;
    for (auto& seen : table_) seen.count /= 2;
  }
  const auto known =
      std::find_if(table_.begin(), table_.end(), [&](const Seen& s) { return s.task == task; });
  if (known != table_.end()) {
    known->count += 1;
  } else if (table_.size() < shapes_) {
    table_.push_back({task, 1});
  } else {
    const auto rarest = std::min_element(table_.begin(), table_.end(),
                                         [](const Seen& a, const Seen& b) { return a.count < b.count; });
    table_.erase(rarest);  // order is age
    table_.push_back({task, 1});
  }
}

Mix Learner::mix() const {
  Mix mix;
  for (const auto& seen : table_) mix.push_back({seen.task, seen.count});
  std::stable_sort(mix.begin(), mix.end(),
                   [](const Typical& a, const Typical& b) { return a.weight > b.weight; });
  return mix;
}

namespace {

bool model_allowed(const Task& task, const Node& node) {
  return task.num_gpu == 0 || task.models == 0 || ((task.models >> node.model) & 1U) != 0;
}

// Which GPUs could serve the task, each by itself.
std::uint32_t able(const Task& task, const Node& node, const Free& free) {
  std::uint32_t mask = 0;
  for (unsigned g = 0; g < node.gpus; ++g) {
    if (free.gpu_milli[g] < task.gpu_milli) continue;
    if (node.gpu_memory_mib != 0 && free.gpu_memory_mib[g] < task.gpu_memory_mib) continue;
    mask |= 1U << g;
  }
  return mask;
}

// The set of whole GPUs from `mask`, or 0.
std::uint32_t pick_set(const Task& task, const Node& node, std::uint32_t mask) {
  struct Group {
    std::uint32_t gpus = 0;
    unsigned numa = 0;
  };
  std::array<Group, kMostGpus> groups{};
  unsigned count = 0;
  for (unsigned g = 0; g < node.gpus; ++g) {
    if (((mask >> g) & 1U) == 0) continue;
    unsigned at = 0;
    while (at < count && groups[at].numa != node.numa[g]) ++at;
    if (at == count) groups[count++].numa = node.numa[g];
    groups[at].gpus |= 1U << g;
  }
  const auto size = [](const Group& group) { return static_cast<unsigned>(std::popcount(group.gpus)); };
  // One NUMA node that holds all: the tightest. Otherwise the largest first, so that few are touched.
  const Group* best = nullptr;
  for (unsigned at = 0; at < count; ++at) {
    if (size(groups[at]) >= task.num_gpu && (best == nullptr || size(groups[at]) < size(*best))) {
      best = &groups[at];
    }
  }
  std::uint32_t chosen = 0;
  unsigned left = task.num_gpu;
  const auto take = [&](std::uint32_t from) {
    for (; from != 0 && left > 0; from &= from - 1, --left) chosen |= from & (~from + 1);
  };
  if (best != nullptr) {
    take(best->gpus);
    return chosen;
  }
  if (task.one_numa) return 0;
  while (left > 0) {
    Group* next = nullptr;
    for (unsigned at = 0; at < count; ++at) {
      if (groups[at].gpus == 0) continue;
      const bool fills = size(groups[at]) >= left;
      if (next == nullptr) {
        next = &groups[at];
      } else if (const bool next_fills = size(*next) >= left; fills != next_fills) {
        if (fills) next = &groups[at];
      } else if (fills ? size(groups[at]) < size(*next) : size(groups[at]) > size(*next)) {
        next = &groups[at];
      }
    }
    if (next == nullptr) return 0;
    take(std::exchange(next->gpus, 0));
  }
  return chosen;
}

void take(const Task& task, std::uint32_t gpus, const Node& node, Free& free, int sign) {
  free.cpu_milli -= sign * task.cpu_milli;
  free.memory_mib -= sign * task.memory_mib;
  for (; gpus != 0; gpus &= gpus - 1) {
    const auto g = static_cast<unsigned>(std::countr_zero(gpus));
    free.gpu_milli[g] -= sign * task.gpu_milli;
    if (node.gpu_memory_mib != 0) free.gpu_memory_mib[g] -= sign * task.gpu_memory_mib;
  }
}

constexpr std::int32_t kNever = std::numeric_limits<std::int32_t>::max();
constexpr std::size_t kBlock = 64;            // cells whose least is kept
constexpr std::size_t kMostShapes = 1024;     // shapes of tasks with cells of their own
constexpr std::size_t kMostCells = 1U << 25;  // of all shapes
constexpr std::size_t kMostKinds = 1024;
constexpr std::size_t kMemo = 1U << 14;

std::uint64_t mixed(std::uint64_t hash, std::uint64_t word) {
  hash = (hash ^ word) * 0x9e3779b97f4a7c15;
  return hash ^ (hash >> 29U);
}

std::uint64_t hash_of(const Task& task) {
  std::uint64_t hash = mixed(
      1, static_cast<std::uint64_t>(task.cpu_milli) << 32U | static_cast<std::uint64_t>(task.memory_mib));
  hash = mixed(hash, static_cast<std::uint64_t>(task.gpu_memory_mib) << 32U |
                         static_cast<std::uint64_t>(task.gpu_milli) << 8U | task.num_gpu << 1U |
                         static_cast<std::uint64_t>(task.one_numa));
  return mixed(hash, task.models);
}

// The fields of a task that have no meaning for it are zero, so that equal demands are one shape.
Task canonical(Task task) {
  if (task.num_gpu == 0) {
    task.gpu_milli = 0;
    task.models = 0;
    task.gpu_memory_mib = 0;
  }
  if (task.num_gpu < 2) task.one_numa = false;
  return task;
}

}  // namespace

// How it stays fast: a cost is a function of the shape of the task and the state of the node, and an event
// changes one node. Each shape keeps the cost on every node (a cell), the least of each block of cells, and a
// list of nodes to look at again before the next answer. A changed node joins the lists of those shapes that
// may fit there now, or did when last looked at: on a full fleet that is few. Most of those are nowhere near
// the best, so a cell first gets a bound that its cost cannot go below, and the cost itself only when the
// bound is the least of all cells. The worth of a state is kept in a memo of fixed size. Nothing is
// approximated: the answer is that of a scan over all nodes.
struct Fleet::State {
  struct alignas(64) Hot {
    std::int32_t cpu = 0;
    std::int32_t memory = 0;
    std::int32_t worth = -1;   // -1: not asked since the last change
    std::int16_t fullest = 0;  // most free milli of one GPU, whatever its memory
    std::uint8_t gpus = 0;
    std::uint8_t model = 0;
    std::uint16_t kind = 0;
    std::uint8_t whole = 0;  // GPUs with all milli free
    bool drained = false;
    std::array<std::int16_t, kMostGpus> levels = {};  // ascending
  };
  // Of each GPU: milli free, and free memory as milli of all of it, rounded down. Of all: the sum of
  // Worth::alone over their levels.
  struct alignas(64) Limits {
    std::array<std::int16_t, kMostGpus> milli = {};
    std::array<std::int16_t, kMostGpus> memory = {};
    Worth::Caps sold = {};
  };
  struct Shape {
    Task task = {};
    std::uint64_t hash = 0;
    std::uint64_t asked = 0;
    bool all = true;  // nothing is in the cells yet
    std::vector<std::int32_t> cells = {};
    std::vector<std::int32_t> least = {};
    std::vector<NodeId> stale = {};  // no node twice
    std::vector<std::int16_t> memory =
        {};  // of each kind: the memory of a GPU it wants, in milli of all of it
  };
  // What 64 shapes ask for, for one pass over them.
  struct Asked {
    std::array<std::int32_t, 64> cpu, memory, milli, whole;
    std::array<std::uint64_t, kModels> models = {};  // bit i of model m: shape i may go there
    Asked() {
      cpu.fill(kNever);  // an empty slot fits nowhere
      memory = milli = whole = {};
    }
  };
  // Of 64 shapes on one node.
  struct Marks {
    std::uint64_t finite = 0;  // the cell is not kNever
    std::uint64_t queued = 0;  // the node is in the stale list
    std::uint64_t bound = 0;   // the cell is not the cost, but no more than it
  };
  struct Remembered {
    Left left = {};
    std::uint32_t kind = UINT32_MAX;
    std::int32_t worth = 0;
  };
  struct Cost {
    std::int32_t cost = kNever;
    std::uint32_t gpus = 0;
  };

  std::vector<Node> nodes;
  std::vector<Free> frees;
  std::vector<Hot> hot;
  std::vector<Limits> limits;
  std::vector<Kind> kinds;
  std::vector<Worth> worths;  // one for each kind
  std::vector<Remembered> memo = std::vector<Remembered>(kMemo);
  std::vector<Shape> shapes;
  std::vector<std::uint32_t> table;  // open addressing: shape + 1
  std::vector<Asked> asked;          // of shapes 64 w .. 64 w + 63
  std::vector<Marks> marks;          // asked.size() of a node
  std::uint64_t asks = 0;
  Mix mix;
  std::int64_t total = 0;
  std::int64_t used = 0;

  static std::int32_t memory_milli(const Node& node, std::int64_t mib) {
    if (node.gpu_memory_mib == 0 || mib == node.gpu_memory_mib) return kWhole;
    return static_cast<std::int32_t>(mib * kWhole / node.gpu_memory_mib);
  }

  std::int32_t level_milli(NodeId id, unsigned g) const {
    const auto& node = nodes[id];
    const auto& free = frees[id];
    return std::min(free.gpu_milli[g], memory_milli(node, free.gpu_memory_mib[g]));
  }

  static void add(Worth::Caps& to, const Worth::Caps& what, int sign) {
    for (unsigned b = 0; b < kBatches; ++b) to[b] = static_cast<std::int16_t>(to[b] + sign * what[b]);
  }

  void refresh(NodeId id) {
    const auto& node = nodes[id];
    const auto& free = frees[id];
    auto& now = hot[id];
    now.cpu = static_cast<std::int32_t>(free.cpu_milli);
    now.memory = static_cast<std::int32_t>(free.memory_mib);
    now.worth = -1;
    limits[id].sold = {};
    now.fullest = 0;
    now.whole = 0;
    for (unsigned g = 0; g < node.gpus; ++g) {
      now.fullest = std::max(now.fullest, static_cast<std::int16_t>(free.gpu_milli[g]));
      now.whole = static_cast<std::uint8_t>(now.whole + (free.gpu_milli[g] == kWhole ? 1 : 0));
      const auto milli = level_milli(id, g);
      const auto level = worths[now.kind].level(milli);
      limits[id].milli[g] = static_cast<std::int16_t>(free.gpu_milli[g]);
      limits[id].memory[g] = static_cast<std::int16_t>(
          milli < free.gpu_milli[g] ? milli : memory_milli(node, free.gpu_memory_mib[g]));
      add(limits[id].sold, worths[now.kind].alone(level), 1);
      unsigned at = g;
      for (; at > 0 && now.levels[at - 1] > level; --at) now.levels[at] = now.levels[at - 1];
      now.levels[at] = level;
    }
  }

  // Bit s: shape 64 w + s may fit on the node (NUMA and the memory of GPUs are left to cost()).
  static std::uint64_t may_fit(const Asked& ask, const Hot& now) {
    std::array<std::uint8_t, 64> fits;
    const std::int32_t cpu = now.drained ? -1 : now.cpu;
    const std::int32_t memory = now.memory;
    const std::int32_t milli = now.fullest;
    const std::int32_t whole = now.whole;
    for (std::size_t i = 0; i < 64; ++i) {
      fits[i] = static_cast<std::uint8_t>(
          static_cast<unsigned>(ask.cpu[i] <= cpu) & static_cast<unsigned>(ask.memory[i] <= memory) &
          static_cast<unsigned>(ask.milli[i] <= milli) & static_cast<unsigned>(ask.whole[i] <= whole));
    }
    std::uint64_t bits = 0;
    for (unsigned i = 0; i < 8; ++i) {  // eight bytes of 0 or 1 to eight bits
      std::uint64_t word = 0;
      for (unsigned j = 0; j < 8; ++j) word |= static_cast<std::uint64_t>(fits[8 * i + j]) << (8 * j);
      bits |= ((word * 0x0102040810204080) >> 56U) << (8 * i);
    }
    return bits & ask.models[now.model];
  }

  void note(NodeId id) {
    refresh(id);
    const auto words = asked.size();
    for (std::size_t w = 0; w < words; ++w) {
      auto& mark = marks[id * words + w];
      auto fresh = (may_fit(asked[w], hot[id]) | mark.finite) & ~mark.queued;
      mark.queued |= fresh;
      for (; fresh != 0; fresh &= fresh - 1) {
        shapes[64 * w + static_cast<std::size_t>(std::countr_zero(fresh))].stale.push_back(id);
      }
    }
  }

  std::int32_t worth(std::uint32_t kind, std::int32_t cpu, std::int32_t memory,
                     const std::array<std::int16_t, kMostGpus>& levels, std::int32_t enough = 0) {
    const auto& of = worths[kind];
    const unsigned n = kinds[kind].gpus;
    if (n == 0 || levels[n - 1] == 0) return 0;
    const Left left{
        .cpu = std::min(cpu, of.most_cpu()), .memory = std::min(memory, of.most_memory()), .gpus = levels};
    // States with many whole GPUs come back often and are dear to fill in; the others are cheaper than a
    // miss.
    if (levels[n - (n + 1) / 2] != kWhole) return of.of(left, enough);
    std::uint64_t hash = mixed(kind, static_cast<std::uint64_t>(left.cpu) << 32U |
                                         static_cast<std::uint64_t>(static_cast<std::uint32_t>(left.memory)));
    const auto words = std::bit_cast<std::array<std::uint64_t, kMostGpus / 4>>(left.gpus);
    for (unsigned at = 0; at < n; at += 4) hash = mixed(hash, words[at / 4]);
    auto& remembered = memo[hash % kMemo];
    if (remembered.kind != kind || !(remembered.left == left)) {
      remembered = {.left = left, .kind = kind, .worth = of.of(left)};
    }
    return remembered.worth;
  }

  std::int32_t worth_now(NodeId id) {
    auto& now = hot[id];
    if (now.worth < 0) now.worth = worth(now.kind, now.cpu, now.memory, now.levels);
    return now.worth;
  }

  // No more than cost(): the worth after it is not filled in, only bounded. kNever only if that is the cost.
  std::int32_t bound(const Shape& shape, NodeId id) {
    const auto& task = shape.task;
    const auto& now = hot[id];
    if (now.cpu < task.cpu_milli || now.memory < task.memory_mib || now.drained) return kNever;
    const unsigned n = now.gpus;
    if (task.num_gpu != 0) {
      if (now.fullest < task.gpu_milli) return kNever;
      if (task.models != 0 && ((task.models >> now.model) & 1U) == 0) return kNever;
      if (task.gpu_milli == kWhole && now.whole < task.num_gpu) return kNever;
    }
    const auto before = worth_now(id);
    if (before == 0) return 0;
    const auto& of = worths[now.kind];
    const auto rows = of.rows(now.cpu - static_cast<std::int32_t>(task.cpu_milli),
                              now.memory - static_cast<std::int32_t>(task.memory_mib));
    std::int32_t after = -1;
    if (task.num_gpu == 0) {
      after = of.at_most(rows, limits[id].sold, now.levels[n - 1], now.whole);
    } else if (task.gpu_milli == kWhole) {
      auto sold = limits[id].sold;
      for (unsigned at = n - task.num_gpu; at < n; ++at) add(sold, of.alone(now.levels[at]), -1);
      const auto top = task.num_gpu == n ? std::int16_t{0} : now.levels[n - task.num_gpu - 1];
      after = of.at_most(rows, sold, top, now.whole - task.num_gpu);
    } else {
      const auto& each = limits[id];
      const std::int32_t memory = shape.memory[now.kind];
      const auto second = n > 1 ? now.levels[n - 2] : std::int16_t{0};
      std::int32_t last_milli = -1;
      std::int32_t last_memory = -1;
      for (unsigned g = 0; g < n; ++g) {
        const std::int32_t has = each.milli[g];
        const std::int32_t has_memory = each.memory[g];
        if (has < task.gpu_milli || has_memory < memory) continue;
        if (has == last_milli && has_memory == last_memory) continue;
        last_milli = has;
        last_memory = has_memory;
        const auto from = of.level(std::min(has, has_memory));
        const auto to = of.level(std::min(has - task.gpu_milli, has_memory - memory));
        const auto top = from == now.levels[n - 1] ? std::max(second, to) : now.levels[n - 1];
        auto sold = each.sold;
        add(sold, of.alone(from), -1);
        add(sold, of.alone(to), 1);
        after = std::max(after, of.at_most(rows, sold, top, now.whole - (has == kWhole ? 1U : 0U)));
      }
      if (after < 0) return kNever;
    }
    return (before - after) * static_cast<std::int32_t>(kMostGpus);
  }

  // What placing the task there takes from the worth of the node, times kMostGpus, plus the NUMA nodes it
  // spans beyond the first; and on which GPUs. Above `limit` the cost may be told too low, but above it
  // still.
  Cost cost(const Task& task, NodeId id, std::int32_t limit = kNever) {
    auto& now = hot[id];
    if (now.cpu < task.cpu_milli || now.memory < task.memory_mib || now.drained) return {};
    const auto cpu = now.cpu - static_cast<std::int32_t>(task.cpu_milli);
    const auto memory = now.memory - static_cast<std::int32_t>(task.memory_mib);
    const auto before = [&] { return worth_now(id); };
    // The least worth after it that keeps the cost within the limit.
    const auto enough = [&](std::int32_t within) { return within == kNever ? 0 : now.worth - (within >> 4); };
    static_assert(kMostGpus == 1U << 4U);
    const auto priced = [](std::int32_t loss) { return loss * static_cast<std::int32_t>(kMostGpus); };
    if (task.num_gpu == 0) {
      if (before() == 0) return {.cost = 0, .gpus = 0};
      return {.cost = priced(now.worth - worth(now.kind, cpu, memory, now.levels, enough(limit))), .gpus = 0};
    }
    if (now.fullest < task.gpu_milli) return {};
    if (task.models != 0 && ((task.models >> now.model) & 1U) == 0) return {};
    const auto& node = nodes[id];
    const auto& free = frees[id];
    const auto& of = worths[now.kind];
    if (task.gpu_milli == kWhole) {
      if (now.whole < task.num_gpu) return {};
      const auto mask = able(task, node, free);
      const auto gpus = pick_set(task, node, mask);
      if (gpus == 0) return {};
      auto levels = now.levels;
      const unsigned n = now.gpus;
      for (unsigned at = n; at-- > 0;)
        levels[at] = at >= task.num_gpu ? levels[at - task.num_gpu] : std::int16_t{0};
      const auto loss = before() == 0 ? 0 : now.worth - worth(now.kind, cpu, memory, levels, enough(limit));
      return {.cost = priced(loss) + spans(node, gpus) - 1, .gpus = gpus};
    }
    Cost best;
    std::int32_t best_milli = 0;
    std::array<std::int32_t, kMostGpus>
        tried{};  // free milli, and memory, seen already are worth the same again
    unsigned tries = 0;
    for (auto left = able(task, node, free); left != 0; left &= left - 1) {
      const auto g = static_cast<unsigned>(std::countr_zero(left));
      const auto milli = free.gpu_milli[g];
      const auto level = level_milli(id, g);
      if (level == milli) {
        if (std::find(tried.begin(), tried.begin() + tries, milli) != tried.begin() + tries) continue;
        tried[tries++] = milli;
      }
      std::int32_t rest = milli - task.gpu_milli;
      if (node.gpu_memory_mib != 0) {
        rest = std::min(rest, static_cast<std::int32_t>((free.gpu_memory_mib[g] - task.gpu_memory_mib) *
                                                        kWhole / node.gpu_memory_mib));
      }
      std::int32_t loss = 0;
      if (before() != 0) {
        auto levels = now.levels;
        const auto from = of.level(level);
        const auto to = of.level(rest);
        if (from != to) {
          unsigned at = 0;
          while (levels[at] != from) ++at;
          for (; at > 0 && levels[at - 1] > to; --at) levels[at] = levels[at - 1];
          levels[at] = to;
        }
        loss = priced(now.worth - worth(now.kind, cpu, memory, levels, enough(std::min(limit, best.cost))));
      }
      if (best.cost == kNever || loss < best.cost || (loss == best.cost && milli < best_milli)) {
        best = {.cost = loss, .gpus = 1U << g};
        best_milli = milli;
      }
    }
    return best;
  }

  static std::int32_t spans(const Node& node, std::uint32_t gpus) {
    std::int32_t count = 0;
    for (auto left = gpus; left != 0; left &= left - 1) {
      const auto g = static_cast<unsigned>(std::countr_zero(left));
      bool first = true;
      for (unsigned h = 0; h < g; ++h) {
        if (((gpus >> h) & 1U) != 0 && node.numa[h] == node.numa[g]) first = false;
      }
      count += first ? 1 : 0;
    }
    return count;
  }

  std::size_t most_shapes() const {
    return std::clamp<std::size_t>(kMostCells / std::max<std::size_t>(nodes.size(), 1), 16, kMostShapes);
  }

  void index_shapes() {
    table.assign(4 * kMostShapes, 0);
    for (std::size_t s = 0; s < shapes.size(); ++s) {
      auto at = shapes[s].hash % table.size();
      while (table[at] != 0) at = (at + 1) % table.size();
      table[at] = static_cast<std::uint32_t>(s + 1);
    }
  }

  // The cells of this task, which take the place of those not asked for longest when there are too many.
  Shape& shape(const Task& task) {
    const auto hash = hash_of(task);
    if (table.empty()) index_shapes();
    auto at = hash % table.size();
    for (; table[at] != 0; at = (at + 1) % table.size()) {
      auto& known = shapes[table[at] - 1];
      if (known.hash == hash && known.task == task) {
        known.asked = ++asks;
        return known;
      }
    }
    auto slot = shapes.size();
    if (slot < most_shapes()) {
      shapes.emplace_back();
      widen();
    } else {
      const auto oldest = std::min_element(shapes.begin(), shapes.end(),
                                           [](const Shape& a, const Shape& b) { return a.asked < b.asked; });
      slot = static_cast<std::size_t>(oldest - shapes.begin());
    }
    auto& fresh = shapes[slot];
    fresh.task = task;
    fresh.hash = hash;
    fresh.asked = ++asks;
    fresh.all = true;
    fresh.memory.clear();
    auto& ask = asked[slot / 64];
    ask.cpu[slot % 64] = static_cast<std::int32_t>(task.cpu_milli);
    ask.memory[slot % 64] = static_cast<std::int32_t>(task.memory_mib);
    ask.milli[slot % 64] = task.gpu_milli;
    ask.whole[slot % 64] = task.gpu_milli == kWhole ? static_cast<std::int32_t>(task.num_gpu) : 0;
    for (unsigned model = 0; model < kModels; ++model) {
      const auto bit = std::uint64_t{1} << (slot % 64);
      const bool welcome = task.models == 0 || ((task.models >> model) & 1U) != 0;
      ask.models[model] = welcome ? ask.models[model] | bit : ask.models[model] & ~bit;
    }
    index_shapes();
    return fresh;
  }

  // Room for the bits of every shape.
  void widen() {
    const auto words = asked.size();
    if (shapes.size() <= 64 * words) return;
    const auto wider = std::max<std::size_t>(2 * words, 1);
    std::vector<Marks> wide(nodes.size() * wider);
    for (std::size_t id = 0; id < nodes.size(); ++id) {
      for (std::size_t w = 0; w < words; ++w) wide[id * wider + w] = marks[id * words + w];
    }
    marks = std::move(wide);
    asked.resize(wider);
  }

  // A fleet that grows is allowed fewer shapes; they come back as they are asked for.
  void forget_shapes() {
    shapes.clear();
    asked.clear();
    marks.clear();
    index_shapes();
  }

  static std::int32_t least_of(const std::int32_t* block) {
    std::int32_t least = kNever;
    for (std::size_t i = 0; i < kBlock; ++i) least = std::min(least, block[i]);
    return least;
  }

  void set_cell(Shape& shape, NodeId id, std::int32_t now, bool exact) {
    const auto slot = static_cast<std::size_t>(&shape - shapes.data());
    auto& mark = marks[id * asked.size() + slot / 64];
    const auto bit = std::uint64_t{1} << (slot % 64);
    mark.queued &= ~bit;
    mark.bound = exact ? mark.bound & ~bit : mark.bound | bit;
    mark.finite = now == kNever ? mark.finite & ~bit : mark.finite | bit;
    const auto was = std::exchange(shape.cells[id], now);
    auto& least = shape.least[id / kBlock];
    if (now <= least) {
      least = now;
    } else if (was == least) {
      least = least_of(shape.cells.data() + id / kBlock * kBlock);
    }
  }

  void set_bound(Shape& shape, NodeId id) {
    const auto now = bound(shape, id);
    set_cell(shape, id, now, now == kNever);
  }

  // The cost there, which until now may have been a bound; one above the limit may remain a bound, above it.
  std::int32_t settle(Shape& shape, NodeId id, std::int32_t limit) {
    const auto slot = static_cast<std::size_t>(&shape - shapes.data());
    if (((marks[id * asked.size() + slot / 64].bound >> (slot % 64)) & 1U) != 0) {
      const auto now = cost(shape.task, id, limit).cost;
      set_cell(shape, id, now, now <= limit || now == kNever);
    }
    return shape.cells[id];
  }

  void catch_up(Shape& shape) {
    const auto blocks = (nodes.size() + kBlock - 1) / kBlock;
    if (shape.cells.size() < blocks * kBlock) {
      shape.cells.resize(blocks * kBlock, kNever);
      shape.least.resize((blocks + kBlock - 1) / kBlock * kBlock, kNever);
    }
    for (auto kind = shape.memory.size(); kind < kinds.size(); ++kind) {
      const auto all = kinds[kind].gpu_memory_mib;
      const auto wants = std::min(shape.task.gpu_memory_mib, all);
      shape.memory.push_back(static_cast<std::int16_t>(all == 0 ? 0 : wants * kWhole / all));
    }
    if (shape.all) {
      for (NodeId id = 0; id < nodes.size(); ++id) set_bound(shape, id);
    } else {
      for (std::size_t i = 0; i < shape.stale.size(); ++i) {
        if (i + 4 < shape.stale.size()) {
          const auto ahead = shape.stale[i + 4];
          __builtin_prefetch(&hot[ahead]);
          __builtin_prefetch(&limits[ahead]);
          __builtin_prefetch(&shape.cells[ahead]);
          __builtin_prefetch(
              &marks[ahead * asked.size() + static_cast<std::size_t>(&shape - shapes.data()) / 64]);
        }
        set_bound(shape, shape.stale[i]);
      }
    }
    shape.stale.clear();
    shape.all = false;
  }

  void new_mix() {
    worths.clear();
    for (const auto& kind : kinds) worths.emplace_back(kind, mix);
    std::fill(memo.begin(), memo.end(), Remembered{});
    for (NodeId id = 0; id < nodes.size(); ++id) refresh(id);
    for (auto& shape : shapes) shape.all = true;
  }
};

Fleet::Fleet() : state_(std::make_unique<State>()) {}
Fleet::~Fleet() = default;
Fleet::Fleet(Fleet&&) noexcept = default;
Fleet& Fleet::operator=(Fleet&&) noexcept = default;

Result<NodeId> Fleet::add_node(const Node& node) {
  const auto wrong = [&](std::string_view what) {
    return Error(Errc::invalid, "node " + std::to_string(state_->nodes.size()) + ": " + std::string(what));
  };
  if (state_->nodes.size() >= kMostNodes) return wrong("a fleet has at most 200000 nodes");
  if (node.cpu_milli < 0 || node.cpu_milli > kMostAmount)
    return wrong("cpu_milli is not within 0..1000000000");
  if (node.memory_mib < 0 || node.memory_mib > kMostAmount)
    return wrong("memory_mib is not within 0..1000000000");
  if (node.gpu_memory_mib < 0 || node.gpu_memory_mib > kMostAmount) {
    return wrong("gpu_memory_mib is not within 0..1000000000");
  }
  if (node.gpus > kMostGpus) return wrong("a node has at most 16 GPUs");
  if (node.model >= kModels) return wrong("the GPU model is not below 64");
  const Kind kind{.gpus = node.gpus, .model = node.model, .gpu_memory_mib = node.gpu_memory_mib};
  auto known = std::find(state_->kinds.begin(), state_->kinds.end(), kind);
  if (known == state_->kinds.end()) {
    if (state_->kinds.size() >= kMostKinds) {
      return wrong("a fleet has at most 1024 kinds of node (GPU count, model, memory of a GPU)");
    }
    state_->kinds.push_back(kind);
    state_->worths.emplace_back(kind, state_->mix);
    known = state_->kinds.end() - 1;
  }
  Free free;
  free.cpu_milli = node.cpu_milli;
  free.memory_mib = node.memory_mib;
  for (unsigned g = 0; g < node.gpus; ++g) {
    free.gpu_milli[g] = kWhole;
    free.gpu_memory_mib[g] = node.gpu_memory_mib;
  }
  const auto id = static_cast<NodeId>(state_->nodes.size());
  state_->nodes.push_back(node);
  state_->frees.push_back(free);
  State::Hot hot;
  hot.gpus = static_cast<std::uint8_t>(node.gpus);
  hot.model = static_cast<std::uint8_t>(node.model);
  hot.kind = static_cast<std::uint16_t>(known - state_->kinds.begin());
  state_->hot.push_back(hot);
  state_->marks.resize(state_->marks.size() + state_->asked.size());
  state_->limits.emplace_back();
  if (state_->shapes.size() > state_->most_shapes()) state_->forget_shapes();
  state_->note(id);
  state_->total += static_cast<std::int64_t>(node.gpus) * kWhole;
  return id;
}

void Fleet::drain(NodeId node, bool drained) {
  state_->hot.at(node).drained = drained;
  state_->note(node);
}

Status Fleet::set_mix(std::span<const Typical> mix) {
  Mix kept;
  for (const auto& typical : mix) {
    if (!well_formed(typical.task)) return Error(Errc::invalid, "mix: a task is out of bounds");
    if (!(typical.weight >= 0) || typical.weight > 1e15)
      return Error(Errc::invalid, "mix: a weight is out of bounds");
    if (typical.weight > 0) kept.push_back({canonical(typical.task), typical.weight});
  }
  std::stable_sort(kept.begin(), kept.end(),
                   [](const Typical& a, const Typical& b) { return a.weight > b.weight; });
  if (kept.size() > kMostTypical) kept.resize(kMostTypical);
  state_->mix = std::move(kept);
  state_->new_mix();
  return ok_status();
}

bool Fleet::fits(const Task& task, NodeId node) const {
  const auto& free = state_->frees.at(node);
  if (!well_formed(task)) return false;
  if (free.cpu_milli < task.cpu_milli || free.memory_mib < task.memory_mib) return false;
  if (task.num_gpu == 0) return true;
  const auto& where = state_->nodes[node];
  return model_allowed(task, where) && pick_set(task, where, able(task, where, free)) != 0;
}

std::optional<Choice> Fleet::choose(const Task& asked, const Filter& filter) {
  if (!well_formed(asked) || state_->nodes.empty()) return std::nullopt;
  const auto task = canonical(asked);
  auto& shape = state_->shape(task);
  state_->catch_up(shape);
  std::int32_t least = kNever;
  NodeId node = 0;
  const bool filtered = filter.allows_class != nullptr || filter.allows != nullptr;
  if (!filtered) {
    // The first of the least cells, until it is a cost.
    std::int32_t limit = kNever;  // the least cost met
    while (true) {
      least = kNever;
      for (std::size_t at = 0; at < shape.least.size(); at += kBlock)
        least = std::min(least, State::least_of(shape.least.data() + at));
      if (least == kNever) return std::nullopt;
      const auto block = std::find(shape.least.begin(), shape.least.end(), least);
      const auto first =
          shape.cells.begin() + (block - shape.least.begin()) * static_cast<std::ptrdiff_t>(kBlock);
      node = static_cast<NodeId>(std::find(first, first + kBlock, least) - shape.cells.begin());
      const auto now = state_->settle(shape, node, limit);
      if (now == least) break;
      limit = std::min(limit, now);
    }
  } else {
    for (std::size_t block = 0; block < shape.least.size(); ++block) {
      if (shape.least[block] >= least) continue;
      const auto end = std::min((block + 1) * kBlock, state_->nodes.size());
      for (auto id = static_cast<NodeId>(block * kBlock); id < end; ++id) {
        if (shape.cells[id] >= least) continue;
        if (filter.allows_class != nullptr &&
            !filter.allows_class(filter.context, state_->nodes[id].class_id))
          continue;
        if (filter.allows != nullptr && !filter.allows(filter.context, id)) continue;
        const auto now = state_->settle(shape, id, least);
        if (now >= least) continue;
        least = now;
        node = id;
      }
    }
    if (least == kNever) return std::nullopt;
  }
  return Choice{.node = node, .gpus = state_->cost(task, node).gpus};
}

bool Fleet::place(const Task& task, const Choice& choice) {
  if (!well_formed(task) || choice.node >= state_->nodes.size()) return false;
  const auto& node = state_->nodes[choice.node];
  auto& free = state_->frees[choice.node];
  if (free.cpu_milli < task.cpu_milli || free.memory_mib < task.memory_mib) return false;
  if (static_cast<unsigned>(std::popcount(choice.gpus)) != task.num_gpu) return false;
  if (task.num_gpu != 0) {
    if (!model_allowed(task, node) || (choice.gpus & ~able(task, node, free)) != 0) return false;
    if (task.one_numa && State::spans(node, choice.gpus) > 1) return false;
    state_->used += static_cast<std::int64_t>(task.num_gpu) * task.gpu_milli;
  }
  take(task, choice.gpus, node, free, 1);
  state_->note(choice.node);
  return true;
}

bool Fleet::remove(const Task& task, const Choice& choice) {
  if (!well_formed(task) || choice.node >= state_->nodes.size()) return false;
  const auto& node = state_->nodes[choice.node];
  auto& free = state_->frees[choice.node];
  if (node.cpu_milli - free.cpu_milli < task.cpu_milli) return false;
  if (node.memory_mib - free.memory_mib < task.memory_mib) return false;
  if (static_cast<unsigned>(std::popcount(choice.gpus)) != task.num_gpu) return false;
  for (auto left = choice.gpus; left != 0; left &= left - 1) {
    const auto g = static_cast<unsigned>(std::countr_zero(left));
    if (g >= node.gpus || kWhole - free.gpu_milli[g] < task.gpu_milli) return false;
    if (node.gpu_memory_mib != 0 && node.gpu_memory_mib - free.gpu_memory_mib[g] < task.gpu_memory_mib)
      return false;
  }
  if (task.num_gpu != 0) state_->used -= static_cast<std::int64_t>(task.num_gpu) * task.gpu_milli;
  take(task, choice.gpus, node, free, -1);
  state_->note(choice.node);
  return true;
}

std::size_t Fleet::size() const { return state_->nodes.size(); }
const Node& Fleet::node(NodeId node) const { return state_->nodes.at(node); }
Free Fleet::free(NodeId node) const { return state_->frees.at(node); }
bool Fleet::drained(NodeId node) const { return state_->hot.at(node).drained; }
std::int64_t Fleet::gpu_milli_total() const { return state_->total; }
std::int64_t Fleet::gpu_milli_used() const { return state_->used; }

}  // namespace bulkhead::fraction
