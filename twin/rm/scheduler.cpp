#include "twin/rm/scheduler.hpp"

#include <algorithm>

#include "twin/rm/rm.hpp"

namespace bulkhead::twin::rm {

static_assert(queue_depth == jobs_of_a_group);

void Scheduler::advance(std::uint32_t gpu_index, std::uint64_t now_ns) {
  Gpu& gpu = page_.gpus[gpu_index];
  if (gpu.now_ns == 0 || now_ns < gpu.now_ns) {
    store_.edit(gpu).now_ns = now_ns;
    gpu.measured_ns = now_ns;
    store_.commit();
    return;
  }
  while (gpu.now_ns < now_ns) {
    step(gpu, now_ns);
    store_.commit();
  }
}

bool Scheduler::off(const Group& group) const { return group.channels > 0 && group.disabled >= group.channels; }

bool Scheduler::runnable(const Gpu& gpu, const Group& group) const {
  return group.scheduled != 0 && group.submitted > group.completed && (gpu.ignores_disable != 0 || !off(group));
}

bool Scheduler::contended(const Gpu& gpu, Index group) const {
  for (Index at = gpu.first; at != 0; at = page_.groups[at].next) {
    if (at != group && runnable(gpu, page_.groups[at])) return true;
  }
  return false;
}

std::uint64_t Scheduler::slice_ns(const Gpu& gpu, const Group& group) const {
  return gpu.ignores_slices != 0 ? slice_when_scheduled_us * 1000 : group.slice_ns;
}

Index Scheduler::next_turn(const Gpu& gpu) const {
  const Index start = gpu.turn != 0 ? page_.groups[gpu.turn].next : gpu.first;
  for (Index at = start; at != 0; at = page_.groups[at].next) {
    if (runnable(gpu, page_.groups[at])) return at;
  }
  for (Index at = gpu.first; at != 0 && at != start; at = page_.groups[at].next) {
    if (runnable(gpu, page_.groups[at])) return at;
  }
  return 0;
}

// Whole rounds in which no job ends, at once: a long time costs as much as the jobs in it, not as its turns.
bool Scheduler::skip_rounds(Gpu& gpu, std::uint64_t until_ns) {
  constexpr std::size_t most = 64;  // that the journal has room for
  if (gpu.loaded == 0 || gpu.loaded != gpu.turn || !runnable(gpu, page_.groups[gpu.loaded])) return false;
  Index busy[most];
  std::size_t count = 0;
  std::uint64_t round_ns = 0, rounds = UINT64_MAX;
  for (Index at = gpu.first; at != 0; at = page_.groups[at].next) {
    const Group& group = page_.groups[at];
    if (!runnable(gpu, group)) continue;
    if (count == most) return false;
    busy[count++] = at;
    const std::uint64_t slice = slice_ns(gpu, group);
    round_ns += switch_ns + slice;
    if (const auto useful = useful_ns(slice); useful > 0)
      rounds = std::min(rounds, (group.head_left_ns - 1) / useful);
  }
  if (count < 2) return false;
  rounds = std::min(rounds, (until_ns - gpu.now_ns) / round_ns);
  if (rounds < 2) return false;
  for (std::size_t i = 0; i < count; ++i) {
    Group& group = store_.edit(page_.groups[busy[i]]);
    const std::uint64_t ran = rounds * useful_ns(slice_ns(gpu, group));
    group.head_left_ns -= ran;
    group.busy_ns += ran;
  }
  gpu.now_ns += rounds * round_ns;
  return true;
}

void Scheduler::finish_job(Gpu& gpu, Index at) {
  Group& group = page_.groups[at];
  ++group.completed;
  group.last_done_ns = gpu.now_ns;
  store_.edit(job(at, group.completed)).ns = gpu.now_ns;
  if (group.submitted > group.completed) {
    group.head_left_ns = job(at, group.completed + 1).ns;
  } else {
    group.head_left_ns = 0;
    gpu.phase = Phase::choosing;
  }
}

// One event: the end of a switch, of a slice or of a job, or the end of the time given.
void Scheduler::step(Gpu& gpu, std::uint64_t until_ns) {
  store_.edit(gpu);
  const std::uint64_t left = until_ns - gpu.now_ns;
  switch (gpu.phase) {
    case Phase::taking_off: {
      const std::uint64_t ran = std::min(left, gpu.phase_left_ns);
      gpu.phase_left_ns -= ran;
      gpu.now_ns += ran;
      if (gpu.phase_left_ns == 0) gpu.phase = Phase::choosing;
      return;
    }
    case Phase::choosing: {
      const Index next = next_turn(gpu);
      if (next == 0) {
        gpu.now_ns = until_ns;
        return;
      }
      if (skip_rounds(gpu, until_ns)) return;
      // A group that left the GPU by itself, having nothing to run, costs the next one nothing.
      const bool switches =
          gpu.loaded != 0 && gpu.loaded != next && runnable(gpu, page_.groups[gpu.loaded]);
      gpu.loaded = gpu.turn = next;
      const std::uint64_t slice = slice_ns(gpu, page_.groups[next]);
      const std::uint64_t lost = contended(gpu, next) ? slice - useful_ns(slice) : 0;
      gpu.phase = Phase::switching;
      gpu.phase_left_ns = (switches ? switch_ns : 0) + lost;
      if (gpu.phase_left_ns > 0) return;
      gpu.phase = Phase::running;
      gpu.slice_left_ns = slice;
      return;
    }
    case Phase::switching: {
      const std::uint64_t ran = std::min(left, gpu.phase_left_ns);
      gpu.phase_left_ns -= ran;
      gpu.now_ns += ran;
      if (gpu.phase_left_ns > 0) return;
      const std::uint64_t slice = slice_ns(gpu, page_.groups[gpu.loaded]);
      gpu.slice_left_ns = contended(gpu, gpu.loaded) ? useful_ns(slice) : slice;
      gpu.phase = gpu.slice_left_ns > 0 ? Phase::running : Phase::choosing;
      return;
    }
    case Phase::running: {
      const Index at = gpu.loaded;
      Group& group = store_.edit(page_.groups[at]);
      const bool others = contended(gpu, at);
      std::uint64_t ran = std::min(left, group.head_left_ns);
      if (others) ran = std::min(ran, gpu.slice_left_ns);
      group.head_left_ns -= ran;
      group.busy_ns += ran;
      gpu.now_ns += ran;
      if (ran < gpu.slice_left_ns) {
        gpu.slice_left_ns -= ran;
      } else if (others) {
        gpu.slice_left_ns = 0;
        gpu.phase = Phase::choosing;
      } else {
        // Alone its slice is renewed again and again; whoever comes waits for the rest of the present one.
        const std::uint64_t slice = slice_ns(gpu, group);
        gpu.slice_left_ns = slice - (ran - gpu.slice_left_ns) % slice;
      }
      if (group.head_left_ns == 0) finish_job(gpu, at);
      return;
    }
  }
}

void Scheduler::add(Index at) {
  Group& group = store_.edit(page_.groups[at]);
  Gpu& gpu = store_.edit(page_.gpus[group.gpu]);
  group.previous = gpu.last;
  group.next = 0;
  if (gpu.last != 0) {
    store_.edit(page_.groups[gpu.last]).next = at;
  } else {
    gpu.first = at;
  }
  gpu.last = at;
}

void Scheduler::remove(Index at) {
  Group& group = store_.edit(page_.groups[at]);
  Gpu& gpu = store_.edit(page_.gpus[group.gpu]);
  if (group.previous != 0) {
    store_.edit(page_.groups[group.previous]).next = group.next;
  } else {
    gpu.first = group.next;
  }
  if (group.next != 0) {
    store_.edit(page_.groups[group.next]).previous = group.previous;
  } else {
    gpu.last = group.previous;
  }
  if (gpu.turn == at) gpu.turn = group.previous;
  if (gpu.loaded == at) {
    gpu.loaded = 0;
    gpu.phase = Phase::choosing;
  }
}

std::uint64_t Scheduler::submit(Index at, std::uint64_t duration_ns) {
  Group& group = page_.groups[at];
  if (group.submitted - group.completed >= jobs_of_a_group) return 0;
  store_.edit(group);
  const std::uint64_t ticket = ++group.submitted;
  store_.edit(job(at, ticket)).ns = std::max<std::uint64_t>(duration_ns, 1);
  if (ticket == group.completed + 1) group.head_left_ns = std::max<std::uint64_t>(duration_ns, 1);
  return ticket;
}

void Scheduler::set_slice(Index at, std::uint64_t ns) {
  Group& group = store_.edit(page_.groups[at]);
  Gpu& gpu = store_.edit(page_.gpus[group.gpu]);
  group.slice_ns = ns;
  if (gpu.loaded == at) gpu.slice_left_ns = std::min(gpu.slice_left_ns, slice_ns(gpu, group));
}

void Scheduler::take_off(Index at) {
  Gpu& gpu = store_.edit(page_.gpus[page_.groups[at].gpu]);
  if (gpu.loaded != at) return;
  gpu.loaded = 0;
  if (gpu.phase != Phase::running && gpu.phase != Phase::switching) return;
  gpu.phase = Phase::taking_off;
  gpu.phase_left_ns = take_off_ns;
}

std::uint64_t Scheduler::at_least_ns(Index at, std::uint64_t ticket) const {
  const Group& group = page_.groups[at];
  if (ticket <= group.completed) return 0;
  std::uint64_t ns = group.head_left_ns;
  for (std::uint64_t t = group.completed + 2; t <= std::min(ticket, group.submitted); ++t) ns += job(at, t).ns;
  const Gpu& gpu = page_.gpus[group.gpu];
  if (gpu.phase == Phase::taking_off || (gpu.phase == Phase::switching && gpu.loaded == at)) ns += gpu.phase_left_ns;
  return ns;
}

}  // namespace bulkhead::twin::rm
