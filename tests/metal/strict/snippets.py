"""Shaders that must be refused, each with what the message must say and a twin that must be accepted."""

from typing import NamedTuple

_START = """#include <metal_stdlib>
using namespace metal;
struct P { uint n; float s; };
"""
_KERNEL = """kernel void k(device float* a [[buffer(0)]], device half* h [[buffer(1)]], device bfloat* b [[buffer(2)]],
              device uint* u [[buffer(3)]], device float4* v [[buffer(4)]], constant P& p [[buffer(5)]],
              constant float* c [[buffer(6)]], threadgroup float* t [[threadgroup(0)]],
              uint i [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
"""


class Snippet(NamedTuple):
    name: str
    message: str
    wrong: str
    right: str


def _whole(name: str, message: str, wrong: str, right: str) -> Snippet:
    """Two shaders."""
    return Snippet(name, message, _START + wrong, _START + right)


def _body(name: str, message: str, wrong: str, right: str) -> Snippet:
    """Two bodies of one kernel."""
    return Snippet(name, message, f"{_START}{_KERNEL}{wrong}\n}}\n", f"{_START}{_KERNEL}{right}\n}}\n")


def _helper(name: str, message: str, wrong: str, right: str, call: str) -> Snippet:
    """Two functions, called by a kernel."""
    end = f"\n{_KERNEL}{call}\n}}\n"
    return Snippet(name, message, _START + wrong + end, _START + right + end)


def _argument(name: str, message: str, wrong: str, right: str) -> Snippet:
    """Two further arguments of a kernel."""
    start = f"{_START}kernel void k(device float* a [[buffer(0)]], "
    return Snippet(name, message, f"{start}{wrong}) {{ a[0] = 1.0f; }}\n", f"{start}{right}) {{ a[0] = 1.0f; }}\n")


