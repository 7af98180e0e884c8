#include "core/compaction/simplex.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace bulkhead::compaction {

namespace {

constexpr std::size_t most_waiting = 200;
constexpr double tiny = 1e-9;        // a pivot or an amount below is zero
constexpr double least_gain = 1e-9;  // a reduced cost must be below its negative to enter, relative to the costs

enum class Kind : std::uint8_t { option, slack, artificial };

// A basic variable that is not the key of its set.
struct Basic {
  Kind kind = Kind::slack;
  unsigned index = 0;  // set of an option; row of a slack or artificial
  Handle handle = 0;
  double cost = 0;
  std::vector<Entry> entries = {};
};

// One key choice a set, and a working basis as large as the rows.
class Simplex {
 public:
  Simplex(std::span<const std::int64_t> bounds, std::span<const LpSet> sets)
      : bounds_(bounds), sets_(sets), m_(bounds.size()) {}

  LpSolution run(std::span<const Handle> keys, double penalty, std::uint64_t most_pivots) {
    start(keys);
    LpSolution out;
    std::uint64_t pivots = 0;
    bool done = true;
    if (penalty > 0 && infeasibility() > tiny) {
      // Costs stay in sight while rows are filled: a start that is nearly right is not spoilt.
      penalty_ = penalty;
      done = iterate(most_pivots, pivots);
      penalty_ = 1;
    }
    if (infeasibility() > tiny) {
      weight_ = 0;
      done = iterate(most_pivots, pivots);
      if (infeasibility() > 1e-6) {
        // The bound proves infeasibility, not the pivots: the Lagrangian with costs left out is above zero.
        const double proof = lagrangian(0);
        out.state = done && proof > 0 ? LpSolution::State::infeasible : LpSolution::State::stopped;
        out.bound = -std::numeric_limits<double>::infinity();
        return out;
      }
    }
    weight_ = 1;
    phase_two_ = true;
    done = iterate(most_pivots, pivots);
    out.state = done ? LpSolution::State::optimal : LpSolution::State::stopped;
    out.bound = lagrangian(1);
    out.prices = prices_;
    for (auto& price : out.prices) price = std::max(price, 0.0);
    refactor();
    std::vector<double> left(sets_.size());
    for (std::size_t s = 0; s < sets_.size(); ++s) left[s] = static_cast<double>(sets_[s].count);
    std::vector<std::vector<Part>> parts(sets_.size());
    for (std::size_t i = 0; i < m_; ++i) {
      if (basis_[i].kind != Kind::option) continue;
      const auto s = basis_[i].index;
      left[s] -= x_[i];
      if (x_[i] > tiny) parts[s].push_back({s, basis_[i].handle, x_[i]});
      out.value += x_[i] * basis_[i].cost;
    }
    for (std::size_t s = 0; s < sets_.size(); ++s) {
      if (left[s] > tiny) {
        out.parts.push_back({static_cast<unsigned>(s), key_[s].handle, left[s]});
        out.value += left[s] * key_[s].cost;
      }
      out.parts.insert(out.parts.end(), parts[s].begin(), parts[s].end());
    }
    return out;
  }

 private:
  Choices::Best price(std::size_t s) const {
    const auto& set = sets_[s];
    if (set.listed != nullptr && !set.among.empty()) return set.listed->best_of(set.among, prices_, weight_);
    return set.choices->best(prices_, weight_);
  }
  double reduced(double cost, const std::vector<Entry>& entries) const {
    double value = weight_ * cost;
    for (const auto& entry : entries) value -= prices_[entry.row] * static_cast<double>(entry.value);
    return value;
  }

  void start(std::span<const Handle> keys) {
    prices_.assign(m_, 0);
    key_.resize(sets_.size());
    members_.assign(sets_.size(), {});
    weight_ = 1;
    for (std::size_t s = 0; s < sets_.size(); ++s) set_key(s, keys.empty() ? price(s).handle : keys[s]);
    std::vector<double> missing(m_);
    for (std::size_t r = 0; r < m_; ++r) missing[r] = static_cast<double>(bounds_[r]);
    for (std::size_t s = 0; s < sets_.size(); ++s) {
      for (const auto& entry : key_[s].entries) missing[entry.row] -= static_cast<double>(sets_[s].count * entry.value);
    }
    basis_.resize(m_);
    inverse_.assign(m_ * m_, 0);
    x_.resize(m_);
    slack_basic_.assign(m_, false);
    for (std::size_t r = 0; r < m_; ++r) {
      const bool short_of = missing[r] > 0;
      basis_[r] = {short_of ? Kind::artificial : Kind::slack,
                   static_cast<unsigned>(r),
                   0,
                   0,
                   {{static_cast<unsigned>(r), short_of ? 1 : -1}}};
      slack_basic_[r] = !short_of;
      inverse_[r * m_ + r] = short_of ? 1 : -1;
      x_[r] = std::fabs(missing[r]);
    }
  }
  void set_key(std::size_t s, Handle handle) {
    auto choice = sets_[s].choices->choice(handle);
    key_[s] = {Kind::option, static_cast<unsigned>(s), handle, static_cast<double>(choice.cost),
               std::move(choice.entries)};
  }

