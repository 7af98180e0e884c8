// The nearest ways to yes. What is promising is computed as if some placements were gone; what is reported
// has been done in the indexes, found to let the request in, and taken back.
#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>

#include <fmt/format.h>

#include "core/placement/state.hpp"

namespace bulkhead::placement {

namespace {

constexpr std::size_t looks_per_trial = 64;  // capacities computed for each trial allowed
constexpr std::size_t candidates_kept = 24, tried_alone = 4;
constexpr std::size_t exhaustive_limit =
    10;  // placements on one domain whose pairs and triples are looked at
constexpr std::int64_t no_time = std::numeric_limits<std::int64_t>::max();

}  // namespace

namespace {

struct Candidate {
  std::tuple<std::int64_t, std::int64_t, std::uint64_t> key = {};  // less is better
  std::size_t domain = 0;
  std::vector<std::uint32_t> gone = {};  // slots
};

using SlotRule = grid::Ref<bool(const Terms&)>;
using KeyOf =
    grid::Ref<std::tuple<std::int64_t, std::int64_t, std::uint64_t>(const std::vector<std::uint32_t>&)>;

class Search {
 public:
  Search(Engine::State& state, const Request& request, const Effort& effort, Refusal& out)
      : state_(state), request_(request), effort_(effort), out_(out) {
    for (const ModelNo model : state.models_for(request)) {
      Ask ask = state.read(request);
      if (state.aim(ask, model)) asks_.push_back(std::move(ask));
    }
  }

  void run() {
    const auto with_budget = [&](void (Search::*kind)()) {
      trials_ = effort_.trials;
      looks_ = effort_.trials * looks_per_trial;
      (this->*kind)();
    };
    if (state_.movables > 0) with_budget(&Search::by_moves);
    if (state_.enders > 0) with_budget(&Search::by_ends);
    with_budget(&Search::smaller);
    with_budget(&Search::other_class);
    with_budget(&Search::without_a_constraint);
    with_budget(&Search::by_eviction);
  }

 private:
  bool fits(const Request& request) {
    if (trials_ == 0) return false;
    --trials_;
    return state_.find(request).has_value();
  }
  std::string whose(std::uint32_t slot) const {
    const Placement& it = state_.records[slot].it;
    return fmt::format("placement {} of {}", it.id, it.request.tenant);
  }
  std::string at(const Part& part) const {
    return fmt::format("host {} GPU {}", state_.hosts[part.host].given.name, state_.gpus[part.gpu].index);
  }

  // ---- who would have to leave
  // ------------------------------------------------------------------------------

