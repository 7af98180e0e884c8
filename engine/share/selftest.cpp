#include <dlfcn.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <vector>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "engine/share/registry.hpp"

namespace bulkhead::share {

namespace fs = std::filesystem;

namespace {

// The self-test and its spinning programs talk through a small shared file.
struct Board {
  std::atomic<std::uint64_t> stop, pause, ready, kernels;
  std::atomic<std::uint64_t> rounds;  // of work in a kernel; 0: the program measures what a millisecond is
};

class BoardFile {
 public:
  static Result<BoardFile> open(const fs::path& path) {
    UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!fd) return errno_error(fmt::format("open {}", path.string()), errno);
    if (::ftruncate(fd.get(), 4096) != 0) return errno_error(fmt::format("size {}", path.string()), errno);
    void* memory = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
    if (memory == MAP_FAILED) return errno_error(fmt::format("map {}", path.string()), errno);
    return BoardFile(static_cast<Board*>(memory));
  }
  Board* operator->() const { return board_; }

 private:
  explicit BoardFile(Board* board) : board_(board) {}
  Board* board_;
};

// The few CUDA driver calls a spinning program needs; the ABI is stable since CUDA 4.
struct Cuda {
  int (*init)(unsigned) = nullptr;
  int (*device)(int*, int) = nullptr;
  int (*retain)(void**, int) = nullptr;
  int (*use)(void*) = nullptr;
  int (*load)(void**, const void*) = nullptr;
  int (*function)(void**, void*, const char*) = nullptr;
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                void**) = nullptr;
  int (*sync)() = nullptr;
  int (*event_create)(void**, unsigned) = nullptr;
  int (*event_record)(void*, void*) = nullptr;
  int (*event_sync)(void*) = nullptr;
  int (*allocate)(std::uint64_t*, std::size_t) = nullptr;

  Status open() {
    void* library = ::dlopen("libcuda.so.1", RTLD_NOW);
    if (library == nullptr)
      return Error(Errc::unavailable, fmt::format("libcuda.so.1: {}", ::dlerror()),
                   "install the NVIDIA driver's CUDA library");
    const auto get = [&](auto& slot, const char* name) {
      slot = reinterpret_cast<std::remove_reference_t<decltype(slot)>>(::dlsym(library, name));
      return slot != nullptr;
    };
    if (get(init, "cuInit") && get(device, "cuDeviceGet") && get(retain, "cuDevicePrimaryCtxRetain") &&
        get(use, "cuCtxSetCurrent") && get(load, "cuModuleLoadData") &&
        get(function, "cuModuleGetFunction") && get(launch, "cuLaunchKernel") &&
        get(sync, "cuCtxSynchronize") && get(event_create, "cuEventCreate") &&
        get(event_record, "cuEventRecord") && get(event_sync, "cuEventSynchronize") &&
        get(allocate, "cuMemAlloc_v2"))
      return ok_status();
    return Error(Errc::unsupported, "libcuda.so.1 lacks an entry point of CUDA 4");
  }
};

// A fixed amount of dependent work, not of time: a kernel that watched a clock would end on time whoever has
// the GPU. The kernel's name tells the twin how long it lasts.
constexpr const char* spin_ptx = R"(.version 6.0
.target sm_50
.address_size 64
.visible .entry spin_us_1000(.param .u64 rounds) {
  .reg .u64 %left; .reg .f32 %x; .reg .pred %done;
  ld.param.u64 %left, [rounds];
  mov.f32 %x, 0f3F800000;
again:
  fma.rn.f32 %x, %x, %x, %x;
  fma.rn.f32 %x, %x, %x, %x;
  sub.u64 %left, %left, 1;
  setp.ne.u64 %done, %left, 0;
  @%done bra again;
  setp.eq.f32 %done, %x, 0f40000000;
  @%done trap;
  ret;
}
)";

Status cuda_ok(int code, const char* what) {
  if (code == 0) return ok_status();
  return Error(Errc::io, fmt::format("{}: CUDA error {}", what, code), {}, code);
}

