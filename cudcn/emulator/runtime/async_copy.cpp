// cp.async: each thread's copies, and the groups that they were committed in.
#include "runtime.h"

namespace emulator {

const Site *async_copy_in_progress;

static void check_alignment(const char *what, const void *address, int size, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % size == 0) return;
  fail("cp.async (%s:%d): misaligned %s, not on a multiple of %d bytes", base_name(site.file), site.line, what, size);
}

void start_async_copy(void *destination, const void *source, int size, int source_size, Site site) {
  check_alignment("destination", destination, size, site);
  if (source_size) check_alignment("source", source, size, site);
  if (!is_shared_memory(destination, size)) {
    fail("cp.async (%s:%d): out-of-bounds destination, outside shared memory", base_name(site.file), site.line);
  }
  check_access(destination, size, AccessKind::async_copy, site);
  if (source_size) counter_copy(source, source_size, site);
  memset(destination, POISON, size);
  block.threads[block.current].copies.push_back({destination, source, size, source_size, site});
}

static void finish(const AsyncCopy &copy) {
  async_copy_in_progress = &copy.site;
  check_access(copy.destination, copy.size, AccessKind::write, copy.site);
  if (copy.source_size) {
    check_access(copy.source, copy.source_size, AccessKind::read, copy.site);
    memcpy(copy.destination, copy.source, copy.source_size);
  }
  memset(static_cast<unsigned char *>(copy.destination) + copy.source_size, 0, copy.size - copy.source_size);
  async_copy_in_progress = nullptr;
}

void commit_async_copies() {
  Thread &thread = block.threads[block.current];
  thread.copy_groups.push_back(thread.copies.size());
}

void wait_async_copies(int groups_left_in_flight) {
  Thread &thread = block.threads[block.current];
  const long finished_groups = long(thread.copy_groups.size()) - groups_left_in_flight;
  if (finished_groups <= 0) return;
  const size_t finished = thread.copy_groups[finished_groups - 1];
  for (size_t i = 0; i < finished; i++) finish(thread.copies[i]);
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + long(finished));
  thread.copy_groups.erase(thread.copy_groups.begin(), thread.copy_groups.begin() + finished_groups);
  for (size_t &end : thread.copy_groups) end -= finished;
}

}  // namespace emulator
