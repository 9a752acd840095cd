// What the compiled library says about itself: `flowkernels::_build_info() -> str`, one "name: value" a line.

#include <torch/csrc/stable/library.h>

#include <exception>
#include <string>

#include "cpu/for_each_target.h"

namespace flowkernels {
namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#else
  return "unknown";
#endif
}

std::string compiled_targets() {
#if defined(FK_HAS_AVX512)
  return std::string(target_name(Target::avx2)) + " " + target_name(Target::avx512);
#elif defined(FK_X86)
  return target_name(Target::avx2);
#elif defined(FK_NEON)
  return target_name(Target::neon);
#else
  return target_name(Target::none);
#endif
}

std::string used_target() {
  try {
    return target_name(best_target());
  } catch (const std::exception& error) {  // a report must not fail on a bad FLOWKERNELS_ISA
    return error.what();
  }
}

std::string build_info() {
  return "compiler: " + compiler() +                                                      //
         "\ntorch stable ABI: " + std::to_string(TORCH_TARGET_VERSION >> 56) + "." +      //
         std::to_string((TORCH_TARGET_VERSION >> 48) & 0xff) +                            //
         "\ninstruction sets compiled in: " + compiled_targets() +                        //
         "\ninstruction set of this CPU: " + target_name(hardware_target()) +             //
         "\ninstruction set used: " + used_target();
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_FRAGMENT(flowkernels, m) { m.def("_build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CompositeExplicitAutograd, m) { m.impl("_build_info", TORCH_BOX(&flowkernels::build_info)); }
