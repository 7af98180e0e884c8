#include <gtest/gtest.h>

#include <string>

#include <fmt/format.h>

#include "core/replay/replay.hpp"

namespace bulkhead::replay {
namespace {

const std::string kNodes = "sn,cpu_milli,memory_mib,gpu,model\n";
const std::string kPods =
    "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,creation_time,deletion_time\n";

std::string wrong_nodes(std::string_view text) {
  const auto list = parse_nodes(text);
  return list.ok() ? "no mistake was found" : list.error().message();
}
std::string wrong_pods(std::string_view text) {
  const auto list = parse_pods(text);
  return list.ok() ? "no mistake was found" : list.error().message();
}
bool has(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

TEST(NodeLists, AreReadAsTheyStand) {
  const auto list = parse_nodes(kNodes + "a,64000,262144,2,P100\nb,32000,1024,0,\nc,96000,393216,8,P100\n");
  ASSERT_TRUE(list.ok()) << list.error().message();
  ASSERT_EQ(list->nodes.size(), 3U);
  EXPECT_EQ(list->nodes[0].name, "a");
  EXPECT_EQ(list->nodes[0].cpu_milli, 64000);
  EXPECT_EQ(list->nodes[0].memory_mib, 262144);
  EXPECT_EQ(list->nodes[0].gpus, 2U);
  EXPECT_EQ(list->models, (std::vector<std::string>{"", "P100"}));
  EXPECT_EQ(list->nodes[0].model, 1U);
  EXPECT_EQ(list->nodes[1].model, 0U);
  EXPECT_EQ(list->gpus(), 10U);
}

TEST(NodeLists, FindColumnsByNameAndIgnoreOthers) {
  const auto list = parse_nodes(
      "\xef\xbb\xbfrack,gpu, memory_mib ,note,cpu_milli,name\r\n"
      "7,4,\"8\",\"a, \"\"b\"\"\",  3000.0 ,\"n \"\"1\"\"\"\r\n\r\n");
  ASSERT_TRUE(list.ok()) << list.error().message();
  ASSERT_EQ(list->nodes.size(), 1U);
  EXPECT_EQ(list->nodes[0].name, "n \"1\"");
  EXPECT_EQ(list->nodes[0].cpu_milli, 3000);
  EXPECT_EQ(list->nodes[0].memory_mib, 8);
  EXPECT_EQ(list->nodes[0].gpus, 4U);
  EXPECT_EQ(list->nodes[0].model, 0U);
}

TEST(PodLists, MayLackSpecsAndTimes) {
  const auto list = parse_pods("name,cpu_milli,memory_mib,num_gpu,gpu_milli\np,1,2,1,460\nq,1,2,0,0\n");
  ASSERT_TRUE(list.ok()) << list.error().message();
  ASSERT_EQ(list->pods.size(), 2U);
  EXPECT_EQ(list->specs, std::vector<std::string>{""});
  EXPECT_EQ(list->pods[0].gpu_milli, 460U);
  EXPECT_FALSE(list->timed);
  EXPECT_FALSE(list->pods[0].deleted);
}

TEST(PodLists, TakeEmptySpecsForAnyModelAndEmptyDeletionsForEver) {
  const auto list = parse_pods(kPods +
                               "a,1,2,1,1000,V100M16|V100M32,5,9\nb,1,2,8,1000,|T4||,5,\nc,1,2,0,,T4,7,7\n"
                               "d,1,2,1,10,T4,0,1\n");
  ASSERT_TRUE(list.ok()) << list.error().message();
  EXPECT_TRUE(list->timed);
  EXPECT_EQ(list->specs, (std::vector<std::string>{"", "V100M16|V100M32", "T4"}));
  EXPECT_EQ(list->pods[0].spec, 1U);
  EXPECT_EQ(list->pods[0].deleted, 9);
  EXPECT_EQ(list->pods[1].spec, 2U);
  EXPECT_FALSE(list->pods[1].deleted);
  EXPECT_EQ(list->pods[2].spec, 0U) << "a pod without a GPU runs beside any model";
  EXPECT_EQ(list->pods[3].spec, 2U);
}

TEST(PodLists, KnowTheOrderOfNamesWhereItIsNotTheirOwn) {
  const std::string head = "name,cpu_milli,memory_mib,num_gpu,gpu_milli\n";
  EXPECT_TRUE(parse_pods(head + "a,1,1,1,1\na,1,1,1,1\nb,1,1,1,1\n")->by_name.empty());
  EXPECT_TRUE(parse_pods("cpu_milli,memory_mib,num_gpu,gpu_milli\n2,1,1,1\n1,1,1,1\n")->by_name.empty());
  EXPECT_EQ(parse_pods(head + "\"b\"\"1\",1,1,1,1\nc,1,1,1,1\n\"b\"\"0\",1,1,1,1\n")->by_name,
            (std::vector<std::uint32_t>{2, 0, 1}));
}

TEST(Lists, TellEveryMistakeWithItsLine) {
  const std::string text = wrong_nodes(kNodes +
                                       "a,64000,262144,2,P100\n"  // 2
                                       "b,x,262144,2,P100\n"
                                       "c,-1,262144,2,P100\n"
                                       "\n"
                                       "d,1.5,262144,2,P100\n"  // 6
                                       "e,,262144,17,P100\n"
                                       "f,1,2,3\n"
                                       "g,1,2,3,P100,5\n"
                                       "h,1000000001,99999999999999999999,3,P100\n"  // 10
                                       "\"i,1,2,3,P100\n"
                                       ",1,2,3,P100\n"
                                       "a,1,2,3,P100\n");
  EXPECT_EQ(text,
            "list of nodes: line 3: cpu_milli: \"x\" is not a whole number from 0\n"
            "line 4: cpu_milli: \"-1\" is not a whole number from 0\n"
            "line 6: cpu_milli: \"1.5\" is not a whole number from 0\n"
            "line 7: cpu_milli: empty; wanted a whole number\n"
            "line 7: gpu: 17 is above 16\n"
            "line 8: 4 fields; the heading has 5\n"
            "line 9: 6 fields; the heading has 5\n"
            "line 10: cpu_milli: 1000000001 is above 1000000000\n"
            "line 10: memory_mib: 99999999999999999999 is above 1000000000\n"
            "line 11: field 1: its quotes do not end, or something follows them\n"
            "line 12: sn: \"\" is no name for a node\n"
            "line 13: sn: a is on line 2 already");
}

TEST(Lists, TellOfPodsThatMakeNoSense) {
  const std::string text = wrong_pods(kPods +
                                      "a,1,1,2,500,,1,2\nb,1,1,1,0,,1,2\nc,1,1,1,1001,,1,2\nd,1,1,0,0,,9,"
                                      "2\ne,1,1,0,0,,,2\nf,1,1,1,10,a\x01,1,2\n");
  EXPECT_TRUE(has(text, "line 2: gpu_milli: 500 of each of 2 GPUs")) << text;
  EXPECT_TRUE(has(text, "line 3: gpu_milli: 0 of a GPU")) << text;
  EXPECT_TRUE(has(text, "line 4: gpu_milli: 1001 is above 1000")) << text;
  EXPECT_TRUE(has(text, "line 5: deletion_time: 2 is before the creation, 9")) << text;
  EXPECT_TRUE(has(text, "line 6: creation_time: empty")) << text;
  EXPECT_TRUE(has(text, "line 7: gpu_spec: \"a\\x01\"")) << text;
}

TEST(Lists, TellOfHeadingsThatAreNone) {
  EXPECT_EQ(wrong_nodes(""), "list of nodes: empty; wanted a heading and rows");
  EXPECT_EQ(wrong_nodes("\n \r\n\n"), "list of nodes: empty; wanted a heading and rows");
  EXPECT_EQ(wrong_nodes(kNodes), "list of nodes: no nodes below the heading");
  EXPECT_EQ(wrong_pods("a,b\n1,2\n"),
            "list of pods: line 1: the heading lacks cpu_milli\nline 1: the heading lacks memory_mib\n"
            "line 1: the heading lacks num_gpu\nline 1: the heading lacks gpu_milli");
  EXPECT_EQ(wrong_nodes("sn,gpu,gpu\n"), "list of nodes: line 1: the heading has gpu twice");
  EXPECT_EQ(wrong_nodes("\"sn,gpu\n"), "list of nodes: line 1: quotes of the heading do not end");
}

TEST(Lists, CountTheMistakesBeyondTheFirstTwenty) {
  std::string text = kNodes;
  for (int i = 0; i < 30; ++i) text += "a\n";
  const std::string told = wrong_nodes(text);
  EXPECT_TRUE(has(told, "line 21: 1 fields")) << told;
  EXPECT_FALSE(has(told, "line 22:")) << told;
  EXPECT_TRUE(has(told, "\nand 10 more")) << told;
}

TEST(Lists, AreBounded) {
  std::string models = kNodes;
  for (std::size_t i = 1; i <= kMostModels; ++i) models += fmt::format("n{},1,1,1,m{}\n", i, i);
  EXPECT_TRUE(has(wrong_nodes(models),
                  fmt::format("line {}: model: \"m{}\" is one too many", kMostModels + 1, kMostModels)));
  EXPECT_TRUE(has(wrong_nodes(kNodes + std::string(300, 'n') + ",1,1,1,m\n"), "is no name for a node"));
  EXPECT_TRUE(has(wrong_nodes(kNodes + "n,1,1,1," + std::string(300, 'm') + "\n"), "too long"));

  std::string specs = kPods;
  for (std::size_t i = 1; i <= kMostSpecs; ++i) specs += fmt::format("p,1,1,1,1,m{},1,1\n", i);
  EXPECT_TRUE(has(wrong_pods(specs), "is one too many"));

  std::string wide = kNodes;
  wide.pop_back();
  for (int i = 0; i < 100'000; ++i) wide += ",c";
  EXPECT_TRUE(has(wrong_nodes(wide + "\n" + std::string(100'000, ',') + "\n"),
                  "100001 fields; the heading has 100005"));
}

TEST(Lists, OfManyRowsAreRead) {
  std::string text = kPods;
  for (int i = 0; i < 20'000; ++i)
    text += fmt::format("p{},{},4096,1,{},T4,{},{}\n", i, 1000 + i % 7, 1 + i % 1000, i, i + 1);
  const auto list = parse_pods(text);
  ASSERT_TRUE(list.ok()) << list.error().message();
  EXPECT_EQ(list->pods.size(), 20'000U);
  EXPECT_EQ(list->pods[19'999].created, 19'999);
  EXPECT_EQ(list->by_name.size(), 20'000U) << "p10 comes before p2";
}

TEST(Fleets, AreEnlargedByRepeatingTheList) {
  const auto list = parse_nodes(kNodes + "a,1,1,2,T4\nb,1,1,0,\nc,1,1,3,T4\n");
  const auto five = enlarge(*list, 5);
  ASSERT_TRUE(five.ok());
  std::string names;
  for (const Node& node : five->nodes) names += node.name + ' ';
  EXPECT_EQ(names, "a b c a~1 b~1 ");
  EXPECT_EQ(five->models, list->models);
  EXPECT_EQ(enlarge(*list, 1)->nodes.size(), 1U);
  EXPECT_FALSE(enlarge(*list, kMostNodes + 1).ok());
  EXPECT_FALSE(enlarge(NodeList{}, 1).ok());

  EXPECT_EQ(*nodes_for_gpus(*list, 0), 0U);
  EXPECT_EQ(*nodes_for_gpus(*list, 2), 1U);
  EXPECT_EQ(*nodes_for_gpus(*list, 3), 3U);
  EXPECT_EQ(*nodes_for_gpus(*list, 5), 3U);
  EXPECT_EQ(*nodes_for_gpus(*list, 6), 4U);
  for (std::uint64_t gpus = 0; gpus < 40; ++gpus) {
    const std::size_t nodes = *nodes_for_gpus(*list, gpus);
    EXPECT_GE(enlarge(*list, nodes)->gpus(), gpus);
    EXPECT_TRUE(nodes == 0 || enlarge(*list, nodes - 1)->gpus() < gpus);
  }
  EXPECT_FALSE(nodes_for_gpus(*list, UINT64_MAX).ok());
  EXPECT_FALSE(nodes_for_gpus(*parse_nodes(kNodes + "b,1,1,0,\n"), 1).ok());
}

TEST(Policies, AreNamedAsPublished) {
  for (const Policy policy : kPolicies) EXPECT_EQ(policy_named(name_of(policy)), policy);
  EXPECT_EQ(policy_named("fgd"), Policy::fgd);
  EXPECT_EQ(policy_named("best-fit"), Policy::best_fit);
  EXPECT_EQ(policy_named("GPU_packing"), Policy::gpu_packing);
  EXPECT_EQ(policy_named("ours"), Policy::ours);
  EXPECT_EQ(policy_named("bulkhead"), Policy::ours);
  EXPECT_EQ(policy_named("lkhead"), std::nullopt);
  EXPECT_EQ(policy_named(""), std::nullopt);
}

}  // namespace
}  // namespace bulkhead::replay
