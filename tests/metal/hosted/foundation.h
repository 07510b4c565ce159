// The Foundation classes, as the double itself makes and reads them.
#pragma once

#include <Foundation/Foundation.h>

#include <map>
#include <string>
#include <utility>

namespace metal_double {

// An owned object.
class Ref {
 public:
  Ref() = default;
  explicit Ref(id object) : object_([object retain]) {}
  Ref(const Ref& other) : object_([other.object_ retain]) {}
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nil)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() { [object_ release]; }
  id get() const { return object_; }

 private:
  id object_ = nil;
};

// Autoreleased, as Apple's are.
NSError* make_error(const std::string& message);

// The keys and values of a dictionary of strings.
std::map<std::string, std::string> strings(NSDictionary* dictionary);

}  // namespace metal_double
