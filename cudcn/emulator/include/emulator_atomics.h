// Atomics. One fiber runs at a time, so plain operations are atomic; the checker is told that they are meant to be.
#pragma once

namespace emulator {

// Only the first argument decides the type, so that atomicAdd(float_pointer, 1) compiles, as on the device.
template <class T>
struct Identity {
  typedef T Type;
};
template <class T>
using NotDeduced = typename Identity<T>::Type;

template <class T, class Update>
EMULATOR_UNCHECKED T update_atomically(T *address, Update update, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) {
    fail("misaligned atomic of %zu bytes at %p (%s:%d)", sizeof(T), static_cast<void *>(address), base_name(site.file),
         site.line);
  }
  check_access(address, sizeof(T), AccessKind::atomic, site);
  const T old = *address;
  *address = update(old);
  return old;
}

}  // namespace emulator

#define EMULATOR_ATOMIC(name, expression)                                                                            \
  template <class T>                                                                                                 \
  inline T name(T *address, emulator::NotDeduced<T> value, emulator::Site site = emulator::Site::here()) {           \
    return emulator::update_atomically(address, [=](T old) -> T { return expression; }, site);                       \
  }
EMULATOR_ATOMIC(atomicAdd, old + value)
EMULATOR_ATOMIC(atomicSub, old - value)
EMULATOR_ATOMIC(atomicExch, ((void)old, value))
EMULATOR_ATOMIC(atomicMin, value < old ? value : old)
EMULATOR_ATOMIC(atomicMax, old < value ? value : old)
EMULATOR_ATOMIC(atomicAnd, old & value)
EMULATOR_ATOMIC(atomicOr, old | value)
EMULATOR_ATOMIC(atomicXor, old ^ value)
#undef EMULATOR_ATOMIC

// Of vectors, from sm_90: each element is added atomically.
inline float2 atomicAdd(float2 *address, float2 value, emulator::Site site = emulator::Site::here()) {
  const auto add = [=](float2 old) { return make_float2(old.x + value.x, old.y + value.y); };
  return emulator::update_atomically(address, add, site);
}
inline float4 atomicAdd(float4 *address, float4 value, emulator::Site site = emulator::Site::here()) {
  const auto add = [=](float4 old) {
    return make_float4(old.x + value.x, old.y + value.y, old.z + value.z, old.w + value.w);
  };
  return emulator::update_atomically(address, add, site);
}

template <class T>
inline T atomicCAS(T *address, emulator::NotDeduced<T> expected, emulator::NotDeduced<T> value,
                   emulator::Site site = emulator::Site::here()) {
  return emulator::update_atomically(address, [=](T old) -> T { return old == expected ? value : old; }, site);
}
