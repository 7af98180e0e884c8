// What the loop owns. Everything here is touched by the loop's thread alone, but for what says otherwise.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <semaphore>
#include <set>
#include <thread>
#include <tuple>
#include <unordered_map>

#include "base/fd.hpp"
#include "core/fairness/fairness.hpp"
#include "core/placement/placement.hpp"
#include "core/spec/spec.hpp"
#include "edge/book/book.hpp"
#include "engine/control/control.hpp"
#include "engine/slice/slice.hpp"

namespace bulkhead::control {

// Threads that do what blocks, each job once, in the order given. Ends with the jobs at hand; those that
// wait are dropped: recovery knows them.
class Lane {
 public:
  explicit Lane(unsigned threads);
  ~Lane();
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;
  void put(std::function<void()> job);

 private:
  void serve();
  std::mutex mutex_ = {};
  std::condition_variable ready_ = {};
  std::deque<std::function<void()>> jobs_ = {};
  bool ending_ = false;
  std::vector<std::thread> threads_ = {};
};

// A change forks its disposable worker (engine/execute) from this process. What another thread has locked in
// the loader or the driver's library at that moment stays locked in the child for ever: so nobody is in the
// driver meanwhile. A change that waits goes before new looks and scrubs.
class Gate {
 public:
  template <class F>
  auto shared(F&& work) {
    {
      std::unique_lock hold(mutex_);
      open_.wait(hold, [this] { return !alone_ && waiting_ == 0; });
      ++inside_;
    }
    const Leave leave{[this] { --inside_; }, *this};
    return work();
  }
  // Within shared work: out of the driver for a while, and in again behind the changes that wait. Whatever
  // was seen before is to be looked at again.
  void step_out() {
    const Leave leave{[this] { --inside_; }, *this};
  }
  void step_in() {
    std::unique_lock hold(mutex_);
    open_.wait(hold, [this] { return !alone_ && waiting_ == 0; });
    ++inside_;
  }
  template <class F>
  auto alone(F&& work) {
    {
      std::unique_lock hold(mutex_);
      ++waiting_;
      open_.wait(hold, [this] { return !alone_ && inside_ == 0; });
      --waiting_;
      alone_ = true;
    }
    const Leave leave{[this] { alone_ = false; }, *this};
    return work();
  }

