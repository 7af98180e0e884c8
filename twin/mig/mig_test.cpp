#include "twin/mig/mig.hpp"

#include <gtest/gtest.h>

#include <memory>
#include <set>

namespace bulkhead::twin::mig {
namespace {

struct Row {
  const char* name;
  std::uint32_t nvml_enum, id, slices, max, memory, sm;
  std::vector<std::uint32_t> starts;
  std::uint32_t size;
};

// Read on an H100 SXM, driver 580.159.04; the A100 80GB shares starts, sizes and ids (its own transcript).
const std::vector<Row> eight_slices = {{"1g.10gb", 0, 19, 1, 7, 9984, 16, {0, 1, 2, 3, 4, 5, 6}, 1},
                                       {"1g.10gb+me", 7, 20, 1, 1, 9984, 16, {0, 1, 2, 3, 4, 5, 6}, 1},
                                       {"1g.20gb", 9, 15, 1, 4, 20096, 26, {0, 2, 4, 6}, 2},
                                       {"2g.20gb", 1, 14, 2, 3, 20096, 32, {0, 2, 4}, 2},
                                       {"3g.40gb", 2, 9, 3, 2, 40448, 60, {0, 4}, 4},
                                       {"4g.40gb", 3, 5, 4, 1, 40448, 64, {0}, 4},
                                       {"7g.80gb", 4, 0, 7, 1, 81152, 132, {0}, 8}};
// RTX PRO 6000 Blackwell: twelve units.
const std::vector<Row> twelve_slices = {{"1g.24gb", 0, 14, 1, 4, 24192, 46, {0, 3, 6, 9}, 3},
                                        {"2g.48gb", 1, 5, 2, 2, 48512, 94, {0, 6}, 6},
                                        {"4g.96gb", 3, 0, 4, 1, 97408, 188, {0}, 12}};

class Board : public ::testing::Test {
 protected:
  void cut(MigActivation how, PlacementPolicy policy, const std::vector<Row>& rows = eight_slices,
           std::uint32_t memory = 8, std::uint32_t compute = 7) {
    *state = State{};
    state->gpu_count = 1;
    Chip& chip = state->chips[0];
    chip.mig = how;
    chip.placement_policy = policy;
    chip.memory_slices = memory;
    chip.compute_slices = compute;
    for (const Row& row : rows) {
      MigProfile& p = chip.profiles[chip.profile_count++];
      p.name.set(row.name);
      p.nvml_enum = row.nvml_enum, p.id = row.id, p.slices = row.slices, p.max_instances = row.max,
      p.memory_mib = row.memory, p.sm = row.sm;
      for (const auto start : row.starts) p.starts[p.start_count++] = start;
      p.size = row.size;
    }
    state->gpus[0].uuid.set("GPU-00000000-0000-4000-8000-000000000001");
    state->gpus[0].mig_current = state->gpus[0].mig_pending = 1;
  }
  void ampere() { cut(MigActivation::needs_reset, PlacementPolicy::most_pairs_left); }
  void hopper() { cut(MigActivation::immediate, PlacementPolicy::most_ids_left); }

