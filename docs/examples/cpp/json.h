// A small reader of JSON: enough for manifest.json and the header of a safetensors file, strict about everything else.
#pragma once

#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

struct Json {
  enum Kind { null, boolean, number, string, list, object } kind = null;
  double value = 0;  // of a number or a boolean
  std::string text;
  std::vector<Json> items;
  std::map<std::string, Json> members;

  const Json& at(const std::string& key) const {
    const auto found = members.find(key);
    if (found == members.end()) throw std::runtime_error("JSON: no member \"" + key + "\"");
    return found->second;
  }
};

class JsonReader {
 public:
  static Json parse(const std::string& text) {
    JsonReader reader(text);
    Json found = reader.value(0);
    reader.space();
    if (reader.at_ != text.size()) throw std::runtime_error("JSON: something follows its end");
    return found;
  }

 private:
  explicit JsonReader(const std::string& text) : text_(text) {}

  [[noreturn]] void fail() const { throw std::runtime_error("JSON: broken at byte " + std::to_string(at_)); }
  void space() {
    while (at_ < text_.size() && std::string(" \t\r\n").find(text_[at_]) != std::string::npos) ++at_;
  }
  char next() {
    space();
    if (at_ >= text_.size()) fail();
    return text_[at_];
  }
  void take(const std::string& word) {
    if (text_.compare(at_, word.size(), word) != 0) fail();
    at_ += word.size();
  }
  bool took(char letter) {
    if (next() != letter) return false;
    ++at_;
    return true;
  }

  Json value(int depth) {
    if (depth > 64) fail();
    Json found;
    switch (next()) {
      case '{':
        ++at_;
        found.kind = Json::object;
        if (took('}')) return found;
        do {
          if (next() != '"') fail();
          std::string key = letters();
          if (!took(':')) fail();
          if (!found.members.emplace(key, value(depth + 1)).second) fail();  // a doubled key has two meanings
        } while (took(','));
        if (!took('}')) fail();
        return found;
      case '[':
        ++at_;
        found.kind = Json::list;
        if (took(']')) return found;
        do found.items.push_back(value(depth + 1));
        while (took(','));
        if (!took(']')) fail();
        return found;
      case '"':
        found.kind = Json::string;
        found.text = letters();
        return found;
      case 't':
        take("true");
        found.kind = Json::boolean;
        found.value = 1;
        return found;
      case 'f':
        take("false");
        found.kind = Json::boolean;
        return found;
      case 'n':
        take("null");
        return found;
      default:
        char* end = nullptr;
        found.kind = Json::number;
        found.value = std::strtod(text_.c_str() + at_, &end);
        if (end == text_.c_str() + at_) fail();
        at_ = end - text_.c_str();
        return found;
    }
  }

  std::string letters() {
    std::string found;
    for (++at_; at_ < text_.size() && text_[at_] != '"'; ++at_) {
      if (text_[at_] != '\\') {
        found += text_[at_];
        continue;
      }
      const std::string short_ones = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
      if (++at_ >= text_.size()) fail();
      if (text_[at_] == 'u') {  // kept as it is written: no name or digest that is read here has one
        found += "\\u";
      } else if (const auto place = short_ones.find(text_[at_]); place != std::string::npos) {
        found += meant[place];
      } else {
        fail();
      }
    }
    if (at_++ >= text_.size()) fail();
    return found;
  }

  const std::string& text_;
  size_t at_ = 0;
};
