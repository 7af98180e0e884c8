// From targets to moves that can be carried out one after the other.
#include <algorithm>
#include <set>
#include <tuple>

#include "core/compaction/model.hpp"

namespace bulkhead::compaction {

namespace {

using At = std::pair<std::size_t, unsigned>;  // (board, start)

struct Board {
  std::size_t gpu = 0;
  grid::SetId now = 0;
  std::vector<Item> leave = {};          // still here
  std::vector<std::uint32_t> take = {};  // still to come, per profile index
  std::uint32_t takes = 0;
};

class Order {
 public:
  Order(const Fleet& fleet, const Offers& offers) : fleet_(fleet), offers_(offers), tables_(offers.tables()) {
    const std::size_t profiles = tables_.profile_count();
    ready_.resize(profiles);
    hot_.resize(profiles);
    cold_.resize(profiles);
  }

  Ordered run(std::vector<Target> targets, std::span<const std::uint64_t> wanted) {
    read(targets);
    drop_surplus(wanted);
    reserve(wanted);
    for (std::size_t b = 0; b < boards_.size(); ++b) refresh(b);
    std::size_t pending = 0;
    for (const auto& board : boards_) pending += board.leave.size();
    while (pending > 0) {
      if (step()) {
        --pending;
      } else if (!detour()) {
        break;
      }
    }
    out_.stuck = pending;
    place_new();
    for (const auto& move : out_.moves.list) {
      out_.moves.price += move.price;
      if (move.visible) ++out_.moves.visible;
    }
    return std::move(out_);
  }

 private:
  std::uint64_t id_at(std::size_t gpu, const Item& item) const {
    for (const auto& instance : now_at(gpu)) {
      if (instance.start == item.start && instance.profile == tables_.geometry().profiles[item.profile].id)
        return instance.id;
    }
    return 0;
  }
  const std::vector<Instance>& now_at(std::size_t gpu) const {
    const auto at = changed_.find(gpu);
    return at == changed_.end() ? fleet_.gpus[gpu].instances : at->second;
  }

  void read(std::vector<Target>& targets) {
    std::sort(targets.begin(), targets.end(), [](const Target& a, const Target& b) { return a.gpu < b.gpu; });
    for (auto& target : targets) {
      Board board;
      board.gpu = target.gpu;
      std::uint64_t bits = 0;
      for (const auto& instance : fleet_.gpus[target.gpu].instances)
        bits |= std::uint64_t{1} << *tables_.place_of(*tables_.profile_of_id(instance.profile), instance.start);
      board.now = *tables_.find(bits);
      board.leave = std::move(target.leave);
      board.take = std::move(target.take);
      board.take.resize(tables_.profile_count(), 0);
      boards_.push_back(std::move(board));
    }
  }

  // More is taken than leaves where an offer is larger than what is needed of it: first from GPUs that are empty now,
  // last from those with least free, so that whole GPUs stay whole.
  void drop_surplus(std::span<const std::uint64_t> wanted) {
    std::vector<std::size_t> by(boards_.size());
    for (std::size_t b = 0; b < by.size(); ++b) by[b] = b;
    std::stable_sort(by.begin(), by.end(), [&](std::size_t a, std::size_t b) {
      const auto key = [&](std::size_t i) {
        std::uint32_t taking = 0;
        for (unsigned p = 0; p < boards_[i].take.size(); ++p) taking += boards_[i].take[p] * tables_.size(p);
        return std::tuple(boards_[i].now != 0, taking, boards_.size() - i);
      };
      return key(a) < key(b);
    });
    for (unsigned p = 0; p < tables_.profile_count(); ++p) {
      std::int64_t surplus = p < wanted.size() ? -static_cast<std::int64_t>(wanted[p]) : 0;
      for (const auto& board : boards_) {
        surplus += board.take[p];
        for (const auto& item : board.leave) surplus -= item.profile == p ? 1 : 0;
      }
      for (const auto b : by) {
        while (surplus > 0 && boards_[b].take[p] > 0) {
          --boards_[b].take[p];
          --surplus;
        }
      }
    }
  }