Status spin_for_real(const BoardFile& board, std::uint64_t allocate, bool& refused) {
  Cuda cuda;
  BH_CHECK(cuda.open());
  BH_CHECK(cuda_ok(cuda.init(0), "cuInit"));
  int device = 0;
  BH_CHECK(cuda_ok(cuda.device(&device, 0), "cuDeviceGet"));
  void* context = nullptr;
  BH_CHECK(cuda_ok(cuda.retain(&context, device), "cuDevicePrimaryCtxRetain"));
  BH_CHECK(cuda_ok(cuda.use(context), "cuCtxSetCurrent"));
  if (allocate != 0) {
    std::uint64_t pointer = 0;
    const int code = cuda.allocate(&pointer, allocate);
    refused = code == 2;  // CUDA_ERROR_OUT_OF_MEMORY
    return refused || code == 0 ? ok_status() : cuda_ok(code, "cuMemAlloc");
  }
  void *module = nullptr, *kernel = nullptr;
  BH_CHECK(cuda_ok(cuda.load(&module, spin_ptx), "cuModuleLoadData"));
  BH_CHECK(cuda_ok(cuda.function(&kernel, module, "spin_us_1000"), "cuModuleGetFunction"));
  std::uint64_t rounds = board->rounds.load();
  const bool measure = rounds == 0;
  if (measure) rounds = 20'000;
  void* parameters[] = {&rounds};
  const auto launch = [&] { return cuda.launch(kernel, 1, 1, 1, 32, 1, 1, 0, nullptr, parameters, nullptr); };
  for (int i = 0; measure && i < 4; ++i) {  // only right while nobody else is on the GPU
    BH_CHECK(cuda_ok(cuda.sync(), "cuCtxSynchronize"));
    const auto before = monotonic_ns();
    BH_CHECK(cuda_ok(launch(), "cuLaunchKernel"));
    BH_CHECK(cuda_ok(cuda.sync(), "cuCtxSynchronize"));
    const auto took = std::max<std::uint64_t>(monotonic_ns() - before, 1000);
    rounds = std::clamp<std::uint64_t>(rounds * 1'000'000 / took, 1000, 10'000'000);
  }
  constexpr std::size_t depth = 4;
  std::vector<void*> events(depth);
  for (auto& event : events) BH_CHECK(cuda_ok(cuda.event_create(&event, 2 /* no timing */), "cuEventCreate"));
  board->rounds.store(rounds);
  board->ready.store(1);
  const pid_t parent = ::getppid();  // the launcher: without it nobody stops this
  for (std::uint64_t n = 0; board->stop.load() == 0 && ::getppid() == parent; ++n) {
    if (board->pause.load() != 0) {
      ::usleep(1000);
      continue;
    }
    BH_CHECK(cuda_ok(launch(), "cuLaunchKernel"));
    BH_CHECK(cuda_ok(cuda.event_record(events[n % depth], nullptr), "cuEventRecord"));
    if (n + 1 >= depth) BH_CHECK(cuda_ok(cuda.event_sync(events[(n + 1) % depth]), "cuEventSynchronize"));
    board->kernels.fetch_add(1);
  }
  return cuda_ok(cuda.sync(), "cuCtxSynchronize");
}

class Spinner {  // a tenant that runs `bulkhead share spin`
 public:
  static Result<Spinner> start(const Place& place, const std::string& gpu, std::string name,
                               const fs::path& dir, std::optional<Bytes> cap, std::uint64_t allocate,
                               std::uint64_t rounds = 0) {
    const auto path = dir / name;
    BH_TRY(auto board, BoardFile::open(path));
    board->rounds.store(rounds);
    std::error_code failed;
    const auto self = fs::read_symlink("/proc/self/exe", failed);
    if (failed) return errno_error("read /proc/self/exe", failed.value());
    Run request;
    request.asked.name = name;
    request.asked.gpu = gpu;
    request.asked.memory = cap;
    request.asked.command = {self.string(), "share", "spin", path.string(), std::to_string(allocate)};
    const pid_t pid = ::fork();
    if (pid < 0) return errno_error("fork", errno);
    if (pid == 0) {
      // A self-test that is killed takes its programs along: the launcher hands the signal on.
      ::prctl(PR_SET_PDEATHSIG, SIGTERM, 0, 0, 0);
      const auto code = run(place, std::move(request));
      ::_exit(code.ok() ? *code : 125);
    }
    return Spinner(std::move(name), board, pid);
  }
  Result<bool> wait_ready() {  // false: it ended instead
    for (int i = 0; i < 6000; ++i) {
      if (board->ready.load() != 0) return true;
      if (::waitpid(pid_, &status_, WNOHANG) == pid_) {
        pid_ = -1;
        return false;
      }
      ::usleep(5000);
    }
    return Error(Errc::timeout, "the spinning program did not start within 30 s");
  }
  int finish() {
    board->stop.store(1);
    for (int i = 0; pid_ > 0; ++i) {
      if (::waitpid(pid_, &status_, WNOHANG) == pid_) break;
      if (i == 2000) ::kill(pid_, SIGTERM);  // ten seconds: it hangs
      if (i == 3000) return pid_ = -1, 128 + SIGTERM;
      ::usleep(5000);
    }
    pid_ = -1;
    return WIFEXITED(status_) ? WEXITSTATUS(status_) : 128 + WTERMSIG(status_);
  }
  const std::string& name() const { return name_; }
  BoardFile board;

