// The counting build: what the memory system of a GPU would see of a launch. Accesses and collectives come here by the
// same hooks as to the checker, and nothing is checked.
//
// The k-th time that each lane of a warp comes to one place, they are taken to come together: one instruction of the
// warp. A place is a line of the kernel with all the calls that led there. What a thread has loaded from shared
// memory a moment ago, with no store, atomic or barrier since, is in a register: this build, which optimises nothing,
// loads it anew each time it is used, and that is not counted.
#include "runtime.h"

#include <algorithm>
#include <dlfcn.h>
#include <unordered_map>
#include <unordered_set>

namespace emulator {

constexpr uint64_t LINE_BYTES = 128, SECTOR_BYTES = 32, BANKS = 32, WORD_BYTES = 4;
constexpr int MAX_FRAMES = 32;

// ---- places: a tree of calls, whose leaves are accesses and collectives
struct Frame {
  const char *file;  // null: `at` is an offset in the kernel's library, else a line
  uint64_t at;
};
struct Call {
  uint32_t caller;
  Frame frame;
};
struct Key {
  uint32_t caller;
  Frame frame;
  const char *name;  // of a leaf
  bool shared;

  bool operator==(const Key &b) const {
    return caller == b.caller && frame.file == b.frame.file && frame.at == b.frame.at && name == b.name &&
           shared == b.shared;
  }
};
struct Hash {
  size_t operator()(const Key &key) const {
    return (key.caller * 31 + key.frame.at + (key.shared ? 7 : 0)) * 0x9E3779B97F4A7C15ull +
           reinterpret_cast<size_t>(key.name);
  }
};
static std::vector<Call> calls;  // [0] is the kernel's caller
static std::unordered_map<Key, uint32_t, Hash> call_numbers, event_numbers;
static std::vector<uint32_t> stacks[MAX_THREADS];  // of each thread: the calls that it is in
static uintptr_t kernel_base;
static bool counting;  // g++ calls the hooks before and after a launch, too

static uint32_t current_call() { return stacks[block.current].empty() ? 0 : stacks[block.current].back(); }

void counter_call(uintptr_t return_address) {
  if (!counting) return;
  const Frame frame = {nullptr, return_address - 1 - kernel_base};
  const auto [found, is_new] = call_numbers.try_emplace({current_call(), frame, nullptr, false}, uint32_t(calls.size()));
  if (is_new) calls.push_back({current_call(), frame});
  stacks[block.current].push_back(found->second);
}

void counter_return() {
  if (counting) stacks[block.current].pop_back();
}

// ---- events
// counts.py has the same structure.
struct Event {
  const char *name;
  uint64_t shared, size;
  uint64_t instructions, lanes, lines, sectors, wavefronts;
  uint64_t addresses;  // a hash of all, in their order
  uint64_t frame_count;
  Frame frames[MAX_FRAMES];  // the innermost first
};
static std::vector<Event> events;

struct Instruction {  // of one warp
  uint32_t lanes;
  uintptr_t addresses[32];
};
static std::vector<std::vector<Instruction>> instructions[MAX_WARPS];  // of the running block, by event
static std::vector<uint32_t> turns[MAX_THREADS];                       // how often a thread came to each event
constexpr size_t REMEMBERED = 16;  // loads of a thread
static std::vector<uintptr_t> loaded[MAX_THREADS];
static uint64_t sectors_of_blocks;  // global ones that a block loads, each once

static uint32_t number_of_event(const char *name, bool shared, size_t size, Frame frame) {
  const Key key = {current_call(), frame, name, shared};
  const auto [found, is_new] = event_numbers.try_emplace(key, uint32_t(events.size()));
  if (is_new) {
    Event event = {name, shared, size};
    event.frames[event.frame_count++] = frame;
    for (uint32_t call = key.caller; call && event.frame_count < MAX_FRAMES; call = calls[call].caller) {
      event.frames[event.frame_count++] = calls[call].frame;
    }
    events.push_back(event);
  }
  return found->second;
}

static bool is_in_register(int thread, uintptr_t address, size_t size) {
  auto &recent = loaded[thread];
  const uintptr_t key = address * 64 + size;
  if (std::find(recent.begin(), recent.end(), key) != recent.end()) return true;
  if (recent.size() == REMEMBERED) recent.erase(recent.begin());
  recent.push_back(key);
  return false;
}

static void count(int thread, const char *name, bool shared, uintptr_t address, size_t size, Frame frame) {
  const uint32_t event = number_of_event(name, shared, size, frame);
  auto &turn = turns[thread];
  if (turn.size() <= event) turn.resize(event + 1);
  auto &of_warp = instructions[thread / 32];
  if (of_warp.size() <= event) of_warp.resize(event + 1);
  auto &all = of_warp[event];
  const uint32_t index = turn[event]++;
  if (all.size() <= index) all.resize(index + 1);
  all[index].lanes |= 1u << thread % 32;
  all[index].addresses[thread % 32] = address;
}

// ---- what an instruction costs
// Distinct units of so many bytes.
static uint64_t units(const Instruction &instruction, uint64_t size, uint64_t unit) {
  std::vector<uint64_t> found;
  for_each_lane(instruction.lanes, [&](unsigned lane) {
    const uint64_t first = instruction.addresses[lane];
    for (uint64_t u = first / unit; u <= (first + size - 1) / unit; u++) found.push_back(u);
  });
  std::sort(found.begin(), found.end());
  return uint64_t(std::unique(found.begin(), found.end()) - found.begin());
}

// A warp's accesses of 16 bytes are made by quarters, those of 8 by halves; in each, different words of one bank follow
// one another.
static uint64_t shared_wavefronts(const Instruction &instruction, uint64_t size) {
  const unsigned together = size >= 16 ? 8 : size >= 8 ? 16 : 32;
  uint64_t total = 0;
  for (unsigned first = 0; first < 32; first += together) {
    Instruction part = instruction;
    part.lanes &= uint32_t((1ull << together) - 1) << first;
    std::vector<uint64_t> words;
    for_each_lane(part.lanes, [&](unsigned lane) {
      const uint64_t begin = part.addresses[lane];
      for (uint64_t w = begin / WORD_BYTES; w <= (begin + size - 1) / WORD_BYTES; w++) words.push_back(w);
    });
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    uint64_t banks[BANKS] = {}, most = 0;
    for (const uint64_t word : words) most = std::max(most, ++banks[word % BANKS]);
    total += most;
  }
  return total;
}

void counter_end_block() {
  std::unordered_set<uint64_t> sectors;
  for (int warp = 0; warp < block.warp_count; warp++) {
    for (size_t i = 0; i < instructions[warp].size(); i++) {
      Event &event = events[i];
      for (const Instruction &instruction : instructions[warp][i]) {
        event.instructions++;
        event.lanes += uint64_t(__builtin_popcount(instruction.lanes));
        if (!event.size) continue;
        for_each_lane(instruction.lanes, [&](unsigned lane) {
          event.addresses = event.addresses * 0x9E3779B97F4A7C15ull + instruction.addresses[lane];
        });
        if (event.shared) {
          event.wavefronts += shared_wavefronts(instruction, event.size);
          continue;
        }
        event.lines += units(instruction, event.size, LINE_BYTES);
        event.sectors += units(instruction, event.size, SECTOR_BYTES);
        if (strcmp(event.name, "load") && strcmp(event.name, "copy")) continue;
        for_each_lane(instruction.lanes, [&](unsigned lane) {
          sectors.insert(instruction.addresses[lane] / SECTOR_BYTES);
        });
      }
      instructions[warp][i].clear();
    }
  }
  sectors_of_blocks += sectors.size();
  for (int thread = 0; thread < block.thread_count; thread++) {
    turns[thread].clear();
    loaded[thread].clear();
  }
}

// ---- the hooks
void checker_start_launch() {
  Dl_info kernel;
  dladdr(reinterpret_cast<void *>(kernel_body), &kernel);
  kernel_base = reinterpret_cast<uintptr_t>(kernel.dli_fbase);
  calls.assign(1, {});
  call_numbers.clear();
  event_numbers.clear();
  events.clear();
  sectors_of_blocks = 0;
  for (int thread = 0; thread < MAX_THREADS; thread++) {  // a launch that failed left something there
    stacks[thread].clear();
    turns[thread].clear();
    loaded[thread].clear();
  }
  for (auto &of_warp : instructions) of_warp.clear();
  counting = true;
}

void checker_start_block() {}
void checker_block_barrier() {}
void checker_warp_barrier(int) {}
void checker_end_launch() { counting = false; }

void counter_collective(const char *name, Site site) {
  loaded[block.current].clear();
  count(block.current, name, false, 0, 0, {site.file, uint64_t(site.line)});
}

// Null for the libraries' own data, such as constants.
static const Buffer *find_buffer(uintptr_t address) {
  static size_t last;
  const auto contains = [=](const Buffer &buffer) { return address >= buffer.low() && address < buffer.high(); };
  if (last < buffers.size() && contains(buffers[last])) return &buffers[last];
  for (last = 0; last < buffers.size(); last++) {
    if (contains(buffers[last])) return &buffers[last];
  }
  return nullptr;
}

void check_access(int lane, const void *address, size_t size, AccessKind kind, Site site) {
  if (async_copy_in_progress) return;  // it was counted when it started
  if (kind != AccessKind::read) loaded[block.current].clear();
  static const char *const names[] = {"load", "store", "atomic", "copy"};
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (const Buffer *buffer = find_buffer(at)) {
    count(block.current / 32 * 32 + lane, names[int(kind)], buffer->shared, at, size, {site.file, uint64_t(site.line)});
  }
}

void counter_copy(const void *source, size_t size, Site site) {
  check_access(block.current % 32, source, size, AccessKind::async_copy, site);
}

void check_access(const void *address, size_t size, AccessKind kind, Site site) {
  check_access(block.current % 32, address, size, kind, site);
}

void check_instrumented_access(uintptr_t address, size_t size, bool is_write, bool, uintptr_t return_address) {
  if (is_on_stack(address)) return;
  const Buffer *buffer = find_buffer(address);
  if (!buffer) return;
  if (is_write) loaded[block.current].clear();
  else if (buffer->shared && is_in_register(block.current, address, size)) return;
  count(block.current, is_write ? "store" : "load", buffer->shared, address, size,
        {nullptr, return_address - 1 - kernel_base});
}

// Of the last launch: where its events are, and how many.
extern "C" EMULATOR_API size_t cudcn_counts(const Event **first, uint64_t *block_sectors) {
  *first = events.data();
  *block_sectors = sectors_of_blocks;
  return events.size();
}

}  // namespace emulator
