#include "edge/process/process.hpp"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <new>

#include "base/clock.hpp"

namespace bulkhead::process {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

// A child that waits to be ended; `stubborn` ignores SIGTERM.
class Child {
 public:
  explicit Child(bool stubborn = false) {
    int ready[2];
    EXPECT_EQ(::pipe(ready), 0);
    pid_ = ::fork();
    if (pid_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      ::prctl(PR_SET_NAME, "a (odd) name");
      if (stubborn) ::signal(SIGTERM, SIG_IGN);
      (void)!::write(ready[1], "x", 1);
      while (true) ::pause();
    }
    char byte = 0;
    (void)!::read(ready[0], &byte, 1);
    ::close(ready[0]);
    ::close(ready[1]);
  }
  ~Child() {
    if (pid_ > 0) ::kill(pid_, SIGKILL);
    reap();
  }
  int reap() {
    int status = 0;
    if (pid_ > 0) ::waitpid(pid_, &status, 0);
    pid_ = -1;
    return status;
  }
  int pid() const { return pid_; }

 private:
  pid_t pid_ = -1;
};

inventory::Holder holder_of(const Identity& identity) {
  return {.pid = identity.pid, .start_time = identity.start_time, .name = identity.name};
}

TEST(ProcessTest, ReadsWhoAProcessIsEvenWhenItsNameHasParentheses) {
  const Child child;
  const auto identity = look("/", child.pid());
  ASSERT_TRUE(identity.ok());
  EXPECT_EQ(identity->pid, child.pid());
  EXPECT_EQ(identity->name, "a (odd) name");
  EXPECT_GT(identity->start_time, 0U);
}

TEST(ProcessTest, NobodyIsNotFound) {
  EXPECT_EQ(look("/", 0x3fffffff).error().code(), Errc::not_found);
  EXPECT_EQ(look("/", -3).error().code(), Errc::invalid);
}

TEST(ProcessTest, EndsAProcessByTerm) {
  Child child;
  const auto identity = look("/", child.pid());
  ASSERT_TRUE(identity.ok());
  ASSERT_TRUE(terminate("/", holder_of(*identity), 5000).ok());
  const int status = child.reap();
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(WTERMSIG(status), SIGTERM);
}

TEST(ProcessTest, KillsAProcessThatIgnoresTerm) {
  Child child(true);
  const auto identity = look("/", child.pid());
  ASSERT_TRUE(identity.ok());
  ASSERT_TRUE(terminate("/", holder_of(*identity), 50).ok());
  EXPECT_EQ(WTERMSIG(child.reap()), SIGKILL);
}

TEST(ProcessTest, NeverEndsAnotherProcessThatGotTheNumber) {
  const Child child;
  const auto identity = look("/", child.pid());
  ASSERT_TRUE(identity.ok());
  inventory::Holder earlier = holder_of(*identity);
  earlier.start_time -= 1;
  const auto refused = terminate("/", earlier, 50);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code(), Errc::conflict);
  EXPECT_EQ(::kill(child.pid(), 0), 0);
  earlier.start_time = 0;
  EXPECT_EQ(terminate("/", earlier, 50).error().code(), Errc::conflict);
  EXPECT_EQ(::kill(child.pid(), 0), 0);
  // Below another root it is no process of this machine at all.
  earlier.start_time = 12345;
  EXPECT_EQ(terminate("/nowhere", earlier, 50).error().code(), Errc::unsupported);
  EXPECT_EQ(::kill(child.pid(), 0), 0);
}

TEST(ProcessTest, AProcessThatIsGoneIsSuccessAndInitIsRefused) {
  Child child;
  const auto identity = look("/", child.pid());
  ASSERT_TRUE(identity.ok());
  ::kill(child.pid(), SIGKILL);
  child.reap();
  EXPECT_TRUE(terminate("/", holder_of(*identity), 50).ok());
  EXPECT_EQ(terminate("/", {.pid = 1, .start_time = 1}, 50).error().code(), Errc::invalid);
}

TEST(ProcessTest, ReadsTheCgroupBelowARootAndRefusesAMangledStat) {
  std::string pattern = (fs::temp_directory_path() / "bulkhead-process-XXXXXX").string();
  const fs::path root = ::mkdtemp(pattern.data());
  fs::create_directories(root / "proc/4711");
  std::ofstream(root / "proc/4711/stat")
      << "4711 (py\x1b[31m) S 1 1 1 0 -1 4194560 1 0 0 0 1 1 0 0 20 0 1 0 987654 1 1 1\n";
  std::ofstream(root / "proc/4711/cgroup") << "4:devices:/x\n0::/kubepods.slice/pod7\n";
  const auto identity = look(root, 4711);
  ASSERT_TRUE(identity.ok());
  EXPECT_EQ(identity->start_time, 987654U);
  EXPECT_EQ(identity->cgroup, "/kubepods.slice/pod7");
  EXPECT_EQ(identity->name, "py\\x1b[31m");
  for (const char* mangled : {"", "4711", "4711 (py", "4711 (py) S 1 2", ") (",
                              "1 (a) S 1 1 1 0 -1 4 1 0 0 0 1 1 0 0 20 0 1 0 x 1"}) {
    std::ofstream(root / "proc/4711/stat") << mangled;
    const auto refused = look(root, 4711);
    ASSERT_FALSE(refused.ok()) << mangled;
    EXPECT_EQ(refused.error().code(), Errc::corrupt);
  }
  fs::remove_all(root);
}