  // Which of the places to come are for the new instances, and not for those that move: on the GPUs that are ready
  // last.
  void reserve(std::span<const std::uint64_t> wanted) {
    reserved_.assign(boards_.size(), {});
    for (std::size_t b = 0; b < boards_.size(); ++b) reserved_[b].assign(tables_.profile_count(), 0);
    for (unsigned p = 0; p < wanted.size(); ++p) {
      std::uint64_t left = wanted[p];
      for (const bool leaving : {true, false}) {
        for (std::size_t b = 0; b < boards_.size() && left > 0; ++b) {
          auto& board = boards_[b];
          if (board.leave.empty() == leaving) continue;
          const auto count = static_cast<std::uint32_t>(std::min<std::uint64_t>(left, board.take[p]));
          board.take[p] -= count;
          reserved_[b][p] += count;
          left -= count;
        }
      }
    }
    for (auto& board : boards_) {
      for (const auto count : board.take) board.takes += count;
    }
  }

  grid::SetId final_of(const Board& board) const {
    auto set = board.now;
    for (const auto& item : board.leave) set = tables_.without(set, item.place);
    return set;
  }
  std::vector<std::uint32_t> still_to_come(std::size_t b) const {
    auto counts = boards_[b].take;
    for (std::size_t p = 0; p < counts.size(); ++p) counts[p] += reserved_[b][p];
    return counts;
  }
  // A start where the profile fits now and leaves room for everything else that is to come.
  std::optional<unsigned> start_for(std::size_t b, unsigned profile) const {
    const auto& board = boards_[b];
    const auto final = final_of(board);
    auto counts = still_to_come(b);
    --counts[profile];
    const auto first = tables_.first_place(profile);
    for (unsigned i = 0; i < tables_.places_of(profile).size(); ++i) {
      if (tables_.next(board.now, first + i) == grid::no_set) continue;
      const auto then = tables_.next(final, first + i);
      if (then != grid::no_set && offers_.covers(then, counts)) return first + i;
    }
    return std::nullopt;
  }

  void refresh(std::size_t b) {
    const auto& board = boards_[b];
    for (unsigned p = 0; p < tables_.profile_count(); ++p) {
      if (board.take[p] > 0 && start_for(b, p)) {
        ready_[p].insert(b);
      } else {
        ready_[p].erase(b);
      }
    }
    for (const auto& item : board.leave) {
      const At at{b, item.start};
      (board.takes > 0 ? hot_ : cold_)[item.profile].insert(at);
      (board.takes > 0 ? cold_ : hot_)[item.profile].erase(at);
    }
  }

  void move(const At& from, std::size_t to, unsigned place, bool detour) {
    auto& source = boards_[from.first];
    const auto item =
        std::find_if(source.leave.begin(), source.leave.end(), [&](const Item& i) { return i.start == from.second; });
    Move move;
    move.instance = id_at(source.gpu, *item);
    move.profile = tables_.geometry().profiles[item->profile].id;
    const unsigned start = tables_.places()[place].start;
    move.from = {source.gpu, item->start};
    move.to = {boards_[to].gpu, start};
    move.price = item->price;
    move.visible = item->visible;
    move.detour = detour;
    auto moved = *item;
    hot_[moved.profile].erase(from);
    cold_[moved.profile].erase(from);
    source.leave.erase(item);
    boards_[to].now = tables_.next(boards_[to].now, place);
    source.now = tables_.without(source.now, moved.place);
    move.empties = source.now == 0;
    Instance instance;
    {
      auto& there = changed_.try_emplace(source.gpu, fleet_.gpus[source.gpu].instances).first->second;
      const auto at =
          std::find_if(there.begin(), there.end(), [&](const Instance& i) { return i.id == move.instance; });
      instance = *at;
      there.erase(at);
    }
    instance.start = start;
    changed_.try_emplace(boards_[to].gpu, fleet_.gpus[boards_[to].gpu].instances).first->second.push_back(instance);
    if (detour) {
      moved.start = start;
      moved.place = place;
      boards_[to].leave.push_back(moved);
      detoured_.insert(move.instance);
      ++out_.detours;
    } else {
      --boards_[to].take[moved.profile];
      --boards_[to].takes;
    }
    out_.moves.list.push_back(move);
    refresh(from.first);
    refresh(to);
  }

  bool step() {
    // Who leaves a GPU that waits for others goes first: it makes room.
    for (auto* leaving : {&hot_, &cold_}) {
      for (unsigned p = 0; p < ready_.size(); ++p) {
        if (ready_[p].empty() || (*leaving)[p].empty()) continue;
        const auto from = *(*leaving)[p].begin();
        const auto to = *ready_[p].begin();
        move(from, to, *start_for(to, p), false);
        return true;
      }
    }
    return false;
  }

