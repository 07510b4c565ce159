// What torch_tqattn and torch's MPS headers use of Foundation, with Apple's signatures (nullability aside). Serves the
// Linux double and the cross-compilation for macOS; nothing is declared that nobody uses.
#pragma once

#include <objc/NSObject.h>

typedef struct _NSZone NSZone;

@protocol NSCopying
- (id)copyWithZone:(NSZone*)zone;
@end

@interface NSString : NSObject <NSCopying>
@property(readonly) NSUInteger length;
@property(readonly) const char* UTF8String;
+ (instancetype)stringWithUTF8String:(const char*)nullTerminatedCString;
@end

@interface NSDictionary<__covariant KeyType, __covariant ObjectType> : NSObject <NSCopying>
+ (instancetype)dictionary;
@end

@interface NSMutableDictionary<KeyType, ObjectType> : NSDictionary <KeyType, ObjectType>
- (void)setObject:(ObjectType)anObject forKey:(KeyType<NSCopying>)aKey;
@end

@interface NSError : NSObject <NSCopying>
@property(readonly, copy) NSString* localizedDescription;
@end