  double infeasibility() const {
    double sum = 0;
    for (std::size_t i = 0; i < m_; ++i) {
      if (basis_[i].kind == Kind::artificial) sum += std::fabs(x_[i]);
    }
    return sum;
  }

  // The column of a variable in the working basis: for an option, its difference from its key.
  std::vector<double> column(const Basic& variable) const {
    std::vector<double> out(m_, 0);
    for (const auto& entry : variable.entries) out[entry.row] += static_cast<double>(entry.value);
    if (variable.kind == Kind::option) {
      for (const auto& entry : key_[variable.index].entries) out[entry.row] -= static_cast<double>(entry.value);
    }
    return out;
  }
  double basic_cost(const Basic& variable) const {
    if (variable.kind == Kind::artificial) return phase_two_ ? 0 : penalty_;
    if (variable.kind == Kind::slack) return 0;
    return weight_ * (variable.cost - key_[variable.index].cost);
  }
  void find_prices() {
    std::fill(prices_.begin(), prices_.end(), 0.0);
    for (std::size_t i = 0; i < m_; ++i) {
      const double cost = basic_cost(basis_[i]);
      if (cost == 0) continue;
      for (std::size_t r = 0; r < m_; ++r) prices_[r] += cost * inverse_[i * m_ + r];
    }
  }

  // Inverts the working basis anew and finds the amounts from it: what many updates blurred.
  void refactor() {
    std::vector<double> work(m_ * m_, 0);
    for (std::size_t i = 0; i < m_; ++i) {
      const auto col = column(basis_[i]);
      for (std::size_t r = 0; r < m_; ++r) work[r * m_ + i] = col[r];
    }
    std::vector<double> inv(m_ * m_, 0);
    for (std::size_t i = 0; i < m_; ++i) inv[i * m_ + i] = 1;
    for (std::size_t c = 0; c < m_; ++c) {
      std::size_t pivot = c;
      for (std::size_t r = c + 1; r < m_; ++r) {
        if (std::fabs(work[r * m_ + c]) > std::fabs(work[pivot * m_ + c])) pivot = r;
      }
      if (std::fabs(work[pivot * m_ + c]) < 1e-11) return;  // near singular: the updated inverse stays
      if (pivot != c) {
        for (std::size_t k = 0; k < m_; ++k) {
          std::swap(work[pivot * m_ + k], work[c * m_ + k]);
          std::swap(inv[pivot * m_ + k], inv[c * m_ + k]);
        }
      }
      const double by = 1 / work[c * m_ + c];
      for (std::size_t k = 0; k < m_; ++k) {
        work[c * m_ + k] *= by;
        inv[c * m_ + k] *= by;
      }
      for (std::size_t r = 0; r < m_; ++r) {
        const double f = work[r * m_ + c];
        if (r == c || f == 0) continue;
        for (std::size_t k = 0; k < m_; ++k) {
          work[r * m_ + k] -= f * work[c * m_ + k];
          inv[r * m_ + k] -= f * inv[c * m_ + k];
        }
      }
    }
    inverse_ = std::move(inv);
    std::vector<double> missing(m_);
    for (std::size_t r = 0; r < m_; ++r) missing[r] = static_cast<double>(bounds_[r]);
    for (std::size_t s = 0; s < sets_.size(); ++s) {
      for (const auto& entry : key_[s].entries) missing[entry.row] -= static_cast<double>(sets_[s].count * entry.value);
    }
    for (std::size_t i = 0; i < m_; ++i) {
      double sum = 0;
      for (std::size_t r = 0; r < m_; ++r) sum += inverse_[i * m_ + r] * missing[r];
      x_[i] = sum;
    }
  }

  double key_amount(std::size_t s) const {
    double left = static_cast<double>(sets_[s].count);
    for (const auto i : members_[s]) left -= x_[i];
    return left;
  }

  // True: optimal for the phase. False: out of pivots.
  bool iterate(std::uint64_t most, std::uint64_t& pivots) {
    find_prices();
    unsigned idle = 0, since = 0;
    while (true) {
      if (!phase_two_ && infeasibility() <= tiny) return true;
      Basic entering;
      if (!find_entering(entering, idle > 60)) return true;
      if (++pivots > most) return false;
      const double step = enter(std::move(entering));
      idle = step > tiny ? 0 : idle + 1;
      if (++since >= 64) {
        refactor();
        since = 0;
        find_prices();
      }
    }
  }

