#include "core/yaml/yaml.hpp"

#include <algorithm>

#include <fmt/format.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <sstream>

#include "base/limits.hpp"
#include "base/text.hpp"

namespace bulkhead::yaml {

namespace {

constexpr std::size_t node_limit = 65536;

// Thrown through the YAML parser to end it early; caught in parse_tree.
struct Stop {
  Mistake mistake;
};

class Builder : public YAML::EventHandler {
 public:
  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    no_anchor(mark, anchor);
    add(make(Node::Kind::null, mark));
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    report(mark, "an alias (*name) is not allowed", "write the value out");
    add(make(Node::Kind::null, mark));
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    no_anchor(mark, anchor);
    no_tag(mark, tag);
    Node node = make(Node::Kind::scalar, mark);
    node.text = value;
    node.quoted = tag == "!";
    add(std::move(node));
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(Node::Kind::sequence, mark, tag, anchor);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(Node::Kind::map, mark, tag, anchor);
  }
  void OnMapEnd() override { close(); }

  Node root = {};
  std::vector<Mistake> mistakes = {};

 private:
  static Mistake at(const YAML::Mark& mark, std::string what, std::string suggestion) {
    return {static_cast<unsigned>(mark.line + 1), static_cast<unsigned>(mark.column + 1), "", std::move(what),
            std::move(suggestion)};
  }
  void report(const YAML::Mark& mark, std::string what, std::string suggestion) {
    if (mistakes.size() < 100) mistakes.push_back(at(mark, std::move(what), std::move(suggestion)));
  }
  Node make(Node::Kind kind, const YAML::Mark& mark) {
    if (++count_ > node_limit) throw Stop{at(mark, fmt::format("more than {} values", node_limit), "")};
    Node node;
    node.kind = kind;
    node.line = static_cast<unsigned>(mark.line + 1);
    node.column = static_cast<unsigned>(mark.column + 1);
    return node;
  }
  void no_anchor(const YAML::Mark& mark, YAML::anchor_t anchor) {
    if (anchor != YAML::NullAnchor)
      report(mark, "an anchor (&name) is not allowed", "write the value out where it is needed");
  }
  void no_tag(const YAML::Mark& mark, const std::string& tag) {
    if (!tag.empty() && tag != "?" && tag != "!")
      report(mark, "a tag (!name) is not allowed", "leave it out");
  }
  void open(Node::Kind kind, const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor) {
    no_anchor(mark, anchor);
    no_tag(mark, tag);
    if (open_.size() >= limits::yaml_depth)
      throw Stop{at(mark, fmt::format("nested deeper than {} levels", limits::yaml_depth), "")};
    open_.push_back(make(kind, mark));
  }
  void close() {
    Node node = std::move(open_.back());
    open_.pop_back();
    add(std::move(node));
  }
  void add(Node node) {
    if (open_.empty()) {
      root = std::move(node);
    } else {
      open_.back().items.push_back(std::move(node));
    }
  }

  std::vector<Node> open_ = {};
  std::size_t count_ = 0;
};

// The first byte that no YAML text has: control bytes and broken UTF-8. yaml-cpp reads on over them.
std::optional<Mistake> bad_byte(std::string_view text) {
  unsigned line = 1, column = 1;
  for (std::size_t i = 0; i < text.size();) {
    const auto byte = static_cast<unsigned char>(text[i]);
    const auto wrong = [&](std::string what) {
      return Mistake{line, column, "", std::move(what), "save the file as UTF-8 text"};
    };
    if (byte == '\n') {
      ++line;
      column = 1;
      ++i;
      continue;
    }
    if ((byte < 0x20 && byte != '\t' && byte != '\r') || byte == 0x7f)
      return wrong(fmt::format("control byte 0x{:02x}", byte));
    const std::size_t length = byte < 0x80                   ? 1
                               : byte >= 0xc2 && byte < 0xe0 ? 2
                               : (byte & 0xf0U) == 0xe0      ? 3
                               : byte >= 0xf0 && byte < 0xf5 ? 4
                                                             : 0;
    bool good = length > 0 && i + length <= text.size();
    for (std::size_t k = 1; good && k < length; ++k)
      good = (static_cast<unsigned char>(text[i + k]) & 0xc0U) == 0x80;
    if (good && length > 2) {  // overlong forms, surrogates, beyond U+10FFFF
      const auto second = static_cast<unsigned char>(text[i + 1]);
      good = !(byte == 0xe0 && second < 0xa0) && !(byte == 0xed && second >= 0xa0) &&
             !(byte == 0xf0 && second < 0x90) && !(byte == 0xf4 && second >= 0x90);
    }
    if (!good) return wrong(fmt::format("byte 0x{:02x} is not UTF-8", byte));
    i += length;
    ++column;
  }
  return std::nullopt;
}

}  // namespace

