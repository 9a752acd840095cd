// Compiles a kernel header once per instruction set and chooses among the copies at run time.
//
//   #define FK_KERNEL "cpu/coupling_kernel.h"   // no include guard; its code in namespace flowkernels::FK_TARGET
//   #include "cpu/for_each_target.h"            // outside any namespace, after every other include
//   ... FK_DISPATCH(run<float>(x, y)) ...       // calls avx512::run<float>(x, y) or avx2::run<float>(x, y) or neon::...
//
// In two builds for tests avx2 is given what other instruction sets have, so that what a kernel takes for granted of it shows on any x86:
// with -DFK_NARROW_VECTORS vectors of 16 bytes, as NEON's, with -DFK_WIDE_VECTORS of 64, as AVX-512's; the tiles of 32 registers with either.
//
// A kernel header must not instantiate function templates of the standard library: the linker would merge them with everybody
// else's copies, and the one it keeps may need an instruction set that the machine lacks.

#ifndef FK_TARGETS_DECLARED
#define FK_TARGETS_DECLARED

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "sum_order.h"

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#define FK_X86 1
#if !defined(FK_NARROW_VECTORS) && !defined(FK_WIDE_VECTORS)
#define FK_HAS_AVX512 1
#endif
#elif defined(__GNUC__) && defined(__aarch64__)
#include <arm_neon.h>
#define FK_NEON 1
#endif

#if defined(__clang__)
#pragma clang diagnostic ignored "-Wpragma-clang-attribute"  // of a region that holds nothing any more
#endif

#define FK_INLINE inline __attribute__((always_inline))
#define FK_CALL inline __attribute__((noinline))
#define FK_BODY __attribute__((always_inline))  // of a lambda: [&](int i) FK_BODY { ... }

// Lanes of a and b by their numbers, those of b counted on
#if defined(__clang__) || __GNUC__ >= 12
#define FK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a == b){__VA_ARGS__})
#endif

namespace flowkernels {

// in ascending order: a larger one runs wherever a smaller one of the same processor family does
enum class Target { none, neon, avx2, avx512 };

inline const char* target_name(Target target) {
  switch (target) {
    case Target::neon: return "neon";
    case Target::avx2: return "avx2";
    case Target::avx512: return "avx512";
    default: return "none";
  }
}

// The best instruction set that this machine has. Where it is none, no CPU kernel should be registered.
inline Target hardware_target() noexcept {
#if defined(FK_X86)
  __builtin_cpu_init();  // this may run before the constructor that would do it
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Target::none;
#if defined(FK_HAS_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return Target::avx512;
#endif
  return Target::avx2;
#elif defined(FK_NEON)
  return Target::neon;
#else
  return Target::none;
#endif
}

inline bool runs_here(Target target) noexcept {
  const Target hardware = hardware_target();
  const bool same_family = (target == Target::neon) == (hardware == Target::neon);
  return target != Target::none && target <= hardware && same_family;
}

inline Target target_named(const std::string& name) {
  for (Target target : {Target::neon, Target::avx2, Target::avx512}) {
    if (name == target_name(target) && runs_here(target)) return target;
  }
  throw std::runtime_error("FLOWKERNELS_ISA must name an instruction set that this machine has, up to " +
                           std::string(target_name(hardware_target())) + "; got " + name);
}

// The instruction set that kernels use: the machine's best, unless FLOWKERNELS_ISA names a lesser one.
inline Target best_target() {
  static const Target chosen = [] {
    const char* name = std::getenv("FLOWKERNELS_ISA");
    return name == nullptr || *name == '\0' ? hardware_target() : target_named(name);
  }();
  return chosen;
}

[[noreturn]] inline void no_target() { throw std::runtime_error("this machine has none of AVX2+FMA, AVX-512 and NEON"); }

}  // namespace flowkernels

// FK_DISPATCH_ON(target, f(x)) is an expression: the copy of f for that target, called on x.
#if defined(FK_HAS_AVX512)
#define FK_DISPATCH_ON(target, ...)                                                       \
  ([&] {                                                                                  \
    const ::flowkernels::Target fk_target = (target);                                     \
    if (fk_target == ::flowkernels::Target::avx512) return ::flowkernels::avx512::__VA_ARGS__; \
    if (fk_target == ::flowkernels::Target::avx2) return ::flowkernels::avx2::__VA_ARGS__;     \
    ::flowkernels::no_target();                                                           \
  }())
#elif defined(FK_X86)
#define FK_DISPATCH_ON(target, ...)                                                       \
  ([&] {                                                                                  \
    if ((target) == ::flowkernels::Target::avx2) return ::flowkernels::avx2::__VA_ARGS__; \
    ::flowkernels::no_target();                                                           \
  }())
#elif defined(FK_NEON)
#define FK_DISPATCH_ON(target, ...)                                                       \
  ([&] {                                                                                  \
    if ((target) == ::flowkernels::Target::neon) return ::flowkernels::neon::__VA_ARGS__; \
    ::flowkernels::no_target();                                                           \
  }())
#endif
#define FK_DISPATCH(...) FK_DISPATCH_ON(::flowkernels::best_target(), __VA_ARGS__)

#endif  // FK_TARGETS_DECLARED

#if defined(FK_X86)

#define FK_TARGET avx2
#if defined(FK_NARROW_VECTORS)
#define FK_TARGET_NARROW 1
#define FK_VECTOR_BYTES 16
#define FK_REGISTERS 32
#elif defined(FK_WIDE_VECTORS)
#define FK_TARGET_WIDE 1
#define FK_VECTOR_BYTES 64
#define FK_REGISTERS 32
#else
#define FK_TARGET_AVX2 1
#define FK_VECTOR_BYTES 32
#define FK_REGISTERS 16
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#ifndef FK_AVX2_DEFINED
#define FK_AVX2_DEFINED
#include "cpu/simd.h"
#include "cpu/simd_math.h"
#include "scale_map.h"
#include "cpu/activation.h"
#endif
#ifdef FK_KERNEL
#include FK_KERNEL
#endif
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FK_TARGET
#undef FK_TARGET_AVX2
#undef FK_TARGET_NARROW
#undef FK_TARGET_WIDE
#undef FK_VECTOR_BYTES
#undef FK_REGISTERS

#if defined(FK_HAS_AVX512)
#define FK_TARGET avx512
#define FK_TARGET_AVX512 1
#define FK_VECTOR_BYTES 64
#define FK_REGISTERS 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#ifndef FK_AVX512_DEFINED
#define FK_AVX512_DEFINED
#include "cpu/simd.h"
#include "cpu/simd_math.h"
#include "scale_map.h"
#include "cpu/activation.h"
#endif
#ifdef FK_KERNEL
#include FK_KERNEL
#endif
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FK_TARGET
#undef FK_TARGET_AVX512
#undef FK_VECTOR_BYTES
#undef FK_REGISTERS
#endif

#elif defined(FK_NEON)

#define FK_TARGET neon
#define FK_TARGET_NEON 1
#define FK_VECTOR_BYTES 16
#define FK_REGISTERS 32
#ifndef FK_NEON_DEFINED
#define FK_NEON_DEFINED
#include "cpu/simd.h"
#include "cpu/simd_math.h"
#include "scale_map.h"
#include "cpu/activation.h"
#endif
#ifdef FK_KERNEL
#include FK_KERNEL
#endif
#undef FK_TARGET
#undef FK_TARGET_NEON
#undef FK_VECTOR_BYTES
#undef FK_REGISTERS

#endif
