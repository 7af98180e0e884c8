#include "core/models/models.hpp"

#include <set>

#include <gtest/gtest.h>

#include "core/mig/mig.hpp"

namespace bulkhead::models {
namespace {

TEST(Models, EveryNameAndAliasFindsItsOwnModelAndNoOther) {
  std::set<std::string_view> seen;
  for (const auto& model : all()) {
    EXPECT_EQ(find(model.name), &model);
    EXPECT_TRUE(seen.insert(model.name).second);
    EXPECT_FALSE(model.source.empty());
    for (const auto alias : model.aliases) {
      EXPECT_EQ(find(alias), &model) << alias;
      EXPECT_TRUE(seen.insert(alias).second) << alias;
    }
  }
  EXPECT_EQ(find("H100"), find("h100-80gb"));
  EXPECT_EQ(find("gtx-1080"), nullptr);
}

TEST(Models, EveryGeometryAgreesWithItself) {
  for (const auto& model : all()) {
    const auto geometry = models::geometry(model);
    ASSERT_FALSE(geometry.profiles.empty()) << model.name;
    std::set<unsigned> ids;
    for (const auto& profile : geometry.profiles) {
      SCOPED_TRACE(std::string(model.name) + " " + profile.name);
      EXPECT_TRUE(ids.insert(profile.id).second);
      ASSERT_FALSE(profile.starts.empty());
      EXPECT_LE(profile.starts.back() + profile.size, geometry.memory_slices);
      EXPECT_GT(profile.memory.count, 0U);
      EXPECT_EQ(geometry.by_name(profile.name), &profile);
      // What the driver says fits of this profile alone is what packing finds.
      EXPECT_EQ(mig::capacity(geometry, {}, profile.id), profile.max_instances);
    }
  }
}

}  // namespace
}  // namespace bulkhead::models
