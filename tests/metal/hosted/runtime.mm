// The Objective-C runtime that clang's code for Apple's 64-bit platforms calls, on ELF: classes, messages, reference
// counts, autorelease pools. Objects that were freed are kept as shells, so that using one is an error that is seen.
#include <Foundation/Foundation.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "double.h"

#if !defined(__x86_64__) || !defined(__linux__)
#error "the double of Metal runs on Linux on x86-64"
#endif

namespace {

// The layouts that clang emits.
struct MethodList {
  struct Method {
    const char* name;
    const char* types;
    void* implementation;
  };
  uint32_t entry_size;
  uint32_t count;
  Method first[1];
};

struct ClassData {
  uint32_t flags;
  uint32_t instance_start;
  uint32_t instance_size;
  const void* ivar_layout;
  const char* name;
  const MethodList* methods;
};

struct ClassObject {
  ClassObject* isa;
  ClassObject* superclass;
  void* cache;
  void* vtable;
  const ClassData* data;
};

struct Object {
  ClassObject* isa;
  std::atomic<long> references;
};

using Method = void (*)(Object*, const char*);

constexpr uint32_t kIsMetaclass = 1;

std::mutex& mutex() {
  static auto* instance = new std::mutex;
  return *instance;
}

std::map<std::string, long>& counts() {
  static auto* instance = new std::map<std::string, long>;
  return *instance;
}

// The autorelease pools of this thread, innermost last.
thread_local std::vector<std::vector<Object*>> pools;

void* find_method(const ClassObject* cls, const char* selector, bool inherited = true) {
  for (; cls != nullptr; cls = inherited ? cls->superclass : nullptr) {
    const MethodList* methods = cls->data->methods;
    for (uint32_t i = 0; methods != nullptr && i < methods->count; ++i) {
      if (strcmp(methods->first[i].name, selector) == 0) return methods->first[i].implementation;
    }
  }
  return nullptr;
}

// C++ members are made from the root class down, and unmade the other way.
void construct_members(Object* object, const ClassObject* cls) {
  if (cls == nullptr) return;
  construct_members(object, cls->superclass);
  if (void* method = find_method(cls, ".cxx_construct", false)) reinterpret_cast<Method>(method)(object, nullptr);
}

void destroy_members(Object* object, const ClassObject* cls) {
  for (; cls != nullptr; cls = cls->superclass) {
    if (void* method = find_method(cls, ".cxx_destruct", false)) reinterpret_cast<Method>(method)(object, nullptr);
  }
}

}  // namespace

