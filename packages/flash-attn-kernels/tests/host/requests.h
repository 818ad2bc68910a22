// Requests of the tests, one a line: a name and whole numbers. Answers are JSON, one a line.
#pragma once

#include <cstdint>
#include <functional>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

class Request {
 public:
  explicit Request(const std::string& line) : stream_(line) { stream_ >> name_; }

  const std::string& name() const { return name_; }

  int next() {
    int value;
    if (!(stream_ >> value)) throw std::runtime_error(name_ + ": too few numbers");
    return value;
  }

  // A count, and so many numbers.
  std::vector<int> next_list() {
    std::vector<int> values(next());
    for (int& value : values) value = next();
    return values;
  }

 private:
  std::istringstream stream_;
  std::string name_;
};

inline std::string json(int64_t value) { return std::to_string(value); }

template <typename Value>
std::string json(const std::vector<Value>& values) {
  std::string text;
  for (const Value& value : values) text += (text.empty() ? "" : ", ") + json(value);
  return "[" + text + "]";
}

// An object of named answers that are JSON already.
inline std::string json(const std::vector<std::pair<std::string, std::string>>& members) {
  std::string text;
  for (const auto& [name, value] : members) text += (text.empty() ? "\"" : ", \"") + name + "\": " + value;
  return "{" + text + "}";
}

using Functions = std::map<std::string, std::function<std::string(Request&)>>;

inline int answer_all(const Functions& functions) {
  for (std::string line; std::getline(std::cin, line);) {
    Request request(line);
    std::cout << functions.at(request.name())(request) << "\n";
  }
  return 0;
}