  bool find_entering(Basic& entering, bool first) {
    double scale = 1;
    for (const double price : prices_) scale = std::max(scale, std::fabs(price));
    const double eps = least_gain * scale;
    // Slacks first: options are priced with prices that are not negative.
    double worst = -least_gain;
    std::size_t row = m_;
    for (std::size_t r = 0; r < m_; ++r) {
      if (!slack_basic_[r] && prices_[r] < worst) {
        worst = prices_[r];
        row = r;
        if (first) break;
      }
    }
    if (row < m_) {
      entering = {Kind::slack, static_cast<unsigned>(row), 0, 0, {{static_cast<unsigned>(row), -1}}};
      return true;
    }
    // Choices that gained in the last search and still do: cheap to price anew, as they are written out.
    if (!first) {
      double gain = -eps;
      std::size_t best = waiting_.size();
      for (std::size_t i = 0; i < waiting_.size();) {
        const auto& key = key_[waiting_[i].index];
        const double value = reduced(waiting_[i].cost, waiting_[i].entries) - reduced(key.cost, key.entries);
        if (value >= -eps) {
          if (best == waiting_.size() - 1) best = i;
          std::swap(waiting_[i], waiting_.back());
          waiting_.pop_back();
          continue;
        }
        if (value < gain) {
          gain = value;
          best = i;
        }
        ++i;
      }
      if (gain < -eps) {
        entering = std::move(waiting_[best]);
        waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(best));
        return true;
      }
    }
    waiting_.clear();
    // Round the sets from where the last search ended, a batch at a time; a full round without gain is the optimum.
    const std::size_t all = sets_.size(), batch = first ? 1 : std::max<std::size_t>(64, all / 8);
    if (first) cursor_ = 0;
    std::vector<std::pair<double, std::pair<std::size_t, Handle>>> gains;
    for (std::size_t seen = 0; seen < all && gains.empty();) {
      for (std::size_t k = 0; k < batch && seen < all; ++k, ++seen) {
        const std::size_t s = cursor_;
        cursor_ = cursor_ + 1 == all ? 0 : cursor_ + 1;
        const auto best = price(s);
        const double value = best.value - reduced(key_[s].cost, key_[s].entries);
        if (value < -eps) gains.push_back({value, {s, best.handle}});
      }
    }
    if (gains.empty()) return false;
    const std::size_t few = std::min<std::size_t>(gains.size(), most_waiting);
    std::partial_sort(gains.begin(), gains.begin() + static_cast<std::ptrdiff_t>(few), gains.end());
    for (std::size_t i = few; i-- > 0;) {
      const auto [s, handle] = gains[i].second;
      auto choice = sets_[s].choices->choice(handle);
      waiting_.push_back({Kind::option, static_cast<unsigned>(s), handle, static_cast<double>(choice.cost),
                          std::move(choice.entries)});
    }
    entering = std::move(waiting_.back());
    waiting_.pop_back();
    return true;
  }