# A line or two for each is easier to read than what a formatter makes of them.
# fmt: off
ADDRESS_SPACES = [
    _body("a local pointer", "cannot initialize", "float* x = a; x[0] = 1.0f;", "device float* x = a; x[0] = 1.0f;"),
    _body("a local pointer to a local", "'x' has no", "float y; float* x = &y; *x = 1.0f;",
          "float y; thread float* x = &y; *x = 1.0f;"),
    _body("a local reference", "'x' has no", "float y; float& x = y; x = 1.0f;",
          "float y; thread float& x = y; x = 1.0f;"),
    _body("a pointer by auto", "'x' has no", "float y; auto x = &y; *x = 1.0f;",
          "float y; thread auto x = &y; *x = 1.0f;"),
    _body("device to threadgroup", "cannot initialize", "threadgroup float* x = a; x[0] = 1.0f;",
          "threadgroup float* x = t; x[0] = 1.0f;"),
    _body("a cast that changes the space", "changes the address space", "((threadgroup uint*)a)[0] = 1u;",
          "((threadgroup uint*)t)[0] = 1u;"),
    _body("a reinterpret_cast that changes the space", "reinterpret_cast",
          "reinterpret_cast<threadgroup uint*>(a)[0] = 1u;", "reinterpret_cast<device uint*>(a)[0] = 1u;"),
    _body("a cast without a space", "has no address space", "float x[2]; ((uint*)x)[0] = 1u;",
          "float x[2]; ((thread uint*)x)[0] = 1u;"),
    _helper("a helper of another space", "no matching function",
            "inline float f(threadgroup const float* x) { return x[0]; }",
            "inline float f(device const float* x) { return x[0]; }", "a[0] = f(a);"),
    _helper("a pointer parameter", "'x' has no", "inline float f(const float* x) { return x[0]; }",
            "inline float f(thread const float* x) { return x[0]; }", "float x[2] = {1.0f, 2.0f}; a[0] = f(x);"),
    _helper("an array parameter", "'x' has no", "inline float f(const float x[2]) { return x[0]; }",
            "inline float f(thread const float x[2]) { return x[0]; }", "float x[2] = {1.0f, 2.0f}; a[0] = f(x);"),
    _helper("a reference parameter", "'x' has no", "inline void f(float& x) { x = 1.0f; }",
            "inline void f(thread float& x) { x = 1.0f; }", "float x; f(x); a[0] = x;"),
    _helper("a reference to an array", "'x' has no", "inline void f(float (&x)[2]) { x[0] = 1.0f; }",
            "inline void f(thread float (&x)[2]) { x[0] = 1.0f; }", "float x[2]; f(x); a[0] = x[0];"),
    _helper("a device number as a thread reference", "no matching function",
            "inline void f(thread float& x) { x = 1.0f; }",
            "inline void f(device float& x) { x = 1.0f; }", "f(a[0]);"),
    _helper("a pointer in a struct", "'x' has no", "struct S { const float* x; };",
            "struct S { device const float* x; };",
            "S s; s.x = nullptr; a[0] = s.x == nullptr ? 1.0f : 0.0f;"),
    _helper("a pointer as a result", "has no address space", "inline float* f(thread float* x) { return x; }",
            "inline thread float* f(thread float* x) { return x; }", "float x; a[0] = *f(&x);"),
    _helper("a pointer parameter of a template", "'x' has no",
            "template <class T> inline T f(const T* x) { return x[0]; }",
            "template <class T> inline T f(thread const T* x) { return x[0]; }", "float x = 1.0f; a[0] = f(&x);"),
    _body("a write to constant memory", "read-only", "c[0] = 1.0f;", "a[0] = c[0];"),
    _body("a pointer that forgets const", "cannot initialize",
          "device const float* x = a; device float* y = x; y[0] = 1.0f;",
          "device const float* x = a; device const float* y = x; a[1] = y[0];"),
    _body("a struct copied from constant memory", "no matching constructor", "P q = p; a[0] = q.s;",
          "P q; q.s = p.s; a[0] = q.s;"),
    _body("a struct copied to device memory", "no viable overloaded '='", "P q = {1u, 2.0f}; *(device P*)a = q;",
          "P q = {1u, 2.0f}; ((device P*)a)->s = q.s;"),
    _whole("a table in no space", "must be constant", "const float x[2] = {1.0f, 2.0f};\n" + _KERNEL + "a[0] = x[i]; }",
           "constant float x[2] = {1.0f, 2.0f};\n" + _KERNEL + "a[0] = x[i]; }"),
    _whole("a constexpr in no space", "must be constant", "constexpr uint n = 2;\n" + _KERNEL + "a[n] = 1.0f; }",
           "constant constexpr uint n = 2;\n" + _KERNEL + "a[n] = 1.0f; }"),
    _whole("a variable for all", "must be constant", "float x = 1.0f;\n" + _KERNEL + "a[0] = x; }",
           "constant float x = 1.0f;\n" + _KERNEL + "a[0] = x; }"),
    _whole("a constant that is computed", "global constructor",
           "constant float x = precise::sqrt(2.0f);\n" + _KERNEL + "a[0] = x; }",
           "constant float x = 2.0f * 3.0f;\n" + _KERNEL + "a[0] = x; }"),
    _body("a constant local", "cannot be in that address space", "static constant float x = 1.0f; a[0] = x;",
          "const float x = 1.0f; a[0] = x;"),
]