  // Domains (a GPU, a NUMA node, a host), and on each the placements of a kind without which there is room
  // for more parts. Hosts are looked at by the least `level` of those on them. Bounded: no clearing's key
  // begins below that level, so that the search can stop at the best.
  std::vector<Candidate> clearings(const SlotRule& may, const KeyOf& key_of,
                                   const grid::Ref<bool(std::uint32_t, std::uint32_t)>& before,
                                   const grid::Ref<std::int64_t(std::uint32_t)>& level, bool bounded,
                                   bool fewest, std::size_t most) {
    std::vector<Candidate> found;
    std::vector<std::int64_t> lowest_on(state_.hosts.size(), no_time);
    std::vector<char> any(state_.hosts.size(), 0);
    for (std::uint32_t slot = 0; slot < state_.terms.size(); ++slot) {
      const Terms& its = state_.terms[slot];
      if (!its.live || !may(its)) continue;
      const std::int64_t lowest = level(slot);
      const auto see = [&](HostNo host) {
        lowest_on[host] = std::min(lowest_on[host], lowest);
        any[host] = 1;
      };
      if (!its.several) {
        see(its.host);
      } else {
        for (const Part& part : state_.records[slot].it.parts) see(part.host);
      }
    }
    std::vector<std::pair<std::int64_t, HostNo>> order;
    for (HostNo host = 0; host < state_.hosts.size(); ++host) {
      if (any[host] != 0) order.emplace_back(lowest_on[host], host);
    }
    std::sort(order.begin(), order.end());
    const std::size_t wanted = request_.count == 1 ? tried_alone : candidates_kept;
    const Topology topology = request_.topology;
    const bool whole = request_.cls == Class::exclusive || request_.cls == Class::passthrough;
    const bool by_host =
        request_.count > 1 && (topology == Topology::same_node || topology == Topology::spread_hosts ||
                               (whole && topology == Topology::any));
    const bool by_numa = request_.count > 1 && topology == Topology::same_numa;
    for (Ask& ask : asks_) {
      for (const auto& [lowest, host] : order) {
        if (looks_ == 0 || (bounded && found.size() >= wanted && lowest > std::get<0>(found[wanted - 1].key)))
          break;
        const auto all = state_.gpus_of(host);
        std::vector<std::vector<GpuNo>> domains;
        if (by_host) {
          domains.push_back(all);
        } else if (by_numa) {
          std::vector<unsigned> seen;
          for (const GpuNo gpu : all) {
            const unsigned numa = state_.gpus[gpu].numa;
            if (std::find(seen.begin(), seen.end(), numa) != seen.end()) continue;
            seen.push_back(numa);
            domains.push_back(state_.gpus_of(host, numa));
          }
        } else {
          for (const GpuNo gpu : all) domains.push_back({gpu});
        }
        for (const auto& domain : domains) {
          if (looks_ == 0) break;
          std::vector<std::uint32_t> slots;
          // CPU, memory and tenants to keep away from may be anywhere on the host.
          const bool far = ask.room || ask.terms || state_.hosts[host].guards != 0;
          for (const GpuNo gpu : far ? all : domain) {
            for (const PartRef& ref : state_.gpus[gpu].parts) {
              if (may(state_.terms[ref.slot])) slots.push_back(ref.slot);
            }
          }
          if (slots.empty()) continue;
          std::sort(slots.begin(), slots.end());
          slots.erase(std::unique(slots.begin(), slots.end()), slots.end());
          std::sort(slots.begin(), slots.end(), before);
          if (auto gone = least(ask, domain, slots, fewest, most)) {
            Candidate candidate{key_of(*gone), domain.front(), std::move(*gone)};
            const auto worse = [](const Candidate& a, const Candidate& b) {
              return std::tie(a.key, a.domain) < std::tie(b.key, b.domain);
            };
            found.insert(std::upper_bound(found.begin(), found.end(), candidate, worse),
                         std::move(candidate));
            if (found.size() > candidates_kept) found.pop_back();
          }
        }
      }
    }
    return found;
  }

  std::int64_t room(Ask& ask, const std::vector<GpuNo>& domain, const std::vector<std::uint32_t>& gone) {
    if (looks_ > 0) --looks_;
    ask.without = gone.empty() ? nullptr : &gone;
    const std::int64_t its = state_.capacity(ask, domain);
    ask.without = nullptr;
    return its;
  }

