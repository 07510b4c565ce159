// The root class, for Linux. On macOS it comes from the compiler's own <objc/NSObject.h>.
#pragma once

#include <cstddef>
#include <cstdint>

typedef bool BOOL;
typedef unsigned long NSUInteger;
typedef long NSInteger;
#define nil nullptr
#define YES true
#define NO false

@protocol NSObject
- (Class)class;
- (BOOL)respondsToSelector:(SEL)aSelector;
- (instancetype)retain;
- (oneway void)release;
- (instancetype)autorelease;
- (NSUInteger)retainCount;
@end

__attribute__((objc_root_class))
@interface NSObject<NSObject> {
 @public
  Class isa;
  long _references;
}
+ (instancetype)alloc;
+ (instancetype)new;
- (instancetype)init;
- (void)dealloc;
- (id)copy;
@end