TYPES = [
    _body("a double", "no double", "double x = a[0]; a[0] = float(x);", "float x = a[0]; a[0] = x;"),
    _body("a cast to double", "no double", "a[0] = float((double)a[0] * 2);", "a[0] = float((float)a[0] * 2);"),
    _helper("a result of double", "no double", "inline double f() { return 1; }", "inline float f() { return 1; }",
            "a[0] = f();"),
    _body("a literal without a suffix", "needs the suffix", "a[0] = a[1] * 2.0;", "a[0] = a[1] * 2.0f;"),
    _body("a literal with an exponent", "needs the suffix", "a[0] = a[1] * 1e-3;", "a[0] = a[1] * 1e-3f;"),
    _body("half made of float", "implicit conversion", "h[0] = a[0];", "h[0] = half(a[0]);"),
    _body("float made of half", "implicit conversion", "float x = h[0]; a[0] = x;", "float x = float(h[0]); a[0] = x;"),
    _body("half and float", "implicit conversion", "a[0] = h[0] * 2.0f;", "h[1] = h[0] * 2.0h;"),
    _body("half from a float literal", "implicit conversion", "half x = 0.5f; h[0] = x;", "half x = 0.5h; h[0] = x;"),
    _helper("half as an argument", "implicit conversion", "inline float f(float x) { return x; }",
            "inline float f(half x) { return float(x); }", "a[0] = f(h[0]);"),
    _body("bfloat made of float", "implicit conversion", "b[0] = a[0];", "b[0] = bfloat(a[0]);"),
    _body("float made of bfloat", "implicit conversion", "a[0] = b[0];", "a[0] = float(b[0]);"),
    _body("a sum of bfloat", "no arithmetic", "b[0] = b[1] + b[2];", "b[0] = bfloat(float(b[1]) + float(b[2]));"),
    _body("a sum into bfloat", "no arithmetic", "b[0] += b[1];", "b[0] = b[1];"),
    _body("minus bfloat", "no arithmetic", "b[0] = -b[1];", "b[0] = bfloat(-float(b[1]));"),
    _body("half4 as float4", "cannot initialize", "half4 x = half4(1.0h); float4 y = x; v[0] = y;",
          "half4 x = half4(1.0h); float4 y = float4(x); v[0] = y;"),
    _body("a vector of too few", "no matching function", "v[0] = float4(1.0f, 2.0f, 3.0f);",
          "v[0] = float4(1.0f, 2.0f, float2(3.0f));"),
    _body("a vector of other vectors", "no matching function", "v[0] = float4(half2(1.0h), half2(2.0h));",
          "v[0] = float4(float2(1.0f), float2(2.0f));"),
    _body("a vector as a number", "cannot initialize", "float x = v[0]; a[0] = x;", "float x = v[0].x; a[0] = x;"),
    _body("a component that is not there", "exceeds", "float2 x = v[0].xy; a[0] = x.z;",
          "float2 x = v[0].xy; a[0] = x.y;"),
    _body("a string", "a string", "constant const char* x = (constant const char*)\"x\"; u[0] = uint(x[0]);",
          "u[0] = uint('x');"),
    _body("an array of unknown length", "variable length", "float x[p.n]; x[0] = 1.0f; a[0] = x[0];",
          "float x[4]; x[0] = 1.0f; a[0] = x[0];"),
    _body("an index past the end", "past the end", "float x[2] = {1.0f, 2.0f}; a[0] = x[2];",
          "float x[2] = {1.0f, 2.0f}; a[0] = x[1];"),
    _body("a number without a value", "uninitialized", "float x; a[0] = x;", "float x = 1.0f; a[0] = x;"),
]

FUNCTIONS = [
    _body("min of int and uint", "ambiguous", "int x = 3; u[0] = min(x, u[1]);",
          "int x = 3; u[0] = min(uint(x), u[1]);"),
    _body("max of uint and a literal", "ambiguous", "u[0] = max(u[1], 0);", "u[0] = max(u[1], 0u);"),
    _body("max of float and half", "ambiguous", "a[0] = max(a[1], h[0]);", "a[0] = max(a[1], float(h[0]));"),
    _body("clamp of float by integers", "ambiguous", "a[0] = clamp(a[1], 0, 1);", "a[0] = clamp(a[1], 0.0f, 1.0f);"),
    _body("exp of an integer", "ambiguous", "int x = 2; a[0] = precise::exp(x);",
          "int x = 2; a[0] = precise::exp(float(x));"),
    _body("exp of either kind", "say precise::exp or fast::exp", "a[0] = exp(a[1]);", "a[0] = fast::exp(a[1]);"),
    _body("metal::sqrt", "say precise::sqrt or fast::sqrt", "a[0] = metal::sqrt(a[1]);",
          "a[0] = metal::precise::sqrt(a[1]);"),
    _helper("mixed types in a template that is used", "ambiguous", "template <class T> T f(T x) { return min(x, 1); }",
            "template <class T> T f(T x) { return min(x, T(1)); }", "a[0] = f(a[1]);"),
    _body("a sum of 64 bits", "ambiguous", "ulong x = 1; u[0] = uint(simd_sum(x));", "uint x = 1; u[0] = simd_sum(x);"),
    _body("a sum of bfloat over lanes", "ambiguous", "b[0] = bfloat(simd_sum(b[1]));",
          "b[0] = bfloat(simd_sum(float(b[1])));"),
    _body("a barrier for nothing", "no matching function", "threadgroup_barrier(); a[0] = 1.0f;",
          "threadgroup_barrier(mem_flags::mem_threadgroup); a[0] = 1.0f;"),
    _body("a name of C", "undeclared", "a[0] = expf(a[1]);", "a[0] = precise::exp(a[1]);"),
    _whole("a header of C++", "file not found", "#include <cmath>\n" + _KERNEL + "a[0] = std::exp(1.0f); }",
           "#include <metal_stdlib>\n" + _KERNEL + "a[0] = precise::exp(1.0f); }"),
    _body("as_type of another size", "no matching function", "u[0] = as_type<uint>(h[0]);",
          "u[0] = as_type<uint>(a[0]);"),
    _helper("a result that is forgotten", "return", "inline float f(float x) { if (x > 1.0f) return x; }",
            "inline float f(float x) { return x > 1.0f ? x : 1.0f; }", "a[0] = f(a[1]);"),
]

