#include "edge/journal/journal.hpp"

#include <dlfcn.h>
#include <systemd/sd-journal.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string_view>

#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/text.hpp"

namespace bulkhead::journal {

namespace {

// The kernel may lose a watch (inotify's queue is bounded): looked for all the same so often.
constexpr std::uint64_t look_ns = 5'000'000'000;

// What is used of libsystemd, by name. Every symbol is in version 209 (2014) already.
struct Symbols {
  decltype(&::sd_journal_open) open = nullptr;
  decltype(&::sd_journal_open_directory) open_directory = nullptr;
  decltype(&::sd_journal_close) close = nullptr;
  decltype(&::sd_journal_get_fd) get_fd = nullptr;
  decltype(&::sd_journal_process) process = nullptr;
  decltype(&::sd_journal_add_match) add_match = nullptr;
  decltype(&::sd_journal_add_disjunction) add_disjunction = nullptr;
  decltype(&::sd_journal_add_conjunction) add_conjunction = nullptr;
  decltype(&::sd_journal_seek_head) seek_head = nullptr;
  decltype(&::sd_journal_seek_cursor) seek_cursor = nullptr;
  decltype(&::sd_journal_test_cursor) test_cursor = nullptr;
  decltype(&::sd_journal_get_cursor) get_cursor = nullptr;
  decltype(&::sd_journal_next) next = nullptr;
  decltype(&::sd_journal_get_data) get_data = nullptr;
  decltype(&::sd_journal_get_realtime_usec) realtime = nullptr;
  decltype(&::sd_journal_set_data_threshold) set_data_threshold = nullptr;
};

template <class F>
bool find(void* library, const char* name, F& out) {
  out = reinterpret_cast<F>(::dlsym(library, name));
  return out != nullptr;
}

// nullptr, or the missing name when libsystemd is too old.
const char* fill(void* library, Symbols& s) {
#define BH_FIND(field, name) \
  if (!find(library, name, s.field)) return name
  BH_FIND(open, "sd_journal_open");
  BH_FIND(open_directory, "sd_journal_open_directory");
  BH_FIND(close, "sd_journal_close");
  BH_FIND(get_fd, "sd_journal_get_fd");
  BH_FIND(process, "sd_journal_process");
  BH_FIND(add_match, "sd_journal_add_match");
  BH_FIND(add_disjunction, "sd_journal_add_disjunction");
  BH_FIND(add_conjunction, "sd_journal_add_conjunction");
  BH_FIND(seek_head, "sd_journal_seek_head");
  BH_FIND(seek_cursor, "sd_journal_seek_cursor");
  BH_FIND(test_cursor, "sd_journal_test_cursor");
  BH_FIND(get_cursor, "sd_journal_get_cursor");
  BH_FIND(next, "sd_journal_next");
  BH_FIND(get_data, "sd_journal_get_data");
  BH_FIND(realtime, "sd_journal_get_realtime_usec");
  BH_FIND(set_data_threshold, "sd_journal_set_data_threshold");
#undef BH_FIND
  return nullptr;
}

}  // namespace

struct Reader::Library {
  void* handle = nullptr;
  Symbols s = {};
  sd_journal* journal = nullptr;

