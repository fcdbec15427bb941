// __syncthreads, __syncwarp, shuffles, votes and reductions.
#pragma once

#define EMULATOR_SITE ::emulator::Site site = ::emulator::Site::here()

inline void __syncthreads(EMULATOR_SITE) { emulator::block_barrier(false, site); }
inline int __syncthreads_count(int predicate, EMULATOR_SITE) { return emulator::block_barrier(predicate, site); }
inline int __syncthreads_or(int predicate, EMULATOR_SITE) { return emulator::block_barrier(predicate, site) != 0; }
inline int __syncthreads_and(int predicate, EMULATOR_SITE) { return emulator::block_barrier(!predicate, site) == 0; }

namespace emulator {

inline unsigned lane_index() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize;
}

// Calls body(lane) for every lane in the mask.
template <class Body>
inline void for_each_lane(unsigned mask, Body body) {
  for (; mask; mask &= mask - 1) body(unsigned(__builtin_ctz(mask)));
}

// ---- shuffles
template <class T>
struct Shuffle : Collective {
  T value, result;
  unsigned source;
};

template <class T>
EMULATOR_UNCHECKED void execute_shuffle(Collective *const *lanes, unsigned participants) {
  for_each_lane(participants, [=](unsigned lane) {
    auto *self = static_cast<Shuffle<T> *>(lanes[lane]);
    // A lane that has returned, or is not in the mask, has nothing to give.
    if (participants >> self->source & 1) self->result = static_cast<Shuffle<T> *>(lanes[self->source])->value;
    else poison(self->result);
  });
}

template <class T>
inline T shuffle(const char *name, unsigned mask, T value, unsigned source, Site site) {
  Shuffle<T> self;
  self.name = name;
  self.site = site;
  self.mask = mask;
  self.execute = execute_shuffle<T>;
  self.value = value;
  self.source = source;
  join_collective(self);
  return self.result;
}

// ---- votes and reductions over 32-bit integers
struct Reduction : Collective {
  unsigned value, result;
  unsigned (*combine)(unsigned, unsigned);
};

EMULATOR_UNCHECKED void execute_reduction(Collective *const *lanes, unsigned participants) {
  const unsigned first = unsigned(__builtin_ctz(participants));
  unsigned total = static_cast<Reduction *>(lanes[first])->value;
  for_each_lane(participants & ~(1u << first), [&](unsigned lane) {
    auto *self = static_cast<Reduction *>(lanes[lane]);
    total = self->combine(total, self->value);
  });
  for_each_lane(participants, [=](unsigned lane) { static_cast<Reduction *>(lanes[lane])->result = total; });
}

inline unsigned reduce(const char *name, unsigned mask, unsigned value, unsigned (*combine)(unsigned, unsigned),
                       Site site) {
  Reduction self;
  self.name = name;
  self.site = site;
  self.mask = mask;
  self.execute = execute_reduction;
  self.value = value;
  self.combine = combine;
  join_collective(self);
  return self.result;
}

inline unsigned combine_or(unsigned a, unsigned b) { return a | b; }

}  // namespace emulator

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_SITE) {
  const unsigned first = emulator::lane_index() & ~unsigned(width - 1);
  return emulator::shuffle("__shfl_sync", mask, value, first | unsigned(source & (width - 1)), site);
}

template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
  const unsigned lane = emulator::lane_index();
  const bool outside = (lane & unsigned(width - 1)) < delta;
  return emulator::shuffle("__shfl_up_sync", mask, value, outside ? lane : lane - delta, site);
}

template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
  const unsigned lane = emulator::lane_index();
  const bool outside = (lane & unsigned(width - 1)) + delta >= unsigned(width);
  return emulator::shuffle("__shfl_down_sync", mask, value, outside ? lane : lane + delta, site);
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMULATOR_SITE) {
  const unsigned lane = emulator::lane_index();
  const unsigned source = lane ^ unsigned(lane_mask);
  const bool outside = source > (lane | unsigned(width - 1));
  return emulator::shuffle("__shfl_xor_sync", mask, value, outside ? lane : source, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  const unsigned vote = unsigned(predicate != 0) << emulator::lane_index();
  return emulator::reduce("__ballot_sync", mask, vote, emulator::combine_or, site);
}

inline int __any_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return emulator::reduce("__any_sync", mask, predicate != 0, emulator::combine_or, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return emulator::reduce("__all_sync", mask, predicate == 0, emulator::combine_or, site) == 0;
}

// __reduce_*_sync, for int and unsigned; these need sm_80 on a device.
#define EMULATOR_REDUCE(name, T, expression)                                               \
  inline T name(unsigned mask, T value, EMULATOR_SITE) {                                   \
    auto combine = [](unsigned a, unsigned b) -> unsigned { return expression; };          \
    return T(emulator::reduce(#name, mask, unsigned(value), combine, site));               \
  }
EMULATOR_REDUCE(__reduce_add_sync, int, a + b)
EMULATOR_REDUCE(__reduce_add_sync, unsigned, a + b)
EMULATOR_REDUCE(__reduce_min_sync, int, int(a) < int(b) ? a : b)
EMULATOR_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
EMULATOR_REDUCE(__reduce_max_sync, int, int(a) > int(b) ? a : b)
EMULATOR_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
EMULATOR_REDUCE(__reduce_and_sync, unsigned, a & b)
EMULATOR_REDUCE(__reduce_or_sync, unsigned, a | b)
EMULATOR_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef EMULATOR_REDUCE

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_SITE) {
  emulator::Collective self{"__syncwarp", site, mask, nullptr, true};
  emulator::join_collective(self);
}