 private:
  struct Leave {
    std::function<void()> change;
    Gate& gate;
    ~Leave() {
      {
        const std::lock_guard hold(gate.mutex_);
        change();
      }
      gate.open_.notify_all();
    }
  };
  std::mutex mutex_ = {};
  std::condition_variable open_ = {};
  unsigned inside_ = 0, waiting_ = 0;
  bool alone_ = false;
};

// One batch while it is decided. What changes in memory has its undo here, in case the batch cannot be made
// durable; what others learn or the hardware is told waits in `after` until it is.
struct Turn {
  WallTime now = {};
  book::Batch batch = {};
  std::vector<std::function<void()>> undo = {};
  std::vector<std::function<void()>> after = {};
  // Work for the lanes, when all is answered: awake, they would take the processor from those who wait.
  std::vector<std::function<void()>> beside = {};
  std::map<std::pair<std::string, std::string>, book::Key> keys = {};  // of this batch, not in the book yet
  std::int64_t creating = 0;  // the lease at hand: its record is written once, with its first answer
};

struct Command {
  std::function<void()> before = {};                // what is so in the hardware: never undone
  std::function<void(Turn&)> run = {};              // may be run again when its batch came to nothing
  std::function<void(const Refusal&)> failed = {};  // the batch could not be made durable
  bool ours = false;                                // of a lane: is tried again until its batch is durable
  bool idle = false;  // nobody waits for it: goes with the next batch, or alone after a moment
};

// A lease that is not over, and what the loop knows of it beside the record.
struct Entry {
  std::shared_ptr<const lease::Lease> lease = {};
  tenant::Amount amount = {};
  placement::PlacementId placement = placement::no_placement;
  bool pending = false;                // in the fairness book, waiting
  bool running = false;                // in the fairness book, holding
  bool at_work = false;                // a job for it is in a lane
  std::int64_t preempts_for = 0;       // the lease it was given notice for
  bool preempts = false;               // others were given notice for it
  bool waited = false;                 // for its turn to start: what is its own is looked at again
  unsigned tries = 0;                  // preparations that failed and may go better next time
  std::optional<WallTime> again = {};  // scrub, prepare, look for a place again
};

// One that ended, until it is known that nothing of it is left in these parts.
struct Leaving {
  std::int64_t id = 0;
  std::shared_ptr<const lease::Lease> lease = {};
  std::vector<lease::Part> parts = {};
};

// One of them of whom something is left. Its parts are scrubbed beside each other; the last one tells.
struct Closer {
  explicit Closer(Leaving its) : one(std::move(its)), open(one.parts.size()) {}
  const Leaving one;
  std::mutex mutex = {};
  std::size_t open;  // parts that are not done
  std::vector<std::string> left = {};
};

// A GPU as last looked at.
struct GpuFacts {
  Uuid uuid = {};
  unsigned index = 0;
  std::string name = {}, pci = {}, cpus = {};
  int numa = -1;
  std::optional<unsigned> minor = {};
  Bytes memory = {};
  std::uint64_t watts = 0;
  mig::Geometry geometry = {};
  placement::Pool pool = placement::Pool::closed;
  std::string why = {};             // of what is closed or shut for now
  bool lost = false, shut = false;  // gone; used by somebody without a lease
  unsigned missed = 0;              // looks in a row that did not see it
  unsigned changes = 0;             // jobs in the lane that change it
  std::uint64_t epoch = 0;          // counts what the loop changed of its instances
  bool mig_on = false;
  std::string model = {};  // of the engine
};

struct DeviceKey {
  std::string gpu = {}, profile = {};
  unsigned start = 0;
  friend auto operator<=>(const DeviceKey&, const DeviceKey&) = default;
};

// GPU time a tenant used in a month; linear between changes of what it holds.
struct Used {
  std::int64_t month = 0;      // months since year 0
  std::uint64_t milli_ms = 0;  // thousandths of a GPU times milliseconds
  WallTime at = {};
  double past = 0;  // of its shares, decayed, as fairness counts it: as of past_at
  WallTime past_at = {};
};

struct Flood {  // of refusals, in one minute
  std::uint64_t minute = 0;
  unsigned count = 0, dropped = 0;
};

struct TokenIndex {
  std::map<std::string, book::Token, std::less<>> by_id = {};
  std::map<std::string, std::string, std::less<>> by_certificate = {};
};

inline constexpr std::size_t most_in_turn = 1024;  // commands of one batch
inline constexpr std::size_t most_over = 1000;     // leases that ended, in the snapshot

struct Control::Inside {
  explicit Inside(Settings given);
  ~Inside();

  // ---- start.cpp
  Status open();
  Status read_node_file();
  Status load();
  Status first_look();
  void resume();
  void in_the_way(const lease::Part& part, std::vector<slice::Place>& out);
  void prepare_again(Turn& turn, std::int64_t id);

  // ---- control.cpp: the loop
  void loop();
  void run_batch(std::deque<Command>& commands);
  bool attempt(std::span<Command> commands, bool tick_due);
  void roll_back(Turn& turn);
  void publish(const Turn& turn);
  static Event event_of(const book::Audit& line);
  bool submit(Command command);  // any thread; false: full
  void later(Command command);   // a lane's result
  void later(std::vector<Command> commands);
  WallTime now_wall() const { return settings.clock ? settings.clock() : wall_now(); }

