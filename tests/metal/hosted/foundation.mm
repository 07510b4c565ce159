// Strings, dictionaries of strings, errors.
#include "foundation.h"

#include <cstring>

#include "double.h"

using metal_double::Ref;

@interface NSString () {
 @public
  std::string _text;
}
@end

@implementation NSString
+ (instancetype)stringWithUTF8String:(const char*)nullTerminatedCString {
  if (nullTerminatedCString == nullptr) metal_double::fail("stringWithUTF8String: of a null pointer");
  NSString* string = [NSString new];
  string->_text = nullTerminatedCString;
  return [string autorelease];
}
- (const char*)UTF8String {
  return _text.c_str();
}
- (NSUInteger)length {
  return _text.size();
}
- (id)copyWithZone:(NSZone*)zone {
  return [self retain];
}
@end

// The class of @"..." literals, whose layout the compiler lays down.
@interface LiteralString : NSString
@end

@implementation LiteralString
- (const char*)UTF8String {
  struct Literal {
    const void* isa;
    long flags;
    const char* text;
    long length;
  };
  return ((const Literal*)self)->text;
}
- (NSUInteger)length {
  return strlen(self.UTF8String);
}
@end

@interface NSDictionary () {
 @public
  std::map<std::string, std::pair<Ref, Ref>> _entries;
}
@end

@implementation NSDictionary
+ (instancetype)dictionary {
  return [[self new] autorelease];
}
- (id)copyWithZone:(NSZone*)zone {
  NSDictionary* copy = [NSDictionary new];
  copy->_entries = _entries;
  return copy;
}
@end

@implementation NSMutableDictionary
- (void)setObject:(id)anObject forKey:(id)aKey {
  if (anObject == nil || aKey == nil) metal_double::fail("nil in a dictionary");
  const Ref key([[aKey copy] autorelease]);
  _entries[((NSString*)aKey).UTF8String] = {key, Ref(anObject)};
}
@end

@interface NSError () {
 @public
  std::string _message;
}
@end

@implementation NSError
- (NSString*)localizedDescription {
  return [NSString stringWithUTF8String:_message.c_str()];
}
- (id)copyWithZone:(NSZone*)zone {
  return [self retain];
}
@end

namespace metal_double {

NSError* make_error(const std::string& message) {
  NSError* error = [NSError new];
  error->_message = message;
  return [error autorelease];
}

std::map<std::string, std::string> strings(NSDictionary* dictionary) {
  std::map<std::string, std::string> result;
  if (dictionary == nil) return result;
  for (const auto& [key, entry] : dictionary->_entries) {
    result[key] = ((NSString*)entry.second.get()).UTF8String;
  }
  return result;
}

}  // namespace metal_double
