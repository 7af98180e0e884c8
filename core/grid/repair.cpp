// At most three moves that let a blocked request in. The search changes the fleet as it goes and puts every
// GPU back into its very place in its bucket: undone in reverse, the neighbour that a GPU stood behind is
// still there.
#include <algorithm>
#include <bit>

#include "core/grid/grid.hpp"

namespace bulkhead::grid {

namespace {

constexpr unsigned word_bits = 64;

}  // namespace

struct Fleet::Search {
  Fleet& fleet;
  const Request& request;
  const RepairRules& rules;
  const Model& model;
  const Tables& tables;
  std::size_t budget;

  struct Moved {
    Instance from = {};
    GpuId to = no_gpu;
    unsigned place = 0;
  };
  struct Put {  // by this search; not to be moved again
    GpuId gpu = no_gpu;
    unsigned place = 0;
  };
  std::array<Moved, max_moves> moved = {};
  std::array<Put, max_moves + 1> put = {};
  std::array<Undo::Step, max_moves + 1> trail = {};
  unsigned moved_count = 0, put_count = 0;  // each put is one step of the trail
  std::uint64_t price = 0;
  std::optional<Repair> best = {};
  // How often an instance of a profile found no place with so many further moves. What failed once is not
  // tried again in the other states of this search, which differ little: most of the time of hopeless
  // searches went there.
  std::array<std::array<std::uint8_t, max_moves>, max_places> failed = {};
  static constexpr unsigned failures = 1;

  bool any_present(const Evictions& group) const {
    for (std::size_t w = 0; w < group.sets.size(); ++w) {
      if ((group.sets[w] & model.present[w]) != 0) return true;
    }
    return false;
  }
  bool hopeless(unsigned profile, unsigned allowed) const {
    return allowed == 0 || failed[profile][allowed] >= failures;
  }

  std::uint64_t base(unsigned profile) const {
    if (rules.base.empty()) return tables.size(profile);
    return profile < rules.base.size() ? rules.base[profile] : 0;
  }

  void step(GpuId gpu, SetId after, unsigned place) {
    trail[put_count] = {gpu, fleet.gpus_[gpu].prev, fleet.gpus_[gpu].set};
    put[put_count++] = {gpu, place};
    fleet.shift(gpu, after);
  }
  void back_to(unsigned puts) {
    while (put_count > puts) fleet.step_back(trail[--put_count]);
  }

  bool may_take(const Instance* from, GpuId gpu) const {
    if (from == nullptr) return !request.filter || request.filter(gpu);
    return !rules.may_go || rules.may_go(*from, gpu);
  }

  // A GPU in the state of the way that may take the newcomer and give what is evicted: the cheapest of those
  // looked at, the first of equals.
  std::optional<std::pair<GpuId, std::uint64_t>> giver(const Eviction& way, const Instance* from) const {
    const ClassSet allowed = from == nullptr ? request.classes : rules.classes;
    std::optional<std::pair<GpuId, std::uint64_t>> found;
    std::size_t seen = 0;
    for (std::size_t c = 0; c < fleet.class_words_; ++c) {
      std::uint64_t classes = model.filled[way.set * fleet.class_words_ + c];
      if (!allowed.empty()) classes &= c < allowed.size() ? allowed[c] : 0;
      for (; classes != 0; classes &= classes - 1) {
        const auto cls =
            static_cast<ClassId>(c * word_bits + static_cast<unsigned>(std::countr_zero(classes)));
        for (GpuId gpu = fleet.bucket(cls, way.set).head; gpu != no_gpu; gpu = fleet.gpus_[gpu].next) {
          if (seen++ == rules.scan) return found;
          const bool taboo = std::any_of(put.begin(), put.begin() + put_count, [&](const Put& p) {
            return p.gpu == gpu && (way.evicted >> p.place & 1U) != 0;
          });
          if (taboo || !may_take(from, gpu)) continue;
          std::uint64_t extra = 0;
          bool movable = true;
          for (std::uint64_t bits = rules.extra ? way.evicted : 0; bits != 0 && movable; bits &= bits - 1) {
            const Place& place = tables.places()[static_cast<unsigned>(std::countr_zero(bits))];
            const auto its = rules.extra({gpu, place.profile, place.start});
            movable = its.has_value();
            extra += its.value_or(0);
          }
          if (!movable || (found && extra >= found->second)) continue;
          found = {gpu, extra};
          if (extra == 0) return found;
        }
      }
    }
    return found;
  }