  // ---- people.cpp
  struct Right {
    access::Verb verb;
    access::Resource resource;
  };
  std::optional<Refusal> denied(const Caller& caller, Right right, const std::string& owner,
                                const std::string& what) const;
  std::string trouble_for(const Caller& caller) const;  // its words, to those who may see the host
  void note(Turn& turn, const Caller& caller, std::string verb, const std::string& what, std::string tenant,
            std::string outcome, Json detail);
  bool worth_a_line(Turn& turn, const std::string& tenant);
  void note_refusal(Turn& turn, const Caller& caller, const std::string& verb, const std::string& what,
                    const Refusal& refusal, const std::string& tenant);
  void put_tenant(Turn& turn, const Caller& caller, tenant::Tenant wanted,
                  std::optional<std::int64_t> version, const Once& once, const Then<tenant::Tenant>& then);
  void end_tenant(Turn& turn, const Caller& caller, const std::string& name,
                  const Then<tenant::Tenant>& then);
  void create_token(Turn& turn, const Caller& caller, const AskToken& ask, const Then<NewToken>& then);
  void revoke_token(Turn& turn, const Caller& caller, const std::string& id, const Then<User>& then);
  void list_tokens(Turn& turn, const Caller& caller, const Then<std::vector<User>>& then);
  void set_token(Turn& turn, const book::Token& token);
  void set_tenant(Turn& turn, const std::string& name, std::shared_ptr<const tenant::Tenant> next);
  void refused(Turn& turn, const Caller& caller, const std::string& verb, const std::string& what,
               const std::string& why);
  void reread(Turn& turn, const Caller& caller, const Then<bool>& then);
  void drain(Turn& turn, const Caller& caller, bool on, const Then<bool>& then);
  void cordon(Turn& turn, const Caller& caller, const Uuid& gpu, const std::optional<std::string>& why,
              const Then<PoolGpu>& then);
  void evict(Turn& turn, const Caller& caller, std::int64_t id, const std::string& why,
             const Then<lease::Lease>& then);
  void publish_tokens();

  // What a key was answered before; nullopt: nothing, and `key` is to be kept with the answer.
  std::optional<Answer<Json>> said_before(const Turn& turn, const Caller& caller, const Once& once,
                                          book::Key& key) const;
  void keep_answer(Turn& turn, book::Key key, const Json& answer) const;

  // ---- decide.cpp: leases
  void create(Turn& turn, const Caller& caller, const lease::Ask& ask, const Once& once,
              const Then<lease::Lease>& then);
  void renew(Turn& turn, const Caller& caller, std::int64_t id, std::chrono::seconds ttl,
             std::optional<std::int64_t> version, const Then<lease::Lease>& then);
  void release(Turn& turn, const Caller& caller, std::int64_t id, std::optional<std::int64_t> version,
               const Then<lease::Lease>& then);
  void old_lease(Turn& turn, const Caller& caller, std::int64_t id, const Then<lease::Lease>& then);
  void standing(Turn& turn, const Caller& caller, std::int64_t id, const Then<Standing>& then);
  // Refusal, or the lease; its entry when it is not over.
  std::optional<Refusal> find_lease(const Caller& caller, access::Verb verb, std::int64_t id,
                                    std::optional<std::int64_t> version,
                                    std::shared_ptr<const lease::Lease>& found) const;
  std::optional<Refusal> may_create(const Turn& turn, const Caller& caller, const lease::Ask& ask) const;
  std::optional<Refusal> beyond_quota(const std::string& tenant, const tenant::Amount& held,
                                      const tenant::Amount& more, WallTime now) const;
  void tick(Turn& turn);
  void serve_queue(Turn& turn);
  bool grant(Turn& turn, std::int64_t id, bool insist, std::string& why);
  void alarm(Turn& turn, std::int64_t id);
  void preempt_for(Turn& turn, std::int64_t id);
  std::vector<std::int64_t> victims_for(const lease::Lease& lease);
  void withdraw_notices(Turn& turn, std::int64_t preemptor);
  void end_holding(Turn& turn, const Caller& who, std::int64_t id, lease::Event event, std::string reason);
  void scrub(Turn& turn, std::int64_t id);
  void sweep();  // in its lane: all that wait, with one look
  // Ends what is left of it in one of its parts.
  void scrub_closer(Closer& closer, std::size_t part);
  Command scrubbed_later(std::int64_t id, std::vector<std::string> left);
  void scrubbed(Turn& turn, std::int64_t id, const std::vector<std::string>& left);
  void prepare(Turn& turn, std::int64_t id, slice::Change change);
  void tell_runtimes(Turn& turn, const std::shared_ptr<const lease::Lease>& lease);
  void prepared(Turn& turn, std::int64_t id, const Result<std::vector<slice::Device>>& made,
                bool looked = false);
  void reclaim_idle(Turn& turn);
  void change(const slice::Change& change,
              std::function<void(Turn&, const Result<std::vector<slice::Device>>&)> then);
  // One step of a lease's life, with what the transition brings along, its record and its audit line.
  void step(Turn& turn, const Caller& who, std::int64_t id, lease::Event event, std::string reason);
  // The record and the snapshot after a change; an audit line unless the verb is empty.
  void write(Turn& turn, const Caller& who, const std::string& verb, std::int64_t id, Entry next);
  void set_entry(Turn& turn, std::int64_t id, std::optional<Entry> next);
  void apply_entry(std::int64_t id, std::optional<Entry> next);
  void show(Turn& turn, std::int64_t id, std::shared_ptr<const lease::Lease> lease);
  void let_go(Turn& turn, std::int64_t id, Entry& entry);
  std::vector<std::string> ways_of(const placement::Refusal& refusal);
  Refusal no_room(const lease::Ask& ask, const std::string& tenant, WallTime now);