LANGUAGE = [
    _helper("recursion", "recursive", "inline int f(int n) { return n < 2 ? 1 : n * f(n - 1); }",
            "inline int f(int n) { return n * 2; }", "u[0] = uint(f(5));"),
    _helper("recursion by two", "recursive",
            "int g(int n); int f(int n) { return g(n); } int g(int n) { return f(n); }",
            "int g(int n) { return n; } int f(int n) { return g(n); }", "u[0] = uint(f(5));"),
    _helper("recursion by templates", "recursive",
            "template <int N> int g(int n); template <int N> int f(int n) { return g<N>(n); }\n"
            "template <int N> int g(int n) { return f<N>(n); }",
            "template <int N> int g(int n) { return n + N; } template <int N> int f(int n) { return g<N>(n); }",
            "u[0] = uint(f<3>(5));"),
    _body("goto", "goto", "goto end; end: a[0] = 1.0f;", "a[0] = 1.0f;"),
    _body("new", "new is not Metal", "thread float* x = new float; a[0] = *x;",
          "float y = 1.0f; thread float* x = &y; a[0] = *x;"),
    _body("throw", "exceptions", "if (a[0] > 1.0f) throw 1;", "if (a[0] > 1.0f) return;"),
    _body("a lambda", "a lambda", "auto x = [](float y) { return y; }; a[0] = x(1.0f);", "auto x = 1.0f; a[0] = x;"),
    _helper("virtual", "virtual", "struct S { virtual float f() { return 1.0f; } };",
            "struct S { float f() { return 1.0f; } };", "S s; a[0] = s.f();"),
    _body("asm", "asm", "asm(\"nop\"); a[0] = 1.0f;", "a[0] = 1.0f;"),
    _body("a static local", "static local", "static float x = 1.0f; a[0] = x;", "float x = 1.0f; a[0] = x;"),
    _helper("a pointer to a function", "pointer to a function", "inline float f(float (*g)(float)) { return g(1.0f); }",
            "inline float f(float g) { return g; }", "a[0] = 1.0f;"),
    _helper("C++17", "C++17", "template <bool B> float f() { if constexpr (B) return 1.0f; return 2.0f; }",
            "template <bool B> float f() { if (B) return 1.0f; return 2.0f; }", "a[0] = f<true>();"),
    _helper("C++20", "C++20", "inline P f() { return {.n = 1u, .s = 2.0f}; }", "inline P f() { return {1u, 2.0f}; }",
            "a[0] = f().s;"),
    _body("a keyword as a name", "expected", "float device = 1.0f; a[0] = device;", "float x = 1.0f; a[0] = x;"),
    _body("a type as a name", "reserved word", "float half = 1.0f; a[0] = half;", "float x = 1.0f; a[0] = x;"),
    _body("a word of CUDA as a name", "reserved word", "float warpSize = 1.0f; a[0] = warpSize;",
          "float width = 1.0f; a[0] = width;"),
    _body("a letter that is not ASCII", "not ASCII", "a[0] = 1.0f;  // \u00b5", "a[0] = 1.0f;  // u"),
]