  // Of `slots`, in order: some without which the domain has room. Pairs and triples are looked at where they
  // are few.
  std::optional<std::vector<std::uint32_t>> least(Ask& ask, const std::vector<GpuNo>& domain,
                                                  const std::vector<std::uint32_t>& slots, bool fewest,
                                                  std::size_t most) {
    const bool together = request_.topology == Topology::same_gpu ||
                          request_.topology == Topology::same_numa ||
                          request_.topology == Topology::same_node || domain.size() > 1;
    const std::int64_t now = room(ask, domain, {});
    const std::int64_t needs =
        together && request_.topology != Topology::spread_hosts ? std::int64_t{request_.count} : now + 1;
    if (needs <= now) return std::nullopt;  // not what is missing
    if (room(ask, domain, slots) < needs) return std::nullopt;
    std::vector<std::uint32_t> gone;
    if (fewest) {
      for (const std::uint32_t one : slots) {
        if (looks_ == 0) return std::nullopt;
        gone = {one};
        if (room(ask, domain, gone) >= needs) return gone;
      }
      if (slots.size() <= exhaustive_limit) {
        for (std::size_t a = 0; a < slots.size() && most >= 2; ++a) {
          for (std::size_t b = a + 1; b < slots.size() && looks_ > 0; ++b) {
            gone = {slots[a], slots[b]};
            if (room(ask, domain, gone) >= needs) return gone;
          }
        }
        for (std::size_t a = 0; a < slots.size() && most >= 3; ++a) {
          for (std::size_t b = a + 1; b < slots.size(); ++b) {
            for (std::size_t c = b + 1; c < slots.size() && looks_ > 0; ++c) {
              gone = {slots[a], slots[b], slots[c]};
              if (room(ask, domain, gone) >= needs) return gone;
            }
          }
        }
        if (most <= 3) return std::nullopt;
      }
    }
    gone.clear();
    for (const std::uint32_t slot : slots) {
      gone.push_back(slot);
      if (looks_ == 0) return std::nullopt;
      if (room(ask, domain, gone) >= needs) break;
    }
    // Who need not go after all; the last is needed.
    for (std::size_t at = 0; at + 1 < gone.size() && looks_ > 0;) {
      std::vector<std::uint32_t> fewer = gone;
      fewer.erase(fewer.begin() + static_cast<std::ptrdiff_t>(at));
      if (room(ask, domain, fewer) >= needs) {
        gone = std::move(fewer);
      } else {
        ++at;
      }
    }
    if (gone.size() > most) return std::nullopt;
    return gone;
  }

  bool fits_without(const std::vector<std::uint32_t>& gone) {
    if (trials_ == 0) return false;
    state_.marks.push_back(state_.journal.size());
    bool fine = true;
    for (const std::uint32_t slot : gone) fine = state_.release(state_.id_of(slot)).ok() && fine;
    fine = fine && fits(request_);
    state_.rollback();
    return fine;
  }

  // The first candidates, one or several together, that let the request in; nobody among them needlessly.
  std::optional<std::vector<std::uint32_t>> enough(const std::vector<Candidate>& candidates,
                                                   std::size_t most) {
    for (const Candidate& one : candidates) {
      if (fits_without(one.gone)) return one.gone;
      if (request_.count > 1 && static_cast<std::size_t>(&one - candidates.data()) >= tried_alone) break;
    }
    if (request_.count == 1) return std::nullopt;
    std::vector<std::uint32_t> gone;
    for (const Candidate& one : candidates) {
      for (const std::uint32_t slot : one.gone) {
        if (std::find(gone.begin(), gone.end(), slot) == gone.end()) gone.push_back(slot);
      }
      if (gone.size() > most) return std::nullopt;
      if (!fits_without(gone)) continue;
      for (std::size_t at = 0; at < gone.size() && trials_ > 0;) {
        std::vector<std::uint32_t> fewer = gone;
        fewer.erase(fewer.begin() + static_cast<std::ptrdiff_t>(at));
        if (fits_without(fewer)) {
          gone = std::move(fewer);
        } else {
          ++at;
        }
      }
      return gone;
    }
    return std::nullopt;
  }

  void by_ends() {
    const auto may = [](const Terms& its) { return its.has_end; };
    const auto when = [&](std::uint32_t slot) { return state_.terms[slot].ends; };
    const auto last = [&](const std::vector<std::uint32_t>& gone) {
      std::int64_t at = -no_time;
      for (const std::uint32_t slot : gone) at = std::max(at, when(slot));
      return at;
    };
    const auto key = [&](const std::vector<std::uint32_t>& gone) {
      return std::tuple(last(gone), static_cast<std::int64_t>(gone.size()), std::uint64_t{0});
    };
    const auto before = [&](std::uint32_t a, std::uint32_t b) {
      return std::pair(when(a), a) < std::pair(when(b), b);
    };
    const auto gone = enough(clearings(may, key, before, when, true, false, most_count), most_count);
    if (!gone) return;
    Way way;
    way.kind = WayKind::ends;
    way.at = last(*gone);
    way.text = fmt::format(
        "fits after {} {} at {}", whose(gone->front()),
        gone->size() == 1 ? "ends" : fmt::format("and {} more end, the last", gone->size() - 1), *way.at);
    for (const std::uint32_t slot : *gone) way.gone.push_back(state_.id_of(slot));
    out_.ways.push_back(std::move(way));
  }

