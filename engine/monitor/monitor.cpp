#include "engine/monitor/monitor.hpp"

#include <fcntl.h>
#include <linux/close_range.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <csignal>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "base/limits.hpp"
#include "base/text.hpp"
#include "engine/monitor/frames.hpp"

namespace bulkhead::monitor {

using namespace sample;

namespace {

using Lock = std::unique_lock<std::mutex>;
using std::chrono::milliseconds;

constexpr std::uint64_t ms_ns = 1'000'000;
constexpr std::uint32_t magic = 0x314d4842;  // "BHM1"
constexpr std::size_t most_request = 4096, most_answer = 16U << 20U;
constexpr std::size_t most_slices = 64;
constexpr std::size_t most_of_host = 1024;  // ports, PCI functions, sensors: of each
// News of a GPU: signals of it and of its slices; seconds of each.
constexpr std::size_t most_told = signals * (most_slices + 1), most_news = 1200;
constexpr unsigned most_instance = 1024;
constexpr unsigned news_ms = 5'000;  // that much of the past a process takes along when it dies
constexpr unsigned most_slow = 16;  // answers under way that wait for something

enum class Ask : std::uint16_t { settings, snapshot, hurry, rest, resume, history_bytes, ready, news, end };

struct Header {
  std::uint32_t sign = magic;
  Ask ask = Ask::end;
  std::uint16_t spare = 0;
  std::uint64_t id = 0;
  std::uint64_t bytes = 0;
};
static_assert(sizeof(Header) == 24 && std::has_unique_object_representations_v<Header>);

Status send_all(int fd, const char* data, std::size_t size, std::uint64_t until_ns) {
  while (size > 0) {
    const ssize_t sent = ::send(fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent > 0) {
      data += sent;
      size -= static_cast<std::size_t>(sent);
      continue;
    }
    if (errno == EINTR) continue;
    if (errno != EAGAIN && errno != EWOULDBLOCK) return errno_error("send", errno);
    const std::uint64_t now = monotonic_ns();
    if (now >= until_ns) return Error(Errc::timeout, "send: the other side does not read");
    pollfd waits{fd, POLLOUT, 0};
    (void)::poll(&waits, 1, static_cast<int>(std::min<std::uint64_t>((until_ns - now) / ms_ns + 1, 1000)));
  }
  return ok_status();
}

Status send_frame(int fd, Ask ask, std::uint64_t id, std::string_view body, std::uint64_t until_ns) {
  const Header header{.ask = ask, .id = id, .bytes = body.size()};
  std::string frame(reinterpret_cast<const char*>(&header), sizeof header);
  frame += body;
  return send_all(fd, frame.data(), frame.size(), until_ns);
}

// Reads whole frames out of a stream of bytes.
class Frames {
 public:
  explicit Frames(std::size_t most) : most_(most) {}
  // What the socket has now. False: it is closed, or broken.
  bool fill(int fd) {
    const std::size_t step = std::max<std::size_t>(wanted_, 64U << 10U);
    const std::size_t had = bytes_.size();
    bytes_.resize(had + step);
    const ssize_t got = ::recv(fd, bytes_.data() + had, step, 0);
    const int why = errno;
    bytes_.resize(had + static_cast<std::size_t>(std::max<ssize_t>(got, 0)));
    return got > 0 || (got < 0 && (why == EINTR || why == EAGAIN));
  }
  // Errc::corrupt: it is no frame. nullopt: not all of it is there yet.
  Result<std::optional<std::pair<Header, std::string>>> next() {
    using Frame = std::optional<std::pair<Header, std::string>>;
    const std::size_t left = bytes_.size() - at_;
    if (left < sizeof(Header)) return shift(), Frame();
    Header header;
    std::memcpy(&header, bytes_.data() + at_, sizeof header);
    if (header.sign != magic || header.ask >= Ask::end || header.bytes > most_)
      return Error(Errc::corrupt, "not a frame");
    if (left - sizeof header < header.bytes) {
      wanted_ = header.bytes + sizeof header - left;
      return shift(), Frame();
    }
    Frame frame(std::in_place, header, bytes_.substr(at_ + sizeof header, header.bytes));
    at_ += sizeof header + header.bytes;
    wanted_ = 0;
    return frame;
  }