 private:
  Spinner(std::string name, BoardFile shared, pid_t pid) : board(shared), name_(std::move(name)), pid_(pid) {}
  std::string name_;
  pid_t pid_;
  int status_ = 0;
};

fs::path remembered_path(const Place& place) { return place.run_dir() / "selftest"; }

}  // namespace

std::optional<sharing::Costs> remembered_costs(const Place& place) {
  const auto text = read_file(remembered_path(place), 65536);
  if (!text.ok()) return std::nullopt;
  const auto json = parse_json(*text);
  if (!json.ok() || !json->is_object()) return std::nullopt;
  sharing::Costs costs;
  const auto flag = [&](const char* key, bool otherwise) {
    const auto at = json->find(key);
    return at != json->end() && at->is_boolean() ? at->get<bool>() : otherwise;
  };
  const auto cost = [&](const char* key, std::uint64_t otherwise) {
    const auto at = json->find(key);
    return at != json->end() && at->is_number_unsigned() && at->get<std::uint64_t>() <= 100'000
               ? at->get<std::uint64_t>()
               : otherwise;
  };
  costs.slices_obeyed = flag("slices", true);
  costs.pauses_obeyed = flag("pauses", true);
  costs.off_us = cost("offMicroseconds", costs.off_us);
  costs.on_us = cost("onMicroseconds", costs.on_us);
  return costs;
}

int spin(std::uint64_t allocate, const fs::path& path) {
  const auto board = BoardFile::open(path);
  if (!board.ok()) return 2;
  bool refused = false;
  const auto done = spin_for_real(*board, allocate, refused);
  if (!done.ok()) {
    (void)!::write(2, done.error().message().data(), done.error().message().size());
    (void)!::write(2, "\n", 1);
    return 2;
  }
  return refused ? 3 : 0;
}