KERNELS = [
    _argument("no attribute", "exactly one attribute", "uint x", "uint x [[thread_position_in_grid]]"),
    _argument("two attributes", "exactly one attribute",
              "uint x [[thread_position_in_grid]] [[thread_index_in_simdgroup]]",
              "uint x [[thread_index_in_simdgroup]]"),
    _argument("an attribute twice", "used twice",
              "uint x [[thread_position_in_grid]], uint y [[thread_position_in_grid]]",
              "uint x [[thread_position_in_grid]], uint y [[threads_per_grid]]"),
    _argument("a buffer twice", "used twice", "device float* x [[buffer(0)]]", "device float* x [[buffer(1)]]"),
    _argument("a buffer too many", "from 0 to 30", "device float* x [[buffer(31)]]", "device float* x [[buffer(30)]]"),
    _argument("an unknown attribute", "msl_attribute_thread_index_in_warp", "uint x [[thread_index_in_warp]]",
              "uint x [[thread_index_in_simdgroup]]"),
    _argument("an attribute of another type", "cannot have the type", "uint3 x [[thread_index_in_simdgroup]]",
              "ushort x [[thread_index_in_simdgroup]]"),
    _argument("an index that is signed", "cannot have the type", "int x [[thread_position_in_grid]]",
              "uint x [[thread_position_in_grid]]"),
    _argument("vectors of two sizes", "same number of components",
              "uint2 x [[thread_position_in_grid]], uint3 y [[threads_per_grid]]",
              "uint2 x [[thread_position_in_grid]], uint2 y [[threads_per_grid]]"),
    _argument("a buffer in no space", "must be a device or constant", "float* x [[buffer(1)]]",
              "device float* x [[buffer(1)]]"),
    _argument("a buffer by value", "must be a device or constant", "uint x [[buffer(1)]]",
              "constant uint& x [[buffer(1)]]"),
    _argument("threadgroup memory in device memory", "must be a threadgroup", "device float* x [[threadgroup(0)]]",
              "threadgroup float* x [[threadgroup(0)]]"),
    _argument("a pointer to pointers", "pointer to pointers", "device float* device* x [[buffer(1)]]",
              "device float* x [[buffer(1)]]"),
    _whole("a result", "must return void", "kernel int k(device int* a [[buffer(0)]]) { return a[0]; }",
           "kernel void k(device int* a [[buffer(0)]]) { a[0] = 1; }"),
    _whole("a template", "is a template", "template <int N> kernel void k(device int* a [[buffer(0)]]) { a[0] = N; }",
           "template <int N> inline void f(device int* a) { a[0] = N; }\n"
           "kernel void k(device int* a [[buffer(0)]]) { f<1>(a); }"),
    _whole("a kernel that is called", "cannot be called", "kernel void k(device int* a [[buffer(0)]]) { a[0] = 1; }\n"
           "kernel void l(device int* a [[buffer(0)]]) { k(a); }",
           "inline void f(device int* a) { a[0] = 1; }\nkernel void k(device int* a [[buffer(0)]]) { f(a); }"),
    _whole("an attribute of a helper", "is no kernel", "inline void f(device int* a [[buffer(0)]]) { a[0] = 1; }",
           "inline void f(device int* a) { a[0] = 1; }"),
    _whole("a struct of vectors", "no 4-byte scalar",
           "struct S { float3 x; };\n"
           "kernel void k(constant S& s [[buffer(0)]], device float* a [[buffer(1)]]) { a[0] = s.x.x; }",
           "struct S { float x[3]; };\n"
           "kernel void k(constant S& s [[buffer(0)]], device float* a [[buffer(1)]]) { a[0] = s.x[0]; }"),
    _whole("a struct of bytes", "no 4-byte scalar",
           "struct R { bool x; };\nstruct S { R r; };\n"
           "kernel void k(constant S& s [[buffer(0)]], device uint* a [[buffer(1)]]) { a[0] = s.r.x ? 1u : 0u; }",
           "struct R { uint x; };\nstruct S { R r; };\n"
           "kernel void k(constant S& s [[buffer(0)]], device uint* a [[buffer(1)]]) { a[0] = s.r.x; }"),
    _helper("threadgroup memory of a helper", "not at the top of a kernel",
            "inline float f(float x) { threadgroup float y[4]; y[0] = x; return y[0]; }",
            "inline float f(float x) { float y[4]; y[0] = x; return y[0]; }", "a[0] = f(a[1]);"),
    _body("threadgroup memory of a block", "not at the top of a kernel",
          "if (p.n > 1) { threadgroup float x[4]; x[i] = 1.0f; }",
          "threadgroup float x[4]; if (p.n > 1) { x[i] = 1.0f; }"),
    _body("threadgroup memory with a value", "cannot be initialised", "threadgroup float x = 1.0f; a[0] = x;",
          "threadgroup float x; x = 1.0f; a[0] = x;"),
    _body("too much threadgroup memory", "32768 is the most",
          "threadgroup float x[4096]; threadgroup float y[4097]; x[i] = y[i] = 1.0f;",
          "threadgroup float x[4096]; threadgroup float y[4096]; x[i] = y[i] = 1.0f;"),
    _body("two threadgroup variables in a statement", "automatic variable",
          "threadgroup float x[4], y[4]; x[i] = y[i] = 1.0f;",
          "threadgroup float x[4]; threadgroup float y[4]; x[i] = y[i] = 1.0f;"),
]

SNIPPETS = [*ADDRESS_SPACES, *TYPES, *FUNCTIONS, *LANGUAGE, *KERNELS]