std::variant<Node, std::vector<Mistake>> parse_tree(std::string_view yaml) {
  if (yaml.size() > limits::node_file_bytes) {
    return std::vector<Mistake>{
        {0, 0, "",
         fmt::format("the file has {} bytes, the limit is {}", yaml.size(), limits::node_file_bytes), ""}};
  }
  if (auto bad = bad_byte(yaml)) return std::vector<Mistake>{*std::move(bad)};
  Builder builder;
  try {
    std::istringstream stream{std::string(yaml)};
    YAML::Parser parser(stream);
    if (!parser.HandleNextDocument(builder)) {
      return std::vector<Mistake>{{1, 1, "", "the file is empty", ""}};
    }
    const Node first = std::move(builder.root);
    builder.root = {};
    if (parser.HandleNextDocument(builder)) {
      builder.mistakes.push_back({builder.root.line, builder.root.column, "", "a second document in one file",
                                  "keep one node file to a file"});
    }
    builder.root = first;
  } catch (const Stop& stop) {
    builder.mistakes.push_back(stop.mistake);
  } catch (const YAML::Exception& e) {
    builder.mistakes.push_back({static_cast<unsigned>(e.mark.line + 1),
                                static_cast<unsigned>(e.mark.column + 1), "",
                                fmt::format("not YAML: {}", printable(e.msg)), ""});
  } catch (const std::exception& e) {  // the library's own limits and assertions
    builder.mistakes.push_back({0, 0, "", fmt::format("not YAML: {}", printable(e.what())), ""});
  }
  if (!builder.mistakes.empty()) return std::move(builder.mistakes);
  return std::move(builder.root);
}

std::string in_quotes(std::string_view text) { return fmt::format("'{}'", printable(text, 60)); }
std::string at_key(const std::string& path, std::string_view key) {
  return path.empty() ? std::string(key) : fmt::format("{}.{}", path, key);
}
std::string at_item(const std::string& path, std::size_t index) { return fmt::format("{}[{}]", path, index); }

std::string meant(std::string_view word, const std::vector<std::string_view>& known) {
  std::string_view best = closest(word, known);
  if (best.empty()) best = closest(lower(word), known);
  for (const auto candidate : known) {
    if (best.empty() && word.size() >= 3 && candidate.starts_with(lower(word))) best = candidate;
  }
  return best.empty() ? std::string() : fmt::format("did you mean '{}'?", best);
}

void Reader::mistake(const Node& at, std::string path, std::string what, std::string suggestion) {
  if (mistakes.size() < mistake_limit) {
    mistakes.push_back({at.line, at.column, std::move(path), std::move(what), std::move(suggestion)});
  } else if (mistakes.size() == mistake_limit) {
    mistakes.push_back({at.line, at.column, "", "and more mistakes, not listed", ""});
  }
}

Reader::Fields Reader::fields(const Node& node, const std::string& path,
                              const std::vector<std::string_view>& known) {
  Fields out;
  if (node.kind != Node::Kind::map) {
    std::vector<std::string> keys(known.begin(), known.end());
    mistake(node, path, fmt::format("must be a mapping with the keys {}", join(keys, ", ")));
    return out;
  }
  for (std::size_t i = 0; i + 1 < node.items.size(); i += 2) {
    const Node& key = node.items[i];
    const Node& value = node.items[i + 1];
    if (key.kind != Node::Kind::scalar) {
      mistake(key, path, "a key must be a plain word");
      continue;
    }
    const auto name = std::find(known.begin(), known.end(), key.text);
    if (name == known.end()) {
      mistake(key, path, fmt::format("unknown key {}", in_quotes(key.text)), meant(key.text, known));
      continue;
    }
    if (out.contains(*name)) {
      mistake(key, path, fmt::format("key '{}' is given twice, first in line {}", *name, out[*name]->line),
              "remove one");
      continue;
    }
    if (value.kind == Node::Kind::null) {
      mistake(key, at_key(path, *name), "has no value", "write one or remove the key");
      continue;
    }
    out[*name] = &value;
  }
  return out;
}

