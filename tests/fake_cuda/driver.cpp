// The CUDA driver's functions that CuPy calls: modules, kernels and launches. A launch's work is Python's (launch.py).
#include "device.h"

#include <elf.h>

#include <cstring>
#include <map>
#include <memory>
#include <string>

using Result = int;
constexpr Result SUCCESS = 0, INVALID_VALUE = 1, NO_DEVICE = 100, INVALID_HANDLE = 400, NOT_FOUND = 500;

// What Python gets to run a launch; launch.py has the same structure.
struct Launch {
  const char *kernel;  // its mangled name
  unsigned grid[3], block[3], shared;
  int device;
  int count;  // of parameters
  const size_t *sizes;
  const unsigned char *const *values;
};

namespace {

constexpr unsigned PLAIN_SHARED_MEMORY = 48 << 10;  // more must be asked for

struct Parameter {
  size_t offset, size;
};

struct Module {
  std::string image;
};

struct Function {
  std::string name;
  std::vector<size_t> sizes;
  unsigned most_shared = PLAIN_SHARED_MEMORY;
};

void (*run_launch)(const Launch *);

template <class T>
T read(const std::string &image, size_t at) {
  T value;
  memcpy(&value, image.data() + at, sizeof value);
  return value;
}

size_t size_of_image(const void *data) {
  const auto *header = static_cast<const Elf64_Ehdr *>(data);
  const size_t sections = header->e_shoff + size_t(header->e_shentsize) * header->e_shnum;
  const size_t segments = header->e_phoff + size_t(header->e_phentsize) * header->e_phnum;
  return std::max(sections, segments);
}

// A section's contents; false if the cubin has none of that name.
bool find_section(const std::string &image, const std::string &name, std::string &contents) {
  const auto header = read<Elf64_Ehdr>(image, 0);
  const auto section = [&](size_t i) { return read<Elf64_Shdr>(image, header.e_shoff + i * header.e_shentsize); };
  const size_t names = section(header.e_shstrndx).sh_offset;
  for (size_t i = 0; i < header.e_shnum; i++) {
    const Elf64_Shdr found = section(i);
    if (name != image.c_str() + names + found.sh_name) continue;
    contents = image.substr(found.sh_offset, found.sh_size);
    return true;
  }
  return false;
}

// The sizes of a kernel's parameters, from its section .nv.info.NAME: entries of a format (byte), an attribute (byte)
// and two bytes of value, which for the format SIZED are the size of what follows.
std::vector<size_t> parameter_sizes(const std::string &info) {
  constexpr unsigned char SIZED = 4, KERNEL_PARAMETER = 0x17;
  std::map<unsigned, size_t> sizes;
  for (size_t at = 0; at + 4 <= info.size();) {
    const auto format = read<unsigned char>(info, at), attribute = read<unsigned char>(info, at + 1);
    const size_t data = at + 4, size = format == SIZED ? read<uint16_t>(info, at + 2) : 0;
    if (format == SIZED && attribute == KERNEL_PARAMETER)  // index (4), ordinal (2), offset (2), 18 bits, size (14 bits)
      sizes[read<uint16_t>(info, data + 4)] = read<uint32_t>(info, data + 8) >> 18;
    at = data + size;
  }
  std::vector<size_t> in_order;
  for (const auto &[ordinal, size] : sizes) in_order.push_back(size);
  return in_order;
}

// A launch that has been given to a stream, with its parameters' values.
struct Pending {
  Function *function;
  Launch launch;
  std::vector<std::string> values;

  void run() const {
    std::vector<const unsigned char *> addresses;
    for (const std::string &value : values) addresses.push_back(reinterpret_cast<const unsigned char *>(value.data()));
    Launch now = launch;
    now.values = addresses.data();
    if (run_launch) run_launch(&now);
  }
};

}  // namespace

extern "C" {

void fake_run_launches_by(void (*run)(const Launch *)) { run_launch = run; }

Result cuGetErrorName(int, const char **name) {
  *name = "CUDA_ERROR";
  return SUCCESS;
}

Result cuGetErrorString(int error, const char **text) {
  static thread_local std::string message;
  message = "error " + std::to_string(error) + " of the fake CUDA driver";
  *text = message.c_str();
  return SUCCESS;
}

// Only those ask who bring a CUDA runtime of their own, and that has no device.
Result cuInit(unsigned) { return NO_DEVICE; }

Result cuDriverGetVersion(int *version) {
  *version = 13000;
  return SUCCESS;
}

Result cuCtxGetCurrent(void **context) {
  *context = reinterpret_cast<void *>(uintptr_t(fake::current_device() + 1));
  return SUCCESS;
}

Result cuCtxGetDevice(int *device) {
  *device = fake::current_device();
  return SUCCESS;
}

Result cuModuleLoadData(void **module, const void *image) {
  NOTE();
  *module = new Module{std::string(static_cast<const char *>(image), size_of_image(image))};
  return SUCCESS;
}

Result cuModuleUnload(void *module) {
  delete static_cast<Module *>(module);
  return SUCCESS;
}

Result cuModuleGetFunction(void **function, void *module, const char *name) {
  std::string info;
  if (!find_section(static_cast<Module *>(module)->image, std::string(".nv.info.") + name, info)) return NOT_FOUND;
  *function = new Function{name, parameter_sizes(info)};  // never deleted: work may be pending
  return SUCCESS;
}

Result cuFuncGetAttribute(int *value, int, void *) {
  *value = 0;
  return SUCCESS;
}

Result cuFuncSetAttribute(void *function, int attribute, int value) {
  constexpr int MAX_DYNAMIC_SHARED_SIZE_BYTES = 8, MOST = 227 << 10;
  if (attribute != MAX_DYNAMIC_SHARED_SIZE_BYTES) return SUCCESS;
  if (value < 0 || value > MOST) return INVALID_VALUE;
  static_cast<Function *>(function)->most_shared = unsigned(value);
  return SUCCESS;
}

Result cuLaunchKernel(void *handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                      unsigned block_y, unsigned block_z, unsigned shared, void *stream_handle, void **parameters,
                      void **) {
  fake::note("cuLaunchKernel", stream_handle);
  fake::Stream *stream = fake::find_stream(stream_handle);
  if (!stream || fake::device_of(stream) != fake::current_device()) return INVALID_HANDLE;
  auto *function = static_cast<Function *>(handle);
  const uint64_t threads = uint64_t(block_x) * block_y * block_z;
  if (!grid_x || !grid_y || !grid_z || grid_x > INT32_MAX || grid_y > UINT16_MAX || grid_z > UINT16_MAX ||
      threads < 1 || threads > 1024 || block_z > 64 || shared > function->most_shared)
    return INVALID_VALUE;
  const std::vector<size_t> &sizes = function->sizes;
  Launch launch{function->name.c_str(), {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared,
                fake::current_device(), int(sizes.size()), sizes.data(), nullptr};
  Pending pending{function, launch, {}};
  for (size_t i = 0; i < sizes.size(); i++)
    pending.values.emplace_back(static_cast<const char *>(parameters[i]), sizes[i]);
  fake::enqueue(stream, [pending = std::move(pending)] { pending.run(); });
  return SUCCESS;
}

}  // extern "C"
