// The checking build: every access of a kernel is looked up here, for bounds, read-only arguments, data races and
// shared memory that nobody has written. checker_hooks.cpp says how the accesses come here.
//
// Two accesses race if they touch the same byte, at least one writes, not both are atomic, and no barrier orders them:
// in one block a __syncthreads() between them, in one warp also a __syncwarp(). Nothing orders two blocks of a launch.
#include "runtime.h"

#include <dlfcn.h>
#include <link.h>

namespace emulator {

struct Access {
  uint32_t block;  // counted from 1 in each launch; 0: none yet
  uint32_t block_barriers, warp_barriers;
  uint32_t location;
  uint16_t thread;
  AccessKind kind;
};

// What is remembered of one byte. Two readers are enough to find a later write by any thread but the reader itself.
struct Byte {
  Access last_write, first_read, other_read;
};

struct Shadow {
  const Buffer *buffer;
  uintptr_t low, high;
  Byte *bytes;
};

static std::vector<Shadow> shadows;  // one for each buffer, in the same order
static size_t last_shadow;
static uint32_t block_number, block_barriers, warp_barriers[MAX_WARPS];
static bool checking;

// ---- source locations in 32 bits: an offset in the kernel's library, or the index of a Site
constexpr uint32_t IS_SITE = 1u << 31;
static std::vector<Site> sites;
static uintptr_t kernel_base;

static uint32_t location_of(uintptr_t program_counter) { return uint32_t(program_counter - kernel_base); }

static uint32_t location_of(Site site) {
  for (size_t i = 0; i < sites.size(); i++) {
    if (sites[i].file == site.file && sites[i].line == site.line) return IS_SITE | uint32_t(i);
  }
  sites.push_back(site);
  return IS_SITE | uint32_t(sites.size() - 1);
}

static std::string describe(uint32_t location) {
  if (!(location & IS_SITE)) return kernel_location(kernel_base + location);
  const Site site = sites[location & ~IS_SITE];
  return std::string(" (") + base_name(site.file) + ":" + std::to_string(site.line) + ")";
}

// ---- the libraries' own data: constants and the emulator's variables are nobody's buffer
struct Range {
  uintptr_t low, high;
};
static Range own_data[2];  // of the kernel's library and of the runtime

static int find_library(dl_phdr_info *info, size_t, void *) {
  Range range = {~uintptr_t(0), 0};
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto &segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    const uintptr_t low = info->dlpi_addr + segment.p_vaddr;
    range.low = std::min(range.low, low);
    range.high = std::max(range.high, low + segment.p_memsz);
  }
  const uintptr_t members[2] = {reinterpret_cast<uintptr_t>(kernel_body), reinterpret_cast<uintptr_t>(&own_data)};
  for (int i = 0; i < 2; i++) {
    if (members[i] >= range.low && members[i] < range.high) own_data[i] = range;
  }
  return 0;
}

static bool is_own_data(uintptr_t address) {
  for (const Range &range : own_data) {
    if (address >= range.low && address < range.high) return true;
  }
  return false;
}

// ---- events
void checker_start_launch() {
  shadows.clear();
  sites.clear();
  last_shadow = 0;
  block_number = block_barriers = 0;
  dl_iterate_phdr(find_library, nullptr);
  Dl_info kernel;
  dladdr(reinterpret_cast<void *>(kernel_body), &kernel);
  kernel_base = reinterpret_cast<uintptr_t>(kernel.dli_fbase);
  checking = true;
}

void checker_start_block() {
  block_number++;
  block_barriers = 0;
  memset(warp_barriers, 0, sizeof warp_barriers);
}

void checker_block_barrier() { block_barriers++; }
void checker_warp_barrier(int warp) { warp_barriers[warp]++; }

void checker_end_launch() {
  checking = false;
  for (Shadow &shadow : shadows) free(shadow.bytes);
  shadows.clear();
}

// ---- lookup
// The shadow is allocated zeroed, which costs nothing where a kernel never goes.
static void add_missing_shadows() {
  for (size_t i = shadows.size(); i < buffers.size(); i++) {
    const Buffer &buffer = buffers[i];
    auto *bytes = static_cast<Byte *>(calloc(buffer.size, sizeof(Byte)));
    if (!bytes && buffer.size) fail("no memory to check %s of %zu bytes", buffer.name.c_str(), buffer.size);
    shadows.push_back({nullptr, buffer.low(), buffer.high(), bytes});
  }
  for (size_t i = 0; i < buffers.size(); i++) shadows[i].buffer = &buffers[i];  // they move when the vector grows
}

static Shadow *find_shadow(uintptr_t address) {
  if (shadows.size() != buffers.size()) add_missing_shadows();
  const auto contains = [=](const Shadow &shadow) { return address >= shadow.low && address < shadow.high; };
  if (last_shadow < shadows.size() && contains(shadows[last_shadow])) return &shadows[last_shadow];
  for (size_t i = 0; i < shadows.size(); i++) {
    if (!contains(shadows[i])) continue;
    last_shadow = i;
    return &shadows[i];
  }
  return nullptr;
}