  std::optional<Choice> direct(unsigned profile, const Instance* from) const {
    if (from == nullptr) return fleet.choose(request);
    const auto go = [&](GpuId gpu) { return rules.may_go(*from, gpu); };
    return fleet.choose(
        {request.model, profile, rules.classes, rules.may_go ? Filter(go) : Filter(), request.scan});
  }

  // Brings an instance that had to go to a new place, with at most `allowed` further moves.
  bool settle(unsigned at, unsigned allowed) {
    const Instance from = moved[at].from;
    if (const auto choice = direct(from.profile, &from)) {
      const unsigned place = *tables.place_of(from.profile, choice->start);
      moved[at].to = choice->gpu;
      moved[at].place = place;
      step(choice->gpu, tables.next(fleet.gpus_[choice->gpu].set, place), place);
      return true;
    }
    if (hopeless(from.profile, allowed)) return false;
    if (displace(from.profile, at, allowed)) return true;
    ++failed[from.profile][allowed];
    return false;
  }

  static constexpr unsigned requested =
      max_moves;  // stands for the request where an index of `moved` is wanted

  // Lets `profile` in with at most `allowed` moves. For a moved instance: true on the first success, the
  // fleet then is changed. For the request: every success is weighed and undone.
  bool displace(unsigned profile, unsigned at, unsigned allowed) {
    const bool root = at == requested;
    const Instance from = root ? Instance{} : moved[at].from;
    std::uint64_t placeable = 0, asked = 0;  // profiles that find a place as things are
    for (const Evictions& group : tables.evictions(profile)) {
      if (group.count > allowed) break;
      unsigned least = group.count;
      std::uint64_t group_price = price;
      for (unsigned i = 0; i < group.count; ++i) {
        const unsigned its = group.profiles[i];
        if ((asked >> its & 1U) == 0) {
          asked |= std::uint64_t{1} << its;
          if (fleet.choose({request.model, its, rules.classes})) placeable |= std::uint64_t{1} << its;
        }
        if ((placeable >> its & 1U) == 0) least += hopeless(its, allowed - group.count) ? allowed : 1;
        group_price += base(its);
      }
      if (least > allowed || (best && group_price > best->price)) continue;
      if (!any_present(group)) continue;
      std::size_t tried = 0;
      for (const Eviction& way : group.ways) {
        if ((model.present[way.set / word_bits] >> (way.set % word_bits) & 1U) == 0) continue;
        const auto gives = giver(way, root ? nullptr : &from);
        if (!gives) continue;
        if (tried++ == rules.ways) break;
        if (budget == 0) return false;
        --budget;
        const unsigned puts = put_count, moves = moved_count;
        const std::uint64_t before = price;
        price = group_price + gives->second;
        if (!root) {
          moved[at].to = gives->first;
          moved[at].place = way.place;
        }
        step(gives->first, way.after, way.place);
        // The largest first: it has the fewest places.
        for (unsigned i = 0; i < group.count; ++i) {
          if (i > 0 && group.profiles[i] == group.profiles[i - 1]) continue;
          for (std::uint64_t bits = way.evicted; bits != 0; bits &= bits - 1) {
            const Place& place = tables.places()[static_cast<unsigned>(std::countr_zero(bits))];
            if (place.profile == group.profiles[i])
              moved[moved_count++] = {{gives->first, place.profile, place.start}, no_gpu, 0};
          }
        }
        bool settled = true;
        for (unsigned i = moves; settled && i < moves + group.count; ++i)
          settled = settle(i, allowed - (moved_count - moves));
        if (settled && !root) return true;
        if (settled) weigh(way.place);
        back_to(puts);
        moved_count = moves;
        price = before;
        if (settled && !rules.extra) break;  // the next ways of the group cost as much and grow no less
      }
    }
    return false;
  }

