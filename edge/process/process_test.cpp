#include "edge/process/process.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>

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

}  // namespace
}  // namespace bulkhead::process