extern "C" {

// What literals and class data refer to.
ClassObject __CFConstantStringClassReference;
extern ClassObject literal_class asm("OBJC_CLASS_$_LiteralString");
void* _NSConcreteStackBlock[32];
void* _NSConcreteGlobalBlock[32];

__attribute__((constructor)) static void init_literals() { __CFConstantStringClassReference = literal_class; }

static bool is_immortal(const Object* object) {
  return object->isa == &__CFConstantStringClassReference || (object->isa->data->flags & kIsMetaclass) != 0;
}

void* double_find_method(Object* object, const char* selector) {
  static auto* cache = new std::unordered_map<const void*, std::unordered_map<const char*, void*>>;
  const std::string name = object->isa->data->name;
  if (!is_immortal(object) && object->references <= 0 && strcmp(selector, "dealloc") != 0) {
    metal_double::fail("message " + std::string(selector) + " to a freed " + name);
  }
  const std::lock_guard<std::mutex> lock(mutex());
  void*& method = (*cache)[object->isa][selector];
  if (method == nullptr) method = find_method(object->isa, selector);
  if (method == nullptr) metal_double::fail(name + " has no method " + selector);
  return method;
}

// In assembly: clang has a declaration of its own for it.
asm(".data\n.globl _objc_empty_cache\n_objc_empty_cache: .quad 0\n");

// Finds the method with all argument registers kept, and jumps to it; a message to nil returns zeros.
asm(R"(
  .text
  .globl objc_msgSend
  .type objc_msgSend, @function
objc_msgSend:
  .cfi_startproc
  test %rdi, %rdi
  jz 1f
  push %rbp
  .cfi_def_cfa_offset 16
  .cfi_offset %rbp, -16
  mov %rsp, %rbp
  .cfi_def_cfa_register %rbp
  sub $192, %rsp
  mov %rdi, -8(%rbp)
  mov %rsi, -16(%rbp)
  mov %rdx, -24(%rbp)
  mov %rcx, -32(%rbp)
  mov %r8, -40(%rbp)
  mov %r9, -48(%rbp)
  mov %rax, -56(%rbp)
  movups %xmm0, -80(%rbp)
  movups %xmm1, -96(%rbp)
  movups %xmm2, -112(%rbp)
  movups %xmm3, -128(%rbp)
  movups %xmm4, -144(%rbp)
  movups %xmm5, -160(%rbp)
  movups %xmm6, -176(%rbp)
  movups %xmm7, -192(%rbp)
  call double_find_method@PLT
  mov %rax, %r11
  mov -8(%rbp), %rdi
  mov -16(%rbp), %rsi
  mov -24(%rbp), %rdx
  mov -32(%rbp), %rcx
  mov -40(%rbp), %r8
  mov -48(%rbp), %r9
  mov -56(%rbp), %rax
  movups -80(%rbp), %xmm0
  movups -96(%rbp), %xmm1
  movups -112(%rbp), %xmm2
  movups -128(%rbp), %xmm3
  movups -144(%rbp), %xmm4
  movups -160(%rbp), %xmm5
  movups -176(%rbp), %xmm6
  movups -192(%rbp), %xmm7
  leave
  .cfi_def_cfa %rsp, 8
  .cfi_restore %rbp
  jmp *%r11
1:
  xor %eax, %eax
  xor %edx, %edx
  pxor %xmm0, %xmm0
  pxor %xmm1, %xmm1
  ret
  .cfi_endproc
  .size objc_msgSend, . - objc_msgSend
)");

Object* objc_alloc(ClassObject* cls) {
  auto* object = static_cast<Object*>(calloc(1, cls->data->instance_size));
  object->isa = cls;
  object->references = 1;
  construct_members(object, cls);
  const std::lock_guard<std::mutex> lock(mutex());
  ++counts()[cls->data->name];
  return object;
}

Object* objc_alloc_init(ClassObject* cls) { return (Object*)[(id)objc_alloc(cls) init]; }
Object* objc_opt_new(ClassObject* cls) { return objc_alloc_init(cls); }
ClassObject* objc_opt_class(Object* object) { return object == nullptr ? nullptr : object->isa; }
Object* objc_opt_self(Object* object) { return object; }

Object* objc_retain(Object* object) {
  if (object == nullptr || is_immortal(object)) return object;
  if (object->references <= 0) metal_double::fail(std::string("retain of a freed ") + object->isa->data->name);
  ++object->references;
  return object;
}

void objc_release(Object* object) {
  if (object == nullptr || is_immortal(object)) return;
  if (object->references <= 0) metal_double::fail(std::string("over-release of a ") + object->isa->data->name);
  if (--object->references == 0) [(id)object dealloc];
}

Object* objc_autorelease(Object* object) {
  if (object == nullptr || is_immortal(object)) return object;
  if (pools.empty()) {
    metal_double::fail(std::string("a ") + object->isa->data->name + " is autoreleased outside any pool: it leaks");
  }
  pools.back().push_back(object);
  return object;
}

void* objc_autoreleasePoolPush() {
  pools.emplace_back();
  return reinterpret_cast<void*>(pools.size());
}

// Also pops the pools inside, whose code was left by an exception.
void objc_autoreleasePoolPop(void* pool) {
  while (pools.size() >= reinterpret_cast<size_t>(pool)) {
    const std::vector<Object*> objects = std::move(pools.back());
    pools.pop_back();
    for (Object* object : objects) objc_release(object);
  }
}

}  // extern "C"

void metal_double::drain_pools() {
  if (!pools.empty()) objc_autoreleasePoolPop(reinterpret_cast<void*>(1));
}

std::map<std::string, long> metal_double::live_objects() {
  const std::lock_guard<std::mutex> lock(mutex());
  return counts();
}

@implementation NSObject
+ (instancetype)alloc {
  return (id)objc_alloc((ClassObject*)self);
}
+ (instancetype)new {
  return (id)objc_alloc_init((ClassObject*)self);
}
+ (Class)class {
  return (Class)self;
}
- (instancetype)init {
  return self;
}
- (void)dealloc {
  auto* object = (Object*)self;
  destroy_members(object, object->isa);
  const std::lock_guard<std::mutex> lock(mutex());
  --counts()[object->isa->data->name];
}
- (instancetype)retain {
  return (id)objc_retain((Object*)self);
}
- (oneway void)release {
  objc_release((Object*)self);
}
- (instancetype)autorelease {
  return (id)objc_autorelease((Object*)self);
}
- (NSUInteger)retainCount {
  return ((Object*)self)->references;
}
- (Class)class {
  return (Class)((Object*)self)->isa;
}
- (BOOL)respondsToSelector:(SEL)aSelector {
  return find_method(((Object*)self)->isa, (const char*)(void*)aSelector) != nullptr;
}
- (id)copy {
  return [(id<NSCopying>)self copyWithZone:nil];
}
@end