static const char *name_of(AccessKind kind) {
  switch (kind) {
    case AccessKind::read: return "read";
    case AccessKind::write: return "write";
    case AccessKind::atomic: return "atomic";
    default: return "cp.async";
  }
}

[[noreturn]] static void fail_out_of_bounds(uintptr_t address, size_t size, const Access &access) {
  const std::string location = describe(access.location);
  for (const Buffer &buffer : buffers) {
    if (!guards(buffer, address)) continue;
    fail("out-of-bounds %s of %zu bytes in %s (%zu bytes) at byte %ld%s", name_of(access.kind), size,
         buffer.name.c_str(), buffer.size, long(address - buffer.low()), location.c_str());
  }
  fail("out-of-bounds %s of %zu bytes at %p, outside every buffer%s", name_of(access.kind), size,
       reinterpret_cast<void *>(address), location.c_str());
}

// ---- the checks
static bool is_unordered(const Access &earlier, const Access &now, bool shared) {
  if (!earlier.block) return false;
  if (earlier.block != now.block) return !shared;
  if (earlier.block_barriers != now.block_barriers || earlier.thread == now.thread) return false;
  const bool same_warp = earlier.thread / 32 == now.thread / 32;
  return !(same_warp && earlier.warp_barriers != now.warp_barriers);
}

static const Access *find_race(const Byte &byte, const Access &now, bool shared) {
  const bool both_atomic = now.kind == AccessKind::atomic && byte.last_write.kind == AccessKind::atomic;
  if (!both_atomic && is_unordered(byte.last_write, now, shared)) return &byte.last_write;
  if (now.kind == AccessKind::read) return nullptr;
  if (is_unordered(byte.first_read, now, shared)) return &byte.first_read;
  if (is_unordered(byte.other_read, now, shared)) return &byte.other_read;
  return nullptr;
}

static void remember(Byte &byte, const Access &now) {
  Access &first = byte.first_read;
  if (now.kind != AccessKind::read) {
    byte.last_write = now;
  } else if (first.block != now.block || first.block_barriers != now.block_barriers) {
    first = now;
    byte.other_read = Access{};
  } else if (first.thread == now.thread) {
    first = now;
  } else {
    byte.other_read = now;
  }
}

static void check_byte(const Shadow &shadow, size_t offset, const Access &now) {
  Byte &byte = shadow.bytes[offset];
  const Buffer &buffer = *shadow.buffer;
  const Access &written = byte.last_write;
  if (const Access *earlier = find_race(byte, now, buffer.shared)) {
    fail("race on %s at byte %zu: %s by this thread%s and %s by thread %d of %s%s, with no barrier between",
         buffer.name.c_str(), offset, name_of(now.kind), describe(now.location).c_str(), name_of(earlier->kind),
         earlier->thread, earlier->block == now.block ? "the same block" : "another block",
         describe(earlier->location).c_str());
  }
  if (buffer.shared && now.kind == AccessKind::read) {
    if (written.block != now.block) {
      fail("read of uninitialised %s at byte %zu%s: no thread has written it yet", buffer.name.c_str(), offset,
           describe(now.location).c_str());
    }
    if (written.kind == AccessKind::async_copy) {
      fail("read of %s at byte %zu%s while a cp.async to it%s is in flight", buffer.name.c_str(), offset,
           describe(now.location).c_str(), describe(written.location).c_str());
    }
  }
  remember(byte, now);
}

static void check(int thread, uintptr_t address, size_t size, AccessKind kind, uint32_t location) {
  const Access now = {block_number, block_barriers, warp_barriers[thread / 32], location, uint16_t(thread), kind};
  const Shadow *shadow = find_shadow(address);
  if (!shadow) {
    if (is_own_data(address)) return;
    fail_out_of_bounds(address, size, now);
  }
  if (address + size > shadow->high) fail_out_of_bounds(address, size, now);
  if (kind != AccessKind::read && !shadow->buffer->writable) {
    fail("%s to read-only %s at byte %zu%s", name_of(kind), shadow->buffer->name.c_str(), size_t(address - shadow->low),
         describe(location).c_str());
  }
  for (size_t i = 0; i < size; i++) check_byte(*shadow, size_t(address - shadow->low) + i, now);
}

// ---- entrances
void check_access(int lane, const void *address, size_t size, AccessKind kind, Site site) {
  const int thread = block.current / 32 * 32 + lane;
  if (checking) check(thread, reinterpret_cast<uintptr_t>(address), size, kind, location_of(site));
}

void check_access(const void *address, size_t size, AccessKind kind, Site site) {
  check_access(block.current % 32, address, size, kind, site);
}

void check_instrumented_access(uintptr_t address, size_t size, bool is_write, bool is_aligned,
                               uintptr_t return_address) {
  if (!checking || is_on_stack(address)) return;
  const AccessKind kind = is_write ? AccessKind::write : AccessKind::read;
  const uint32_t location = location_of(return_address - 1);  // inside the instruction that made the access
  if (is_aligned && address % size) {
    fail("misaligned %s of %zu bytes at %p%s", name_of(kind), size, reinterpret_cast<void *>(address),
         describe(location).c_str());
  }
  check(block.current, address, size, kind, location);
}

}  // namespace emulator
