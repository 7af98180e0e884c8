#include "twin/state/state.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <thread>

#include "base/fd.hpp"

namespace bulkhead::twin {
namespace {

namespace fs = std::filesystem;

class TwinState : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "bulkhead-state-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
    path_ = directory_ / "state.bin";
    ASSERT_TRUE(StateFile::create(path_, *fresh()).ok());
  }
  void TearDown() override { fs::remove_all(directory_); }

  static std::unique_ptr<State> fresh() {
    auto state = std::make_unique<State>();
    std::memset(static_cast<void*>(state.get()), 0, sizeof(State));
    state->version = state_version;
    state->gpu_count = 1;
    state->chip_count = 1;
    return state;
  }
  std::uint64_t seed() const {
    std::uint64_t value = 0;
    auto file = StateFile::open(path_);
    EXPECT_TRUE(file.ok()) << (file.ok() ? "" : file.error().message());
    if (file.ok()) (*file)->read([&](const State& s) { value = s.seed; });
    return value;
  }
  // Runs `body` in a child process; the child never returns.
  template <class Body>
  static pid_t in_child(Body body) {
    const pid_t pid = ::fork();
    if (pid == 0) {
      body();
      ::_exit(0);
    }
    return pid;
  }

  fs::path directory_, path_;
};

TEST_F(TwinState, WhatOneProcessWritesAnotherReads) {
  const pid_t child = in_child([&] {
    auto file = StateFile::open(path_);
    (*file)->write([](State& s) {
      s.seed = 42;
      return true;
    });
  });
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(seed(), 42U);
}

TEST_F(TwinState, AChangeThatRefusesItselfLeavesNoTrace) {
  auto file = StateFile::open(path_);
  ASSERT_TRUE(file.ok());
  EXPECT_FALSE((*file)->write([](State& s) {
    s.seed = 7;
    s.gpus[0].watts = 9;
    return false;
  }));
  EXPECT_EQ(seed(), 0U);
}

TEST_F(TwinState, AChangeThatThrowsLeavesNoTraceAndNoLock) {
  auto file = StateFile::open(path_);
  ASSERT_TRUE(file.ok());
  EXPECT_THROW((*file)->write([](State& s) -> bool {
    s.seed = 7;
    throw std::runtime_error("no");
  }),
               std::runtime_error);
  EXPECT_EQ(seed(), 0U);
  EXPECT_TRUE((*file)->write([](State& s) {
    s.seed = 8;
    return true;
  }));
  EXPECT_EQ(seed(), 8U);
}

TEST_F(TwinState, NoIncrementOfManyConcurrentProcessesIsLost) {
  constexpr int processes = 8, rounds = 40;
  std::vector<pid_t> children;
  for (int p = 0; p < processes; ++p) {
    children.push_back(in_child([&] {
      for (int i = 0; i < rounds; ++i) {
        auto file = StateFile::open(path_);  // as each nvidia-smi call does
        if (!file.ok()) ::_exit(1);
        (*file)->write([](State& s) {
          ++s.seed;
          ++s.gpus[max_gpus - 1].generation;
          return true;
        });
        (*file)->read([](const State& s) {
          if (s.seed != s.gpus[max_gpus - 1].generation) ::_exit(2);  // half of a change is visible
        });
      }
    }));
  }
  for (const pid_t child : children) {
    int status = 0;
    ::waitpid(child, &status, 0);
    EXPECT_EQ(status, 0);
  }
  EXPECT_EQ(seed(), static_cast<std::uint64_t>(processes * rounds));
}

TEST_F(TwinState, ThreadsOfOneProcessShareOneOpenFileWithoutLosingAnything) {
  auto file = StateFile::open(path_);
  ASSERT_TRUE(file.ok());
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 50; ++i) {
        (*file)->write([](State& s) {
          ++s.seed;
          return true;
        });
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(seed(), 200U);
}

TEST_F(TwinState, AForkedChildThatInheritedTheFileTakesALockOfItsOwn) {
  auto file = StateFile::open(path_);
  ASSERT_TRUE(file.ok());
  std::vector<pid_t> children;
  for (int p = 0; p < 4; ++p) {
    children.push_back(in_child([&] {
      for (int i = 0; i < 50; ++i) {
        (*file)->write([](State& s) {
          ++s.seed;
          return true;
        });
      }
    }));
  }
  for (const pid_t child : children) ::waitpid(child, nullptr, 0);
  EXPECT_EQ(seed(), 200U);
}

TEST_F(TwinState, AProcessKilledInTheMiddleOfAWriteLeavesTheOldState) {
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t child = in_child([&] {
    auto file = StateFile::open(path_);
    (*file)->write([&](State& s) {
      std::memset(static_cast<void*>(s.gpus), 0xee, sizeof s.gpus);  // half a change
      s.gpu_count = 9999;
      if (::write(ready[1], "x", 1) != 1) ::_exit(1);
      ::pause();
      return true;
    });
  });
  char byte = 0;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  ::close(ready[0]);
  ::close(ready[1]);
  auto file = StateFile::open(path_);
  ASSERT_TRUE(file.ok()) << file.error().message();
  (*file)->read([](const State& s) {
    EXPECT_EQ(s.gpu_count, 1U);
    EXPECT_EQ(s.gpus[0].generation, 0U);
  });
  EXPECT_TRUE((*file)->write([](State& s) {
    s.seed = 5;
    return true;
  }));
  EXPECT_EQ(seed(), 5U);
}