const Node* Reader::required(const Fields& fields, std::string_view key, const Node& node,
                             const std::string& path) {
  if (const auto at = fields.find(key); at != fields.end()) return at->second;
  if (node.kind != Node::Kind::map) return nullptr;
  // A key without a value has been reported already.
  for (std::size_t i = 0; i + 1 < node.items.size(); i += 2) {
    if (node.items[i].text == key) return nullptr;
  }
  mistake(node, path, fmt::format("the key '{}' is missing", key));
  return nullptr;
}

const std::vector<Node>& Reader::items(const Node& node, const std::string& path, std::size_t limit) {
  static const std::vector<Node> none;
  if (node.kind != Node::Kind::sequence) {
    mistake(node, path, "must be a list", "write [a, b] or one item a line with a dash");
    return none;
  }
  if (node.items.size() > limit) {
    mistake(node, path, fmt::format("has {} items, the limit is {}", node.items.size(), limit));
    return none;
  }
  return node.items;
}

std::vector<const Node*> Reader::one_or_more(const Node& node, const std::string& path, std::size_t limit) {
  if (node.kind == Node::Kind::scalar) return {&node};
  std::vector<const Node*> out;
  for (const auto& item : items(node, path, limit)) out.push_back(&item);
  if (out.empty() && node.kind == Node::Kind::sequence && node.items.empty())
    mistake(node, path, "is an empty list", "name one at least or remove the key");
  return out;
}

std::optional<std::string> Reader::text(const Node& node, const std::string& path, std::size_t limit) {
  if (node.kind != Node::Kind::scalar || trim(node.text).empty()) {
    mistake(node, path, "must be a word");
    return std::nullopt;
  }
  if (node.text.size() > limit) {
    mistake(node, path, fmt::format("is longer than {} bytes", limit));
    return std::nullopt;
  }
  return node.text;
}

std::optional<unsigned> Reader::number(const Node& node, const std::string& path, unsigned low,
                                       unsigned high) {
  const auto value = node.kind == Node::Kind::scalar ? parse_u64(node.text) : std::nullopt;
  if (!value) {
    const auto digits = node.text.find_first_not_of("0123456789");
    const bool unit =
        node.kind == Node::Kind::scalar && digits != 0 && digits != std::string::npos && digits < 10;
    mistake(node, path,
            node.kind == Node::Kind::scalar ? fmt::format("{} is not a whole number", in_quotes(node.text))
                                            : "must be a whole number",
            unit ? fmt::format("write {}: the key names the unit", node.text.substr(0, digits)) : "");
    return std::nullopt;
  }
  if (*value < low || *value > high) {
    mistake(node, path, fmt::format("{} is out of range {} to {}", *value, low, high));
    return std::nullopt;
  }
  return static_cast<unsigned>(*value);
}

std::optional<bool> Reader::boolean(const Node& node, const std::string& path) {
  if (node.kind == Node::Kind::scalar && !node.quoted) {
    if (node.text == "true") return true;
    if (node.text == "false") return false;
  }
  const std::string word = lower(node.text);
  const bool yes = word == "yes" || word == "on" || word == "1" || word == "true";
  const bool no = word == "no" || word == "off" || word == "0" || word == "false";
  mistake(node, path,
          node.kind == Node::Kind::scalar ? fmt::format("{} is not true or false", in_quotes(node.text))
                                          : "must be true or false",
          yes  ? "write true"
          : no ? "write false"
               : "");
  return std::nullopt;
}

std::string render(const std::vector<Mistake>& mistakes, std::string_view file_name) {
  std::string out;
  for (const auto& mistake : mistakes) {
    out += printable(file_name, 4096);
    if (mistake.line > 0) out += fmt::format(":{}:{}", mistake.line, mistake.column);
    out += ": ";
    if (!mistake.path.empty()) out += mistake.path + ": ";
    out += mistake.what;
    if (!mistake.suggestion.empty()) out += "; " + mistake.suggestion;
    out += '\n';
  }
  return out;
}

std::vector<Mistake> Reader::in_order() const {
  auto sorted = mistakes;
  std::stable_sort(sorted.begin(), sorted.end(), [](const Mistake& a, const Mistake& b) {
    return a.line != b.line ? a.line < b.line : a.column < b.column;
  });
  return sorted;
}

}  // namespace bulkhead::yaml