  // Ids in creation order; -1 where it no longer fits, and no further.
  std::vector<int> create_all(const std::vector<std::uint32_t>& profiles) {
    std::vector<int> ids;
    for (const auto profile : profiles) {
      GpuInstance* made = nullptr;
      const Code code = create(*state, 0, profile, std::nullopt, &made);
      ids.push_back(code == success ? static_cast<int>(made->id) : -1);
      if (code != success) {
        EXPECT_EQ(code, insufficient_resources);
        break;
      }
    }
    return ids;
  }
  GpuInstance* place(std::uint32_t profile, std::uint32_t start, std::uint32_t size,
                     Code expected = success) {
    GpuInstance* made = nullptr;
    EXPECT_EQ(create(*state, 0, profile, Place{start, size}, &made), expected);
    return made;
  }
  Process& process(std::uint32_t gi = none, std::uint32_t ci = none) {
    Process& p = state->processes[0];
    p = Process{};
    p.used = 1, p.pid = 4711, p.gpu = 0, p.gpu_instance = gi, p.compute_instance = ci;
    return p;
  }
  std::unique_ptr<State> state = std::make_unique<State>();
};
using Mig = Board;

TEST_F(Mig, a_bare_ampere_board_gives_the_ids_that_the_user_guide_prints) {
  const std::vector<std::pair<std::vector<std::uint32_t>, std::vector<int>>> sequences = {
      {{19, 19, 19, 19, 19, 19, 19}, {13, 11, 12, 7, 8, 9, 10}},
      {{14, 19, 19, 19, 19, 19}, {5, 13, 7, 8, 9, 10}},
      {{19, 19, 14, 9}, {13, 11, 3, -1}},
      {{9, 9}, {2, 1}},
      {{19, 14, 5}, {13, 5, 1}}};
  for (const auto& [profiles, ids] : sequences) {
    ampere();
    EXPECT_EQ(create_all(profiles), ids);
  }
}

TEST_F(Mig, a_hopper_board_gives_the_ids_seen_on_an_h100) {
  hopper();
  EXPECT_EQ(create_all({9, 15, 19}), (std::vector<int>{1, 5, 13}));
}

TEST_F(Mig, a_grid_of_twelve_slices_is_the_same_tree) {
  cut(MigActivation::immediate, PlacementPolicy::most_ids_left, twelve_slices, 12, 4);
  EXPECT_EQ(create_all({14, 14, 14, 14}), (std::vector<int>{3, 4, 5, 6}));
  cut(MigActivation::immediate, PlacementPolicy::most_ids_left, twelve_slices, 12, 4);
  EXPECT_EQ(create_all({5, 14, 14}), (std::vector<int>{1, 5, 6}));
}

TEST_F(Mig, every_hopper_placement_can_be_made_has_its_own_id_and_blocks_what_overlaps) {
  std::set<std::uint32_t> singles;
  for (const Row& row : eight_slices) {
    for (const auto start : row.starts) {
      hopper();
      const GpuInstance* made = place(row.id, start, row.size);
      ASSERT_NE(made, nullptr) << row.name << " at " << start;
      if (row.id == 19) singles.insert(made->id);
      EXPECT_EQ(made->id, row.size == 8   ? 0
                          : row.size == 4 ? 1 + start / 4
                          : row.size == 2 ? 3 + start / 2
                                          : 7 + start);
      for (const Row& other : eight_slices) {
        for (const auto at : other.starts) {
          const bool overlaps = at < start + row.size && start < at + other.size;
          hopper();
          ASSERT_NE(place(row.id, start, row.size), nullptr);
          GpuInstance* second = nullptr;
          const bool same_and_spent = other.id == row.id && other.max == 1;
          EXPECT_EQ(create(*state, 0, other.id, Place{at, other.size}, &second),
                    overlaps || same_and_spent ? insufficient_resources : success)
              << row.name << "@" << start << " then " << other.name << "@" << at;
        }
      }
    }
  }
  EXPECT_EQ(singles.size(), 7U);
}

TEST_F(Mig, a_place_that_the_profile_does_not_offer_is_an_invalid_argument) {
  hopper();
  place(9, 2, 4, invalid_argument);
  place(9, 0, 3, invalid_argument);
  place(77, 0, 1, invalid_argument);
  place(19, 7, 1, invalid_argument);
}

TEST_F(Mig, capacity_counts_down_to_what_fits) {
  hopper();
  EXPECT_EQ(capacity(*state, 0, *profile_by_id(*state, 0, 19)), 7U);
  place(9, 0, 4);
  EXPECT_EQ(capacity(*state, 0, *profile_by_id(*state, 0, 19)), 3U);
  EXPECT_EQ(capacity(*state, 0, *profile_by_id(*state, 0, 9)), 1U);
  EXPECT_EQ(capacity(*state, 0, *profile_by_id(*state, 0, 0)), 0U);
  EXPECT_EQ(capacity(*state, 0, *profile_by_id(*state, 0, 5)), 0U);
  place(9, 4, 4);
  EXPECT_EQ(capacity(*state, 0, *profile_by_id(*state, 0, 19)), 0U);
}

TEST_F(Mig, instances_need_mig_mode_and_a_chip_that_has_it) {
  hopper();
  state->gpus[0].mig_current = 0;
  place(19, 0, 1, not_supported);
  cut(MigActivation::unsupported, PlacementPolicy::most_ids_left);
  EXPECT_EQ(set_mode(*state, 0, true).code, not_supported);
}

TEST_F(Mig, hopper_changes_mode_at_once_and_ampere_in_a_guest_owes_a_reset) {
  hopper();
  auto answer = set_mode(*state, 0, false);
  EXPECT_EQ(answer.activation, success);
  EXPECT_EQ(state->gpus[0].mig_current, 0U);

  ampere();
  state->virtualization = 1;
  answer = set_mode(*state, 0, false);
  EXPECT_EQ(answer.code, success);
  EXPECT_EQ(answer.activation, reset_required);
  EXPECT_EQ(state->gpus[0].mig_current, 1U);
  EXPECT_EQ(state->gpus[0].mig_pending, 0U);
  reset(*state, 0);
  EXPECT_EQ(state->gpus[0].mig_current, 0U);

  ampere();  // bare metal, idle: the driver resets the board itself
  EXPECT_EQ(set_mode(*state, 0, false).activation, success);
  EXPECT_EQ(state->gpus[0].mig_current, 0U);
}

TEST_F(Mig, a_busy_board_keeps_its_mode_and_remembers_the_wish) {
  hopper();
  process();
  EXPECT_EQ(set_mode(*state, 0, false).activation, in_use);
  EXPECT_EQ(state->gpus[0].mig_current, 1U);
  EXPECT_EQ(state->gpus[0].mig_pending, 0U);
  state->processes[0].used = 0;
  place(19, 0, 1);
  EXPECT_EQ(set_mode(*state, 0, false).activation, in_use);
}

TEST_F(Mig, hopper_forgets_its_mode_with_the_driver_and_ampere_does_not) {
  hopper();
  place(19, 0, 1);
  forget(*state, 0);
  EXPECT_EQ(state->gpus[0].mig_current, 0U);
  EXPECT_EQ(find(*state, 0, 7), nullptr);
  ampere();
  place(19, 0, 1);
  forget(*state, 0);
  EXPECT_EQ(state->gpus[0].mig_current, 1U);
  EXPECT_EQ(find(*state, 0, 7), nullptr);
}

TEST_F(Mig, a_process_on_the_whole_board_stops_the_first_instance) {
  hopper();
  process();
  place(19, 0, 1, in_use);
}

TEST_F(Mig, compute_instances_go_first_and_busy_ones_do_not_go_at_all) {
  hopper();
  GpuInstance* gi = place(9, 0, 4);
  ComputeInstance* ci = nullptr;
  ASSERT_EQ(create_compute(*state, 0, *gi, 2, std::nullopt, &ci), success);
  EXPECT_EQ(destroy(*state, 0, gi->id), in_use);
  process(gi->id, ci->id);
  EXPECT_EQ(destroy_compute(*state, 0, *gi, ci->id), in_use);
  state->processes[0].used = 0;
  EXPECT_EQ(destroy_compute(*state, 0, *gi, ci->id), success);
  EXPECT_EQ(destroy(*state, 0, gi->id), success);
  EXPECT_EQ(destroy(*state, 0, 1), invalid_argument);
}

TEST_F(Mig, a_slice_made_again_at_its_old_place_has_its_old_name_but_a_new_birth) {
  hopper();
  std::string first;
  std::uint64_t born = 0;
  for (int round = 0; round < 2; ++round) {
    GpuInstance* gi = place(9, 4, 4);
    ComputeInstance* ci = nullptr;
    ASSERT_EQ(create_compute(*state, 0, *gi, 2, std::nullopt, &ci), success);
    if (round == 0) {
      first = ci->uuid.view();
      born = ci->born;
      EXPECT_EQ(first.size(), 40U);
      EXPECT_EQ(first[18], '5') << "version 5";
    } else {
      EXPECT_EQ(ci->uuid.view(), first);
      EXPECT_GT(ci->born, born);
    }
    destroy_compute(*state, 0, *gi, ci->id);
    destroy(*state, 0, gi->id);
  }
  EXPECT_NE(device_uuid("GPU-1", 1, 0), device_uuid("GPU-1", 2, 0));
  EXPECT_NE(device_uuid("GPU-1", 1, 0), device_uuid("GPU-1", 1, 1));
  EXPECT_NE(device_uuid("GPU-1", 1, 0), device_uuid("GPU-2", 1, 0));
}

TEST_F(Mig, compute_profiles_of_a_2g_are_those_listed_on_an_h100) {
  hopper();
  GpuInstance* gi = place(14, 0, 2);
  std::vector<std::tuple<std::uint32_t, std::uint32_t, std::uint32_t>> seen;
  for (std::uint32_t e = 0; e < 9; ++e) {
    if (const auto p = compute_profile(*state, 0, *gi, e)) seen.emplace_back(p->id, p->max_instances, p->sm);
  }
  EXPECT_EQ(seen, (std::vector<std::tuple<std::uint32_t, std::uint32_t, std::uint32_t>>{
                      {0, 2, 16}, {1, 1, 32}, {7, 1, 26}}));
}

TEST_F(Mig, compute_instances_fill_their_instance_and_no_more) {
  hopper();
  GpuInstance* gi = place(9, 0, 4);
  std::set<std::string> names;
  for (std::uint32_t i = 0; i < 3; ++i) {
    ComputeInstance* ci = nullptr;
    ASSERT_EQ(create_compute(*state, 0, *gi, 0, std::nullopt, &ci), success);
    EXPECT_EQ(ci->id, i);
    names.insert(std::string(ci->uuid.view()));
  }
  EXPECT_EQ(names.size(), 3U);
  ComputeInstance* ci = nullptr;
  EXPECT_EQ(create_compute(*state, 0, *gi, 0, std::nullopt, &ci), insufficient_resources);
  EXPECT_EQ(create_compute(*state, 0, *gi, 3, std::nullopt, &ci), not_supported);
  EXPECT_EQ(devices(*state, 0).size(), 3U);
  EXPECT_EQ(device_name(state->chips[0], *gi, gi->compute[0]), "1c.3g.40gb");
}

TEST_F(Mig, a_half_made_instance_is_no_device_and_takes_no_compute_instance_but_can_go) {
  hopper();
  GpuInstance* gi = place(9, 0, 4);
  gi->half_made = 1;
  ComputeInstance* ci = nullptr;
  EXPECT_EQ(create_compute(*state, 0, *gi, 2, std::nullopt, &ci), unknown_error);
  EXPECT_TRUE(devices(*state, 0).empty());
  EXPECT_EQ(destroy(*state, 0, gi->id), success);
}

TEST_F(Mig, cap_minors_are_those_of_the_drivers_table) {
  // /proc/driver/nvidia-caps/mig-minors: gpu0/gi0/access 3, gpu0/gi0/ci0/access 4, gpu0/gi1/access 12,
  // gpu1/gi0/access 138.
  EXPECT_EQ(cap_minor(0, 0), 3U);
  EXPECT_EQ(cap_minor(0, 0, 0), 4U);
  EXPECT_EQ(cap_minor(0, 1), 12U);
  EXPECT_EQ(cap_minor(0, 1, 0), 13U);
  EXPECT_EQ(cap_minor(1, 0), 138U);
}

}  // namespace
}  // namespace bulkhead::twin::mig