TEST_F(TwinState, KillingWritersAtAnyMomentNeverTearsAStateOrKeepsALock) {
  std::mt19937 random(1);
  std::uint64_t before = 0;
  for (int round = 0; round < 40; ++round) {
    const pid_t child = in_child([&] {
      auto file = StateFile::open(path_);
      if (!file.ok()) ::_exit(1);
      for (;;) {
        (*file)->write([](State& s) {
          ++s.seed;
          for (auto& gpu : s.gpus) gpu.generation = s.seed;  // spread over the whole copy
          for (auto& process : s.processes) process.memory_bytes = s.seed;
          return true;
        });
      }
    });
    ::usleep(std::uniform_int_distribution<unsigned>(500, 12000)(random));
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    auto file = StateFile::open(path_);
    ASSERT_TRUE(file.ok()) << file.error().message();
    (*file)->read([&](const State& s) {
      EXPECT_GE(s.seed, before);
      before = s.seed;
      for (const auto& gpu : s.gpus) ASSERT_EQ(gpu.generation, s.seed);
      for (const auto& process : s.processes) ASSERT_EQ(process.memory_bytes, s.seed);
    });
  }
  EXPECT_GT(before, 0U) << "the writers never got to write";
}

TEST_F(TwinState, AFileThatIsNotThereSaysHowToStartATwin) {
  const auto file = StateFile::open(directory_ / "nothing.bin");
  ASSERT_FALSE(file.ok());
  EXPECT_EQ(file.error().code(), Errc::not_found);
  EXPECT_NE(file.error().hint().find("twin up"), std::string::npos);
}

TEST_F(TwinState, AFileCutShortAnywhereIsRefusedWithItsLength) {
  const auto whole = fs::file_size(path_);
  for (const std::uintmax_t size :
       {std::uintmax_t{0}, std::uintmax_t{1}, std::uintmax_t{7}, std::uintmax_t{8}, std::uintmax_t{39},
        std::uintmax_t{40}, std::uintmax_t{4095}, std::uintmax_t{4096}, whole / 2, whole - 4096, whole - 1}) {
    fs::copy_file(path_, directory_ / "cut.bin", fs::copy_options::overwrite_existing);
    fs::resize_file(directory_ / "cut.bin", size);
    const auto file = StateFile::open(directory_ / "cut.bin");
    ASSERT_FALSE(file.ok()) << size;
    EXPECT_EQ(file.error().code(), Errc::corrupt) << size;
    EXPECT_NE(file.error().message().find("cut.bin"), std::string::npos);
    EXPECT_NE(file.error().hint().find("twin up"), std::string::npos);
  }
}

TEST_F(TwinState, AFlippedBitAnywhereInTheCurrentCopyIsNoticed) {
  std::mt19937_64 random(2);
  const int copies_begin = 4096;
  for (int i = 0; i < 60; ++i) {
    fs::copy_file(path_, directory_ / "bad.bin", fs::copy_options::overwrite_existing);
    const auto at = static_cast<off_t>(copies_begin + random() % sizeof(State));
    const UniqueFd fd(::open((directory_ / "bad.bin").c_str(), O_RDWR | O_CLOEXEC));
    unsigned char byte = 0;
    ASSERT_EQ(::pread(fd.get(), &byte, 1, at), 1);
    byte ^= static_cast<unsigned char>(1U << (random() % 8));
    ASSERT_EQ(::pwrite(fd.get(), &byte, 1, at), 1);
    const auto file = StateFile::open(directory_ / "bad.bin");
    ASSERT_FALSE(file.ok()) << "a flip at " << at << " went unseen";
    EXPECT_EQ(file.error().code(), Errc::corrupt);
  }
}

TEST_F(TwinState, AStrangersFileAndADirectoryAreRefused) {
  std::ofstream(directory_ / "text.bin") << std::string(100000, 'x');
  auto file = StateFile::open(directory_ / "text.bin");
  ASSERT_FALSE(file.ok());
  EXPECT_NE(file.error().message().find("not a twin's state file"), std::string::npos);
  EXPECT_FALSE(StateFile::open(directory_).ok());
}

TEST_F(TwinState, AFileOfAnotherBuildIsRefusedAndNotMisread) {
  const UniqueFd fd(::open(path_.c_str(), O_RDWR | O_CLOEXEC));
  const std::uint64_t other = sizeof(State) + 8;
  ASSERT_EQ(::pwrite(fd.get(), &other, sizeof other, 16), 8);
  const auto file = StateFile::open(path_);
  ASSERT_FALSE(file.ok());
  EXPECT_NE(file.error().message().find("another build"), std::string::npos);
}

TEST(TwinText, ATextIsCutAtItsRoomAndAlwaysEnds) {
  Text<8> text;
  text.set("123456789");
  EXPECT_EQ(text.view(), "1234567");
  text.set("ab");
  EXPECT_EQ(text.view(), "ab");
}

}  // namespace
}  // namespace bulkhead::twin