TEST(ProcessTest, OfManyAtOnceOnlyThoseMeantAreEnded) {
  Child polite, stubborn(true), reused;
  std::vector<inventory::Holder> all;
  for (const Child* child : {&polite, &stubborn, &reused})
    all.push_back(holder_of(look("/", child->pid()).value()));
  all[2].start_time -= 1;  // somebody who had this number before
  const auto answers = terminate_all("/", all, 200);
  ASSERT_EQ(answers.size(), 3U);
  EXPECT_TRUE(answers[0].ok());
  EXPECT_TRUE(answers[1].ok());
  ASSERT_FALSE(answers[2].ok());
  EXPECT_EQ(answers[2].error().code(), Errc::conflict);
  EXPECT_EQ(WTERMSIG(polite.reap()), SIGTERM);
  EXPECT_EQ(WTERMSIG(stubborn.reap()), SIGKILL);
  EXPECT_EQ(::kill(reused.pid(), 0), 0);
}

// ---- who has a file open
class Hopping {  // hands a descriptor on to child after child, each of which lives for a moment
 public:
  explicit Hopping(const fs::path& file) {
    void* page = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    over_ = new (page) std::atomic<int>(0);
    first_ = ::fork();
    if (first_ != 0) return;
    const int fd = ::open(file.c_str(), O_RDONLY);
    const std::uint64_t until = monotonic_ns() + 20'000'000'000;
    while (fd >= 0 && over_->load() != 1 && monotonic_ns() < until) {
      const pid_t child = ::fork();
      if (child > 0) ::_exit(0);
      if (child == 0) ::setpgid(0, 0);
    }
    *over_ = 2;
    ::_exit(0);
  }
  ~Hopping() {
    *over_ = 1;
    ::waitpid(first_, nullptr, 0);
    for (int i = 0; i < 2000 && *over_ != 2; ++i) ::usleep(1000);
  }
  Hopping(const Hopping&) = delete;
  Hopping& operator=(const Hopping&) = delete;

 private:
  std::atomic<int>* over_ = nullptr;
  pid_t first_ = -1;
};

class OpenersTest : public testing::Test {
 protected:
  void SetUp() override {
    if (::geteuid() != 0) GTEST_SKIP() << "needs root: it looks into processes of others";
    std::ofstream(file_) << "x";
  }
  void TearDown() override { fs::remove(file_); }
  const fs::path file_ = fs::temp_directory_path() / ("bulkhead-openers." + std::to_string(::getpid()));
  const std::vector<fs::path> files_ = {file_.string() + ".none", file_};
};

TEST_F(OpenersTest, WhoHasItOpenIsNamedWithWhichOfTheFilesAndNobodyElse) {
  const Child other;
  const pid_t holder = ::fork();
  if (holder == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::open(file_.c_str(), O_RDONLY) < 0) ::_exit(1);
    while (true) ::pause();
  }
  std::vector<Opener> who;
  for (int i = 0; i < 1000 && who.empty(); ++i) {
    auto found = openers(files_);
    ASSERT_TRUE(found.ok()) << found.error().message();
    who = found->who;
  }
  ASSERT_EQ(who.size(), 1U);
  EXPECT_EQ(who[0].who.pid, holder);
  EXPECT_EQ(who[0].who.start_time, look("/", holder).value().start_time);
  EXPECT_EQ(who[0].files, std::vector<std::size_t>{1});
  EXPECT_TRUE(who[0].same_program);
  ::kill(holder, SIGKILL);
  ::waitpid(holder, nullptr, 0);
  EXPECT_TRUE(openers(files_)->who.empty());
}

TEST_F(OpenersTest, WhoHandsItOnFasterThanAnybodyLooksIsSeenOrTheAnswerSaysThatItMayBeMissing) {
  const Hopping chain(file_);
  ::usleep(20'000);
  for (int i = 0; i < 10; ++i) {
    const auto found = openers(files_);
    ASSERT_TRUE(found.ok()) << found.error().message();
    EXPECT_TRUE(!found->who.empty() || !found->all) << "look " << i;
  }
}

TEST_F(OpenersTest, OfFilesThatAreNotThereNobodyIsTheWholeAnswer) {
  const std::vector<fs::path> none = {file_.string() + ".none"};
  const auto found = openers(none);
  ASSERT_TRUE(found.ok());
  EXPECT_TRUE(found->who.empty());
  EXPECT_TRUE(found->all);
}

}  // namespace
}  // namespace bulkhead::process
