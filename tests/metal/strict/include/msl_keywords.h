// Keywords and attributes. `thread` is clang's default address space, so that it is only noted.
#pragma once

#include "msl_functions.h"

#define device MSL_DEVICE
#define constant MSL_CONSTANT
#define threadgroup MSL_THREADGROUP
#define thread __attribute__((annotate("thread")))
#define kernel __attribute__((annotate("kernel")))

// check.py writes [[msl_attribute_x]] for [[x]].
#define MSL_TEXT_OF(x) #x
#define MSL_TEXT(x) MSL_TEXT_OF(x)
#define msl_attribute_buffer(n) clang::annotate("attribute:buffer:" MSL_TEXT(n))
#define msl_attribute_threadgroup(n) clang::annotate("attribute:threadgroup:" MSL_TEXT(n))
#define msl_attribute_max_total_threads_per_threadgroup(n) clang::annotate("threads:" MSL_TEXT(n))
#define MSL_NOTE(name) clang::annotate("attribute:" #name ":")
#define msl_attribute_thread_position_in_grid MSL_NOTE(thread_position_in_grid)
#define msl_attribute_thread_position_in_threadgroup MSL_NOTE(thread_position_in_threadgroup)
#define msl_attribute_threadgroup_position_in_grid MSL_NOTE(threadgroup_position_in_grid)
#define msl_attribute_threads_per_threadgroup MSL_NOTE(threads_per_threadgroup)
#define msl_attribute_threadgroups_per_grid MSL_NOTE(threadgroups_per_grid)
#define msl_attribute_threads_per_grid MSL_NOTE(threads_per_grid)
#define msl_attribute_thread_index_in_threadgroup MSL_NOTE(thread_index_in_threadgroup)
#define msl_attribute_thread_index_in_simdgroup MSL_NOTE(thread_index_in_simdgroup)
#define msl_attribute_simdgroup_index_in_threadgroup MSL_NOTE(simdgroup_index_in_threadgroup)
#define msl_attribute_simdgroups_per_threadgroup MSL_NOTE(simdgroups_per_threadgroup)
#define msl_attribute_threads_per_simdgroup MSL_NOTE(threads_per_simdgroup)

#define bool2(...) ::metal::make_vector<::bool2>(__VA_ARGS__)
#define bool3(...) ::metal::make_vector<::bool3>(__VA_ARGS__)
#define bool4(...) ::metal::make_vector<::bool4>(__VA_ARGS__)
#define char2(...) ::metal::make_vector<::char2>(__VA_ARGS__)
#define char3(...) ::metal::make_vector<::char3>(__VA_ARGS__)
#define char4(...) ::metal::make_vector<::char4>(__VA_ARGS__)
#define uchar2(...) ::metal::make_vector<::uchar2>(__VA_ARGS__)
#define uchar3(...) ::metal::make_vector<::uchar3>(__VA_ARGS__)
#define uchar4(...) ::metal::make_vector<::uchar4>(__VA_ARGS__)
#define short2(...) ::metal::make_vector<::short2>(__VA_ARGS__)
#define short3(...) ::metal::make_vector<::short3>(__VA_ARGS__)
#define short4(...) ::metal::make_vector<::short4>(__VA_ARGS__)
#define ushort2(...) ::metal::make_vector<::ushort2>(__VA_ARGS__)
#define ushort3(...) ::metal::make_vector<::ushort3>(__VA_ARGS__)
#define ushort4(...) ::metal::make_vector<::ushort4>(__VA_ARGS__)
#define int2(...) ::metal::make_vector<::int2>(__VA_ARGS__)
#define int3(...) ::metal::make_vector<::int3>(__VA_ARGS__)
#define int4(...) ::metal::make_vector<::int4>(__VA_ARGS__)
#define uint2(...) ::metal::make_vector<::uint2>(__VA_ARGS__)
#define uint3(...) ::metal::make_vector<::uint3>(__VA_ARGS__)
#define uint4(...) ::metal::make_vector<::uint4>(__VA_ARGS__)
#define half2(...) ::metal::make_vector<::half2>(__VA_ARGS__)
#define half3(...) ::metal::make_vector<::half3>(__VA_ARGS__)
#define half4(...) ::metal::make_vector<::half4>(__VA_ARGS__)
#define float2(...) ::metal::make_vector<::float2>(__VA_ARGS__)
#define float3(...) ::metal::make_vector<::float3>(__VA_ARGS__)
#define float4(...) ::metal::make_vector<::float4>(__VA_ARGS__)
