// Memory is the host's. A stream is a queue; nothing runs in it until somebody waits, and then no more than must.
#include "device.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace fake {

struct Task {
  uint64_t number;  // in the order in which all streams were given work
  Work work;
};

struct Stream {
  int device;
  bool blocking;  // waits for the default stream, and the default stream for it
  std::deque<Task> tasks;
  uint64_t last = 0;  // the number of the last task that it was given
  Graph *capture = nullptr;
  bool destroyed = false;  // its work goes on
};

// Of all below. Never held while work runs: work may need the interpreter lock, whose holder may want this one.
static std::mutex state;
// One thread at a time runs work. Recursive, since Python may free memory meanwhile.
static std::recursive_mutex execution;

// ---- the calls that a test asks for
struct Call {
  const char *name;
  const void *stream;
  int device;
};
static std::atomic<bool> noting;
static std::vector<Call> calls;

void note(const char *call, const void *stream) {
  if (!noting) return;
  std::lock_guard<std::mutex> hold(state);
  calls.push_back({call, stream, current_device()});
}

extern "C" void fake_note_calls(int on) {
  std::lock_guard<std::mutex> hold(state);
  noting = on;
  calls.clear();
}

extern "C" int fake_call(size_t index, Call *call) {
  std::lock_guard<std::mutex> hold(state);
  if (index >= calls.size()) return 0;
  *call = calls[index];
  return 1;
}

// ---- devices and streams
static thread_local int device = 0;
static Stream default_streams[DEVICES] = {{0, true}, {1, true}};
static std::set<Stream *> streams = {&default_streams[0], &default_streams[1]};
static uint64_t issued;

int current_device() { return device; }

bool set_current_device(int index) {
  if (index < 0 || index >= DEVICES) return false;
  device = index;
  return true;
}

Stream *new_stream(bool blocking) {
  std::lock_guard<std::mutex> hold(state);
  return *streams.insert(new Stream{device, blocking}).first;
}

Stream *find_stream(const void *handle) {
  if (reinterpret_cast<uintptr_t>(handle) <= 1) return &default_streams[device];  // 1 is cudaStreamLegacy
  std::lock_guard<std::mutex> hold(state);
  auto found = streams.find(static_cast<Stream *>(const_cast<void *>(handle)));
  return found == streams.end() || (*found)->destroyed ? nullptr : *found;
}

void destroy(Stream *stream) {
  std::lock_guard<std::mutex> hold(state);
  stream->destroyed = true;
}

int device_of(const Stream *stream) { return stream->device; }

// ---- work
static std::string failure;   // not yet reported
static std::string reported;  // the last that was
static int depth;             // of waiting inside work
static std::vector<uint64_t> running;  // the numbers of the tasks that are, each within the one before
static void release_what_is_done();

void enqueue(Stream *stream, Work work) {
  std::lock_guard<std::mutex> hold(state);
  if (stream->capture) {
    stream->capture->work.push_back(std::move(work));
  } else {
    stream->last = ++issued;
    stream->tasks.push_back({issued, std::move(work)});
  }
}

uint64_t position(Stream *stream) {
  std::lock_guard<std::mutex> hold(state);
  return stream->last;
}

bool reached(Stream *stream, uint64_t position) {
  std::lock_guard<std::mutex> hold(state);
  return stream->tasks.empty() || stream->tasks.front().number > position;
}

static bool take(Stream *stream, uint64_t position, Task &task) {
  std::lock_guard<std::mutex> hold(state);
  if (stream->tasks.empty() || stream->tasks.front().number > position) return false;
  task = std::move(stream->tasks.front());
  stream->tasks.pop_front();
  running.push_back(task.number);  // at once: what is in no queue must not count as done
  return true;
}

static std::vector<Stream *> streams_of(int index) {
  std::lock_guard<std::mutex> hold(state);
  std::vector<Stream *> found;
  for (Stream *stream : streams)
    if (stream->device == index) found.push_back(stream);
  return found;
}

static void run(Stream *stream, uint64_t position);

// Runs a stream's next task, after what it must come after; false if there is none up to there.
static bool run_next(Stream *stream, uint64_t position) {
  Stream *first = &default_streams[stream->device];
  Task task;
  if (!take(stream, position, task)) return false;
  if (stream == first) {
    for (Stream *other : streams_of(stream->device))
      if (other->blocking && other != first) run(other, task.number);
  } else if (stream->blocking) {
    run(first, task.number);
  }
  if (failure.empty()) task.work();  // after a failure nothing runs until it is reported
  std::lock_guard<std::mutex> hold(state);
  running.pop_back();
  return true;
}

static void run(Stream *stream, uint64_t position) {
  while (run_next(stream, position)) {
  }
}

void run_before_this(Stream *stream, uint64_t position) { run(stream, position); }

static bool report() {
  release_what_is_done();
  if (failure.empty()) return true;
  reported = std::move(failure);
  failure.clear();
  return false;
}

