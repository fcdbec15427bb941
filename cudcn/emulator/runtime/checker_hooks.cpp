// g++ -fsanitize=thread puts a call of __tsan_* before every access to memory, and -fsanitize=undefined a call of
// __ubsan_* where something undefined happens. We define these functions ourselves, in place of libtsan and libubsan.
#include "runtime.h"

namespace emulator {
void check_instrumented_access(uintptr_t address, size_t size, bool is_write, bool is_aligned,
                               uintptr_t return_address);
}

extern "C" {

#define RETURN_ADDRESS reinterpret_cast<uintptr_t>(__builtin_return_address(0))
#define TSAN_ACCESS(name, size, is_write, is_aligned)                                                       \
  EMULATOR_API void __tsan_##name(uintptr_t address) {                                                      \
    emulator::check_instrumented_access(address, size_t(size), is_write, is_aligned, RETURN_ADDRESS);       \
  }
TSAN_ACCESS(read1, 1, false, true)
TSAN_ACCESS(read2, 2, false, true)
TSAN_ACCESS(read4, 4, false, true)
TSAN_ACCESS(read8, 8, false, true)
TSAN_ACCESS(read16, 16, false, true)
TSAN_ACCESS(write1, 1, true, true)
TSAN_ACCESS(write2, 2, true, true)
TSAN_ACCESS(write4, 4, true, true)
TSAN_ACCESS(write8, 8, true, true)
TSAN_ACCESS(write16, 16, true, true)
TSAN_ACCESS(unaligned_read2, 2, false, false)
TSAN_ACCESS(unaligned_read4, 4, false, false)
TSAN_ACCESS(unaligned_read8, 8, false, false)
TSAN_ACCESS(unaligned_read16, 16, false, false)
TSAN_ACCESS(unaligned_write2, 2, true, false)
TSAN_ACCESS(unaligned_write4, 4, true, false)
TSAN_ACCESS(unaligned_write8, 8, true, false)
TSAN_ACCESS(unaligned_write16, 16, true, false)

EMULATOR_API void __tsan_read_range(uintptr_t address, long size) {
  emulator::check_instrumented_access(address, size_t(size), false, false, RETURN_ADDRESS);
}
EMULATOR_API void __tsan_write_range(uintptr_t address, long size) {
  emulator::check_instrumented_access(address, size_t(size), true, false, RETURN_ADDRESS);
}
EMULATOR_API void __tsan_init() {}
EMULATOR_API void __tsan_func_entry(uintptr_t return_address) { emulator::counter_call(return_address); }
EMULATOR_API void __tsan_func_exit() { emulator::counter_return(); }
EMULATOR_API void __tsan_vptr_update(void **, void *) {}
EMULATOR_API void __tsan_vptr_read(void **) {}

// Every report begins with the place in the source.
struct UbsanLocation {
  const char *file;
  uint32_t line, column;
};

[[noreturn]] static void fail_undefined(const UbsanLocation *location, const char *what) {
  emulator::fail("undefined behaviour: %s (%s:%u)", what, emulator::base_name(location->file), location->line);
}

#define UBSAN_HANDLER(name, what) \
  EMULATOR_API void __ubsan_handle_##name(const UbsanLocation *location) { fail_undefined(location, what); }
UBSAN_HANDLER(out_of_bounds, "index outside an array's dimension")
UBSAN_HANDLER(add_overflow, "signed integer overflow")
UBSAN_HANDLER(sub_overflow, "signed integer overflow")
UBSAN_HANDLER(mul_overflow, "signed integer overflow")
UBSAN_HANDLER(negate_overflow, "signed integer overflow")
UBSAN_HANDLER(pointer_overflow, "pointer overflow")
UBSAN_HANDLER(divrem_overflow, "integer division by zero, or its overflow")
UBSAN_HANDLER(shift_out_of_bounds, "shift by more than the type's width, or of a negative number")
UBSAN_HANDLER(float_cast_overflow, "conversion of NaN or of a number too large for the integer type")
UBSAN_HANDLER(load_invalid_value, "a bool or enum that holds no value of its type")
UBSAN_HANDLER(vla_bound_not_positive, "array of no or negative length")
UBSAN_HANDLER(invalid_builtin, "__builtin_clz or __builtin_ctz of zero")
UBSAN_HANDLER(builtin_unreachable, "__builtin_unreachable() reached")
UBSAN_HANDLER(missing_return, "no return from a function that has a result")
UBSAN_HANDLER(nonnull_arg, "null pointer")

struct UbsanTypeMismatch {
  UbsanLocation location;
  const void *type;
  unsigned char log_alignment, check_kind;
};

EMULATOR_API void __ubsan_handle_type_mismatch_v1(const UbsanTypeMismatch *mismatch, uintptr_t address) {
  const uintptr_t alignment = uintptr_t(1) << mismatch->log_alignment;
  if (!address) fail_undefined(&mismatch->location, "access through a null pointer");
  if (address % alignment) fail_undefined(&mismatch->location, "misaligned access");
  fail_undefined(&mismatch->location, "access beyond an object");
}

}  // extern "C"