  // True when something that waits could come to the board once the item has left.
  bool opens(std::size_t b, const Item& item) const {
    const auto& board = boards_[b];
    const auto then = tables_.without(board.now, item.place);
    const auto final = final_of(board);
    for (unsigned p = 0; p < ready_.size(); ++p) {
      if (board.take[p] == 0 || (hot_[p].empty() && cold_[p].empty())) continue;
      auto counts = still_to_come(b);
      --counts[p];
      const auto first = tables_.first_place(p);
      for (unsigned i = 0; i < tables_.places_of(p).size(); ++i) {
        if (tables_.next(then, first + i) == grid::no_set) continue;
        const auto after = tables_.next(final, first + i);
        if (after != grid::no_set && offers_.covers(after, counts)) return true;
      }
    }
    return false;
  }

  // Moves wait for each other in a circle: one instance steps aside to a free place.
  bool detour() {
    std::optional<std::tuple<bool, std::uint64_t, At, std::size_t, unsigned>> best;
    for (unsigned p = 0; p < ready_.size(); ++p) {
      for (const auto& from : hot_[p]) {
        const auto& board = boards_[from.first];
        const auto& item = *std::find_if(board.leave.begin(), board.leave.end(),
                                         [&](const Item& i) { return i.start == from.second; });
        if (detoured_.contains(id_at(board.gpu, item))) continue;
        const bool useless = !opens(from.first, item);
        if (best && std::tuple(useless, item.price, from) >=
                        std::tuple(std::get<0>(*best), std::get<1>(*best), std::get<2>(*best)))
          continue;
        if (const auto free = free_place(p, from.first)) best = {useless, item.price, from, free->first, free->second};
      }
    }
    if (!best) return false;
    move(std::get<2>(*best), std::get<3>(*best), std::get<4>(*best), true);
    return true;
  }
  // A place where nothing is to come, else one where something is.
  std::optional<std::pair<std::size_t, unsigned>> free_place(unsigned profile, std::size_t not_on) const {
    for (const bool waits : {false, true}) {
      for (std::size_t b = 0; b < boards_.size(); ++b) {
        if (b == not_on || !fleet_.gpus[boards_[b].gpu].open || (boards_[b].takes > 0) != waits) continue;
        const auto first = tables_.first_place(profile);
        for (unsigned i = 0; i < tables_.places_of(profile).size(); ++i) {
          if (tables_.next(boards_[b].now, first + i) != grid::no_set) return std::pair{b, first + i};
        }
      }
    }
    return std::nullopt;
  }

  void place_new() {
    for (std::size_t b = 0; b < boards_.size(); ++b) {
      auto set = boards_[b].now;
      auto counts = reserved_[b];
      for (unsigned p = 0; p < counts.size(); ++p) {
        while (counts[p] > 0) {
          --counts[p];
          bool placed = false;
          const auto first = tables_.first_place(p);
          for (unsigned i = 0; i < tables_.places_of(p).size() && !placed; ++i) {
            const auto then = tables_.next(set, first + i);
            if (then == grid::no_set || !offers_.covers(then, counts)) continue;
            set = then;
            placed = true;
            out_.places.push_back(
                {p, tables_.geometry().profiles[p].id, {boards_[b].gpu, tables_.places()[first + i].start}});
          }
        }
      }
    }
  }

  const Fleet& fleet_;
  const Offers& offers_;
  const grid::Tables& tables_;
  std::vector<Board> boards_;
  std::vector<std::vector<std::uint32_t>> reserved_;
  std::vector<std::set<std::size_t>> ready_;  // per profile: boards that can take one now
  std::vector<std::set<At>> hot_, cold_;      // who is to leave a board that waits for others, or that does not
  std::map<std::size_t, std::vector<Instance>> changed_;
  std::set<std::uint64_t> detoured_;
  Ordered out_;
};

}  // namespace

Ordered order(const Fleet& fleet, const Offers& offers, std::vector<Target> targets,
              std::span<const std::uint64_t> wanted) {
  return Order(fleet, offers).run(std::move(targets), wanted);
}

}  // namespace bulkhead::compaction