Result<SelfTest> selftest(const Place& place, const std::string& gpu,
                          const std::function<void(std::string_view)>& say) {
  SelfTest out;
  std::error_code failed;
  const auto dir = place.run_dir() / fmt::format("selftest-{}", ::getpid());
  fs::create_directories(dir, failed);
  if (failed) {
    auto error = errno_error(fmt::format("make {}", dir.string()), failed.value());
    return error.code() == Errc::permission ? std::move(error).with_hint("run as root") : std::move(error);
  }
  struct Cleaner {
    fs::path dir;
    ~Cleaner() {
      std::error_code ignored;
      fs::remove_all(dir, ignored);
    }
  } cleaner{dir};

  for (const auto& tenant : read_all(place))
    if (tenant.alive && tenant.now && !tenant.now->groups.empty()) {
      out.notes.push_back("other tenants run on this host: the shares below are disturbed by them");
      break;
    }

  say("starting two spinning programs");
  const auto label = [&](const char* which) { return fmt::format("selftest-{}-{}", ::getpid(), which); };
  BH_TRY(auto a, Spinner::start(place, gpu, label("a"), dir, std::nullopt, 0));
  const auto started = [&](Spinner& who) -> Status {
    const auto ready = who.wait_ready();
    if (!ready.ok()) return ready.error();
    if (*ready) return ok_status();
    return Error(Errc::unavailable, "a spinning program could not run on this GPU",
                 fmt::format("bulkhead share run -- {} share spin /tmp/board 0   shows why",
                             fs::read_symlink("/proc/self/exe", failed).string()));
  };
  if (auto up = started(a); !up.ok()) return a.finish(), up.error();
  // The second has the first one's measure of a millisecond: its own would be of a GPU that it shares.
  auto second = Spinner::start(place, gpu, label("b"), dir, std::nullopt, 0, a.board->rounds.load());
  if (!second.ok()) return a.finish(), second.error();
  auto& b = *second;
  const auto stop_all = [&] { return std::pair(a.finish(), b.finish()); };
  if (auto up = started(b); !up.ok()) return stop_all(), up.error();
  const auto rates = [&](unsigned milliseconds) {
    const auto a0 = a.board->kernels.load(), b0 = b.board->kernels.load();
    const auto t0 = monotonic_ns();
    ::usleep(milliseconds * 1000);
    const double seconds = static_cast<double>(monotonic_ns() - t0) / 1e9;
    return std::pair(static_cast<double>(a.board->kernels.load() - a0) / seconds,
                     static_cast<double>(b.board->kernels.load() - b0) / seconds);
  };
  const auto weight = [&](const Spinner& who, unsigned value) {
    return set(place, who.name(), [&](Asked& asked) { return asked.weight = value, ok_status(); });
  };

  say("slices: 75 : 25 for two seconds");
  out.asked = 0.75;
  auto changed = weight(a, 75);
  if (changed.ok()) changed = weight(b, 25);
  if (!changed.ok()) return stop_all(), changed.error();
  ::usleep(300'000);
  const auto shared = rates(2000);
  if (shared.first + shared.second > 0) out.received = shared.first / (shared.first + shared.second);
  out.slices = std::abs(out.received - out.asked) < 0.05;

  say("pauses: a ceiling of 20 % on an idle GPU");
  b.board->pause.store(1);
  ::usleep(200'000);
  const double freely = rates(700).first;
  changed = set(place, a.name(), [](Asked& asked) { return asked.ceiling = 20, ok_status(); });
  if (!changed.ok()) return stop_all(), changed.error();
  ::usleep(200'000);
  const double capped = rates(1500).first;
  out.paused_rate = freely > 0 ? capped / freely : 0;
  out.pauses = out.paused_rate > 0.05 && out.paused_rate < 0.35;

  std::vector<std::uint64_t> in_force;
  for (const auto& tenant : read_all(place)) {
    if (!tenant.now || (tenant.asked.name != a.name() && tenant.asked.name != b.name())) continue;
    if (tenant.now->in_force_us != 0) in_force.push_back(tenant.now->in_force_us);
    if (tenant.asked.name == a.name()) {
      out.off_us = tenant.now->off_cost_us;
      out.on_us = tenant.now->on_cost_us;
    }
    for (const auto& trouble : tenant.now->troubles) out.notes.push_back(trouble);
  }
  if (!in_force.empty()) out.in_force_us = *std::max_element(in_force.begin(), in_force.end());
  stop_all();

  say("memory: 2 GiB against a cap of 1 GiB");
  BH_TRY(auto bomb, Spinner::start(place, gpu, label("m"), dir, Bytes(1ULL << 30U), 2ULL << 30U));
  out.memory = bomb.finish() == 3;

  if (!out.slices) out.notes.push_back("this driver does not obey time slices: shares are held by turns");
  if (!out.pauses)
    out.notes.push_back(
        "this driver does not obey pauses: ceilings and turns need the guard's gate (share run --guard)");
  if (!out.memory) out.notes.push_back("the memory cap did not hold");
  BH_CHECK(write_file_quick(remembered_path(place), dump(Json{{"slices", out.slices},
                                                              {"pauses", out.pauses},
                                                              {"memory", out.memory},
                                                              {"received", out.received},
                                                              {"pausedRate", out.paused_rate},
                                                              {"offMicroseconds", out.off_us},
                                                              {"onMicroseconds", out.on_us},
                                                              {"inForceMicroseconds", out.in_force_us}})));
  return out;
}

}  // namespace bulkhead::share