  double enter(Basic entering) {
    const auto col = column(entering);
    std::vector<double> d(m_, 0);
    for (std::size_t i = 0; i < m_; ++i) {
      double sum = 0;
      for (std::size_t r = 0; r < m_; ++r) sum += inverse_[i * m_ + r] * col[r];
      d[i] = sum;
    }
    // The first basic variable to reach zero; of several the one with the largest pivot.
    double step = std::numeric_limits<double>::infinity(), pivot = 0;
    std::size_t leaves = m_, leaves_key = sets_.size();
    const auto consider = [&](double amount, double rate, std::size_t basic, std::size_t key) {
      const double ratio = std::max(amount, 0.0) / rate;
      if (ratio < step - tiny || (ratio <= step + tiny && rate > pivot)) {
        step = std::min(step, ratio);
        pivot = rate;
        leaves = basic;
        leaves_key = key;
      }
    };
    for (std::size_t i = 0; i < m_; ++i) {
      if (phase_two_ && basis_[i].kind == Kind::artificial) {
        if (std::fabs(d[i]) > 1e-7) consider(0, std::fabs(d[i]), i, sets_.size());
      } else if (d[i] > tiny) {
        consider(x_[i], d[i], i, sets_.size());
      }
    }
    touched_.clear();
    for (std::size_t i = 0; i < m_; ++i) {
      if (basis_[i].kind == Kind::option) touched_.push_back(basis_[i].index);
    }
    if (entering.kind == Kind::option) touched_.push_back(entering.index);
    std::sort(touched_.begin(), touched_.end());
    touched_.erase(std::unique(touched_.begin(), touched_.end()), touched_.end());
    for (const auto s : touched_) {
      double rate = entering.kind == Kind::option && entering.index == s ? 1 : 0;
      for (const auto i : members_[s]) rate -= d[i];
      if (rate > tiny) consider(key_amount(s), rate, m_, s);
    }
    // A set's own key bounds every option, and rows bound slacks from one side only; without a bound nothing enters.
    if (leaves == m_ && leaves_key == sets_.size()) return 0;
    for (std::size_t i = 0; i < m_; ++i) x_[i] -= step * d[i];

    if (leaves_key < sets_.size() && members_[leaves_key].empty()) {
      // The set changes its key; the working basis and the prices stay.
      key_[leaves_key] = std::move(entering);
      return step;
    }
    if (leaves_key < sets_.size()) {
      const std::size_t s = leaves_key;
      // Another member becomes the key, the old key an ordinary member that leaves: the one with the largest pivot.
      std::size_t q = members_[s].front();
      for (const auto i : members_[s]) {
        if (std::fabs(d[i]) > std::fabs(d[q])) q = i;
      }
      const double old_amount = key_amount(s) - (entering.kind == Kind::option && entering.index == s ? step : 0);
      for (std::size_t r = 0; r < m_; ++r) {
        double sum = 0;
        for (const auto i : members_[s]) sum += inverse_[i * m_ + r];
        inverse_[q * m_ + r] = -sum;
      }
      double sum = 0;
      for (const auto i : members_[s]) sum += d[i];
      d[q] = -sum;
      x_[q] = old_amount;
      std::swap(key_[s], basis_[q]);
      // An entering option of this set is now measured against the new key.
      if (entering.kind == Kind::option && entering.index == s) {
        const auto again = column(entering);
        for (std::size_t i = 0; i < m_; ++i) {
          double value = 0;
          for (std::size_t r = 0; r < m_; ++r) value += inverse_[i * m_ + r] * again[r];
          d[i] = value;
        }
      }
      leaves = q;
    }
    // Ordinary pivot at `leaves`.
    const double by = 1 / d[leaves];
    for (std::size_t r = 0; r < m_; ++r) inverse_[leaves * m_ + r] *= by;
    for (std::size_t i = 0; i < m_; ++i) {
      if (i == leaves || d[i] == 0) continue;
      const double f = d[i];
      for (std::size_t r = 0; r < m_; ++r) inverse_[i * m_ + r] -= f * inverse_[leaves * m_ + r];
    }
    auto& gone = basis_[leaves];
    if (gone.kind == Kind::option) std::erase(members_[gone.index], static_cast<unsigned>(leaves));
    if (gone.kind == Kind::slack) slack_basic_[gone.index] = false;
    if (entering.kind == Kind::option) members_[entering.index].push_back(static_cast<unsigned>(leaves));
    if (entering.kind == Kind::slack) slack_basic_[entering.index] = true;
    gone = std::move(entering);
    x_[leaves] = step;
    find_prices();
    return step;
  }

  double lagrangian(double weight) {
    const double before = weight_;
    weight_ = weight;
    for (auto& price : prices_) price = std::max(price, 0.0);
    double value = 0, magnitude = 0;
    for (std::size_t r = 0; r < m_; ++r) {
      value += prices_[r] * static_cast<double>(bounds_[r]);
      magnitude += std::fabs(prices_[r] * static_cast<double>(bounds_[r]));
    }
    double largest = 0;
    for (const double price : prices_) largest = std::max(largest, price);
    for (std::size_t s = 0; s < sets_.size(); ++s) {
      const double each = price(s).value;
      value += each * static_cast<double>(sets_[s].count);
      magnitude += (std::fabs(each) + 64 * largest) * static_cast<double>(sets_[s].count);
    }
    weight_ = before;
    return value - 1e-13 * magnitude;
  }

  std::span<const std::int64_t> bounds_;
  std::span<const LpSet> sets_;
  std::size_t m_;
  std::vector<Basic> key_, basis_;
  std::vector<std::vector<unsigned>> members_;  // per set: positions of its non-key members in the basis
  std::vector<double> inverse_, x_, prices_;
  std::vector<bool> slack_basic_;
  std::vector<unsigned> touched_;
  std::vector<Basic> waiting_;  // options that gained when they were last looked at
  std::size_t cursor_ = 0;
  double weight_ = 1, penalty_ = 1;
  bool phase_two_ = false;
};

}  // namespace

LpSolution relax(std::span<const std::int64_t> bounds, std::span<const LpSet> sets, std::span<const Handle> keys,
                 double penalty, std::uint64_t most_pivots) {
  return Simplex(bounds, sets).run(keys, penalty, most_pivots);
}

}  // namespace bulkhead::compaction