  // Puts the moves in order, as from the state before the search; leaves what cannot be ordered.
  void weigh(unsigned place) {
    std::array<std::pair<GpuId, SetId>, max_moves + 1> sets;
    unsigned touched = 0;
    Repair plan;
    for (unsigned i = 0; i < put_count; ++i) {
      const auto end = sets.begin() + touched;
      if (std::find_if(sets.begin(), end, [&](const auto& s) { return s.first == trail[i].gpu; }) != end)
        continue;
      sets[touched++] = {trail[i].gpu, trail[i].set};  // the first step of a GPU knows its state before
      plan.growth += tables.waste(fleet.gpus_[trail[i].gpu].set) - tables.waste(trail[i].set);
    }
    const auto set = [&](GpuId gpu) -> SetId& {
      return std::find_if(sets.begin(), sets.begin() + touched, [&](const auto& s) { return s.first == gpu; })
          ->second;
    };
    std::uint32_t done = 0;
    while (plan.count < moved_count) {
      bool any = false;
      // What was displaced last goes first.
      for (unsigned i = moved_count; i-- > 0 && !any;) {
        if ((done >> i & 1U) != 0) continue;
        const Moved& move = moved[i];
        const unsigned old = *tables.place_of(move.from.profile, move.from.start);
        SetId& source = set(move.from.gpu);
        SetId& target = set(move.to);
        const SetId left = tables.without(source, old);
        const SetId then = tables.next(move.to == move.from.gpu ? left : target, move.place);
        if (then == no_set) continue;
        source = left;
        target = then;
        done |= 1U << i;
        plan.moves[plan.count++] = {move.from, move.to, tables.places()[move.place].start};
        any = true;
      }
      if (!any) return;
    }
    const GpuId host = put[0].gpu;
    const SetId ready = set(host);
    if (tables.next(ready, place) == no_set) return;
    plan.choice = {host, request.profile, tables.places()[place].start, tables.growth(ready, place)};
    plan.price = price;
    if (!best || plan.price < best->price || (plan.price == best->price && plan.growth < best->growth))
      best = plan;
  }
};

std::optional<Repair> Fleet::repair(const Request& request, const RepairRules& rules) {
  if (request.model >= models_.size() || request.profile >= models_[request.model].ranks.size())
    return std::nullopt;
  const Model& model = models_[request.model];
  if (hopeless(model, request.profile)) return std::nullopt;
  Search search{*this, request, rules, model, *model.tables, rules.budget};
  for (unsigned moves = 1; moves <= std::min(rules.moves, max_moves) && !search.best; ++moves)
    search.displace(request.profile, Search::requested, moves);
  return search.best;
}

void Fleet::step_back(const Undo::Step& step) {
  const bool open = gpus_[step.gpu].state == State::open;
  if (open) unlink(step.gpu);
  change(step.gpu, step.set);
  if (open) link(step.gpu, step.prev);
}

// Most blocked requests of a full fleet could not be let in by any number of moves: the closed form says so
// at once.
bool Fleet::hopeless(const Model& model, unsigned profile) const {
  const Tables& its = *model.tables;
  if (model.open * its.units() < its.size(profile)) return true;
  const auto& grid = its.seven_of_eight();
  if (!grid) return false;
  std::array<std::uint64_t, max_places> demand{};
  for (unsigned p = 0; p < its.profile_count(); ++p) {
    if (grid->stands_for[p] >= 0)
      demand[static_cast<unsigned>(grid->stands_for[p])] += model.held[p] + (p == profile ? 1 : 0);
  }
  const std::array<Group, 1> all = {{{0, model.open}}};
  return seven_of_eight_holds(its, all, std::span(demand).first(its.profile_count())) == false;
}

bool Fleet::apply(const Repair& repair, Undo* undo) {
  Undo steps;
  const auto move = [&](const Instance& instance, bool in) {
    if (!present(instance.gpu)) return false;
    steps.steps[steps.count] = {instance.gpu, gpus_[instance.gpu].prev, gpus_[instance.gpu].set};
    const bool done = in ? place(instance.gpu, instance.profile, instance.start)
                         : remove(instance.gpu, instance.profile, instance.start);
    if (done) ++steps.count;
    return done;
  };
  bool done = repair.count <= max_moves;
  for (unsigned i = 0; done && i < repair.count; ++i) {
    const Move& it = repair.moves[i];
    done = present(it.to) && present(it.from.gpu) && model_of(it.to) == model_of(it.from.gpu) &&
           move(it.from, false) && move({it.to, it.from.profile, it.start}, true);
  }
  done = done && move({repair.choice.gpu, repair.choice.profile, repair.choice.start}, true);
  if (!done) {
    this->undo(steps);
    return false;
  }
  if (undo != nullptr) *undo = steps;
  return true;
}

void Fleet::undo(const Undo& undo) {
  for (unsigned i = undo.count; i-- > 0;) step_back(undo.steps[i]);
}

}  // namespace bulkhead::grid
