#include "api/v1/v1.hpp"

#include <set>

#include <gtest/gtest.h>

namespace bulkhead::api::v1 {
namespace {

TEST(Api, every_route_is_found_by_its_own_method_and_path) {
  for (const Route& route : routes()) {
    std::string path(route.path);
    for (const auto name : {"{lease}", "{tenant}", "{token}", "{gpu}", "{rest}"})
      if (const auto at = path.find(name); at != std::string::npos)
        path.replace(at, std::string_view(name).size(), "17");
    EXPECT_EQ(path.find('{'), std::string::npos) << path;
    const Match found = match(route.method, path);
    ASSERT_NE(found.route, nullptr) << route.method << ' ' << path;
    EXPECT_EQ(found.route->operation, route.operation);
  }
}

TEST(Api, a_path_with_another_method_says_which_it_has) {
  const Match found = match("PATCH", "/leases/7");
  EXPECT_EQ(found.route, nullptr);
  EXPECT_EQ(found.other_methods, (std::vector<std::string>{"GET", "DELETE"}));
  EXPECT_TRUE(match("GET", "/nothing").other_methods.empty());
}

TEST(Api, a_fixed_word_stands_before_a_name) {
  EXPECT_EQ(match("GET", "/audit/verdict").route->operation, "verifyAudit");
  EXPECT_EQ(match("GET", "/leases/7").values.at("lease"), "7");
  EXPECT_EQ(match("GET", "/leases/7/").values.at("lease"), "7");
}

TEST(Api, operations_and_routes_are_named_once) {
  std::set<std::string_view> names;
  std::set<std::pair<std::string_view, std::string_view>> paths;
  for (const Route& route : routes()) {
    EXPECT_TRUE(names.insert(route.operation).second) << route.operation;
    EXPECT_TRUE(paths.insert({route.method, route.path}).second) << route.path;
  }
}

void references(const Json& json, std::set<std::string>& out) {
  if (json.is_object())
    for (const auto& [key, value] : json.items()) {
      if (key == "$ref") out.insert(value.get<std::string>());
      references(value, out);
    }
  if (json.is_array())
    for (const auto& value : json) references(value, out);
}

TEST(Api, the_openapi_document_has_every_route_and_every_schema_it_names) {
  const Json document = openapi();
  EXPECT_EQ(document["openapi"], "3.1.0");
  for (const Route& route : routes()) {
    std::string method(route.method);
    for (char& c : method) c = static_cast<char>(std::tolower(c));
    ASSERT_TRUE(document["paths"].contains(std::string(route.path))) << route.path;
    const Json& operation = document["paths"][std::string(route.path)][method];
    EXPECT_EQ(operation["operationId"], route.operation);
    EXPECT_TRUE(operation["responses"].contains(std::to_string(route.success)));
  }
  std::set<std::string> named;
  references(document, named);
  for (const auto& one : named) {
    constexpr std::string_view before = "#/components/schemas/";
    ASSERT_EQ(one.rfind(before, 0), 0U);
    EXPECT_FALSE(schema(one.substr(before.size())).is_null()) << one;
  }
}

TEST(Api, what_a_client_sends_may_have_no_unknown_keys_and_what_it_gets_may) {
  for (const Route& route : routes()) {
    EXPECT_TRUE(route.request.empty() || schema(route.request).at("additionalProperties") == false)
        << route.request;
    EXPECT_TRUE(route.response.empty() || route.response == "Quota" ||
                !schema(route.response).contains("additionalProperties"))
        << route.response;
  }
}

TEST(Api, a_problem_comes_back_and_a_newer_one_is_read_too) {
  const Problem problem{.status = 409,
                        .code = "quota",
                        .detail = "holds 3 of 3 leases",
                        .reasons = {"a"},
                        .ways = {"b", "c"},
                        .hint = "d"};
  Json json = to_json(problem);
  json["colour"] = "new";
  const auto again = parse_problem(json);
  ASSERT_TRUE(again.ok()) << again.error().message();
  EXPECT_EQ(again->code, "quota");
  EXPECT_EQ(again->ways, problem.ways);
  EXPECT_EQ(again->title, "In the way of what is");
  EXPECT_FALSE(parse_problem(Json("text")).ok());
}

TEST(Api, a_page_without_a_next_is_the_last) {
  EXPECT_FALSE(page(Json::array(), std::nullopt).contains("next"));
  EXPECT_EQ(page(Json::array(), "40")["next"], "40");
}

}  // namespace
}  // namespace bulkhead::api::v1
