// cp.async. kernels_cu/cp_async.cuh has the same functions as PTX.
#pragma once

namespace emulator {
// `source_size` bytes are copied and the rest of `size` is zero. The bytes land at the wait; until then the destination
// is poison, so that a missing wait shows.
EMULATOR_API void start_async_copy(void *destination, const void *source, int size, int source_size, Site site);
EMULATOR_API void commit_async_copies();
EMULATOR_API void wait_async_copies(int groups_left_in_flight);
}  // namespace emulator

template <int N>
inline void cp_async(void *destination, const void *source, bool predicate = true, EMULATOR_SITE) {
  static_assert(N == 4 || N == 8 || N == 16, "cp.async copies 4, 8 or 16 bytes");
  emulator::start_async_copy(destination, source, N, predicate ? N : 0, site);
}

inline void cp_async_commit() { emulator::commit_async_copies(); }

template <int N>
inline void cp_async_wait() {
  emulator::wait_async_copies(N);
}
