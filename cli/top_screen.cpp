// The one file that includes curses, linked statically: the binary starts where no libncurses is installed,
// and finds the host's terminals in terminfo, which every distribution's base system has.
#include "cli/top_screen.hpp"

#include <langinfo.h>
#include <locale.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <cstring>

#define NCURSES_NOMACROS 1
#include <curses.h>
#include <fmt/format.h>

#include "base/clock.hpp"
#include "base/text.hpp"

namespace bulkhead::cli::top {

namespace {

volatile std::sig_atomic_t stopped = 0;
void on_signal(int) { stopped = 1; }

constexpr short pair_bad = 1, pair_warn = 2, pair_dim = 3;
constexpr std::size_t longest_filter = 40;
constexpr int key_escape = 27, key_redraw = 12;  // Ctrl-L

class Terminal {
 public:
  Terminal() {
    // Sizes come from the terminal alone: LINES and COLUMNS of the environment are wrong after a resize.
    ::use_env(false);
    ::use_tioctl(true);
    screen_ = ::newterm(nullptr, stdout, stdin);
    if (screen_ == nullptr) return;
    ::set_escdelay(25);
    ::cbreak();
    ::noecho();
    ::nonl();
    ::keypad(::stdscr, true);
    ::nodelay(::stdscr, true);
    ::curs_set(0);
  }
  ~Terminal() {
    if (screen_ == nullptr) return;
    ::endwin();
    ::delscreen(screen_);
  }
  Terminal(const Terminal&) = delete;
  Terminal& operator=(const Terminal&) = delete;
  bool good() const { return screen_ != nullptr; }

  // Only what has a meaning has a colour, and only colours that can be read on black and on white.
  void colours() {
    if (!::has_colors() || ::start_color() != OK || ::use_default_colors() != OK) return;
    coloured_ = true;
    many_ = ::COLORS >= 256;
    ::init_pair(pair_bad, many_ ? 160 : COLOR_RED, -1);
    ::init_pair(pair_warn, many_ ? 166 : COLOR_MAGENTA, -1);
    if (many_) ::init_pair(pair_dim, 244, -1);
  }

  attr_t attribute(Tone tone) const {
    switch (tone) {
      case Tone::bad:
        return A_BOLD | (coloured_ ? static_cast<attr_t>(COLOR_PAIR(pair_bad)) : 0);
      case Tone::warn:
        return coloured_ ? static_cast<attr_t>(COLOR_PAIR(pair_warn)) : A_BOLD;
      case Tone::dim:
        return coloured_ && many_ ? static_cast<attr_t>(COLOR_PAIR(pair_dim)) : A_DIM;
      case Tone::bold:
        return A_BOLD;
      case Tone::plain:
      case Tone::good:
        break;
    }
    return A_NORMAL;
  }

  void show(const Page& page) const {
    ::werase(::stdscr);
    const int rows = ::getmaxy(::stdscr);
    for (std::size_t i = 0; i < page.lines.size() && static_cast<int>(i) < rows; ++i) {
      ::wmove(::stdscr, static_cast<int>(i), 0);
      for (const Span& span : page.lines[i].spans) {
        // On the bar of the chosen line a grey word would vanish.
        const bool chosen = page.lines[i].chosen;
        const attr_t tone = chosen && span.tone == Tone::dim ? A_NORMAL : attribute(span.tone);
        ::wattrset(::stdscr, static_cast<int>(tone | (chosen ? A_REVERSE : A_NORMAL)));
        ::waddnstr(::stdscr, span.text.data(), static_cast<int>(span.text.size()));
      }
    }
    ::wattrset(::stdscr, A_NORMAL);
    ::wrefresh(::stdscr);
  }

  // Asked for, not waited for: a signal may reach another thread, whose system call it then interrupts.
  void follow_size() const {
    winsize size{};
    if (::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_row == 0 || size.ws_col == 0) return;
    if (::is_term_resized(size.ws_row, size.ws_col)) ::resizeterm(size.ws_row, size.ws_col);
  }

