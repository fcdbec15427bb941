// Memory for arguments and shared arrays. Every buffer ends at a guard page, after up to 15 bytes that keep its
// alignment, and has a guard page below; what lies between buffer and guards is filled with a canary.
#include "runtime.h"

#include <sys/mman.h>

namespace emulator {

constexpr size_t PAGE_SIZE = 4096;
constexpr size_t GUARD_SIZE = 1 << 20;  // addresses cost nothing, and an index is often wrong by a whole row or plane
constexpr size_t POOL_LIMIT = 64 << 20;
constexpr size_t POOL_COUNT = 1024;  // each is three mappings, of which a process has 65530
constexpr size_t SHARED_LIMIT = 227 * 1024;        // of a block on sm_90 and later
constexpr size_t STATIC_SHARED_LIMIT = 48 * 1024;  // ptxas refuses more

std::vector<Buffer> buffers;
uint64_t current_block;
unsigned char *dynamic_shared_memory;

// ---- mappings, kept from launch to launch
struct Mapping {
  unsigned char *pages;
  size_t capacity;
};
static std::vector<Mapping> pool;
static size_t pool_size;

static unsigned char *map_pages(size_t capacity) {
  for (size_t i = pool.size(); i-- > 0;) {
    if (pool[i].capacity != capacity) continue;
    unsigned char *pages = pool[i].pages;
    pool.erase(pool.begin() + long(i));
    pool_size -= capacity;
    return pages;
  }
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void *mapped = mmap(nullptr, capacity + 2 * GUARD_SIZE, PROT_NONE, flags, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  unsigned char *pages = static_cast<unsigned char *>(mapped) + GUARD_SIZE;
  mprotect(pages, capacity, PROT_READ | PROT_WRITE);
  return pages;
}

static void unmap_pages(unsigned char *pages, size_t capacity) {
  if (pool_size + capacity <= POOL_LIMIT && pool.size() < POOL_COUNT) {
    pool.push_back({pages, capacity});
    pool_size += capacity;
  } else {
    munmap(pages - GUARD_SIZE, capacity + 2 * GUARD_SIZE);
  }
}

// ---- canaries
// A signalling NaN of float and bfloat16, so that `element += 1` changes it, and a NaN of half.
constexpr unsigned char CANARY[2] = {0xA5, 0xFF};

static unsigned char canary_at(const unsigned char *address) {
  return CANARY[reinterpret_cast<uintptr_t>(address) % 2];
}

static void fill_canary(unsigned char *begin, unsigned char *end) {
  for (unsigned char *byte = begin; byte < end; byte++) *byte = canary_at(byte);
}

static void check_canaries(const Buffer &buffer) {
  for (unsigned char *byte = buffer.begin - 1; byte >= buffer.pages; byte--) {
    if (*byte == canary_at(byte)) continue;
    return report_afterwards("out-of-bounds write to %s (%zu bytes), %zu bytes before its start", buffer.name.c_str(),
                             buffer.size, size_t(buffer.begin - byte));
  }
  for (unsigned char *byte = buffer.begin + buffer.size; byte < buffer.pages + buffer.capacity; byte++) {
    if (*byte == canary_at(byte)) continue;
    return report_afterwards("out-of-bounds write to %s (%zu bytes) at byte %zu", buffer.name.c_str(), buffer.size,
                             size_t(byte - buffer.begin));
  }
}

void check_canaries(bool shared) {
  for (const Buffer &buffer : buffers) {
    if (buffer.shared == shared && !launch_failed) check_canaries(buffer);
  }
}

// ---- buffers
static size_t round_up(size_t size, size_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// The buffer's first byte keeps `alignment` modulo 16, so that a misaligned vector load stays one.
Buffer &add_buffer(std::string name, size_t size, uintptr_t alignment) {
  const size_t slack = -(size + alignment) % 16;
  const size_t capacity = round_up(size + slack, PAGE_SIZE);
  unsigned char *pages = map_pages(capacity);
  if (!pages) fail("no memory for %s of %zu bytes", name.c_str(), size);
  unsigned char *begin = pages + capacity - slack - size;
  fill_canary(pages, begin);
  fill_canary(begin + size, pages + capacity);
  buffers.push_back({std::move(name), pages, capacity, begin, size, false, true, nullptr});
  return buffers.back();
}

void make_read_only(Buffer &buffer) {
  mprotect(buffer.pages, buffer.capacity, PROT_READ);
  buffer.writable = false;
}

void release_buffers() {
  for (Buffer &buffer : buffers) {
    if (!buffer.writable) mprotect(buffer.pages, buffer.capacity, PROT_READ | PROT_WRITE);
    unmap_pages(buffer.pages, buffer.capacity);
  }
  buffers.clear();
}

bool guards(const Buffer &buffer, uintptr_t address) {
  const uintptr_t pages = reinterpret_cast<uintptr_t>(buffer.pages);
  return address >= pages - GUARD_SIZE && address < pages + buffer.capacity + GUARD_SIZE;
}

// ---- shared memory
static size_t static_shared_size;

void prepare_dynamic_shared_memory() {
  dynamic_shared_memory = nullptr;
  if (!launch_config->dynamic_shared) return;
  Buffer &buffer = add_buffer("dynamic shared memory", launch_config->dynamic_shared, 0);
  buffer.shared = true;
  dynamic_shared_memory = buffer.begin;
}

void start_block_memory() {
  current_block++;
  static_shared_size = 0;
  if (dynamic_shared_memory) memset(dynamic_shared_memory, POISON, launch_config->dynamic_shared);
}

static unsigned char *find_shared_array(const SharedArray &array) {
  for (const Buffer &buffer : buffers) {
    if (buffer.array == &array) return buffer.begin;
  }
  return nullptr;
}

static void check_shared_size() {
  const size_t total = static_shared_size + launch_config->dynamic_shared;
  if (static_shared_size > STATIC_SHARED_LIMIT) {
    fail("%zu bytes of static shared memory, at most %zu", static_shared_size, STATIC_SHARED_LIMIT);
  }
  if (total > SHARED_LIMIT) fail("%zu bytes of shared memory in a block, at most %zu", total, SHARED_LIMIT);
}

// A block's first thread to reach the declaration of a shared array finds it poisoned.
void *prepare_shared_array(SharedArray &array, const char *name, size_t size) {
  static_shared_size += round_up(size, 16);
  check_shared_size();
  unsigned char *data = find_shared_array(array);
  if (!data) {
    Buffer &buffer = add_buffer(std::string("shared array '") + name + "'", size, 0);
    buffer.shared = true;
    buffer.array = &array;
    data = buffer.begin;
  }
  memset(data, POISON, size);
  array = {data, current_block};
  return data;
}

bool is_shared_memory(const void *address, size_t size) {
  const uintptr_t low = reinterpret_cast<uintptr_t>(address);
  for (const Buffer &buffer : buffers) {
    if (buffer.shared && low >= buffer.low() && low + size <= buffer.high()) return true;
  }
  return false;
}

}  // namespace emulator
