// How often: a token bucket for each name, in bounded memory. One thread at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>

namespace bulkhead::serve {

class Buckets {
 public:
  Buckets(double per_second, double burst, std::size_t most = 16'384)
      : rate_(per_second), burst_(burst), most_(most) {}

  // Takes one; 0: granted; else the seconds until there is one.
  unsigned take(std::string_view name, std::uint64_t now_ns) {
    auto at = all_.find(name);
    if (at == all_.end()) {
      if (all_.size() >= most_) sweep(now_ns);
      at = all_.emplace(std::string(name), Bucket{burst_, now_ns}).first;
    }
    Bucket& bucket = at->second;
    refill(bucket, now_ns);
    if (bucket.left >= 1) {
      bucket.left -= 1;
      return 0;
    }
    return static_cast<unsigned>(std::max(1.0, std::ceil((1 - bucket.left) / rate_)));
  }
  // Whether there is one, taking none.
  bool empty(std::string_view name, std::uint64_t now_ns) {
    const auto at = all_.find(name);
    if (at == all_.end()) return false;
    refill(at->second, now_ns);
    return at->second.left < 1;
  }
  void change(double per_second, double burst) { rate_ = per_second, burst_ = burst; }
  std::size_t size() const { return all_.size(); }

 private:
  struct Bucket {
    double left = 0;
    std::uint64_t at = 0;
  };
  struct Hash {
    using is_transparent = void;
    std::size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
  };
  void refill(Bucket& bucket, std::uint64_t now_ns) const {
    if (now_ns > bucket.at) {
      bucket.left = std::min(burst_, bucket.left + static_cast<double>(now_ns - bucket.at) * 1e-9 * rate_);
      bucket.at = now_ns;
    }
    bucket.left = std::min(bucket.left, burst_);
  }
  // A full bucket and none are the same. Where all are in use the whole table goes: a moment of mercy for
  // some, instead of memory without end.
  void sweep(std::uint64_t now_ns) {
    for (auto at = all_.begin(); at != all_.end();) {
      refill(at->second, now_ns);
      at = at->second.left >= burst_ ? all_.erase(at) : std::next(at);
    }
    if (all_.size() >= most_ - most_ / 8) all_.clear();
  }

  double rate_, burst_;
  std::size_t most_;
  std::unordered_map<std::string, Bucket, Hash, std::equal_to<>> all_ = {};
};

}  // namespace bulkhead::serve
