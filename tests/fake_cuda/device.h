// The fake device as the runtime and the driver see it. See README.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace fake {

constexpr int DEVICES = 2;

using Work = std::function<void()>;
struct Graph {
  std::vector<Work> work;
};

// CUDA's handles: a stream's is its address, 0 is the current device's default stream.
struct Stream;

// ---- the calls that a test asks for
// Notes that the calling thread made this call, for this stream where it names one.
void note(const char *call, const void *stream = nullptr);
#define NOTE(...) fake::note(__func__ __VA_OPT__(, ) __VA_ARGS__)

// ---- devices and streams
int current_device();
bool set_current_device(int device);
Stream *new_stream(bool blocking);
// Null if the handle is no stream's.
Stream *find_stream(const void *handle);
void destroy(Stream *stream);
int device_of(const Stream *stream);

// ---- work
// Puts work at the end of a stream, or into the graph that is being captured from it. It runs when somebody waits.
void enqueue(Stream *stream, Work work);
// A number that all work in the stream so far has at most.
uint64_t position(Stream *stream);
bool reached(Stream *stream, uint64_t position);
// Called by work that waits for other work, in another stream.
void run_before_this(Stream *stream, uint64_t position);
// Runs the stream up to there, or all of it; false if work has failed, or if the stream is being captured.
bool wait(Stream *stream, uint64_t position = UINT64_MAX);
bool wait_for_device();
// Says why work failed, in the message of the next call that waits.
void fail(const char *message);
const char *last_failure();

// ---- capture
bool is_capturing(const Stream *stream);
bool is_capturing();  // any stream of the current device
bool begin_capture(Stream *stream);
Graph *end_capture(Stream *stream);  // null if something ended it before

// ---- memory
struct Block {
  uintptr_t begin;
  size_t size;
  int device;
  bool released;  // as the work that is running must not find it
};
void *allocate(size_t size);
// Releases memory once all work that has been given to any stream by now is done.
bool release(void *memory);
// Called by work in whose place in its stream memory ends: whatever runs later must not use it.
void end_life(void *memory);
// The block that an address lies in; an empty one if it is not the device's.
Block block_of(const void *address);

void *allocate_pinned(size_t size);
bool release_pinned(void *memory);
bool is_pinned(const void *address);

}  // namespace fake
