// YAML as a bounded tree with places, and a reader that collects mistakes instead of stopping at the first.
// Shared by everything that people write: the node file, the daemon's file, mig-parted's.
#pragma once

#include <initializer_list>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace bulkhead::yaml {

struct Mistake {
  unsigned line = 0, column = 0;  // from 1; 0 when there is no place to name
  std::string path = {};          // "gpus[0].layout[2]"
  std::string what = {};
  std::string suggestion = {};  // may be empty
};
// "node.yaml:4:13: gpus[0].mode: 'migg' is not a mode; did you mean 'mig'?" one a line.
std::string render(const std::vector<Mistake>& mistakes, std::string_view file_name);

struct Node {
  enum class Kind { null, scalar, sequence, map };
  Kind kind = Kind::null;
  bool quoted = false;            // a scalar in quotes is text, whatever it looks like
  std::string text = {};          // of a scalar
  unsigned line = 0, column = 0;  // from 1
  std::vector<Node> items = {};   // of a sequence; of a map: key, value, key, value ...
};

// One YAML document. Refuses what a small file could use to become a large tree or to hide something:
// aliases, anchors, tags, further documents, control bytes, invalid UTF-8, deep nesting. Never throws.
std::variant<Node, std::vector<Mistake>> parse_tree(std::string_view yaml);

class Reader {
 public:
  using Fields = std::map<std::string_view, const Node*>;

  void mistake(const Node& at, std::string path, std::string what, std::string suggestion = {});

  // The values of a map by key; unknown and repeated keys and keys without a value are mistakes.
  Fields fields(const Node& node, const std::string& path, const std::vector<std::string_view>& known);
  // The value of `key` or a mistake at `node`.
  const Node* required(const Fields& fields, std::string_view key, const Node& node, const std::string& path);

  // The items of a sequence; anything else is a mistake and has none.
  const std::vector<Node>& items(const Node& node, const std::string& path, std::size_t limit);
  // A scalar alone counts as a list of one.
  std::vector<const Node*> one_or_more(const Node& node, const std::string& path, std::size_t limit);

  std::optional<std::string> text(const Node& node, const std::string& path, std::size_t limit = 256);
  std::optional<unsigned> number(const Node& node, const std::string& path, unsigned low, unsigned high);
  std::optional<bool> boolean(const Node& node, const std::string& path);

  std::vector<Mistake> mistakes = {};
  std::vector<Mistake> in_order() const;  // of the file

 private:
  static constexpr std::size_t mistake_limit = 100;
};

std::string in_quotes(std::string_view text);  // 'text', printable and short
std::string at_key(const std::string& path, std::string_view key);
std::string at_item(const std::string& path, std::size_t index);
std::string meant(std::string_view word,
                  const std::vector<std::string_view>& known);  // "did you mean 'x'?" or empty

}  // namespace bulkhead::yaml