  void by_eviction() {
    const auto may = [&](const Terms& its) { return its.priority < request_.priority; };
    const auto key = [&](const std::vector<std::uint32_t>& gone) {
      std::int64_t highest = std::numeric_limits<std::int64_t>::min();
      std::uint64_t price = 0;
      for (const std::uint32_t slot : gone) {
        highest = std::max<std::int64_t>(highest, state_.records[slot].it.request.priority);
        price += state_.records[slot].it.request.price;
      }
      return std::tuple(highest, static_cast<std::int64_t>(gone.size()), price);
    };
    const auto before = [&](std::uint32_t a, std::uint32_t b) {
      const Request& left = state_.records[a].it.request;
      const Request& right = state_.records[b].it.request;
      return std::tie(left.priority, left.price, a) < std::tie(right.priority, right.price, b);
    };
    const auto level = [&](std::uint32_t slot) { return std::int64_t{state_.terms[slot].priority}; };
    const auto gone = enough(clearings(may, key, before, level, true, true, most_count), most_count);
    if (!gone) return;
    Way way;
    way.kind = WayKind::evict;
    way.text = fmt::format("fits if {}{} went: of lower priority", whose(gone->front()),
                           gone->size() == 1 ? "" : fmt::format(" and {} more", gone->size() - 1));
    for (const std::uint32_t slot : *gone) way.gone.push_back(state_.id_of(slot));
    out_.ways.push_back(std::move(way));
  }

  // ---- moves
  // ---------------------------------------------------------------------------------------------------

