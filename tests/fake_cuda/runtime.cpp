// The CUDA runtime's functions, as far as CuPy and the tests need them.
#include "device.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>

using fake::Stream;

namespace {

constexpr int VERSION = 13000;

struct Event {
  Stream *stream = nullptr;
  uint64_t position = 0;
};

Event *event_of(cudaEvent_t event) { return reinterpret_cast<Event *>(event); }

cudaError_t copy_or_set(cudaStream_t handle, fake::Work work) {
  Stream *stream = fake::find_stream(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  fake::enqueue(stream, std::move(work));
  return cudaSuccess;
}

cudaError_t wait_for(Stream *stream, uint64_t position = UINT64_MAX) {
  if (fake::is_capturing(stream)) return cudaErrorStreamCaptureUnsupported;
  return fake::wait(stream, position) ? cudaSuccess : cudaErrorLaunchFailure;
}

bool is_host(const void *address) { return !fake::block_of(address).begin; }
bool is_pageable(const void *address) { return is_host(address) && !fake::is_pinned(address); }

bool overruns(const void *address, size_t size) {
  const fake::Block block = fake::block_of(address);
  return block.begin && reinterpret_cast<uintptr_t>(address) + size > block.begin + block.size;
}

}  // namespace

extern "C" {

// ---- errors and versions
const char *cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    default: return "cudaErrorUnknown";
  }
}

const char *cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return fake::last_failure();
  static thread_local char text[64];
  snprintf(text, sizeof text, "error %d of the fake CUDA device", error);
  return text;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaDriverGetVersion(int *version) {
  *version = VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = VERSION;
  return cudaSuccess;
}

// ---- devices
cudaError_t cudaGetDeviceCount(int *count) {
  *count = fake::DEVICES;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
  NOTE();
  *device = fake::current_device();
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  NOTE();
  return fake::set_current_device(device) ? cudaSuccess : cudaErrorInvalidDevice;
}

// An H100's, as far as they are asked for.
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= fake::DEVICES) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device) {
  if (device < 0 || device >= fake::DEVICES) return cudaErrorInvalidDevice;
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "fake CUDA device");
  properties->major = 9;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *value, int, int) {
  *value = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  NOTE();
  if (fake::is_capturing()) return cudaErrorStreamCaptureUnsupported;
  return fake::wait_for_device() ? cudaSuccess : cudaErrorLaunchFailure;
}

// ---- memory
cudaError_t cudaMalloc(void **memory, size_t size) {
  NOTE();
  *memory = fake::allocate(size);
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFree(void *memory) {
  NOTE();
  return fake::release(memory) ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaMallocAsync(void **memory, size_t size, cudaStream_t stream) {
  NOTE(stream);
  *memory = fake::allocate(size);
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}

// In the stream's order: work of other streams that has not run by then finds it gone.
cudaError_t cudaFreeAsync(void *memory, cudaStream_t stream) {
  NOTE(stream);
  const size_t size = fake::block_of(memory).size;
  if (!size) return cudaErrorInvalidValue;
  // a graph has its memory again in each launch
  const bool graphs = fake::is_capturing(fake::find_stream(stream));
  return copy_or_set(stream, [=] {
    memset(memory, 0xFF, size);
    if (!graphs) fake::end_life(memory);
  });
}

cudaError_t cudaHostAlloc(void **memory, size_t size, unsigned) {
  NOTE();
  *memory = fake::allocate_pinned(size);
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void *memory) {
  NOTE();
  fake::wait_for_device();
  return fake::release_pinned(memory) ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
  *free = *total = size_t(80) << 30;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *address) {
  NOTE();
  memset(attributes, 0, sizeof *attributes);
  const fake::Block block = fake::block_of(address);
  attributes->type = block.begin ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  attributes->device = block.begin ? block.device : -2;
  attributes->devicePointer = block.begin ? const_cast<void *>(address) : nullptr;
  return cudaSuccess;
}

// Pageable host memory is read before the call returns, and is written before it returns.
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  NOTE(stream);
  if (overruns(to, size) || overruns(from, size)) return cudaErrorInvalidValue;
  if (is_pageable(from)) {
    const auto *bytes = static_cast<const unsigned char *>(from);
    std::vector<unsigned char> staged(bytes, bytes + size);
    return copy_or_set(stream, [=, staged = std::move(staged)] { memcpy(to, staged.data(), size); });
  }
  const cudaError_t error = copy_or_set(stream, [=] { memmove(to, from, size); });
  return error == cudaSuccess && is_pageable(to) ? wait_for(fake::find_stream(stream)) : error;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind) {
  NOTE();
  if (fake::is_capturing()) return cudaErrorStreamCaptureUnsupported;
  if (overruns(to, size) || overruns(from, size)) return cudaErrorInvalidValue;
  copy_or_set(nullptr, [=] { memmove(to, from, size); });
  return wait_for(fake::find_stream(nullptr));
}

cudaError_t cudaMemsetAsync(void *memory, int value, size_t size, cudaStream_t stream) {
  NOTE(stream);
  if (is_host(memory) || overruns(memory, size)) return cudaErrorInvalidValue;
  return copy_or_set(stream, [=] { memset(memory, value, size); });
}

cudaError_t cudaMemset(void *memory, int value, size_t size) {
  NOTE();
  if (is_host(memory) || overruns(memory, size)) return cudaErrorInvalidValue;
  return copy_or_set(nullptr, [=] { memset(memory, value, size); });
}

// ---- streams
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  *stream = reinterpret_cast<cudaStream_t>(fake::new_stream(flags != cudaStreamNonBlocking));
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  Stream *stream = fake::find_stream(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  fake::destroy(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  NOTE(handle);
  Stream *stream = fake::find_stream(handle);
  return stream ? wait_for(stream) : cudaErrorInvalidResourceHandle;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  NOTE(handle);
  Stream *stream = fake::find_stream(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  return fake::reached(stream, UINT64_MAX) ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  NOTE(handle);
  const Event recorded = *event_of(event);
  if (!recorded.stream) return cudaSuccess;
  return copy_or_set(handle, [=] { fake::run_before_this(recorded.stream, recorded.position); });
}

// ---- events
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event_of(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  NOTE(handle);
  Stream *stream = fake::find_stream(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  if (fake::is_capturing(stream)) return cudaErrorStreamCaptureUnsupported;  // would be an edge of the graph
  *event_of(event) = {stream, fake::position(stream)};
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  NOTE();
  const Event recorded = *event_of(event);
  return !recorded.stream || fake::reached(recorded.stream, recorded.position) ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  NOTE();
  const Event recorded = *event_of(event);
  return recorded.stream ? wait_for(recorded.stream, recorded.position) : cudaSuccess;
}

// ---- graphs. An executable graph is the graph: nobody changes one.
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus *status) {
  NOTE(handle);
  Stream *stream = fake::find_stream(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  *status = fake::is_capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode) {
  Stream *stream = fake::find_stream(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  return fake::begin_capture(stream) ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
  Stream *stream = fake::find_stream(handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  *graph = reinterpret_cast<cudaGraph_t>(fake::end_capture(stream));
  return *graph ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new fake::Graph(*reinterpret_cast<fake::Graph *>(graph)));
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  NOTE(handle);
  for (const fake::Work &work : reinterpret_cast<fake::Graph *>(executable)->work) {
    const cudaError_t error = copy_or_set(handle, work);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<fake::Graph *>(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<fake::Graph *>(executable);
  return cudaSuccess;
}

}  // extern "C"