  // ---- pools.cpp
  struct Casualty {
    std::int64_t lease = 0;
    std::string why = {};
  };
  struct Sight {  // one look at the host, and what the loop had changed when it began
    std::optional<inventory::Host> host = {};
    std::string trouble = {};
    std::vector<slice::Device> devices = {};
    std::map<std::string, std::uint64_t> epochs = {};
  };
  Sight sight(bool full, std::set<DeviceKey> known) const;  // any thread
  std::vector<Casualty> rebuild(const inventory::Host& host);
  std::vector<Casualty> refresh(const Sight& sight);
  void settle_gpu(placement::GpuNo number, const inventory::Gpu& gpu, std::vector<Casualty>& casualties);
  void lose(Turn& turn, const Casualty& casualty);
  void set_capacities();
  void set_nominals();
  Result<placement::PlacementId> adopt(const Entry& entry);
  placement::Request request_of(const lease::Lease& lease) const;
  placement::Request request_of(const lease::Ask& ask, const std::string& tenant) const;
  tenant::Amount amount_of(const lease::Ask& ask, const placement::Model& model, std::uint64_t watts) const;
  std::optional<tenant::Amount> likely_amount(const lease::Ask& ask) const;
  fairness::Amounts demand_of(const lease::Ask& ask) const;
  // Names of the engine's models that serve a class and match the patterns; empty where all of them do.
  std::vector<std::string> models_for(placement::Class cls, const std::vector<std::string>& patterns) const;
  bool nothing_serves(const lease::Ask& ask) const;
  lease::Part part_of(const lease::Lease& lease, std::size_t number, const placement::Part& part) const;
  GpuFacts* facts_of(const Uuid& gpu);
  void submit_all();
  void look();
  PoolGpu pool_gpu(placement::GpuNo number) const;
  void set_door(placement::GpuNo number);  // whether the engine may choose it

  // ---- metering
  Used settled(const std::string& tenant, WallTime now) const;
  std::uint64_t gpu_seconds(const std::string& tenant, WallTime now) const;
  void write_use(Turn& turn, const std::string& tenant);

  Settings settings;
  slice::Settings hands = {};
  UniqueFd lock = {};
  std::unique_ptr<book::Book> book = {};
  std::optional<spec::NodeFile> node = {};