  ~Library() {
    if (journal != nullptr) s.close(journal);
    if (handle != nullptr) ::dlclose(handle);
  }
  // Nothing where the record has no such field.
  std::string field(const char* name) const {
    const void* data = nullptr;
    std::size_t size = 0;
    if (s.get_data(journal, name, &data, &size) < 0) return {};
    const std::string_view all(static_cast<const char*>(data), size);
    const auto equals = all.find('=');
    return equals == all.npos ? std::string() : std::string(all.substr(equals + 1, most_message));
  }
};

Reader::Reader() : library_(std::make_unique<Library>()) {}
Reader::~Reader() = default;

Error Reader::error(const char* what, int code) const {
  return Error(code == -EACCES || code == -EPERM ? Errc::permission : Errc::io,
               fmt::format("the journal: {}: {}", what, printable(std::strerror(-code))));
}

Result<std::unique_ptr<Reader>> Reader::open(const std::filesystem::path& root, const std::string& unit,
                                             const std::string& boot, const std::string& cursor) {
  std::unique_ptr<Reader> out(new Reader);
  auto& l = *out->library_;
  std::error_code failed;
  auto folder = root / "var/log/journal";
  if (!std::filesystem::is_directory(folder, failed)) folder = root / "run/log/journal";
  if (!std::filesystem::is_directory(folder, failed))
    return Error(Errc::not_found,
                 fmt::format("there is no journal below {}", (root / "var/log/journal").string()));
  l.handle = ::dlopen("libsystemd.so.0", RTLD_NOW | RTLD_LOCAL);
  if (l.handle == nullptr)
    return Error(Errc::unavailable, fmt::format("the journal: {}", printable(::dlerror())),
                 "apt install libsystemd0");
  if (const char* missing = fill(l.handle, l.s); missing != nullptr)
    return Error(Errc::unsupported, fmt::format("the journal: libsystemd.so.0 has no {}", missing));
  const auto opened = root == "/" ? l.s.open(&l.journal, SD_JOURNAL_LOCAL_ONLY | SD_JOURNAL_SYSTEM)
                                  : l.s.open_directory(&l.journal, folder.c_str(), 0);
  if (opened < 0) return out->error("open", opened);
  // From here on files that come and go are seen by sd_journal_process.
  if (const int fd = l.s.get_fd(l.journal); fd < 0) return out->error("watch", fd);
  (void)l.s.set_data_threshold(l.journal, most_message + 64);

  std::string id = boot;
  std::erase(id, '-');
  const auto match = [&](const std::string& text) {
    return l.s.add_match(l.journal, text.data(), text.size());
  };
  int done = match("_BOOT_ID=" + id);
  if (done >= 0) done = l.s.add_conjunction(l.journal);
  if (done >= 0) done = match("_SYSTEMD_UNIT=" + unit);
  if (done >= 0) done = l.s.add_disjunction(l.journal);
  if (done >= 0) done = match("_PID=1");
  if (done >= 0) done = match("UNIT=" + unit);
  if (done < 0) return out->error("choose records", done);

  out->cursor_ = cursor;
  done = cursor.empty() ? l.s.seek_head(l.journal) : l.s.seek_cursor(l.journal, cursor.c_str());
  if (done < 0) {  // a cursor that is none
    out->cursor_.clear();
    done = l.s.seek_head(l.journal);
  }
  if (done < 0) return out->error("seek", done);
  return out;
}

Result<std::vector<Record>> Reader::read() {
  auto& l = *library_;
  std::vector<Record> out;
  const auto now = monotonic_ns();
  const int changed = l.s.process(l.journal);
  if (changed < 0) return error("follow", changed);
  if (changed == SD_JOURNAL_NOP && !more_ && now - looked_ns_ < look_ns) return out;
  looked_ns_ = now;
  more_ = false;
  while (true) {
    if (out.size() >= most_records) {
      more_ = true;
      break;
    }
    const int moved = l.s.next(l.journal);
    if (moved == -EBADMSG) continue;  // a record that a crash left half: the next one
    if (moved < 0) return error("read", moved);
    if (moved == 0) break;
    if (!cursor_.empty() && l.s.test_cursor(l.journal, cursor_.c_str()) > 0) continue;  // where we were
    char* at = nullptr;
    if (l.s.get_cursor(l.journal, &at) >= 0 && at != nullptr) {
      cursor_ = at;
      std::free(at);
    }
    Record one{.message = l.field("MESSAGE")};
    std::ranges::replace(one.message, '\n', ' ');
    one.program = l.field("_PID") == "1" ? "systemd" : l.field("_COMM");
    std::uint64_t at_us = 0;
    if (l.s.realtime(l.journal, &at_us) >= 0) one.realtime_us = static_cast<std::int64_t>(at_us);
    if (!one.message.empty()) out.push_back(std::move(one));
  }
  return out;
}

}  // namespace bulkhead::journal