 private:
  void shift() {
    bytes_.erase(0, at_);
    at_ = 0;
  }
  const std::size_t most_;
  std::string bytes_ = {};
  std::size_t at_ = 0, wanted_ = 0;
};

// ---- the documents

void put(Writer& out, const Values& values) {
  for (const Value& value : values) {
    out.put(static_cast<std::uint8_t>((value.known() ? 1U : 0U) | (value.refused ? 2U : 0U)));
    if (value.known()) {
      out.put(value.number);
      out.put(value.at_ns);
    }
    if (value.refused) out.put(static_cast<std::uint8_t>(*value.refused));
  }
}

void get(Reader& in, Values& values) {
  for (std::size_t i = 0; i < signals; ++i) {
    Value& value = values[i];
    const auto has = in.below<std::uint8_t>(4);
    if ((has & 1U) != 0) {
      value.number = in.get<double>();
      value.at_ns = in.get<std::uint64_t>();
      // The sampler believes nothing beyond these; whoever says so is not the sampler we know.
      const Row& row = rows()[i];
      if (!std::isfinite(value.number) || value.number < row.least || value.number > row.most) value = {};
    }
    if ((has & 2U) != 0)
      value.refused = static_cast<Errc>(
          in.below<std::uint8_t>(static_cast<std::uint8_t>(static_cast<unsigned>(Errc::unavailable) + 1)));
  }
}

void put(Writer& out, std::optional<double> number) {
  out.put(static_cast<std::uint8_t>(number ? 1 : 0));
  if (number) out.put(*number);
}

std::optional<double> get_optional(Reader& in) {
  if (!in.flag()) return std::nullopt;
  const auto number = in.get<double>();
  return std::isfinite(number) ? std::optional(number) : std::nullopt;
}

// Both sides cut lists at the same length.
template <class T, class Each>
void put_all(Writer& out, const std::vector<T>& all, Each each) {
  out.put(static_cast<std::uint16_t>(std::min(all.size(), most_of_host)));
  for (std::size_t i = 0; i < std::min(all.size(), most_of_host); ++i) each(all[i]);
}
template <class T, class Each>
void get_all(Reader& in, std::vector<T>& all, Each each) {
  const auto count = in.below<std::uint16_t>(most_of_host + 1);
  for (unsigned i = 0; i < count && in.good(); ++i) each(all.emplace_back());
}

void put(Writer& out, const Host& host) {
  out.put(host.at_ns);
  put_all(out, host.ports, [&](const Port& port) {
    out.text(port.device);
    out.put(port.port);
    out.text(port.state);
    out.text(port.rate);
    for (const auto count : {port.packets, port.lost, port.symbol_errors, port.recoveries, port.downed})
      out.put(count);
    put(out, port.loss);
    out.put(static_cast<std::uint8_t>(port.alarm ? 1 : 0));
  });
  put_all(out, host.pcie, [&](const Pcie& pcie) {
    out.put(pcie.address.domain);
    out.put(pcie.address.bus);
    out.put(pcie.address.device);
    out.put(pcie.address.function);
    for (const auto count : {pcie.correctable, pcie.nonfatal, pcie.fatal}) out.put(count);
  });
  put_all(out, host.sensors, [&](const Sensor& sensor) {
    out.text(sensor.source);
    out.text(sensor.name);
    out.text(sensor.kind);
    out.put(sensor.value);
    put(out, sensor.low);
    put(out, sensor.high);
  });
  out.text(host.bmc);
}

void get(Reader& in, Host& host) {
  host.at_ns = in.get<std::uint64_t>();
  get_all(in, host.ports, [&](Port& port) {
    port.device = printable(in.text(), 96);
    port.port = in.get<unsigned>();
    port.state = printable(in.text(), 96);
    port.rate = printable(in.text(), 96);
    for (auto* count : {&port.packets, &port.lost, &port.symbol_errors, &port.recoveries, &port.downed})
      *count = in.get<std::uint64_t>();
    port.loss = get_optional(in);
    port.alarm = in.flag();
  });
  get_all(in, host.pcie, [&](Pcie& pcie) {
    pcie.address.domain = in.get<std::uint32_t>();
    pcie.address.bus = in.get<std::uint8_t>();
    pcie.address.device = in.get<std::uint8_t>();
    pcie.address.function = in.get<std::uint8_t>();
    for (auto* count : {&pcie.correctable, &pcie.nonfatal, &pcie.fatal}) *count = in.get<std::uint64_t>();
  });
  get_all(in, host.sensors, [&](Sensor& sensor) {
    sensor.source = printable(in.text(), 96);
    sensor.name = printable(in.text(), 96);
    sensor.kind = printable(in.text(), 96);
    sensor.value = in.get<double>();
    if (!std::isfinite(sensor.value)) sensor.value = 0;
    sensor.low = get_optional(in);
    sensor.high = get_optional(in);
  });
  host.bmc = printable(in.text(), Writer::most_text);
}

std::string put_settings(const Settings& settings) {
  Writer out;
  out.text(settings.library);
  out.put(settings.tick_ms);
  out.put(settings.gpm_ms);
  out.put(settings.budget);
  out.put(settings.deadline_ms);
  out.put(static_cast<std::uint64_t>(settings.history.most_bytes));
  out.put(settings.history.seconds_kept);
  out.put(settings.history.minutes_kept);
  out.put(static_cast<std::uint64_t>(settings.history.most_series));
  out.text(settings.root);
  return out.take();
}

std::optional<Settings> get_settings(std::string_view bytes) {
  Reader in(bytes);
  Settings out;
  out.library = in.text();
  out.tick_ms = in.get<unsigned>();
  out.gpm_ms = in.get<unsigned>();
  out.budget = in.get<double>();
  out.deadline_ms = in.get<unsigned>();
  out.history.most_bytes = in.get<std::uint64_t>();
  out.history.seconds_kept = in.get<std::uint64_t>();
  out.history.minutes_kept = in.get<std::uint64_t>();
  out.history.most_series = in.get<std::uint64_t>();
  out.root = in.text();
  if (!in.whole() || !std::isfinite(out.budget)) return std::nullopt;
  return out;
}

std::string put_news(const std::vector<Sampler::GpuPast>& news) {
  Writer out;
  out.put(static_cast<std::uint16_t>(std::min(news.size(), limits::gpus)));
  for (std::size_t i = 0; i < std::min(news.size(), limits::gpus); ++i) {
    out.put(news[i].index);
    out.text(news[i].uuid.text);
    out.put(news[i].layouts);
    out.put(static_cast<std::uint16_t>(std::min(news[i].series.size(), most_told)));
    for (std::size_t s = 0; s < std::min(news[i].series.size(), most_told); ++s) {
      const auto& one = news[i].series[s];
      out.put(one.slice);
      out.put(static_cast<std::uint8_t>(one.signal));
      const std::size_t skipped = one.points.size() - std::min(one.points.size(), most_news);
      out.put(static_cast<std::uint16_t>(one.points.size() - skipped));
      for (std::size_t k = skipped; k < one.points.size(); ++k) {
        out.put(one.points[k].at_s);
        out.put(one.points[k].mean);
      }
    }
  }
  return out.take();
}

std::optional<std::vector<Sampler::GpuPast>> get_news(std::string_view bytes) {
  Reader in(bytes);
  std::vector<Sampler::GpuPast> out;
  const auto gpus = in.below<std::uint16_t>(limits::gpus + 1);
  for (unsigned i = 0; i < gpus && in.good(); ++i) {
    auto& gpu = out.emplace_back();
    gpu.index = in.below<unsigned>(limits::gpus);
    gpu.uuid.text = printable(in.text(), 96);
    gpu.layouts = in.get<std::uint64_t>();
    const auto series = in.below<std::uint16_t>(most_told + 1);
    for (unsigned s = 0; s < series && in.good(); ++s) {
      auto& one = gpu.series.emplace_back();
      one.slice = in.below<unsigned>(most_instance);
      one.signal = in.one_of(Signal::end);
      const auto points = in.below<std::uint16_t>(most_news + 1);
      for (unsigned k = 0; k < points && in.good(); ++k) {
        auto& point = one.points.emplace_back();
        point.at_s = in.get<std::uint64_t>();
        point.mean = in.get<double>();
      }
    }
  }
  if (!in.whole()) return std::nullopt;
  return out;
}

}  // namespace

std::string encode(const Snapshot& snapshot) {
  Writer out;
  out.reserve(64U << 10U);
  out.put(snapshot.at_ns);
  out.text(snapshot.why);
  out.put(static_cast<std::uint16_t>(std::min(snapshot.gpus.size(), limits::gpus)));
  for (std::size_t i = 0; i < std::min(snapshot.gpus.size(), limits::gpus); ++i) {
    const Gpu& gpu = snapshot.gpus[i];
    out.put(gpu.index);
    out.text(gpu.uuid.text);
    out.put(gpu.pci.domain);
    out.put(gpu.pci.bus);
    out.put(gpu.pci.device);
    out.put(gpu.pci.function);
    out.text(gpu.name);
    out.put(static_cast<std::uint8_t>(gpu.state));
    out.text(gpu.call);
    out.put(gpu.since_ns);
    out.text(gpu.why);
    put(out, gpu.values);
    out.put(static_cast<std::uint8_t>(gpu.gpm ? (*gpu.gpm ? 2 : 1) : 0));
    out.put(static_cast<std::uint8_t>(gpu.mig ? 1 : 0));
    out.put(static_cast<std::uint16_t>(std::min(gpu.slices.size(), most_slices)));
    for (std::size_t s = 0; s < std::min(gpu.slices.size(), most_slices); ++s) {
      out.put(gpu.slices[s].gpu_instance);
      out.text(gpu.slices[s].uuid.text);
      put(out, gpu.slices[s].values);
    }
    for (const TierState& tier : gpu.tier) {
      out.put(tier.cost_us);
      out.put(tier.period_ms);
      out.put(tier.rounds);
      out.put(tier.nanoseconds);
    }
    out.put(gpu.fresh);
  }
  put(out, snapshot.host);
  return out.take();
}

Result<Snapshot> decode_snapshot(std::string_view bytes) {
  Reader in(bytes);
  Snapshot out;
  out.at_ns = in.get<std::uint64_t>();
  out.why = printable(in.text(), Writer::most_text);
  const auto gpus = in.below<std::uint16_t>(limits::gpus + 1);
  for (unsigned i = 0; i < gpus && in.good(); ++i) {
    Gpu gpu;
    gpu.index = in.get<unsigned>();
    gpu.uuid.text = printable(in.text(), 96);
    gpu.pci.domain = in.get<std::uint32_t>();
    gpu.pci.bus = in.get<std::uint8_t>();
    gpu.pci.device = in.get<std::uint8_t>();
    gpu.pci.function = in.get<std::uint8_t>();
    gpu.name = printable(in.text(), 96);
    gpu.state = in.one_of(static_cast<State>(static_cast<unsigned>(State::resting) + 1));
    gpu.call = printable(in.text(), 96);
    gpu.since_ns = in.get<std::uint64_t>();
    gpu.why = printable(in.text(), Writer::most_text);
    get(in, gpu.values);
    const auto gpm = in.below<std::uint8_t>(3);
    if (gpm != 0) gpu.gpm = gpm == 2;
    gpu.mig = in.flag();
    const auto slices = in.below<std::uint16_t>(most_slices + 1);
    for (unsigned s = 0; s < slices && in.good(); ++s) {
      Slice slice;
      slice.gpu_instance = in.get<unsigned>();
      slice.uuid.text = printable(in.text(), 96);
      get(in, slice.values);
      gpu.slices.push_back(std::move(slice));
    }
    for (TierState& tier : gpu.tier) {
      tier.cost_us = in.get<double>();
      tier.period_ms = in.get<double>();
      tier.rounds = in.get<std::uint64_t>();
      tier.nanoseconds = in.get<std::uint64_t>();
      if (!std::isfinite(tier.cost_us) || !std::isfinite(tier.period_ms)) tier = {};
    }
    gpu.fresh = in.get<std::uint64_t>();
    if (gpu.index != i) return Error(Errc::corrupt, "GPUs out of order");  // consumers find them by place
    out.gpus.push_back(std::move(gpu));
  }
  get(in, out.host);
  if (!in.whole()) return Error(Errc::corrupt, "a snapshot cut short or out of bounds");
  return out;
}

// ---- the process

Status serve(int fd) {
  // It ends by the socket alone: a terminal's or a service manager's signal is for the daemon, which may have
  // a while yet to go.
  for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGPIPE}) (void)::signal(number, SIG_IGN);
  ::prctl(PR_SET_NAME, "bh-monitor");
  Frames frames(most_request);
  // Never destroyed: slow answers may still be inside it when the socket closes, and _exit() follows.
  Sampler* sampler = nullptr;
  // Shared with slow answers, which may outlive this function.
  struct Out {
    std::mutex mutex;
    int fd = -1;
    unsigned slow = 0;
    void answer(const Header& asked, std::string_view body) {
      const std::lock_guard hold(mutex);
      (void)send_frame(fd, asked.ask, asked.id, body, monotonic_ns() + 10'000 * ms_ns);
    }
  };
  const auto out = std::make_shared<Out>();
  out->fd = fd;
  const auto number = [](auto value) {
    Writer body;
    body.put(value);
    return body.take();
  };
  const auto slowly = [&](const Header& header, auto work) {
    {
      const std::lock_guard hold(out->mutex);
      if (out->slow >= most_slow) {
        const auto no = number(std::uint8_t{0});
        (void)send_frame(fd, header.ask, header.id, no, monotonic_ns() + 1'000 * ms_ns);
        return;
      }
      ++out->slow;
    }
    std::thread([out, header, work, number] {
      out->answer(header, number(static_cast<std::uint8_t>(work() ? 1 : 0)));
      const std::lock_guard hold(out->mutex);
      --out->slow;
    }).detach();
  };
  while (true) {
    BH_TRY(auto frame, frames.next());
    if (!frame) {
      if (!frames.fill(fd)) return ok_status();
      continue;
    }
    const auto& [header, body] = *frame;
    if (header.ask == Ask::settings) {
      const auto settings = get_settings(body);
      if (!settings || sampler != nullptr) return Error(Errc::corrupt, "settings");
      sampler = new Sampler(*settings);
      continue;
    }
    if (sampler == nullptr) return Error(Errc::corrupt, "no settings");
    Reader in(body);
    Sampler* all = sampler;
    switch (header.ask) {
      case Ask::snapshot:
        out->answer(header, encode(all->snapshot()));
        break;
      case Ask::hurry: {
        const auto gpu = in.get<unsigned>();
        const auto tier = in.one_of(Tier::end);
        if (in.whole()) all->hurry(gpu, tier);
        break;
      }
      case Ask::rest:
      case Ask::ready: {
        const auto most = std::min(in.get<unsigned>(), 600'000U);
        if (!in.whole()) break;
        if (header.ask == Ask::rest)
          slowly(header, [all, most] { return all->rest(most); });
        else
          slowly(header, [all, most] { return all->wait_ready(most); });
        break;
      }
      case Ask::resume:
        all->resume();
        out->answer(header, number(std::uint8_t{1}));
        break;
      case Ask::news:
        out->answer(header, put_news(all->news()));
        break;
      case Ask::history_bytes:
        out->answer(header, number(static_cast<std::uint64_t>(all->history_bytes())));
        break;
      case Ask::settings:
      case Ask::end:
        break;
    }
  }
}

// ---- the one who asks

struct Monitor::Inside {
  struct Waiting {
    bool done = false, failed = false;
    std::string body = {};
  };

  Settings settings;
  Program program;

  mutable std::mutex mutex;
  std::condition_variable changed;
  bool stop = false, resting = false, kill = false;
  unsigned rests = 0;  // not taken back yet
  int pid = 0;
  int fd = -1;  // of the keeper; others only send, under send_mutex
  std::uint64_t next = 1, restarts = 0;
  std::uint64_t deaf_since = 0;  // the first question without an answer since the last answer; 0: none
  std::map<std::uint64_t, Waiting*> waiting;
  std::string why = "starting";
  Snapshot last;  // as it came
  std::uint64_t lives = 0;

  // The past, which outlives the process that saw it.
  struct Kept {
    unsigned index = 0;
    std::uint64_t life = 0, layouts = 0;
    std::map<unsigned, std::array<std::size_t, signals>> series = {};  // by slice + 1; 0: the GPU
  };
  std::mutex past_mutex;
  history::History past;
  std::map<std::string, Kept> kept;  // by UUID
  std::thread gatherer;
  std::mutex send_mutex;
  std::mutex rest_mutex;  // over a whole rest() or resume(): the process hears them in their order
  std::thread keeper;

  // One question and its answer. nullopt: none came, or there is nobody to ask.
  std::optional<std::string> ask(Ask what, std::string_view body, unsigned milliseconds_most,
                                 bool answer = true) {
    Waiting mine;
    std::uint64_t id = 0;
    const std::uint64_t until = monotonic_ns() + milliseconds_most * ms_ns;
    {
      const std::lock_guard sending(send_mutex);  // the keeper closes the socket under this lock
      int to = -1;
      {
        const Lock lock(mutex);
        if (fd < 0) return std::nullopt;
        to = fd;
        id = next++;
        if (answer) waiting[id] = &mine;
      }
      if (!send_frame(to, what, id, body, until).ok()) {
        const Lock lock(mutex);
        waiting.erase(id);
        kill = true;  // what was sent may be half a frame
        ::shutdown(to, SHUT_RDWR);
        return std::nullopt;
      }
    }
    if (!answer) return std::string();
    Lock lock(mutex);
    changed.wait_for(lock, milliseconds(milliseconds_most), [&] { return mine.done || stop; });
    waiting.erase(id);
    if (!mine.done && deaf_since == 0) deaf_since = monotonic_ns();
    if (!mine.done || mine.failed) return std::nullopt;
    return std::move(mine.body);
  }

  // What the process saw since it was asked last. One at a time, so that none is asked for twice.
  void gather() {
    const std::lock_guard one(past_mutex);
    std::uint64_t life = 0;
    {
      const Lock lock(mutex);
      life = lives;
    }
    const auto body = ask(Ask::news, {}, program.answer_ms);
    if (!body) return;
    const auto news = get_news(*body);
    if (!news) return;
    const std::uint64_t now = monotonic_ns() / 1'000'000'000;
    for (const auto& gpu : *news) {
      if (gpu.uuid.text.empty() || (kept.size() >= limits::gpus && !kept.contains(gpu.uuid.text))) continue;
      for (auto& [uuid, its] : kept)
        if (its.index == gpu.index && uuid != gpu.uuid.text) its.index = ~0U;  // they moved up
      Kept& its = kept[gpu.uuid.text];
      its.index = gpu.index;
      // Slices that ended take their past along. A new process finds those that there are.
      if (its.life == life && its.layouts != gpu.layouts)
        for (auto at = its.series.upper_bound(0); at != its.series.end(); at = its.series.erase(at))
          for (const std::size_t series : at->second)
            if (series != none) past.close(series);
      its.life = life;
      its.layouts = gpu.layouts;
      for (const auto& told : gpu.series) {
        const Row& row = rows()[static_cast<std::size_t>(told.signal)];
        if (row.step <= 0) continue;
        auto [at, fresh] = its.series.try_emplace(told.slice);
        if (fresh) at->second.fill(none);
        std::size_t& series = at->second[static_cast<std::size_t>(told.signal)];
        if (series == none) {
          const auto opened = past.open({.step = row.step, .worst = row.worst});
          if (!opened) continue;
          series = *opened;
        }
        for (const auto& point : told.points)
          if (point.at_s <= now && point.at_s + 3600 >= now)
            past.add(series, static_cast<double>(point.at_s), point.mean);
      }
    }
  }

  void gather_always() {
    ::prctl(PR_SET_NAME, "bh-monitor-past");
    while (true) {
      {
        Lock lock(mutex);
        if (changed_stop(lock, news_ms)) return;
      }
      gather();
    }
  }
  // Sleeps; true: it is to end.
  bool changed_stop(Lock& lock, unsigned most_ms) {
    return changed.wait_for(lock, milliseconds(most_ms), [&] { return stop; });
  }
  static constexpr std::size_t none = ~std::size_t{0};

  void keep() {
    ::prctl(PR_SET_NAME, "bh-monitor-keep");
    unsigned wait_ms = program.first_wait_ms;
    while (true) {
      {
        Lock lock(mutex);
        // Nobody starts what is to keep its hands off the driver.
        changed.wait(lock, [&] { return stop || !resting; });
        if (stop) return;
      }
      const std::uint64_t began = monotonic_ns();
      const auto ended = one_life();
      Lock lock(mutex);
      why = ended;
      if (stop) return;
      if (resting) continue;  // it was killed so that it lets go
      ++restarts;
      wait_ms = monotonic_ns() - began > 60'000 * ms_ns ? program.first_wait_ms
                                                        : std::min(wait_ms * 2, program.longest_wait_ms);
      why += fmt::format("; started again after {} ms", wait_ms);
      changed.wait_for(lock, milliseconds(wait_ms), [&] { return stop; });
    }
  }

  // Starts a process, reads what it says until it ends; why it did.
  std::string one_life() {
    int ends[2] = {-1, -1};
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
      return errno_error("the sampler could not be started: socketpair", errno).message();
    UniqueFd mine(ends[0]), theirs(ends[1]);
    // All that a child of a program with threads may not do is done before.
    std::vector<char*> words;
    for (auto& word : program.arguments) words.push_back(word.data());
    words.push_back(nullptr);
    const std::string file = program.file.string();
    const pid_t parent = ::getpid();
    const UniqueFd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
    const pid_t child = ::fork();
    if (child < 0) return errno_error("the sampler could not be started: fork", errno).message();
    if (child == 0) {
      // The kernel ends it with the thread that started it, which is the keeper; asked again in case that
      // went in between.
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (::getppid() != parent) ::_exit(1);
      sigset_t no_signals;
      ::sigemptyset(&no_signals);
      ::sigprocmask(SIG_SETMASK, &no_signals, nullptr);
      if (null) ::dup2(null.get(), 0), ::dup2(null.get(), 1);
      if (::dup2(theirs.get(), 3) != 3) ::_exit(1);
      if (theirs.get() == 3) ::fcntl(3, F_SETFD, 0);
      (void)::syscall(SYS_close_range, 4U, ~0U, 0U);
      ::execv(file.c_str(), words.data());
      ::_exit(127);
    }
    theirs.reset();
    {
      const Lock lock(mutex);
      pid = child;
      ++lives;
      fd = mine.get();
      kill = resting;  // who asked for rest meanwhile was told that there is no process
      deaf_since = 0;
    }
    // It opens the driver when it has its settings, not before.
    if (!kill_asked()) (void)ask(Ask::settings, put_settings(settings), 1'000, false);
    std::string ended = listen(mine.get());
    {
      const std::lock_guard sending(send_mutex);
      const Lock lock(mutex);
      fd = -1;
      for (auto& [id, one] : waiting) one->done = one->failed = true;
      waiting.clear();
    }
    changed.notify_all();
    mine.reset();  // its word to end
    const auto status = reap(child);
    const Lock lock(mutex);
    pid = 0;
    changed.notify_all();
    if (!ended.empty()) return ended;
    if (!status) return "the sampler is stuck in the driver and does not end";
    if (WIFSIGNALED(*status)) return fmt::format("the sampler ended by signal {}", WTERMSIG(*status));
    return fmt::format("the sampler ended with exit code {}", WEXITSTATUS(*status));
  }

  // Until the process closes, or is to be ended: then why; empty: it closed.
  std::string listen(int from) {
    Frames frames(most_answer);
    while (true) {
      auto frame = frames.next();
      if (!frame.ok()) return "the sampler said what is no frame: killed";
      if (*frame) {
        deliver((*frame)->first.id, std::move((*frame)->second));
        continue;
      }
      pollfd waits{from, POLLIN, 0};
      (void)::poll(&waits, 1, 250);
      {
        const Lock lock(mutex);
        if (stop) return "stopped";
        if (kill)
          return resting ? "killed so that it lets go of the driver" : "the sampler does not read: killed";
        if (deaf_since != 0 && monotonic_ns() > deaf_since + program.deaf_ms * ms_ns)
          return fmt::format("the sampler did not answer for {} s: killed", program.deaf_ms / 1000);
      }
      if ((waits.revents & (POLLIN | POLLHUP | POLLERR)) != 0 && !frames.fill(from)) return {};
    }
  }

  bool kill_asked() {
    const Lock lock(mutex);
    return kill;
  }

  void deliver(std::uint64_t id, std::string body) {
    {
      const Lock lock(mutex);
      deaf_since = 0;
      const auto at = waiting.find(id);
      if (at == waiting.end()) return;  // whoever asked waits no more
      at->second->body = std::move(body);
      at->second->done = true;
      waiting.erase(at);
    }
    changed.notify_all();
  }

  // Its socket is closed: it ends by itself, or is killed. nullopt: not even that, for as long as we would
  // wait; what is stuck in the kernel for good is not waited for twice.
  std::optional<int> reap(pid_t child) {
    const auto wait_until = [&](std::uint64_t until, int& status) {
      while (true) {
        const pid_t got = ::waitpid(child, &status, WNOHANG);
        if (got == child || (got < 0 && errno == ECHILD)) return true;
        if (monotonic_ns() >= until) return false;
        ::usleep(2'000);
      }
    };
    int status = 0;
    if (!kill_asked() && wait_until(monotonic_ns() + 700 * ms_ns, status)) return status;
    ::kill(child, SIGKILL);
    if (wait_until(monotonic_ns() + 1'000 * ms_ns, status)) return status;
    // Not another one beside it: each would hang in the same place.
    while (true) {
      {
        const Lock lock(mutex);
        if (stop) return std::nullopt;
        why = "the sampler is stuck in the driver and cannot be ended";
      }
      if (wait_until(monotonic_ns() + 1'000 * ms_ns, status)) return status;
    }
  }
};

Monitor::Monitor(const Settings& settings, const Program& program) : inside_(std::make_shared<Inside>()) {
  inside_->settings = settings;
  inside_->program = program;
  inside_->past = history::History(settings.history);
  // The process keeps what was not fetched yet, and no more.
  auto& brief = inside_->settings.history;
  brief.seconds_kept = std::min<std::uint64_t>(brief.seconds_kept, 600);
  brief.minutes_kept = std::min<std::uint64_t>(brief.minutes_kept, 5);
  brief.most_bytes = std::min<std::size_t>(brief.most_bytes, 8U << 20U);
  inside_->keeper = std::thread([inside = inside_] { inside->keep(); });
  inside_->gatherer = std::thread([inside = inside_] { inside->gather_always(); });
}

Monitor::~Monitor() {
  {
    const Lock lock(inside_->mutex);
    inside_->stop = true;
    if (inside_->fd >= 0) ::shutdown(inside_->fd, SHUT_RDWR);
  }
  inside_->changed.notify_all();
  inside_->keeper.join();
  inside_->gatherer.join();
}

Snapshot Monitor::snapshot() const {
  const auto body = inside_->ask(Ask::snapshot, {}, inside_->program.answer_ms);
  std::optional<Snapshot> fresh;
  if (body)
    if (auto decoded = decode_snapshot(*body); decoded.ok()) fresh = std::move(decoded).value();
  const Lock lock(inside_->mutex);
  Snapshot& last = inside_->last;
  const auto old = [&](const std::string& why) {
    Snapshot out = last;
    out.at_ns = monotonic_ns();
    out.why = why;
    for (Gpu& gpu : out.gpus) {
      gpu.state = inside_->resting ? State::resting : State::lost;
      gpu.why = why;
      gpu.call.clear();
    }
    return out;
  };
  if (!fresh) return old(body ? "the sampler said what is no snapshot" : inside_->why);
  inside_->why = "the sampler does not answer";
  // A new process has not counted them yet: the old ones are shown until it has.
  if (fresh->gpus.empty() && !last.gpus.empty()) return old(fresh->why);
  last = std::move(*fresh);
  return last;
}

bool Monitor::wait_ready(unsigned most_ms) const {
  const std::uint64_t until = monotonic_ns() + most_ms * ms_ns;
  while (true) {
    const std::uint64_t now = monotonic_ns();
    const auto left = now < until ? static_cast<unsigned>((until - now) / ms_ns) : 0U;
    Writer body;
    body.put(left);
    const auto answer = inside_->ask(Ask::ready, body.take(), left + 100);
    if (answer && !answer->empty() && answer->front() == 1) return true;
    if (left == 0) return false;
    ::usleep(10'000);  // it is starting, or starting again
  }
}

void Monitor::hurry(unsigned gpu, Tier tier) {
  Writer body;
  body.put(gpu);
  body.put(static_cast<std::uint8_t>(tier));
  (void)inside_->ask(Ask::hurry, body.take(), inside_->program.answer_ms, false);
}

bool Monitor::rest(unsigned most_ms) {
  const std::lock_guard order(inside_->rest_mutex);
  {
    const Lock lock(inside_->mutex);
    ++inside_->rests;
    inside_->resting = true;
    if (inside_->pid == 0) return true;
  }
  Writer body;
  body.put(most_ms);
  const auto answer = inside_->ask(Ask::rest, body.take(), most_ms + 100);
  if (answer && !answer->empty() && answer->front() == 1) return true;
  Lock lock(inside_->mutex);
  inside_->kill = true;
  if (inside_->fd >= 0) ::shutdown(inside_->fd, SHUT_RDWR);
  return inside_->changed.wait_for(lock, milliseconds(1'000), [&] { return inside_->pid == 0; });
}

void Monitor::resume() {
  const std::lock_guard order(inside_->rest_mutex);
  {
    const Lock lock(inside_->mutex);
    if (inside_->rests > 0 && --inside_->rests > 0) return;  // somebody else needs it still
    inside_->resting = false;
  }
  inside_->changed.notify_all();
  (void)inside_->ask(Ask::resume, {}, inside_->program.answer_ms);
}

std::vector<history::Point> Monitor::history(unsigned gpu, std::optional<unsigned> gpu_instance,
                                             Signal signal, std::uint64_t from_s, std::uint64_t to_s,
                                             history::History::Grain grain) const {
  if (signal >= Signal::end) return {};
  inside_->gather();  // up to now, where there is a process that answers
  const std::lock_guard lock(inside_->past_mutex);
  for (const auto& [uuid, its] : inside_->kept) {
    if (its.index != gpu) continue;
    const auto found = its.series.find(gpu_instance ? *gpu_instance + 1 : 0U);
    if (found == its.series.end()) return {};
    const std::size_t series = found->second[static_cast<std::size_t>(signal)];
    return series == Inside::none ? std::vector<history::Point>()
                                  : inside_->past.query(series, from_s, to_s, grain);
  }
  return {};
}

std::size_t Monitor::history_bytes() const {
  const auto answer = inside_->ask(Ask::history_bytes, {}, inside_->program.answer_ms);
  const std::lock_guard lock(inside_->past_mutex);
  return inside_->past.bytes() + (answer ? Reader(*answer).get<std::uint64_t>() : 0);
}

int Monitor::pid() const {
  const Lock lock(inside_->mutex);
  return inside_->pid;
}

std::uint64_t Monitor::restarts() const {
  const Lock lock(inside_->mutex);
  return inside_->restarts;
}

}  // namespace bulkhead::monitor