  void too_small() const {
    ::werase(::stdscr);
    ::mvwaddnstr(::stdscr, 0, 0, "40x8 at least", std::max(0, ::getmaxx(::stdscr)));
    ::wrefresh(::stdscr);
  }

 private:
  SCREEN* screen_ = nullptr;
  bool coloured_ = false, many_ = false;
};

// Signals end the watching, not the process: the terminal is put back first.
class Signals {
 public:
  Signals() {
    struct sigaction action = {};
    action.sa_handler = on_signal;  // no SA_RESTART: poll() returns
    for (std::size_t i = 0; i < std::size(numbers); ++i) ::sigaction(numbers[i], &action, &before_[i]);
  }
  ~Signals() {
    for (std::size_t i = 0; i < std::size(numbers); ++i) ::sigaction(numbers[i], &before_[i], nullptr);
  }
  Signals(const Signals&) = delete;
  Signals& operator=(const Signals&) = delete;

 private:
  static constexpr int numbers[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT};
  struct sigaction before_[std::size(numbers)] = {};
};

void choose(Looking& looking, const Page& page, int step) {
  if (page.shown.empty()) return;
  std::size_t at = 0;
  for (std::size_t i = 0; i < page.shown.size(); ++i)
    if (page.shown[i] <= looking.chosen) at = i;
  if (step < 0) at -= std::min<std::size_t>(at, static_cast<std::size_t>(-step));
  if (step > 0) at = std::min(at + static_cast<std::size_t>(step), page.shown.size() - 1);
  looking.chosen = page.shown[at];
  looking.scroll = 0;
}

void scroll(Looking& looking, const Page& page, long lines) {
  const auto now = static_cast<long>(std::min(looking.scroll, page.most_scroll));
  looking.scroll = static_cast<std::size_t>(std::clamp(now + lines, 0L, static_cast<long>(page.most_scroll)));
}

void type(Looking& looking, int key) {
  if (key == '\r' || key == '\n' || key == KEY_ENTER) {
    looking.typing = false;
  } else if (key == key_escape) {
    looking.typing = false;
    looking.filter.clear();
  } else if (key == KEY_BACKSPACE || key == 127 || key == 8) {
    if (!looking.filter.empty()) looking.filter.pop_back();
  } else if (key >= 0x20 && key < 0x7f && looking.filter.size() < longest_filter) {
    looking.filter += static_cast<char>(key);
  }
  looking.scroll = 0;
}

void go(Looking& looking, Screen screen) {
  looking.screen = looking.screen == screen ? Screen::all : screen;
  looking.scroll = 0;
}

// False: quit.
bool press(Looking& looking, const Page& page, int key, bool& paused) {
  const long window = std::max(1L, static_cast<long>(looking.height) / 2);
  const bool inside = looking.screen != Screen::all;
  switch (key) {
    case 'q':
    case 'Q':
      return false;
    case KEY_UP:
    case 'k':
      inside ? scroll(looking, page, -1) : choose(looking, page, -1);
      break;
    case KEY_DOWN:
    case 'j':
      inside ? scroll(looking, page, 1) : choose(looking, page, 1);
      break;
    case KEY_LEFT:
      if (looking.screen == Screen::gpu) choose(looking, page, -1);
      break;
    case KEY_RIGHT:
      if (looking.screen == Screen::gpu) choose(looking, page, 1);
      break;
    case KEY_PPAGE:
      scroll(looking, page, -window);
      break;
    case KEY_NPAGE:
    case ' ':
      scroll(looking, page, window);
      break;
    case KEY_HOME:
      inside ? scroll(looking, page, -1'000'000) : choose(looking, page, -10'000);
      break;
    case KEY_END:
      inside ? scroll(looking, page, 1'000'000) : choose(looking, page, 10'000);
      break;
    case '\r':
    case '\n':
    case KEY_ENTER:
      go(looking, Screen::gpu);
      break;
    case key_escape:
    case KEY_BACKSPACE:
    case 127:
      if (inside) {
        go(looking, looking.screen);
      } else {
        looking.filter.clear();
      }
      break;
    case 't':
      looking.screen = Screen::all;
      looking.by_tenant = !looking.by_tenant;
      looking.scroll = 0;
      break;
    case 'a':
      go(looking, Screen::alarms);
      break;
    case 'h':
    case '?':
      go(looking, Screen::help);
      break;
    case '/':
      looking.screen = Screen::all;
      looking.typing = true;
      break;
    case 'p':
      paused = !paused;
      break;
    case key_redraw:
      ::clearok(::curscr, true);
      break;
    default:
      break;
  }
  return true;
}

}  // namespace

bool utf8_locale() {
  ::setlocale(LC_CTYPE, "");
  return std::strcmp(::nl_langinfo(CODESET), "UTF-8") == 0;
}

int watch(const Context& context, Look& look, std::uint64_t interval_ns) {
  const bool utf8 = utf8_locale();
  stopped = 0;
  const Signals signals;
  Terminal terminal;
  if (!terminal.good()) {
    const char* name = std::getenv("TERM");
    return fail(context, Error(Errc::unsupported,
                               fmt::format("top: this terminal ({}) is not in the host's terminfo",
                                           name != nullptr ? printable(name, 64) : "TERM is not set"),
                               "try: TERM=xterm bulkhead top, or bulkhead top --once"));
  }
  if (context.colour) terminal.colours();

  Looking looking;
  View view = look.view();
  bool paused = false;
  std::uint64_t paused_at = 0, next = 0;
  unsigned silent_reads = 0;
  while (stopped == 0) {
    const std::uint64_t now = monotonic_ns();
    // Until the first readings are there, one need not wait a whole interval for them.
    const bool starting = view.gpus.empty() || view.gpus[0].seen.state == sample::State::starting;
    if (!paused && (now >= next || starting)) {
      view = look.view();
      next = now + interval_ns;
    }
    looking.paused = paused ? age(paused_at, now) : "";
    looking.blocks = utf8;
    terminal.follow_size();
    const int rows = ::getmaxy(::stdscr), columns = ::getmaxx(::stdscr);
    Page page;
    if (rows < 8 || columns < 40) {
      terminal.too_small();
    } else {
      looking.width = static_cast<unsigned>(columns);
      looking.height = static_cast<unsigned>(rows);
      page = draw(view, looking);
      looking.scroll = std::min(looking.scroll, page.most_scroll);
      terminal.show(page);
    }

    const std::uint64_t wait = starting ? 100'000'000 : paused ? 1'000'000'000 : next - std::min(next, now);
    pollfd key{.fd = STDIN_FILENO, .events = POLLIN, .revents = 0};
    ::poll(&key, 1, static_cast<int>(std::min<std::uint64_t>(wait / 1'000'000 + 1, 250)));
    if ((key.revents & (POLLHUP | POLLERR | POLLNVAL)) != 0 && (key.revents & POLLIN) == 0) break;
    const bool was_paused = paused;
    // Readable, and nothing comes: the terminal is gone without a word.
    silent_reads = (key.revents & POLLIN) != 0 ? silent_reads + 1 : 0;
    if (silent_reads > 20) break;
    for (int c = ::wgetch(::stdscr); c != ERR; c = ::wgetch(::stdscr)) {
      silent_reads = 0;
      if (c == KEY_RESIZE) continue;
      if (looking.typing) {
        type(looking, c);
      } else if (!press(looking, page, c, paused)) {
        return exit_ok;
      }
      // What one key chose is what the next one goes on from.
      if (rows >= 8 && columns >= 40) page = draw(view, looking);
    }
    if (paused && !was_paused) paused_at = monotonic_ns();
    if (!paused && was_paused) next = 0;
  }
  return exit_ok;
}

}  // namespace bulkhead::cli::top
