// What a GPU runs, event by event: the runlist is a plain round of the groups that have work and are not disabled; each
// has the GPU for its slice or until it has no work. Nothing here reads a clock.
#pragma once

#include "twin/rm/page.hpp"
#include "twin/rm/store.hpp"

namespace bulkhead::twin::rm {

class Scheduler {
 public:
  explicit Scheduler(Store& store) : store_(store), page_(store.page()) {}

  // Moves a GPU's time. Commits after each event. Time that goes back (another boot) is taken as it is.
  void advance(std::uint32_t gpu, std::uint64_t now_ns);

  // The rest changes things at the GPU's present time and leaves the commit to the caller.
  void add(Index group);     // at the end of the runlist
  void remove(Index group);  // frees its place at once
  // Puts a job behind the others; 0: the queue is full. A duration of 0 counts as 1 ns.
  std::uint64_t submit(Index group, std::uint64_t duration_ns);
  void set_slice(Index group, std::uint64_t slice_ns);
  // Takes it off the GPU if it is on: after its channels were disabled, or to preempt it.
  void take_off(Index group);

  bool off(const Group& group) const;  // every channel is disabled
  // The least time until a ticket of this group finishes.
  std::uint64_t at_least_ns(Index group, std::uint64_t ticket) const;

 private:
  bool runnable(const Gpu& gpu, const Group& group) const;
  bool contended(const Gpu& gpu, Index group) const;
  std::uint64_t slice_ns(const Gpu& gpu, const Group& group) const;
  Index next_turn(const Gpu& gpu) const;
  void step(Gpu& gpu, std::uint64_t until_ns);
  bool skip_rounds(Gpu& gpu, std::uint64_t until_ns);
  void finish_job(Gpu& gpu, Index group);
  Job& job(Index group, std::uint64_t ticket) const { return page_.jobs[group][ticket % jobs_of_a_group]; }

  Store& store_;
  Page& page_;
};

}  // namespace bulkhead::twin::rm