  // True when the moves can be made in some order and the request fits then; they are left in that order.
  bool can_be_done(std::vector<Move>& moves) {
    std::vector<std::size_t> order(moves.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    do {
      if (trials_ == 0) return false;
      state_.marks.push_back(state_.journal.size());
      bool fine = true;
      for (const std::size_t at : order) fine = fine && state_.move(moves[at]).ok();
      fine = fine && fits(request_);
      state_.rollback();
      if (fine) {
        std::vector<Move> sorted;
        for (const std::size_t at : order) sorted.push_back(moves[at]);
        moves = std::move(sorted);
        return true;
      }
    } while (std::next_permutation(order.begin(), order.end()));
    return false;
  }

  void report(std::vector<Move> moves) {
    Way way;
    way.kind = WayKind::moves;
    way.text = fmt::format("fits after {} move{}:", moves.size(), moves.size() == 1 ? "" : "s");
    for (const Move& move : moves) {
      const auto slot = static_cast<std::uint32_t>((move.placement & 0xffffffffU) - 1);
      const Record& record = state_.records[slot];
      way.price += record.it.request.price;
      way.text += fmt::format(" {} from {} to {};", whose(slot), at(record.it.parts[move.part]), at(move.to));
    }
    way.text.pop_back();
    way.moves = std::move(moves);
    out_.ways.push_back(std::move(way));
  }

  void by_moves() {
    if (effort_.moves == 0) return;
    if (request_.cls == Class::mig && request_.count == 1 && by_repair()) return;
    const auto may = [](const Terms& its) { return its.movable; };
    const auto price = [&](std::uint32_t slot) { return state_.terms[slot].price; };
    const auto key = [&](const std::vector<std::uint32_t>& gone) {
      std::uint64_t sum = 0;
      std::size_t parts = 0;
      for (const std::uint32_t slot : gone) {
        sum += price(slot);
        parts += state_.records[slot].it.parts.size();
      }
      return std::tuple(static_cast<std::int64_t>(parts), std::int64_t{0}, sum);
    };
    const auto before = [&](std::uint32_t a, std::uint32_t b) {
      return std::pair(price(a), a) < std::pair(price(b), b);
    };
    const auto level = [&](std::uint32_t slot) {
      return static_cast<std::int64_t>(
          std::min<std::uint64_t>(price(slot), static_cast<std::uint64_t>(no_time)));
    };
    const auto candidates = clearings(may, key, before, level, false, true, effort_.moves);
    std::vector<std::uint32_t> together;
    for (const Candidate& one : candidates) {
      if (try_moving(one.gone)) return;
      for (const std::uint32_t slot : one.gone) {
        if (std::find(together.begin(), together.end(), slot) == together.end()) together.push_back(slot);
      }
      if (request_.count > 1 && together.size() > one.gone.size() && together.size() <= effort_.moves &&
          try_moving(together))
        return;
    }
  }

  // What a placement would ask for to be where it may be.
  Request again_of(const Placement& was) const {
    Request again = was.request;
    again.models = {state_.models[was.model].given.name};
    again.count = static_cast<unsigned>(was.parts.size());
    return again;
  }

  // The request goes first, those in its way find places after it.
  bool try_moving(const std::vector<std::uint32_t>& gone) {
    if (trials_ == 0) return false;
    --trials_;
    // Repair has looked at moves within a GPU; what is left needs a place elsewhere, and asking for that is
    // cheap.
    if (request_.cls == Class::mig && request_.count == 1) {
      for (const std::uint32_t slot : gone) {
        if (!state_.find(again_of(state_.records[slot].it))) return false;
      }
    }
    std::vector<Placement> left;
    std::vector<Move> moves;
    state_.marks.push_back(state_.journal.size());
    bool fine = true;
    for (const std::uint32_t slot : gone) {
      auto was = state_.release(state_.id_of(slot));
      fine = fine && was.ok();
      if (was.ok()) left.push_back(std::move(was).value());
    }
    auto choice = fine ? state_.find(request_) : std::nullopt;
    fine = choice && state_.enter({no_placement, request_, choice->model, choice->parts}, false).ok();
    // The largest first: it has the fewest places.
    std::stable_sort(left.begin(), left.end(), [](const Placement& a, const Placement& b) {
      const auto size = [](const Placement& p) {
        return std::pair(p.parts.front().size, p.parts.front().milli);
      };
      return size(a) > size(b);
    });
    for (const Placement& was : left) {
      if (!fine) break;
      const Request again = again_of(was);
      choice = state_.find(again);
      fine = choice && choice->model == was.model &&
             state_.enter({no_placement, again, choice->model, choice->parts}, false).ok();
      if (!fine) break;
      for (std::size_t at = 0; at < was.parts.size(); ++at) {
        const Part& to = choice->parts[at];
        if (to.gpu != was.parts[at].gpu || to.start != was.parts[at].start) moves.push_back({was.id, at, to});
      }
    }
    state_.rollback();
    if (!fine || moves.empty() || moves.size() > effort_.moves || !can_be_done(moves)) return false;
    report(std::move(moves));
    return true;
  }

  bool by_repair() {
    for (const Ask& ask : asks_) {
      const auto owner = [&](const grid::Instance& instance) -> std::optional<PartRef> {
        const GpuState& gpu = state_.gpus[state_.of_grid[instance.gpu]];
        for (const PartRef& ref : gpu.parts) {
          const Part& part = state_.records[ref.slot].it.parts[ref.part];
          if (part.start == instance.start &&
              *state_.models[gpu.model].tables->profile_of_id(part.profile) == instance.profile)
            return ref;
        }
        return std::nullopt;
      };
      const auto fine = [&](grid::GpuId id) {
        const GpuNo gpu = state_.of_grid[id];
        return state_.parts_by_host(ask, state_.gpus[gpu].host) > 0 &&
               state_.static_why(ask, gpu) == Why::none;
      };
      const auto extra = [&](const grid::Instance& instance) -> std::optional<std::uint32_t> {
        const auto ref = owner(instance);
        if (!ref) return std::nullopt;
        const Record& record = state_.records[ref->slot];
        if (!record.it.request.movable ||
            (record.it.parts.size() > 1 && record.it.request.topology != Topology::any))
          return std::nullopt;
        return static_cast<std::uint32_t>(std::min<std::uint64_t>(record.it.request.price, 1U << 30U));
      };
      const auto may_go = [&](const grid::Instance& instance, grid::GpuId to) {
        const auto ref = owner(instance);
        if (!ref) return false;
        Ask its = state_.read(state_.records[ref->slot].it.request);
        if (!state_.aim(its, ask.model)) return false;
        const GpuNo gpu = state_.of_grid[to];
        const bool same_host = state_.gpus[gpu].host == state_.records[ref->slot].it.parts[ref->part].host;
        return (same_host || state_.parts_by_host(its, state_.gpus[gpu].host) > 0) &&
               state_.static_why(its, gpu) == Why::none;
      };
      const std::vector<std::uint32_t> base(state_.models[ask.model].tables->profile_count(), 0);
      grid::Request wanted;
      wanted.model = state_.models[ask.model].grid;
      wanted.profile = static_cast<unsigned>(ask.profile);
      wanted.classes = ask.classes;
      wanted.filter = fine;
      grid::RepairRules rules;
      rules.moves = std::min(effort_.moves, grid::max_moves);
      rules.base = base;
      rules.extra = extra;
      rules.may_go = may_go;
      const auto repair = state_.grid.repair(wanted, rules);
      if (!repair) continue;
      std::vector<Move> moves;
      bool known = true;
      for (unsigned at = 0; at < repair->count && known; ++at) {
        const grid::Move& it = repair->moves[at];
        const auto ref = owner(it.from);
        known = ref.has_value();
        if (!known) break;
        const GpuNo to = state_.of_grid[it.to];
        Part part = state_.records[ref->slot].it.parts[ref->part];
        part.host = state_.gpus[to].host;
        part.gpu = to;
        part.numa = state_.gpus[to].numa;
        part.start = it.start;
        moves.push_back({state_.id_of(ref->slot), ref->part, part});
      }
      if (known && !moves.empty() && can_be_done(moves)) {
        report(std::move(moves));
        return true;
      }
    }
    return false;
  }

  // ---- another request
  // -----------------------------------------------------------------------------------------

  bool offer(WayKind kind, Request instead, std::string text) {
    if (!fits(instead)) return false;
    Way way;
    way.kind = kind;
    way.text = std::move(text);
    way.instead = std::move(instead);
    out_.ways.push_back(std::move(way));
    return true;
  }

  void smaller() {
    Request r = request_;
    if (r.cls == Class::mig) {
      // Profiles below the one asked for, the largest first.
      struct Below {
        unsigned compute = 0, size = 0;
        std::string name = {};
      };
      std::vector<Below> below;
      for (const Ask& ask : asks_) {
        const auto& profiles = state_.models[ask.model].given.geometry.profiles;
        const mig::Profile& mine = profiles[static_cast<std::size_t>(ask.profile)];
        for (const mig::Profile& it : profiles) {
          if (it.size > mine.size || it.compute_slices > mine.compute_slices || &it == &mine) continue;
          if (it.size == mine.size && it.compute_slices == mine.compute_slices) continue;
          if (std::none_of(below.begin(), below.end(), [&](const Below& b) { return b.name == it.name; }))
            below.push_back({it.compute_slices, it.size, it.name});
        }
      }
      std::stable_sort(below.begin(), below.end(), [](const Below& a, const Below& b) {
        return std::pair(a.size, a.compute) > std::pair(b.size, b.compute);
      });
      for (const Below& it : below) {
        r.profile = it.name;
        if (offer(WayKind::smaller, r, fmt::format("fits with the smaller profile {}", it.name))) break;
      }
    }
    if (r.cls == Class::share) {
      // Less weight, less memory, less of both: the largest that fits, to a 64th.
      const auto shrink = [&](bool weight, bool memory) {
        std::int64_t low = 0, high = 64;
        const auto with = [&](std::int64_t share) {
          Request less = request_;
          if (weight)
            less.milli = static_cast<std::int32_t>(std::max<std::int64_t>(1, less.milli * share / 64));
          if (memory) less.memory_mib = less.memory_mib * share / 64;
          return less;
        };
        while (high - low > 1) {
          const std::int64_t middle = (low + high) / 2;
          (fits(with(middle)) ? low : high) = middle;
        }
        const Request less = with(low);
        return low > 0 && offer(WayKind::smaller, less,
                                fmt::format("fits with {} milli and {} MiB", less.milli, less.memory_mib));
      };
      if (!shrink(true, false) && !(request_.memory_mib > 0 && shrink(false, true)) &&
          request_.memory_mib > 0)
        shrink(true, true);
    }
    if (request_.count > 1) {
      unsigned low = 0, high = request_.count;
      r = request_;
      while (high - low > 1) {
        r.count = (low + high) / 2;
        (fits(r) ? low : high) = r.count;
      }
      r.count = low;
      if (low > 0) offer(WayKind::smaller, r, fmt::format("fits with {} instead of {}", low, request_.count));
    }
  }

  void other_class() {
    const auto as = [&](Class cls) {
      Request r = request_;
      r.cls = cls;
      r.profile.clear();
      r.milli = 0;
      r.memory_mib = 0;
      return r;
    };
    if (request_.cls == Class::mig) {
      for (const Ask& ask : asks_) {
        const Model& model = state_.models[ask.model].given;
        const mig::Profile& mine = model.geometry.profiles[static_cast<std::size_t>(ask.profile)];
        unsigned slices = 1;
        for (const mig::Profile& it : model.geometry.profiles) slices = std::max(slices, it.compute_slices);
        Request r = as(Class::share);
        r.milli = static_cast<std::int32_t>((whole_gpu * mine.compute_slices + slices - 1) / slices);
        r.milli = std::clamp(r.milli, 1, whole_gpu);
        const auto exact = static_cast<std::int64_t>(to_mebibytes(mine.memory));
        r.memory_mib = exact > 0 || model.geometry.memory_slices == 0
                           ? exact
                           : model.memory_mib * mine.size / model.geometry.memory_slices;
        if (offer(WayKind::other_class, r,
                  fmt::format("fits as a share of {} milli and {} MiB", r.milli, r.memory_mib)))
          break;
      }
    }
    if (request_.cls == Class::share) {
      for (const Ask& ask : asks_) {
        const Model& model = state_.models[ask.model].given;
        unsigned slices = 1;
        for (const mig::Profile& it : model.geometry.profiles) slices = std::max(slices, it.compute_slices);
        const mig::Profile* best = nullptr;
        for (const mig::Profile& it : model.geometry.profiles) {
          const auto exact = static_cast<std::int64_t>(to_mebibytes(it.memory));
          const std::int64_t memory =
              exact > 0 ? exact : model.memory_mib * it.size / model.geometry.memory_slices;
          if (static_cast<std::int64_t>(it.compute_slices) * whole_gpu <
                  std::int64_t{request_.milli} * slices ||
              memory < request_.memory_mib)
            continue;
          if (best == nullptr ||
              std::pair(it.size, it.compute_slices) < std::pair(best->size, best->compute_slices))
            best = &it;
        }
        if (best == nullptr) continue;
        Request r = as(Class::mig);
        r.profile = best->name;
        if (offer(WayKind::other_class, r, fmt::format("fits as MIG {}", best->name))) break;
      }
    }
    if (request_.cls == Class::mig || request_.cls == Class::share)
      offer(WayKind::other_class, as(Class::exclusive),
            request_.count == 1 ? "fits as a whole GPU" : "fits as whole GPUs");
    if (request_.cls == Class::exclusive) {
      // The largest profile, where the GPUs left are cut.
      const mig::Profile* best = nullptr;
      for (const Ask& ask : asks_) {
        for (const mig::Profile& it : state_.models[ask.model].given.geometry.profiles) {
          if (best == nullptr ||
              std::pair(it.size, it.compute_slices) > std::pair(best->size, best->compute_slices))
            best = &it;
        }
      }
      if (best != nullptr) {
        Request r = as(Class::mig);
        r.profile = best->name;
        offer(WayKind::other_class, r, fmt::format("fits as MIG {}", best->name));
      }
    }
  }

  void without_a_constraint() {
    struct Drop {
      std::string text = {};
      void (*drop)(Request&) = nullptr;
      bool asked = false;
    };
    const Request& r = request_;
    const std::array<Drop, 10> drops = {{
        {fmt::format("the topology {}", name_of(r.topology)), [](Request& q) { q.topology = Topology::any; },
         r.topology != Topology::any && r.count > 1},
        {"the list of GPU models", [](Request& q) { q.models.clear(); }, !r.models.empty()},
        {"the labels", [](Request& q) { q.labels.clear(); }, !r.labels.empty()},
        {"regard to taints", [](Request& q) { q.tolerates = {"*"}; },
         state_.tainted_hosts > 0 &&
             std::find(r.tolerates.begin(), r.tolerates.end(), "*") == r.tolerates.end()},
        {"the limit of the band", [](Request& q) { q.most_band = Band::warm; },
         state_.read(r).most < Band::warm},
        {"keeping away from tenants on a GPU", [](Request& q) { q.avoid_on_gpu.clear(); },
         !r.avoid_on_gpu.empty()},
        {"keeping away from tenants on a host", [](Request& q) { q.avoid_on_host.clear(); },
         !r.avoid_on_host.empty()},
        {"being alone", [](Request& q) { q.alone = Alone::no; }, r.alone != Alone::no},
        {"CPU of the host", [](Request& q) { q.cpu_milli = 0; }, r.cpu_milli > 0},
        {"memory of the host", [](Request& q) { q.host_memory_mib = 0; }, r.host_memory_mib > 0},
    }};
    bool any = false;
    unsigned asked = 0;
    Request bare = r;
    for (const Drop& it : drops) {
      if (!it.asked) continue;
      ++asked;
      it.drop(bare);
      Request less = r;
      it.drop(less);
      any = offer(WayKind::without, std::move(less), fmt::format("fits without {}", it.text)) || any;
    }
    if (any || asked < 2 || !fits(bare)) return;
    // Not one alone: all, and then those again without which it still fits.
    std::vector<bool> dropped(drops.size(), true);
    for (std::size_t at = 0; at < drops.size(); ++at) {
      if (!drops[at].asked) continue;
      Request less = r;
      for (std::size_t other = 0; other < drops.size(); ++other) {
        if (other != at && drops[other].asked && dropped[other]) drops[other].drop(less);
      }
      if (fits(less)) dropped[at] = false;
    }
    Request less = r;
    std::string text = "fits without";
    for (std::size_t at = 0; at < drops.size(); ++at) {
      if (!drops[at].asked || !dropped[at]) continue;
      drops[at].drop(less);
      text += fmt::format("{}{}", text.back() == 't' && text.size() == 12 ? " " : ", ", drops[at].text);
    }
    offer(WayKind::without, std::move(less), std::move(text));
  }

  Engine::State& state_;
  const Request& request_;
  const Effort& effort_;
  Refusal& out_;
  std::size_t trials_ = 0, looks_ = 0;  // left to the kind of way that is looked for
  std::vector<Ask> asks_;
};

}  // namespace

void Engine::State::find_ways(const Request& request, const Effort& effort, Refusal& out) {
  Search(*this, request, effort, out).run();
}

}  // namespace bulkhead::placement