  // what is so
  placement::Engine engine;
  std::optional<fairness::Book> fair = {};
  std::map<std::string, fairness::TenantId> fair_tenants = {};
  std::vector<GpuFacts> gpus = {};                           // by GpuNo
  std::map<DeviceKey, slice::Device> devices = {};           // instances that are there and whole
  std::map<DeviceKey, WallTime> idle_since = {};             // instances of dynamic pools that nobody has
  std::map<DeviceKey, placement::PlacementId> foreign = {};  // instances that are not ours to give
  std::map<std::int64_t, Entry> entries = {};
  std::unordered_map<placement::PlacementId, std::int64_t> lease_of = {};
  std::set<std::pair<WallTime, std::int64_t>> alarms = {};
  // Of entries: those others were given notice for; those given notice; active ones that may be; by tenant.
  std::set<std::int64_t> preemptors = {}, noticed = {}, preemptible = {};
  std::map<std::string, std::set<std::int64_t>> of_tenant = {};
  std::vector<std::set<std::int64_t>> leases_on = {};  // by GpuNo
  std::map<std::string, Cordon> cordons = {};          // by GPU, those that are not there as well
  std::map<std::string, Used> used = {};
  std::map<std::string, std::uint64_t> weights = {};
  std::deque<std::int64_t> over = {};  // oldest first
  std::int64_t last_lease = 0;
  TokenIndex tokens = {};
  Snapshot live = {};
  std::set<placement::GpuNo> dirty = {};      // of live.gpus
  std::set<std::int64_t> changed_terms = {};  // placements whose terms to tell the engine
  WallTime at_now = {};                       // of the turn
  bool host_seen = false;
  bool reload = false;  // the pools are to be made anew at the next look
  std::vector<Casualty> first_casualties = {};
  std::array<std::int64_t, 4> class_gpus = {};  // GPUs that serve each class
  bool retry_queue = false;
  std::uint64_t turned_away = 0;  // when the last one found no room who would not wait in the queue
  std::string driver_trouble = {}, disk_trouble = {};
  std::uint64_t next_tick = 0, next_look = 0, next_forget = 0;
  bool looking = false;
  std::vector<Command> postponed = {};       // of the lanes, whose batch was not durable; for the next tick
  std::map<std::string, Flood> floods = {};  // by tenant

  // shared with readers
  std::atomic<std::shared_ptr<const Snapshot>> snapshot = {};
  std::atomic<bool> somebody_waits = false;  // in the queue for room
  std::atomic<std::shared_ptr<const TokenIndex>> token_index = {};
  mutable std::mutex reader_mutex = {};
  mutable std::unique_ptr<book::Book> reader = {};
  std::function<void(const std::vector<Event>&)> tell = {};

  // the queue
  std::mutex mutex = {};
  std::condition_variable ready = {};
  std::deque<Command> queue = {};    // of callers, bounded
  std::deque<Command> results = {};  // of the lanes
  std::uint64_t idle_until = 0;      // when those of them that nobody waits for go alone; 0: there are none
  bool urgent = false;               // one of them is waited for
  bool ending = false;

  mutable Gate gate = {};
  std::mutex leaving_mutex = {};
  std::vector<Leaving> leaving = {};  // for the next sweep
  // Changes one by one; looks and scrubs beside each other; sweeps and CDI files in order.
  std::unique_ptr<Lane> changes = {}, rounds = {}, sweeps = {}, files = {};
  std::counting_semaphore<> closer_turns{4};  // scrubs that work, not those that wait for a grace to pass
  std::thread thread = {};

  // ---- aside.cpp: starts are staggered
  std::chrono::milliseconds starts_in(const lease::Lease& lease) const;
  void wait_turn(Turn& turn, std::int64_t id, std::chrono::milliseconds time,
                 const Result<std::vector<slice::Device>>& made);
  mutable std::mutex starts_mutex = {};
  std::function<std::chrono::milliseconds(const lease::Lease&)> starts = {};
  std::unique_ptr<Lane> turns = {};  // last: it gives work to all of the above
};

std::string short_time(WallTime time);  // "2026-11-22T14:05:09Z"
std::string lease_name(std::int64_t id);
const Caller& daemon_caller();

}  // namespace bulkhead::control