bool wait(Stream *stream, uint64_t position) {
  if (is_capturing(stream)) return false;
  std::lock_guard<std::recursive_mutex> turn(execution);
  if (depth++ == 0) run(stream, position);
  return --depth ? true : report();
}

// The streams' work by turns, one task of each, as when a device has room for all at once.
extern "C" void fake_run_by_turns(Stream **some, size_t count) {
  std::lock_guard<std::recursive_mutex> turn(execution);
  depth++;
  for (bool more = true; more;) {
    more = false;
    for (size_t i = 0; i < count; i++) more |= run_next(some[i], UINT64_MAX);
  }
  depth--;
}

bool wait_for_device() {
  std::lock_guard<std::recursive_mutex> turn(execution);
  if (depth++ == 0)
    for (Stream *stream : streams_of(device)) run(stream, UINT64_MAX);
  return --depth ? true : report();
}

void fail(const char *message) {
  if (failure.empty()) failure = message;
}

const char *last_failure() { return reported.c_str(); }

// ---- capture
bool is_capturing(const Stream *stream) {
  std::lock_guard<std::mutex> hold(state);
  return stream->capture;
}

bool is_capturing() {
  std::lock_guard<std::mutex> hold(state);
  for (const Stream *stream : streams)
    if (stream->device == device && stream->capture) return true;
  return false;
}

bool begin_capture(Stream *stream) {
  std::lock_guard<std::mutex> hold(state);
  if (stream->capture || stream == &default_streams[stream->device]) return false;
  stream->capture = new Graph;
  return true;
}

Graph *end_capture(Stream *stream) {
  std::lock_guard<std::mutex> hold(state);
  Graph *graph = stream->capture;
  stream->capture = nullptr;
  return graph;
}

// ---- memory
constexpr unsigned char NEVER_WRITTEN = 0xFF;  // NaN in every float type
constexpr size_t ALIGNMENT = 512;

struct Memory {
  size_t size;
  int device;
  uint64_t last_user = UINT64_MAX;  // the number of the last task that may use it
};
static std::map<uintptr_t, Memory> blocks;        // by their first address
static std::map<uintptr_t, size_t> pinned;        // host memory that copies need not wait for
static std::multimap<uint64_t, void *> released;  // by the number of the last task when it was

void *allocate(size_t size) {
  void *memory = aligned_alloc(ALIGNMENT, (size + ALIGNMENT) / ALIGNMENT * ALIGNMENT);
  if (!memory) return nullptr;
  memset(memory, NEVER_WRITTEN, size);
  std::lock_guard<std::mutex> hold(state);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  blocks[begin] = {size, device};
  return memory;
}

// Memory stays mapped until nothing is pending that was given to a stream before; whether it may be used is another
// matter.
static bool retire(void *memory, bool at_once) {
  if (!memory) return true;
  {
    std::lock_guard<std::mutex> hold(state);
    auto found = blocks.find(reinterpret_cast<uintptr_t>(memory));
    if (found == blocks.end() || found->second.last_user != UINT64_MAX) return false;
    found->second.last_user = at_once ? 0 : issued;
    released.insert({issued, memory});
  }
  release_what_is_done();
  return true;
}

bool release(void *memory) { return retire(memory, false); }
void end_life(void *memory) { retire(memory, true); }

static void release_what_is_done() {
  std::lock_guard<std::mutex> hold(state);
  uint64_t pending = UINT64_MAX;
  for (uint64_t number : running) pending = std::min(pending, number);
  for (const Stream *stream : streams)
    if (!stream->tasks.empty()) pending = std::min(pending, stream->tasks.front().number);
  while (!released.empty() && released.begin()->first < pending) {
    void *memory = released.begin()->second;
    blocks.erase(reinterpret_cast<uintptr_t>(memory));
    free(memory);
    released.erase(released.begin());
  }
}

Block block_of(const void *address) {
  std::lock_guard<std::mutex> hold(state);
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  auto next = blocks.upper_bound(at);
  if (next == blocks.begin()) return {};
  const auto &[begin, memory] = *std::prev(next);
  if (at > begin + memory.size) return {};
  return {begin, memory.size, memory.device, !running.empty() && running.back() > memory.last_user};
}

void *allocate_pinned(size_t size) {
  void *memory = malloc(size);
  std::lock_guard<std::mutex> hold(state);
  pinned[reinterpret_cast<uintptr_t>(memory)] = size;
  return memory;
}

bool release_pinned(void *memory) {
  std::lock_guard<std::mutex> hold(state);
  if (!pinned.erase(reinterpret_cast<uintptr_t>(memory))) return false;
  free(memory);
  return true;
}

bool is_pinned(const void *address) {
  std::lock_guard<std::mutex> hold(state);
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  auto next = pinned.upper_bound(at);
  return next != pinned.begin() && at < std::prev(next)->first + std::prev(next)->second;
}

extern "C" void fake_block(const void *address, Block *block) { *block = block_of(address); }
extern "C" void fake_fail(const char *message) { fail(message); }

}  // namespace fake
